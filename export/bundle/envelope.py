"""Signed JSON that has one form: canonical JSON in a DSSE envelope with Ed25519 signatures."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from compression.types import Frozen
from export.bundle import BundleError

MAX_BYTES = 1 << 20
"""Of an envelope."""

Model = TypeVar("Model", bound=Frozen)


def canonical(value: Any) -> bytes:
    """ASCII JSON with sorted keys and no white space; NaN and infinity have no form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def read_canonical(data: bytes, where: str) -> Any:
    """The value of canonical JSON.

    Raises:
        BundleError: it isn't JSON, or another spelling of it.
    """
    try:
        value = json.loads(data)
        again = canonical(value)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{where} has no JSON that can be read ({error}), expected canonical JSON. {_AGAIN}"
        ) from error
    if again != data:
        place = next(
            (at for at, (a, b) in enumerate(zip(data, again, strict=False)) if a != b), min(len(data), len(again))
        )
        raise BundleError(
            f"{where} has another spelling of its JSON at byte {place}, expected canonical JSON (sorted keys, no white"
            f" space, ASCII). {_AGAIN}"
        )
    return value


_AGAIN = "Get the file again from who made it."


def read_model(kind: type[Model], data: bytes, where: str) -> Model:
    """A strict model of canonical JSON: no field more, none less, no number as text.

    Raises:
        BundleError: it isn't one; the message names the first wrong field.
    """
    read_canonical(data, where)
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise BundleError(f"{where} has {first_problem(error)}. {_AGAIN}") from error


def first_problem(error: ValidationError) -> str:
    """The first field that is wrong, and how."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "value"
    return f"a wrong {field}: {first['msg']}"


@dataclass(frozen=True)
class Envelope:
    """An envelope whose form is right; whether its signatures are is what ``signers`` finds out."""

    payload: bytes
    payload_type: str
    signatures: dict[str, bytes]
    """By key id."""


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed (DSSE, pre-authentication encoding)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, payload_type: str, keys: Sequence[Ed25519PrivateKey]) -> bytes:
    """The envelope around a payload, signed by every key; the same arguments give the same bytes.

    Raises:
        BundleError: there is no key, or an envelope would be too long.
    """
    if not keys:
        raise BundleError("Envelope has no key to sign it, expected one or more. Name one with --key.")
    message = pae(payload_type, payload)
    sealed = _dump(Envelope(payload, payload_type, {key_id(key.public_key()): key.sign(message) for key in keys}))
    if len(sealed) > MAX_BYTES:
        raise BundleError(
            f"Envelope has {len(sealed):,} bytes, expected at most {MAX_BYTES:,}. Sign less in one piece."
        )
    return sealed


def read_envelope(data: bytes, payload_type: str, where: str) -> Envelope:
    """The envelope that the bytes are the one form of; no signature was checked.

    Raises:
        BundleError: it is too long, isn't canonical, has other fields, another type, or a key id twice.
    """
    if len(data) > MAX_BYTES:
        raise BundleError(f"{where} has {len(data):,} bytes, expected at most {MAX_BYTES:,}. {_AGAIN}")
    value = read_canonical(data, where)
    try:
        if value["payloadType"] != payload_type:
            raise BundleError(
                f"{where} has type {value['payloadType']!r}, expected '{payload_type}'. Give the right file."
            )
        rows = [(row["keyid"], base64.b64decode(row["sig"], validate=True)) for row in value["signatures"]]
        payload = base64.b64decode(value["payload"], validate=True)
        envelope = Envelope(payload, payload_type, dict(rows))
        if len(envelope.signatures) != len(rows):
            raise BundleError(f"{where} has two signatures of one key, expected one of each. {_AGAIN}")
        again = _dump(envelope)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{where} has other fields than an envelope, expected payload, payloadType and signatures. {_AGAIN}"
        ) from error
    if again != data:
        raise BundleError(f"{where} has more than an envelope, or its signatures in another order. {_AGAIN}")
    return envelope


def signers(envelope: Envelope, keys: Mapping[str, Ed25519PublicKey], where: str) -> frozenset[str]:
    """Ids of the keys that signed; every signature there is was checked.

    Raises:
        BundleError: a signature is of another key, or wrong.
    """
    message = pae(envelope.payload_type, envelope.payload)
    for name, signature in envelope.signatures.items():
        if name not in keys:
            raise BundleError(
                f"{where} has a signature of key {name[:12]!r}, expected one of"
                f" {', '.join(known[:12] for known in sorted(keys)) or 'no key at all'}. Get a file signed by a trusted"
                " key, or update the trust."
            )
        try:
            keys[name].verify(signature, message)
        except InvalidSignature as error:
            raise BundleError(
                f"{where} has a wrong signature of key {name[:12]}, expected one of exactly these bytes. {_AGAIN}"
            ) from error
    return frozenset(envelope.signatures)


def _dump(envelope: Envelope) -> bytes:
    rows = [{"keyid": name, "sig": _text(sig)} for name, sig in sorted(envelope.signatures.items())]
    return canonical({"payload": _text(envelope.payload), "payloadType": envelope.payload_type, "signatures": rows})


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
