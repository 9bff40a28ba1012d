"""Trust: which keys count and how many must sign, and how the next trust follows from the one before."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, PositiveInt, ValidationError, model_validator

from compression.types import Frozen
from export.bundle import BundleError
from export.bundle.envelope import canonical, first_problem, key_id, read_envelope, read_model, seal, signers

TRUST_TYPE = "application/vnd.stillhouse.trust.v1+json"


class Trust(Frozen):
    """``trust.json``: what a device, or a person who checks bundles, relies on."""

    version: PositiveInt
    """One higher with every change."""
    threshold: PositiveInt
    """How many of the keys have to sign."""
    keys: Annotated[dict[str, str], Field(min_length=1, max_length=64)]
    """Key id -> base64 of the raw public key."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, text in self.keys.items():
            raw = base64.b64decode(text, validate=True)
            if len(raw) != 32 or base64.b64encode(raw).decode() != text or hashlib.sha256(raw).hexdigest() != name:
                raise ValueError(f"key {name[:12]!r} is not the SHA-256 of a public key of 32 bytes")
        if self.threshold > len(self.keys):
            raise ValueError(f"{len(self.keys)} keys can never give {self.threshold} signatures")
        return self

    def public_keys(self) -> dict[str, Ed25519PublicKey]:
        """The keys by id."""
        return {name: Ed25519PublicKey.from_public_bytes(base64.b64decode(text)) for name, text in self.keys.items()}


def make_trust(keys: Iterable[Ed25519PublicKey], *, threshold: int, version: int = 1) -> Trust:
    """The trust in some keys.

    Raises:
        BundleError: fewer keys than the threshold, or none.
    """
    try:
        return Trust(
            version=version,
            threshold=threshold,
            keys={key_id(key): base64.b64encode(key.public_bytes_raw()).decode() for key in keys},
        )
    except ValidationError as error:
        raise BundleError(
            f"Trust {version} has {first_problem(error)}. Give more keys, or a lower threshold."
        ) from error


def dump_trust(trust: Trust) -> bytes:
    """``trust.json``."""
    return canonical(trust.model_dump(mode="json"))


def read_trust(path: Path) -> Trust:
    """The trust of a file; white space at its end, as editors leave it, does not count.

    Raises:
        BundleError: there is none, or it is not one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"Trust '{path}' has no file that can be read ({error.strerror}), expected trust.json as `stillhouse keys"
            " new` writes it. Name it with --trust."
        ) from error
    return read_model(Trust, data.rstrip(), f"Trust '{path}'")


def open_sealed(data: bytes, payload_type: str, trust: Trust, where: str) -> tuple[bytes, frozenset[str]]:
    """The payload of an envelope that enough trusted keys signed, and the ids of those keys.

    Raises:
        BundleError: the form is wrong, a signature is wrong or by a stranger, or there are too few.
    """
    envelope = read_envelope(data, payload_type, where)
    found = signers(envelope, trust.public_keys(), where)
    _enough(found, trust, where)
    return envelope.payload, found


def seal_next_trust(
    trust: Trust,
    keys: Sequence[Ed25519PrivateKey],
    *,
    add: Iterable[Ed25519PublicKey] = (),
    remove: Iterable[str] = (),
    threshold: int | None = None,
) -> bytes:
    """The envelope with the trust after this one; it is checked as a device will check it.

    Args:
        trust: The one before.
        keys: Sign it; those that neither trust knows are refused.
        add: Keys that are trusted from now on.
        remove: Ids of keys that no longer are.
        threshold: Signatures needed from now on; None: as before.

    Raises:
        BundleError: a key to remove is not there, nothing would change, or too few of the old or new keys sign.
    """
    kept = trust.public_keys()
    for name in remove:
        if kept.pop(name, None) is None:
            raise BundleError(f"Trust {trust.version} has no key {name[:12]!r}, expected one of its own. List them.")
    new = make_trust([*kept.values(), *add], threshold=threshold or trust.threshold, version=trust.version + 1)
    if (new.keys, new.threshold) == (trust.keys, trust.threshold):
        raise BundleError(f"Trust {trust.version} has all of this already, expected a change. Add or remove a key.")
    sealed = seal(dump_trust(new), TRUST_TYPE, keys)
    next_trust(trust, sealed)
    return sealed


def next_trust(trust: Trust, sealed: bytes) -> Trust:
    """The trust in an envelope, if it follows from this one.

    Raises:
        BundleError: another version than one higher, a stranger's or a wrong signature, or too few by the keys of
            either trust.
    """
    where = f"Trust after {trust.version}"
    envelope = read_envelope(sealed, TRUST_TYPE, where)
    new = read_model(Trust, envelope.payload, where)
    if new.version != trust.version + 1:
        raise BundleError(
            f"{where} has version {new.version}, expected {trust.version + 1}. Apply the versions one after the other."
        )
    keys: Mapping[str, Ed25519PublicKey] = {**trust.public_keys(), **new.public_keys()}
    found = signers(envelope, keys, where)
    for each in (trust, new):
        _enough(found, each, where)
    return new


def _enough(found: frozenset[str], trust: Trust, where: str) -> None:
    count = len(found & trust.keys.keys())
    if count < trust.threshold:
        raise BundleError(
            f"{where} has {count} signatures by keys of trust {trust.version}, expected {trust.threshold}. Sign it with"
            " more of them."
        )
