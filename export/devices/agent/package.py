"""Reads a bundle: what it says is taken at its word only after the whole file has been verified."""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable

from . import durable
from .envelope import BUNDLE, Trust
from .errors import Refused

MAGIC = b"EDGEPKG1"
MAX_ENVELOPE = 1 << 20
MAX_FILES, MAX_BYTES = 256, (1 << 32) - 1
CHUNK = 1 << 20
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
STATEMENT = "statement.json"
"""What a slot keeps of the envelope; no member can have the name."""

RUNTIMES = ("onnxruntime", "tensorrt_rtx", "tensorrt", "openvino")


class Bundle:
    """A verified bundle: its statement, and where its content begins."""

    def __init__(self, path: Path, statement: dict[str, Any], start: int) -> None:
        self.path, self.statement, self.start = path, statement, start

    @property
    def digest(self) -> str:
        """Of the content and of what is said about it."""
        return str(self.statement["content"]["sha256"])


def read(path: Path, trust: Trust) -> Bundle:
    """Verify a bundle from its first byte to its last.

    Raises:
        Refused: it is no bundle, not signed as it must be, or not the whole and only what was signed.
    """
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a pipe must not keep us waiting
    except OSError as error:
        raise Refused("no file", f"Bundle '{path}' cannot be read: {error.strerror}.") from error
    with file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise Refused("no file", f"Bundle '{path}' is no plain file.")
        head = file.read(12)
        size = int.from_bytes(head[8:12], "big")
        if head[:8] != MAGIC or len(head) < 12:
            raise Refused("malformed", f"Bundle '{path.name}' does not begin as one, expected {MAGIC.decode()}.")
        if not 0 < size <= MAX_ENVELOPE:
            raise Refused("malformed", f"Bundle '{path.name}' has an envelope of {size} bytes, expected at most 1 MiB.")
        statement = trust.open(file.read(size), BUNDLE, "The bundle's envelope")
        check(statement)
        start, content = 12 + size, statement["content"]
        whole = start + content["length"]
        if facts.st_size != whole:
            text = f"Bundle '{path.name}' has {facts.st_size} bytes, expected {whole}. Fetch it again."
            raise Refused("length", text)
        if digest_of(file) != content["sha256"]:
            raise Refused("digest", f"Bundle '{path.name}' has other content than was signed. Fetch it again.")
    return Bundle(path, statement, start)


def digest_of(file: BinaryIO) -> str:
    """SHA-256 of the rest of a file."""
    digest = hashlib.sha256()
    for chunk in iter(lambda: file.read(CHUNK), b""):
        digest.update(chunk)
    return digest.hexdigest()


def unpack(bundle: Bundle, slot: Path) -> None:
    """Write the members into a new folder, flush everything, and verify it as the disk gives it back.

    Only what the statement lists is written, under the names that the statement gives.

    Raises:
        Refused: the archive holds something else than the statement says.
    """
    files = bundle.statement["files"]
    slot.mkdir()
    folders = {slot}
    try:
        archive = zipfile.ZipFile(bundle.path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise Refused("archive", f"The bundle's content is no ZIP archive ({error}).") from error
    with archive:
        infos = archive.infolist()
        if [info.filename for info in infos] != [each["path"] for each in files]:
            raise Refused("archive", "The bundle's content has other members than its statement lists.")
        for info, each in zip(infos, files):
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != each["length"] or info.flag_bits & 0x1:
                raise Refused("archive", f"Member '{each['path']}' is compressed, encrypted or of another size.")
            place = slot.joinpath(*each["path"].split("/"))
            for folder in reversed(place.relative_to(slot).parents[:-1]):
                (slot / folder).mkdir(exist_ok=True)
                folders.add(slot / folder)
            try:
                with archive.open(info) as member:
                    _copy(member, place, each["length"])
            except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                    raise  # of the disk; what says EINVAL is a place in the archive that is none
                raise Refused("archive", f"Member '{each['path']}' cannot be read ({error}).") from error
    durable.write_json(slot / STATEMENT, bundle.statement)
    for folder in sorted(folders, reverse=True):
        durable.flush_folder(folder)
    durable.flush_folder(slot.parent)
    verify(slot, bundle.statement)


def _copy(member: Any, place: Path, length: int) -> None:
    with open(place, "xb") as file:
        left = length
        while left:
            chunk = member.read(min(CHUNK, left))
            if not chunk:
                raise EOFError("it ends too early")
            file.write(chunk)
            left -= len(chunk)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is verified is read from the disk


def verify(slot: Path, statement: dict[str, Any]) -> None:
    """Raises Refused when a file of a slot is not what was signed."""
    for each in statement["files"]:
        place = slot.joinpath(*each["path"].split("/"))
        try:
            with open(place, "rb") as file:
                found = digest_of(file)
        except OSError as error:
            raise Refused("slot", f"File '{each['path']}' of slot '{slot.name}' is not there.") from error
        if found != each["sha256"]:
            raise Refused("slot", f"File '{each['path']}' of slot '{slot.name}' has other bytes than were signed.")


# --- what a statement must look like ---

Check = Callable[[Any], bool]
DIGEST: Check = lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None  # noqa: E731
TEXT: Check = lambda value: isinstance(value, str) and len(value) <= 10_000  # noqa: E731
COUNT: Check = lambda value: type(value) is int and 0 <= value < 1 << 63  # noqa: E731
NUMBER: Check = lambda value: type(value) in (int, float)  # noqa: E731
ANY: Check = lambda value: True  # noqa: E731


def path_is_plain(value: Any) -> bool:
    """Whether a member's name is a relative path of plain parts."""
    parts = value.split("/") if isinstance(value, str) else []
    return 0 < len(parts) <= 4 and all(PART.fullmatch(part) for part in parts) and value != STATEMENT


def moment(value: Any) -> float:
    """Seconds since the epoch of a time as statements write it."""
    form = "%Y-%m-%dT%H:%M:%SZ"
    return datetime.datetime.strptime(value, form).replace(tzinfo=datetime.timezone.utc).timestamp()


def _is_moment(value: Any) -> bool:
    try:
        return isinstance(value, str) and moment(value) > 0
    except ValueError:
        return False


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


LIMITS = ("warmup", "runs", "p50_ms", "p95_ms", "memory_mib", "startup_s")
TENSOR = {"name": TEXT, "dtype": TEXT, "shape": [lambda value: type(value) is int]}
VARIANT = {
    **{"id": lambda value: isinstance(value, str) and PART.fullmatch(value) is not None},
    **{"runtime": lambda value: value in RUNTIMES, "runtime_versions": TEXT, "file": path_is_plain, "precision": TEXT},
    **{"isa": _maybe(TEXT), "cpu_features": [TEXT], "compute_capability": _maybe(TEXT), "system": _maybe(TEXT)},
    **{"min_memory_mib": _maybe(NUMBER), "rebuild_from": _maybe(path_is_plain), "temperature": _maybe(NUMBER)},
    "batches": _maybe(lambda value: isinstance(value, list) and len(value) == 2 and all(COUNT(each) for each in value)),
    "tolerance": {"rtol": NUMBER, "atol": NUMBER},
    "limits": {name: _maybe(NUMBER) for name in LIMITS},
}
SHAPE: dict[str, Any] = {
    "schema": lambda value: value == 1 and type(value) is int,
    "kind": lambda value: value == "model",
    "name": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", value) is not None,
    "version": TEXT,
    "seq": lambda value: COUNT(value) and value >= 1,
    "created": _is_moment,
    "not_after": _maybe(_is_moment),
    "content": {"length": COUNT, "sha256": DIGEST},
    "files": [{"path": path_is_plain, "length": COUNT, "sha256": DIGEST}],
    "variants": [VARIANT],
    "input": TENSOR,
    "output": TENSOR,
    "preprocessing": _maybe(lambda value: _fits(value, {"scale": NUMBER, "mean": [NUMBER], "std": [NUMBER]}, "") == ""),
    "labels": [TEXT],
    "golden": path_is_plain,
    "lineage": ANY,
}


def _fits(value: Any, shape: Any, where: str) -> str:
    """The place where a value is not as it must be; empty when there is none."""
    if isinstance(shape, dict):
        if not isinstance(value, dict) or set(value) != set(shape):
            return where or "the statement"
        return next((found for key in shape if (found := _fits(value[key], shape[key], f"{where}.{key}"))), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return where
        return next((found for n, each in enumerate(value) if (found := _fits(each, shape[0], f"{where}.{n}"))), "")
    return "" if shape(value) else (where or "it")


def check(statement: Any) -> None:
    """Raises Refused when a statement, though signed, is not what an agent of this version can act on."""
    place = _fits(statement, SHAPE, "").lstrip(".")
    if not place:
        place = _contradiction(statement)
    if place:
        raise Refused("statement", f"The bundle's statement has '{place}' not as an agent of this version needs it.")


def _contradiction(statement: dict[str, Any]) -> str:
    files = {each["path"]: each["length"] for each in statement["files"]}
    paths = [each["path"] for each in statement["files"]]
    if paths != sorted(paths) or len({path.lower() for path in paths}) != len(paths) or not 0 < len(paths) <= MAX_FILES:
        return "files"
    folders = {"/".join(path.split("/")[:depth]).lower() for path in paths for depth in range(1, path.count("/") + 1)}
    if folders & {path.lower() for path in paths} or sum(files.values()) > MAX_BYTES:
        return "files"
    if not statement["variants"] or statement["golden"] not in files:
        return "variants" if not statement["variants"] else "golden"
    for number, each in enumerate(statement["variants"]):
        wanted = [each["file"], *([each["rebuild_from"]] if each["rebuild_from"] else [])]
        if any(path not in files for path in wanted):
            return f"variants.{number}.file"
    ids = [each["id"] for each in statement["variants"]]
    return "variants" if len(set(ids)) != len(ids) else ""
