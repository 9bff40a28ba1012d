"""Signed files: DSSE envelopes in one canonical form, and the keys that a device trusts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .errors import Refused

BUNDLE = "application/vnd.stillhouse.edgepkg.v1+json"
TRUST = "application/vnd.stillhouse.trust.v1+json"
SPKI = bytes.fromhex("302a300506032b6570032100")
"""What comes before the 32 bytes of an Ed25519 public key in DER (RFC 8410)."""


def canonical(value: Any) -> bytes:
    """The one JSON form of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse(data: bytes, what: str) -> Any:
    """The value of canonical JSON.

    Raises:
        Refused: it is none, or not in that form.
    """
    try:
        value = json.loads(data)
        same = canonical(value) == data
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"{what} is no JSON ({error}), expected canonical JSON.") from error
    if not same:
        raise Refused("malformed", f"{what} is not in its canonical form, expected sorted keys and no white space.")
    return value


def pae(kind: str, payload: bytes) -> bytes:
    """What is signed (DSSE v1): type and payload, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def key_id(key: bytes) -> str:
    """The name of a public key."""
    return hashlib.sha256(key).hexdigest()


def is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether an Ed25519 signature of 64 bytes is right (RFC 8032)."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return _is_signed_by_openssl(key, message, signature)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _is_signed_by_openssl(key: bytes, message: bytes, signature: bytes) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        files = {"key": SPKI + key, "message": message, "signature": signature}
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        command = "openssl pkeyutl -verify -pubin -keyform DER -inkey key -rawin -in message -sigfile signature"
        try:
            done = subprocess.run(command.split(), cwd=folder, capture_output=True, timeout=30, check=False)
        except FileNotFoundError as error:
            raise Refused(
                "no verifier", "Neither cryptography nor openssl is here, expected one. Install openssl 1.1.1 or newer."
            ) from error
    return done.returncode == 0


class Trust:
    """The keys whose signatures count, and how many of them are needed."""

    def __init__(self, value: Any) -> None:
        fields = value if isinstance(value, dict) else {}
        keys, threshold, version = fields.get("keys"), fields.get("threshold"), fields.get("version")
        if set(fields) != {"version", "threshold", "keys"} or not isinstance(keys, dict):
            raise Refused("trust", "The trust file needs version, threshold and keys, and nothing else.")
        if type(threshold) is not int or type(version) is not int or version < 1 or not 1 <= threshold <= len(keys):
            raise Refused("trust", f"The trust file asks for {threshold!r} of {len(keys)} keys, expected 1 or more.")
        self.value, self.version, self.threshold = fields, version, threshold
        self.keys = {name: _decoded(text, f"key '{name[:12]}'") for name, text in keys.items()}
        for name, key in self.keys.items():
            if len(key) != 32 or key_id(key) != name:
                raise Refused("trust", f"Key '{name[:12]}' of the trust file is not the one its name says.")

    def open(self, data: bytes, kind: str, what: str) -> Any:
        """The payload of an envelope that enough trusted keys have signed.

        Raises:
            Refused: malformed, of another type, or not signed as it must be.
        """
        payload, signatures = split(data, kind, what)
        message = pae(kind, payload)
        for name, signature in signatures.items():
            if name not in self.keys:
                raise Refused("signature", f"{what} is signed by '{name[:12]}', expected a trusted key.")
            if not is_signed(self.keys[name], message, signature):
                raise Refused("signature", f"{what} does not have the content that '{name[:12]}' has signed.")
        if len(signatures) < self.threshold:
            raise Refused("signature", f"{what} has {len(signatures)} signatures, expected {self.threshold}.")
        return parse(payload, f"{what}'s payload")

    def next(self, data: bytes) -> Trust:
        """The trust that follows, from an envelope that enough keys of both have signed.

        Raises:
            Refused: it does not follow this one.
        """
        payload, signatures = split(data, TRUST, "New trust")
        after, message = Trust(parse(payload, "New trust's payload")), pae(TRUST, payload)
        if after.version != self.version + 1:
            raise Refused("trust", f"New trust has version {after.version}, expected {self.version + 1}.")
        known = {**after.keys, **self.keys}
        wrong = [name for name, text in signatures.items() if name not in known]
        wrong += [
            name for name, text in signatures.items() if name in known and not is_signed(known[name], message, text)
        ]
        if wrong:
            raise Refused("signature", f"New trust has a wrong signature by '{wrong[0][:12]}', expected known keys.")
        for each, word in ((self, "before"), (after, "itself")):
            count = len(set(signatures) & set(each.keys))
            if count < each.threshold:
                raise Refused(
                    "signature", f"New trust has {count} signatures by the trust {word}, expected {each.threshold}."
                )
        return after


def split(data: bytes, kind: str, what: str) -> tuple[bytes, dict[str, bytes]]:
    """Payload and signatures of an envelope, not yet verified."""
    value = parse(data, what)
    if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
        raise Refused("malformed", f"{what} is no envelope, expected payload, payloadType and signatures.")
    if value["payloadType"] != kind:
        raise Refused("type", f"{what} has type '{value['payloadType']}', expected '{kind}'.")
    signatures: dict[str, bytes] = {}
    rows = value["signatures"] if isinstance(value["signatures"], list) else [None]
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"keyid", "sig"} or not isinstance(row["keyid"], str):
            raise Refused("malformed", f"{what} has a malformed signature, expected keyid and sig.")
        if signatures and row["keyid"] <= max(signatures):
            raise Refused("malformed", f"{what} has its signatures twice or out of order.")
        signatures[row["keyid"]] = _decoded(row["sig"], f"{what}'s signature")
    return _decoded(value["payload"], f"{what}'s payload"), signatures


def _decoded(text: Any, what: str) -> bytes:
    """Bytes of base64 in its one form."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise Refused("malformed", f"{what} is no base64.") from error
    if base64.b64encode(data).decode() != text:
        raise Refused("malformed", f"{what} is not in the one form of base64.")
    return data
