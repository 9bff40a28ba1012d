"""Whoever has the keys still gets no odd member, no lying checksum and no statement without sense past the reader."""

import base64
import hashlib
import io
import json
import struct
import zipfile
from pathlib import Path

import pytest

from export.bundle import BundleError
from export.bundle.envelope import canonical, seal
from export.bundle.package import BUNDLE_TYPE, HEADER, MAGIC, Package, open_package
from tests.export.bundle.accepted import TRUST, A, B


def write_crafted(path: Path, value: dict, content: bytes, keys=(A, B)) -> Path:
    """A bundle by somebody who has the keys: any statement, any content, well signed."""
    value = value | {"content": {"length": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    envelope = seal(canonical(value), BUNDLE_TYPE, keys)
    path.write_bytes(HEADER.pack(MAGIC, len(envelope)) + envelope + content)
    return path


def statement_of(bundle: Package) -> dict:
    return json.loads(canonical(bundle.statement.model_dump(mode="json", by_alias=True)))


def zipped(bundle: Package, change=None, extra=()) -> bytes:
    """The content as the standard library writes it, after a change of the entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in bundle.offsets:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            data = bundle.read(name)
            if change is not None and name == "model_card.md":
                data = change(info) or data
            file.writestr(info, data)
        for name, data in extra:
            file.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def renamed(name):
    def change(info):
        info.filename = name

    return change


def compressed(info):
    info.compress_type = zipfile.ZIP_DEFLATED


def a_link(info):
    info.external_attr = 0o120777 << 16
    return b"/etc/pas"


def executable(info):
    info.external_attr = 0o104755 << 16


def dated(info):
    info.date_time = (2026, 1, 1, 0, 0, 0)


def with_extra(info):
    info.extra = struct.pack("<HH4s", 0x7075, 4, b"evil")


def with_comment(info):
    info.comment = b"hello"


def grown(info):
    return b"# A card, and more"


CONTENTS = {
    "traversal": renamed("../../card.md"),
    "absolute": renamed("/etc/card.md1"),
    "another name": renamed("model_card.MD"),
    "unicode": renamed("model_cärd.md"),
    "NUL": renamed("model\0card.md"),
    "back slashes": renamed("..\\..\\card.m"),
    "compressed": compressed,
    "a symbolic link": a_link,
    "set-uid": executable,
    "another date": dated,
    "an extra field": with_extra,
    "a comment": with_comment,
    "another size": grown,
}


@pytest.mark.parametrize("change", CONTENTS.values(), ids=CONTENTS)
def test_a_well_signed_content_with_an_odd_member_is_refused(bundle, tmp_path, change):
    path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), zipped(bundle, change))
    with pytest.raises(BundleError, match=r"a\.edgepkg"):
        open_package(path, TRUST)


@pytest.mark.parametrize("extra", [("extra", b"x"), ("../x", b"x"), ("model_card.md", b"again")], ids=str)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_well_signed_content_with_a_member_more_is_refused(bundle, tmp_path, extra):
    path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), zipped(bundle, extra=[extra]))
    with pytest.raises(BundleError, match="its files make"):
        open_package(path, TRUST)


def test_a_well_signed_content_with_bytes_before_between_or_after_is_refused(bundle, tmp_path):
    content = zipped(bundle)
    open_package(write_crafted(tmp_path / "good.edgepkg", statement_of(bundle), content), TRUST)
    for other in (b"x" + content, content + b"x", content[:100] + b"x" + content[100:], content[:-1], b""):
        path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), other)
        with pytest.raises(BundleError, match="its files make|wrong content"):
            open_package(path, TRUST)


def test_a_checksum_and_a_list_of_members_that_lie_are_refused(bundle, tmp_path):
    content = bytearray(zipped(bundle))
    last, listed = content.rindex(b"PK\5\6"), content.rindex(b"PK\1\2")
    for at, says in ((14, "CRC"), (listed + 42, "list of members"), (last + 10, "end of the archive")):
        other = bytearray(content)
        other[at] ^= 1
        path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), bytes(other))
        with pytest.raises(BundleError, match=says):
            open_package(path, TRUST)


def files_with(*paths):
    """Makes the statement about other paths."""
    rows = [{"path": path, "length": 1, "sha256": "0" * 64} for path in paths]

    def change(value):
        value["files"] = sorted([*value["files"], *rows], key=lambda row: row["path"])

    return change


def variant_with(**fields):
    def change(value):
        value["variants"][0].update(fields)

    return change


STATEMENTS = {
    "a field more": lambda value: value.update(note="hello"),
    "a field of a variant more": variant_with(note="hello"),
    "a field less": lambda value: value.pop("labels"),
    "another schema": lambda value: value.update(schema=2),
    "a schema that is true": lambda value: value.update(schema=True),
    "another kind": lambda value: value.update(kind="agent"),
    "seq 0": lambda value: value.update(seq=0),
    "seq as text": lambda value: value.update(seq="7"),
    "seq with a point": lambda value: value.update(seq=7.0),
    "a name with a slash": lambda value: value.update(name="a/b"),
    "a date that is none": lambda value: value.update(created="2026-02-31T00:00:00Z"),
    "a date with a zone": lambda value: value.update(not_after="2026-01-01T00:00:00+00:00"),
    "traversal": files_with("../x"),
    "traversal inside": files_with("models/../x"),
    "absolute": files_with("/etc/x"),
    "a hidden file": files_with(".x"),
    "an empty part": files_with("a//b"),
    "a folder": files_with("a/"),
    "NUL": files_with("a\0b"),
    "unicode": files_with("ä"),
    "a line end": files_with("a\n"),
    "a back slash": files_with("a\\b"),
    "a drive": files_with("C:x"),
    "deep": files_with("a/b/c/d/e"),
    "long": files_with("a" * 101),
    "the same twice": files_with("golden.npz"),
    "case alone": files_with("Golden.npz"),
    "a file as folder": files_with("golden.npz/x"),
    "too many": files_with(*(f"f{number}" for number in range(256))),
    "too much": lambda value: value["files"][0].update(length=1 << 33),
    "not sorted": lambda value: value["files"].reverse(),
    "a digest in capitals": lambda value: value["files"][0].update(sha256="A" * 64),
    "no variant": lambda value: value.update(variants=[]),
    "a variant without its file": variant_with(file="models/none.engine"),
    "a rebuild from nothing": variant_with(rebuild_from="models/none.onnx"),
    "a variant twice": variant_with(id="cpu"),
    "another runtime": variant_with(runtime="torch"),
    "versions that are a command": variant_with(runtime_versions=">=1; rm -rf /"),
    "golden data that is not there": lambda value: value.update(golden="none.npz"),
    "a variant without tolerance": variant_with(tolerance={}),
    "a limit below zero": lambda value: value["variants"][0]["limits"].update(p50_ms=-1),
    "a smallest batch of 2": variant_with(batches=[2, 8]),
    "a batch that is fixed": lambda value: value["input"].update(shape=[1, 1, 12, 12]),
    "a size with a point": lambda value: value["input"].update(shape=[-1.0, 1, 12, 12]),
    "labels for other classes": lambda value: value.update(labels=["a"]),
    "temperature 0": variant_with(temperature=0),
}


@pytest.mark.parametrize("change", STATEMENTS.values(), ids=STATEMENTS)
def test_a_well_signed_statement_that_makes_no_sense_is_refused(bundle, tmp_path, change):
    value = statement_of(bundle)
    change(value)
    path = write_crafted(tmp_path / "a.edgepkg", value, zipped(bundle))
    with pytest.raises(BundleError, match="statement has"):
        open_package(path, TRUST)


def test_a_well_signed_statement_in_another_spelling_is_refused(bundle, tmp_path):
    payload = json.dumps(statement_of(bundle)).encode()
    envelope = seal(payload, BUNDLE_TYPE, [A, B])
    path = tmp_path / "a.edgepkg"
    path.write_bytes(HEADER.pack(MAGIC, len(envelope)) + envelope + zipped(bundle))
    with pytest.raises(BundleError, match="statement has another spelling"):
        open_package(path, TRUST)


def test_a_signature_for_another_type_is_worth_nothing(bundle, tmp_path):
    data = bundle.path.read_bytes()
    length = HEADER.unpack_from(data)[1]
    value = json.loads(data[HEADER.size : HEADER.size + length])
    sealed = json.loads(seal(base64.b64decode(value["payload"]), "application/vnd.in-toto+json", [A, B]))
    other = canonical(value | {"signatures": sealed["signatures"]})
    path = tmp_path / "a.edgepkg"
    path.write_bytes(HEADER.pack(MAGIC, len(other)) + other + data[HEADER.size + length :])
    with pytest.raises(BundleError, match="wrong signature"):
        open_package(path, TRUST)
