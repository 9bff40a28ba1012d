"""The file: magic, envelope, content; written whole, and read only as far as it has proved right."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import BundleError
from export.bundle.content import Measured, Piece, Progress, archive, check_archive
from export.bundle.durable import durable_file
from export.bundle.envelope import MAX_BYTES, canonical, read_model, seal
from export.bundle.statement import Statement
from export.bundle.trust import Trust, open_sealed

MAGIC = b"EDGEPKG1"
HEADER = struct.Struct(">8sL")
BUNDLE_TYPE = "application/vnd.stillhouse.edgepkg.v1+json"
_AGAIN = "Copy the file again, or get it again from who made it."


@dataclass(frozen=True)
class Package:
    """A bundle of which every byte was checked."""

    path: Path
    statement: Statement
    signed_by: frozenset[str]
    """Ids of the keys."""
    offsets: Mapping[str, int]
    """Where the bytes of each member begin."""

    def piece(self, member: str) -> Piece:
        """Where the bytes of a member are.

        Raises:
            BundleError: there is no such member.
        """
        if member not in self.offsets:
            raise BundleError(
                f"Bundle '{self.path.name}' has no member '{member}'. It holds {', '.join(self.offsets)}."
            )
        return Piece(self.path, self.offsets[member], self.statement.member(member).length)

    def read(self, member: str) -> bytes:
        """The bytes of a member, checked once more.

        Raises:
            BundleError: there is no such member, or the file has changed since.
        """
        place = self.piece(member)
        with place.path.open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if hashlib.sha256(data).hexdigest() != self.statement.member(member).sha256:
            raise BundleError(f"Bundle '{self.path.name}' has changed while it was read. {_AGAIN}")
        return data


def write_package(
    path: Path, statement: Statement, members: Sequence[Measured], keys: Sequence[Ed25519PrivateKey]
) -> None:
    """Write a bundle; it appears whole or not at all, and never over another file.

    Raises:
        BundleError: the statement is about other members, one changed while it was read, or the file is there.
    """
    if statement.files != tuple(each.member for each in members):
        raise BundleError(f"Bundle '{path.name}' has a statement about other members. This is a defect of the caller.")
    payload = canonical(statement.model_dump(mode="json", by_alias=True))
    read_model(Statement, payload, f"Bundle '{path.name}', statement")
    envelope = seal(payload, BUNDLE_TYPE, keys)
    digest = hashlib.sha256()
    with durable_file(path) as file:
        file.write(HEADER.pack(MAGIC, len(envelope)) + envelope)
        for chunk in archive(members):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != statement.content.sha256:
            raise BundleError(f"Bundle '{path.name}' has members that changed while it was written. Write it again.")


def open_package(path: Path, trust: Trust, *, now: str | None = None, on_progress: Progress | None = None) -> Package:
    """The bundle in a file, after every byte was checked: form, signatures, statement, each member, the end.

    Args:
        path: The file.
        trust: Who may have signed it, and how many have to.
        now: Time as a statement writes it; a bundle that is not valid after an earlier one is refused. None: any.
        on_progress: Is told how much of the content is read.

    Raises:
        BundleError: anything is not as it must be; the message says what and where.
    """
    where = f"Bundle '{path.name}'"
    if not path.is_file():
        raise BundleError(f"{where} has no file at '{path}', expected one. Correct the path.")
    with path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(HEADER.size)
        if not head.startswith(MAGIC):
            raise BundleError(f"{where} has {head[:8]!r} at its beginning, expected {MAGIC!r}. Give a bundle.")
        if len(head) < HEADER.size:
            raise BundleError(f"{where} has {size} bytes, it was cut off. {_AGAIN}")
        length = HEADER.unpack(head)[1]
        if length > MAX_BYTES:
            raise BundleError(f"{where} has an envelope of {length:,} bytes, expected at most {MAX_BYTES:,}. {_AGAIN}")
        envelope = file.read(length)
        if len(envelope) < length:
            raise BundleError(
                f"{where} has {len(envelope):,} bytes of its envelope, expected {length:,}: cut off. {_AGAIN}"
            )
        payload, signed_by = open_sealed(envelope, BUNDLE_TYPE, trust, f"{where}, envelope")
        statement = read_model(Statement, payload, f"{where}, statement")
        if statement.not_after is not None and now is not None and now > statement.not_after:
            raise BundleError(f"{where} has been valid until {statement.not_after}, now is {now}. Issue it again.")
        expected = HEADER.size + length + statement.content.length
        if size != expected:
            word = "cut off" if size < expected else "something was appended"
            raise BundleError(f"{where} has {size:,} bytes, expected {expected:,}: {word}. {_AGAIN}")
        offsets = check_archive(file, statement.files, statement.content, where, on_progress)
    return Package(path, statement, signed_by, offsets)
