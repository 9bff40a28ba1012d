"""Archives made to break out of the slot, each in a bundle whose statement is right and signed by a trusted key."""

import io
import stat
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from tests.export.devices import made_up_bundle as made_up

Files = Mapping[str, bytes]
LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
NAMES = (
    *("../evil", "../../evil", "../../../../../../tmp/evil", "a/../../evil", "/evil", "/tmp/evil", "//evil", "./evil"),
    *("a//evil", "..", ".", "..\\evil", "C:\\evil", "C:evil", "\\\\host\\evil", "~/evil", "$HOME/evil", "`id`"),
    *("; rm -rf x", "| sh", "-rf", "evil\n", "ev il", "évil", "\u202elive", "ｅvil", "e\u0301vil", ".hidden", ".git/x"),
    *("a" * 300, "a/b/c/d/e", "statement.json", "choice.json", "../current", "../../state.json", "%2e%2e/evil", "CON"),
    *("MODEL.onnx", "model.onnx/evil", "model.onnx ", "model.onnx.", "folder/", "../a/model.onnx"),
)
"""In place of ``model.onnx``, in the archive alone."""
KINDS = {
    **{"a symbolic link": stat.S_IFLNK, "a character device": stat.S_IFCHR, "a block device": stat.S_IFBLK},
    **{"a pipe": stat.S_IFIFO, "a socket": stat.S_IFSOCK, "a folder by its mode": stat.S_IFDIR},
}


def info(name: str, **fields: Any) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def written(rows: list[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for each, data in rows:
            archive.writestr(each, data)
    return content.getvalue()


def renamed(name: str) -> Callable[[Files], bytes]:
    return lambda files: written(
        [(info(name if each == "model.onnx" else each), files[each]) for each in sorted(files)]
    )


def marked(kind: int) -> Callable[[Files], bytes]:
    """A member of a kind, as long as the right one, whose bytes are a path."""

    def make(files: Files) -> bytes:
        target = b"/etc/passwd".ljust(len(files["golden.npz"]), b"/")
        fields = {"external_attr": (kind | 0o4777) << 16, "create_system": 3}
        return written([(info("golden.npz", **fields), target), *_rest(files)])

    return make


def _rest(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    return [(info(each), files[each]) for each in sorted(files) if each != "golden.npz"]


def header(data: bytes | bytearray, mark: bytes) -> int:
    """Where the archive's own header of a kind is, the first one; its members are archives, too."""
    end = data.rindex(END)
    return {LOCAL: 0, CENTRAL: int.from_bytes(data[end + 16 : end + 20], "little"), END: end}[mark]


def patched(mark: bytes, offset: int, value: bytes) -> Callable[[Files], bytes]:
    """Other bytes in the header of a kind, that of the first member where each has one."""

    def make(files: Files) -> bytes:
        data = bytearray(made_up.archive(files))
        place = header(data, mark)
        assert data[place : place + 4] == mark
        data[place + offset : place + offset + len(value)] = value
        return bytes(data)

    return make


def overlapping(files: Files) -> bytes:
    """The second entry points into the first member."""
    data = bytearray(made_up.archive(files))
    second = data.index(CENTRAL, header(data, CENTRAL) + 1)
    data[second + 42 : second + 46] = (0).to_bytes(4, "little")
    return bytes(data)


def twice(files: Files) -> bytes:
    """Two members of one name; the later one would win."""
    rows = [(info(each), files[each]) for each in sorted(files)]
    return written([*rows, (info("model.onnx"), b"evil")])


def bomb(files: Files) -> bytes:
    """A few kilobytes that would become 64 MiB."""
    data = bytes(64 << 20)
    return written([(info("golden.npz", compress_type=zipfile.ZIP_DEFLATED), data), *_rest(files)])


HUGE = (0xFFFFFFF0).to_bytes(4, "little")
ARCHIVES: dict[str, Callable[[Files], bytes]] = {
    **{f"named {name!r}"[:60]: renamed(name) for name in NAMES},
    **{name: marked(kind) for name, kind in KINDS.items()},
    "a name that ends at a zero byte": patched(LOCAL, 30, b"golden\0npz"),
    "another name in the header than in the list": patched(LOCAL, 30, b"../../evil"),
    "another name in the list than in the header": patched(CENTRAL, 46, b"../../evil"),
    "a huge member, by the list": patched(CENTRAL, 24, HUGE),
    "a huge member, by list and place": patched(CENTRAL, 20, HUGE + HUGE),
    "a member that begins behind the end": patched(CENTRAL, 42, HUGE),
    "a version that nobody has": patched(CENTRAL, 6, b"\xff\x00"),
    "encrypted": patched(CENTRAL, 8, b"\x01\x00"),
    "a method that nobody has": patched(CENTRAL, 10, b"\x63\x00"),
    "a list that begins elsewhere": patched(END, 16, HUGE),
    "a list that is longer than the file": patched(END, 12, HUGE),
    "no list": patched(END, 0, b"NONE"),
    "another checksum": patched(CENTRAL, 16, b"evil"),
    "overlapping members": overlapping,
    "a member twice": twice,
    "a bomb": bomb,
    "a member more, above the slot": lambda files: written([*_rest(files), (info("../evil"), b"evil")]),
    "half an archive": lambda files: made_up.archive(files)[: len(made_up.archive(files)) // 2],
    "nothing": lambda files: b"",
    "zeros": lambda files: bytes(1 << 20),
}
