"""Key files: a private key as encrypted PKCS#8 that only its owner can read, and the public key beside it."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from export.bundle import BundleError
from export.bundle.durable import write_durably

PRIVATE, PUBLIC = ".pem", ".pub"
VARIABLE = "STILLHOUSE_KEY_PASSPHRASE"
SHORTEST = 12
"""Characters of a passphrase: PKCS#8 as it is written here makes guessing only 2,048 times dearer."""

Ask = Callable[[Path], bytes]
"""Gives the passphrase of a key file."""


def new_key(path: Path, passphrase: bytes | None, *, unencrypted: bool = False) -> Ed25519PrivateKey:
    """A new key, its private file (mode 0600, never over another one) and its public file, ``.pub`` beside it.

    Args:
        path: Of the private file.
        passphrase: That encrypts it; None only with ``unencrypted``.
        unencrypted: Write the key in the open; for keys that live a test long.

    Raises:
        BundleError: no passphrase or a short one, or a file is there already.
    """
    if unencrypted != (passphrase is None) or (passphrase is not None and len(passphrase) < SHORTEST):
        found = "none" if passphrase is None else "one, and none is wanted" if unencrypted else "a short one"
        raise BundleError(
            f"Key '{path.name}' has a wrong passphrase ({found}), expected {SHORTEST} characters or more. Set"
            f" {VARIABLE}, or say explicitly that the key is to be kept unencrypted."
        )
    public = path.with_suffix(PUBLIC)
    if public.exists():
        raise BundleError(f"Key '{public}' has been there before, expected a new name. Choose another name.")
    key = Ed25519PrivateKey.generate()
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    write_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=0o600)
    write_durably(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key


def load_key(path: Path, ask: Ask) -> Ed25519PrivateKey:
    """The private key of a file; ``ask`` is called if it is encrypted.

    Raises:
        BundleError: there is none, others can read it, the passphrase is wrong, or it is of another kind.
    """
    data = _read_private(path)
    try:
        key = load_pem_private_key(data, ask(path) if _is_encrypted(data) else None)
    except (ValueError, TypeError) as error:
        raise BundleError(
            f"Key '{path}' has not opened ({error}), expected an Ed25519 key in PKCS#8 and its passphrase. Correct"
            f" {VARIABLE}, or name another file."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"Key '{path}' has another kind than Ed25519. Make one: stillhouse keys new NAME")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """The public key of a file.

    Raises:
        BundleError: there is none, or it is of another kind.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(
            f"Key '{path}' has no public key ({error}), expected a file that `stillhouse keys new` wrote."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"Key '{path}' has another kind than Ed25519. Make one: stillhouse keys new NAME")
    return key


def is_encrypted(path: Path) -> bool:
    """Whether a private key needs a passphrase.

    Raises:
        BundleError: there is none, or others can read it.
    """
    return _is_encrypted(_read_private(path))


def _is_encrypted(data: bytes) -> bool:
    return data.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise BundleError(
            f"Key '{path}' has no file that can be read ({error.strerror}), expected a private key. Make one:"
            " stillhouse keys new NAME"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise BundleError(
                f"Key '{path}' has mode {mode:04o}, so that others can use it, expected 0600. Make a new key if they"
                f" may have; else: chmod 600 {path}"
            )
        return file.read(1 << 16)
