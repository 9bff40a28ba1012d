"""The content of a bundle: a ZIP archive that has one form, so that reading is comparing.

Members are stored, dated 1980-01-01, in the order of their paths, without comments or extra fields. Whoever knows the
path, length and bytes of each knows every byte of the archive; anything else is refused before it means something.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from export.bundle import BundleError
from export.bundle.statement import MAX_CONTENT, Content, Member

CHUNK = 1 << 20
MADE_BY, NEEDS, JANUARY_1980, MODE = 0x0314, 20, 0x21, 0o100644 << 16  # Unix, ZIP 2.0
LOCAL, CENTRAL, END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")
LOCAL_FIELDS = "signature,version,flags,compression,time,date,CRC,packed size,size,name length,extra length".split(",")
CENTRAL_FIELDS = (
    "signature,made by,version,flags,compression,time,date,CRC,packed size,size,name length,extra length,"
    "comment length,disk,internal attributes,attributes,offset"
).split(",")
END_FIELDS = "signature,disk,first disk,members here,members,size of the list,offset of the list,comment length".split(
    ","
)

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, of how many."""


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    path: Path
    offset: int
    length: int


Source = bytes | Piece


def whole(path: Path) -> Piece:
    """All bytes of a file."""
    return Piece(path, 0, path.stat().st_size)


@dataclass(frozen=True)
class Measured:
    """A member, its checksum in the archive, and where its bytes are."""

    member: Member
    crc: int
    source: Source


def measure(sources: Mapping[str, Source]) -> tuple[Measured, ...]:
    """The members in the order of the archive, each read once."""
    found = []
    for path, source in sorted(sources.items()):
        digest, crc, length = hashlib.sha256(), 0, 0
        for chunk in _chunks(source):
            digest.update(chunk)
            crc, length = zlib.crc32(chunk, crc), length + len(chunk)
        member = Member(path=path, length=length, sha256=digest.hexdigest())
        found.append(Measured(member, crc, source))
    return tuple(found)


def archive(members: Sequence[Measured]) -> Iterator[bytes]:
    """The bytes of the archive, piece by piece."""
    for each in members:
        yield _local(each.member, each.crc)
        yield from _chunks(each.source)
    yield from _directory([(each.member, each.crc) for each in members])


def archive_size(members: Sequence[Member]) -> int:
    """How long the archive of some members is."""
    per_name = sum(2 * len(each.path) for each in members)
    return sum(each.length for each in members) + per_name + len(members) * (LOCAL.size + CENTRAL.size) + END.size


def describe(members: Sequence[Measured]) -> Content:
    """Length and digest of the archive.

    Raises:
        BundleError: it would be longer than a ZIP archive without extensions can be.
    """
    size = archive_size([each.member for each in members])
    if size > MAX_CONTENT:
        raise BundleError(f"Content has {size:,} bytes, expected at most {MAX_CONTENT:,}. Leave out a target.")
    digest = hashlib.sha256()
    for chunk in archive(members):
        digest.update(chunk)
    return Content(length=size, sha256=digest.hexdigest())


def check_archive(
    file: BinaryIO, members: Sequence[Member], content: Content, where: str, on_progress: Progress | None = None
) -> dict[str, int]:
    """Offset of each member's bytes in the file, from whose position on every byte was compared.

    Raises:
        BundleError: the archive is not the one these members make; the message names the member and what differs.
    """
    if archive_size(members) != content.length:
        raise BundleError(
            f"{where} has a content of {content.length:,} bytes, its files make {archive_size(members):,}. {_AGAIN}"
        )
    start, digest, offsets, rows = file.tell(), hashlib.sha256(), {}, []
    for member in members:
        place = f"{where}, member '{member.path}'"
        header = file.read(LOCAL.size + len(member.path))
        offsets[member.path] = file.tell()
        crc, own = 0, hashlib.sha256()
        digest.update(header)
        left = member.length
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            crc = zlib.crc32(chunk, crc)
            own.update(chunk)
            digest.update(chunk)
            if on_progress is not None:
                on_progress(file.tell() - start, content.length)
        _compare(
            header, _local(member, _crc(header, crc, own.hexdigest() == member.sha256)), LOCAL, LOCAL_FIELDS, place
        )
        if left or own.hexdigest() != member.sha256:
            found = f"{left:,} bytes too few" if left else f"sha256 {own.hexdigest()[:12]}"
            raise BundleError(f"{place}, has {found}, expected sha256 {member.sha256[:12]}. {_AGAIN}")
        rows.append((member, crc))
    for number, expected in enumerate(_directory(rows)):
        found = file.read(len(expected))
        digest.update(found)
        last = number == len(rows)
        place = f"{where}, end of the archive" if last else f"{where}, list of members, '{rows[number][0].path}'"
        _compare(found, expected, END if last else CENTRAL, END_FIELDS if last else CENTRAL_FIELDS, place)
    if digest.hexdigest() != content.sha256:
        raise BundleError(
            f"{where} has a content with sha256 {digest.hexdigest()[:12]}, expected {content.sha256[:12]}. {_AGAIN}"
        )
    return offsets


_AGAIN = "Copy the file again, or get it again from who made it."


def _crc(header: bytes, found: int, is_right: bool) -> int:
    """The checksum to expect: of the bytes; where those are wrong anyway, whatever the header says."""
    if is_right or len(header) < LOCAL.size:
        return found
    return LOCAL.unpack_from(header)[6]


def _compare(found: bytes, expected: bytes, layout: struct.Struct, fields: Sequence[str], place: str) -> None:
    if found == expected:
        return
    if len(found) < len(expected):
        raise BundleError(f"{place}, has {len(found)} bytes of its header, expected {len(expected)}. {_AGAIN}")
    pairs = zip(fields, layout.unpack_from(found), layout.unpack_from(expected), strict=True)
    wrong = [f"{name} {a}, expected {b}" for name, a, b in pairs if a != b]
    name = f"name {found[layout.size :]!r}, expected {expected[layout.size :]!r}"
    raise BundleError(f"{place}, has {wrong[0] if wrong else name}. {_AGAIN}")


def _local(member: Member, crc: int) -> bytes:
    name = member.path.encode("ascii")
    sizes = (member.length, member.length)
    return LOCAL.pack(b"PK\3\4", NEEDS, 0, 0, 0, JANUARY_1980, crc, *sizes, len(name), 0) + name


def _directory(rows: Sequence[tuple[Member, int]]) -> Iterator[bytes]:
    """The list of members, one by one, and the end of the archive."""
    offset, size = 0, 0
    for member, crc in rows:
        name = member.path.encode("ascii")
        sizes = (member.length, member.length)
        head = (b"PK\1\2", MADE_BY, NEEDS, 0, 0, 0, JANUARY_1980, crc, *sizes, len(name), 0, 0, 0, 0, MODE, offset)
        yield CENTRAL.pack(*head) + name
        size += CENTRAL.size + len(name)
        offset += LOCAL.size + len(name) + member.length
    yield END.pack(b"PK\5\6", 0, 0, len(rows), len(rows), size, offset, 0)


def _chunks(source: Source) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.path.open("rb") as file:
        file.seek(source.offset)
        left = source.length
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
