"""A bundle comes back as it was, and every other file than exactly it is refused."""

import hashlib
import io
import random
import zipfile
import zlib

import pytest

from export.bundle import BundleError
from export.bundle.content import Measured, archive, describe, measure, whole
from export.bundle.envelope import canonical
from export.bundle.package import HEADER, open_package, write_package
from export.bundle.statement import Content, Member, Statement
from export.bundle.trust import make_trust
from tests.export.bundle.accepted import TRUST, A, B, C

MUTANTS = 300


def test_every_other_file_than_the_bundle_is_refused(bundle, tmp_path):
    data = bundle.path.read_bytes()
    dice = random.Random(5)
    path = tmp_path / "mutant.edgepkg"
    for number in range(MUTANTS):
        at, end = sorted(dice.sample(range(len(data) + 1), 2))
        if number % 5 < 2:  # the first bytes and the envelope are few: half of the flips go there
            at = dice.randrange(HEADER.size + 4096 if number % 2 else len(data))
            mutant = data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :]
        else:
            mutant = {
                2: data[:at],
                3: data + dice.randbytes(dice.randrange(1, 100)),
                4: data[:at] + data[end:],
            }[number % 5]
            if number % 10 == 4:
                mutant = data[:at] + data[at : at + 50] + data[at:]
        assert mutant != data
        path.write_bytes(mutant)
        with pytest.raises(BundleError, match=r"mutant\.edgepkg"):
            open_package(path, TRUST)
    path.write_bytes(data)
    open_package(path, TRUST)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"PK\3\4" + data, "at its beginning, expected b'EDGEPKG1'"),
        (lambda data: b"", "at its beginning"),
        (lambda data: data[:10], "cut off"),
        (lambda data: data[:100], "bytes of its envelope"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"\n", "something was appended"),
        (lambda data: data[:8] + b"\xff" * 4 + data[12:], "expected at most 1,048,576"),
        (lambda data: data.replace(b"engine for SM89", b"engine for SM99"), "member 'models/rtx/student.*sm89.engine'"),
        (lambda data: data.replace(b"# A card", b"# A hard"), "member 'model_card.md'"),
    ],
)
def test_a_refusal_names_the_place(bundle, tmp_path, change, says):
    path = tmp_path / "b.edgepkg"
    path.write_bytes(change(bundle.path.read_bytes()))
    with pytest.raises(BundleError, match=says):
        open_package(path, TRUST)


def test_no_file_a_folder_and_a_stranger_are_refused(bundle, tmp_path):
    for place in (tmp_path / "none.edgepkg", tmp_path):
        with pytest.raises(BundleError, match="no file"):
            open_package(place, TRUST)
    with pytest.raises(BundleError, match="signature of key"):
        open_package(bundle.path, make_trust([A.public_key()], threshold=1))
    with pytest.raises(BundleError, match="2 signatures by keys of trust 1, expected 3"):
        open_package(bundle.path, make_trust([A.public_key(), B.public_key(), C.public_key()], threshold=3))


def test_a_member_that_changes_while_it_is_written_is_noticed(tmp_path, bundle):
    moving = tmp_path / "model_card.md"
    moving.write_bytes(b"# A card\n")
    sources = {name: bundle.piece(name) for name in bundle.offsets} | {"model_card.md": whole(moving)}
    members = measure(sources)
    moving.write_bytes(b"# B card\n")
    with pytest.raises(BundleError, match="changed while it was written"):
        write_package(tmp_path / "out" / "a.edgepkg", bundle.statement, members, [A, B])
    assert not list((tmp_path / "out").iterdir())


def test_a_bundle_is_never_overwritten(tmp_path, bundle):
    members = measure({name: bundle.piece(name) for name in bundle.offsets})
    path = tmp_path / "a.edgepkg"
    path.write_bytes(b"something")
    with pytest.raises(BundleError, match="never overwritten"):
        write_package(path, bundle.statement, members, [A, B])
    assert path.read_bytes() == b"something"
    assert [each.name for each in tmp_path.iterdir()] == ["a.edgepkg"]


def test_the_content_is_the_archive_that_the_standard_library_writes(bundle, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in bundle.offsets:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            file.writestr(info, bundle.read(name))
    assert bundle.path.read_bytes().endswith(buffer.getvalue())
    assert len(buffer.getvalue()) == bundle.statement.content.length
    with zipfile.ZipFile(bundle.path) as file:
        assert file.testzip() is None
        assert file.namelist() == list(bundle.offsets)


def test_an_archive_beyond_32_bits_is_refused_before_it_is_read(tmp_path):
    member = Member(path="a", length=1 << 32, sha256="0" * 64)
    with pytest.raises(BundleError, match="expected at most"):
        describe([Measured(member, 0, b"")])


def test_an_archive_is_described_without_being_kept():
    members = measure({"b": b"2", "a": b"1"})
    data = b"".join(archive(members))
    assert describe(members) == Content(length=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert [each.member.path for each in members] == ["a", "b"]
    assert members[0].crc == zlib.crc32(b"1")


def test_a_statement_reads_what_it_writes(bundle):
    value = canonical(bundle.statement.model_dump(mode="json", by_alias=True))
    assert Statement.model_validate_json(value, strict=True) == bundle.statement
