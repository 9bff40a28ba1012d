"""What the agent refuses to read, and that nothing lands outside of its slot."""

import io
import json
import os
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.devices.agent import package
from export.devices.agent.envelope import Trust
from export.devices.agent.errors import Refused
from tests.export.devices import made_up_bundle as made_up

TRUST = Trust(made_up.trust())


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def unpacked(path: Path, place: Path) -> set[str]:
    slots = place / "slots"
    slots.mkdir(parents=True)
    package.unpack(package.read(path, TRUST), slots / "a")
    return files_below(place)


def test_a_bundle_comes_out_as_it_went_in(tmp_path: Path) -> None:
    members = made_up.members(padding=3_000_000)
    path = made_up.write(tmp_path / "x.edgepkg", members)
    assert unpacked(path, tmp_path / "d") == {f"slots/a/{name}" for name in [*members, "statement.json"]}
    for name, content in members.items():
        assert (tmp_path / "d" / "slots" / "a" / name).read_bytes() == content


def test_any_unzip_shows_its_members(tmp_path: Path) -> None:
    path = made_up.write(tmp_path / "x.edgepkg")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == sorted(made_up.members())
        assert archive.testzip() is None


def mutants(whole: bytes, count: int, seed: int) -> list[bytes]:
    """Bits flipped, bytes put in, taken out and changed, ends cut and added, parts copied elsewhere."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        place, kind = draw.randrange(len(whole)), draw.randrange(7)
        changed = bytearray(whole)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place:place] = draw.randbytes(draw.randint(1, 9))
        elif kind == 2:
            del changed[place : place + draw.randint(1, 9)]
        elif kind == 3:
            del changed[place:]
        elif kind == 4:
            changed += draw.randbytes(draw.randint(1, 99))
        elif kind == 5:
            changed[place] = draw.randrange(256)
        else:
            other = draw.randrange(len(whole))
            changed[place : place + 16] = whole[other : other + 16]
        if bytes(changed) != whole:
            found.append(bytes(changed))
    return found


@pytest.mark.parametrize(
    ("count", "seed"), [(2000, 0), pytest.param(20_000, 1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_every_changed_byte_is_noticed_before_anything_is_unpacked(tmp_path: Path, count: int, seed: int) -> None:
    whole = made_up.write(tmp_path / "x.edgepkg").read_bytes()
    envelope_ends = 12 + int.from_bytes(whole[8:12], "big")
    taken = []
    broken = tmp_path / "broken.edgepkg"
    half = count // 2  # the envelope is a small part of the file, and the part where refusing is subtle
    heads = [head + whole[envelope_ends:] for head in mutants(whole[:envelope_ends], half, seed)]
    for number, mutant in enumerate([*mutants(whole, count - half, seed + 1), *heads]):
        broken.write_bytes(mutant)
        try:
            package.read(broken, TRUST)
        except Refused:
            continue
        taken.append(number)
    assert taken == []


def raw_zip(rows: list[tuple[zipfile.ZipInfo, bytes]], **options: Any) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as archive:
        for info, data in rows:
            archive.writestr(info, data)
    return content.getvalue()


def info(name: str, **fields: Any) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    for field, value in fields.items():
        setattr(found, field, value)
    return found


EVIL_NAMES = [
    *("../evil", "a/../../evil", "/evil", "//evil", "./evil", "a/./evil", "a//evil", "evil/", "..", ".", "", " "),
    *(
        "a\\..\\evil",
        "C:\\evil",
        "C:evil",
        "\\\\host\\evil",
        "~/evil",
        "$HOME/evil",
        "`id`",
        "; rm -rf x",
        "a|b",
        "-rf",
    ),
    *(
        "evil\0.txt",
        "evil\n",
        "evil\r",
        "evil\t",
        "ev il",
        "évil",
        "\u202elive",
        "ｅvil",
        "e\u0301vil",
        ".hidden",
        "a/.git",
    ),
    *(
        "a" * 101,
        "a/b/c/d/e",
        "statement.json",
        "%2e%2e/evil",
        "evil?",
        "evil*",
        "CON:",
        "&",
        "'evil'",
        '"evil"',
        "a:b",
    ),
]
"""Names that no path may have, signed by a trusted key all the same."""


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_signed_file_with_an_evil_name_is_refused(tmp_path: Path, name: str) -> None:

    def rename(said: dict[str, Any]) -> None:
        for row in said["files"]:
            if row["path"] == "stand-in":
                row["path"] = name
        said["files"].sort(key=lambda row: row["path"])

    path = made_up.write(tmp_path / "x.edgepkg", {**made_up.members(), "stand-in": b"evil"}, change=rename)
    with pytest.raises(Refused, match="files"):
        unpacked(path, tmp_path / "d")
    assert files_below(tmp_path / "d") == set()


def wrong_archives() -> dict[str, Callable[[dict[str, bytes]], bytes]]:
    """Archives that hold something else than the statement, which is right and signed, lists."""

    def rows(members: dict[str, bytes]) -> list[tuple[zipfile.ZipInfo, bytes]]:
        return [(info(name), members[name]) for name in sorted(members)]

    def named(name: str) -> Callable[[dict[str, bytes]], bytes]:
        return lambda members: raw_zip([*rows(members), (info(name), b"evil")])

    def instead(name: str) -> Callable[[dict[str, bytes]], bytes]:
        return lambda members: raw_zip([(info(name), b"evil"), *rows(members)[1:]])

    link = stat.S_IFLNK | 0o777
    found: dict[str, Callable[[dict[str, bytes]], bytes]] = {
        "a member more": named("more"),
        "a member of another folder": named("../evil"),
        "an absolute member": named("/tmp/evil"),
        "another name": instead("other"),
        "traversal in place of a member": instead("../golden.npz"),
        "a member less": lambda members: raw_zip(rows(members)[1:]),
        "no member": lambda members: raw_zip([]),
        "another order": lambda members: raw_zip(rows(members)[::-1]),
        "a member twice": lambda members: raw_zip([*rows(members), rows(members)[0]]),
        "compressed": lambda members: raw_zip(
            [(info(name, compress_type=zipfile.ZIP_DEFLATED), members[name]) for name in sorted(members)]
        ),
        "compressed by bzip2": lambda members: raw_zip(
            [(info(name, compress_type=zipfile.ZIP_BZIP2), members[name]) for name in sorted(members)]
        ),
        "other bytes": lambda members: raw_zip(rows({**members, "model.onnx": members["model.onnx"][:-1] + b"?"})),
        "a longer member": lambda members: raw_zip(rows({**members, "model.onnx": members["model.onnx"] + b"?"})),
        "a shorter member": lambda members: raw_zip(rows({**members, "model.onnx": members["model.onnx"][:-1]})),
        "a link in place of a member": lambda members: raw_zip(
            [(info("golden.npz", external_attr=link << 16), b"/etc/passwd"), *rows(members)[1:]]
        ),
        "a device in place of a member": lambda members: raw_zip(
            [(info("golden.npz", external_attr=(stat.S_IFCHR | 0o666) << 16), b""), *rows(members)[1:]]
        ),
        "a folder": lambda members: raw_zip([*rows(members), (info("folder/"), b"")]),
        "no archive": lambda members: b"no archive at all",
        "nothing": lambda members: b"",
        "an archive cut short": lambda members: raw_zip(rows(members))[:-30],
        "an encrypted flag": lambda members: raw_zip([(info("golden.npz", flag_bits=1), b"x"), *rows(members)[1:]]),
    }
    return found


@pytest.mark.parametrize("kind", sorted(wrong_archives()))
def test_an_archive_that_is_not_what_was_signed_is_refused(tmp_path: Path, kind: str) -> None:
    members = made_up.members()
    path = made_up.write(tmp_path / "x.edgepkg", members, content=wrong_archives()[kind](members))
    (tmp_path / "d").mkdir()
    with pytest.raises(Refused):
        unpacked(path, tmp_path / "d")
    assert all(name.startswith("slots/a/") for name in files_below(tmp_path / "d"))


WRONG_STATEMENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "schema": lambda said: said.update(schema=2),
    "seq": lambda said: said.update(seq=0),
    "name": lambda said: said.update(name="../x"),
    "created": lambda said: said.update(created="yesterday"),
    "not_after": lambda said: said.update(not_after="2026-13-01T00:00:00Z"),
    "unknown field": lambda said: said.update(run="rm"),
    "missing field": lambda said: said.pop("labels"),
    "variants": lambda said: said.update(variants=[]),
    "variants.0.file": lambda said: said["variants"][0].update(file="absent.onnx"),
    "variants.0.runtime": lambda said: said["variants"][0].update(runtime="shell"),
    "a variant twice": lambda said: said["variants"].append(said["variants"][0]),
    "golden": lambda said: said.update(golden="absent.npz"),
    "a tolerance": lambda said: said["variants"][0].update(tolerance={}),
    "limits.p50_ms": lambda said: said["variants"][0]["limits"].update(p50_ms="fast"),
    "batches": lambda said: said["variants"][0].update(batches=[1]),
    "files out of order": lambda said: said["files"].reverse(),
    "a file twice": lambda said: said["files"].append(said["files"][-1]),
    "a case clash": lambda said: said["files"].insert(0, {**said["files"][-1], "path": "SBOM.cdx.json"}),
    "a file that is a folder too": lambda said: said["files"].append({**said["files"][-1], "path": "sbom.cdx.json/x"}),
    "a huge file": lambda said: said["files"][0].update(length=1 << 40),
    "a negative length": lambda said: said["files"][0].update(length=-1),
    "a digest": lambda said: said["files"][0].update(sha256="0" * 63),
    "too many files": lambda said: said.update(
        files=[{**said["files"][0], "path": f"f{number:03}"} for number in range(300)]
    ),
    "true for a number": lambda said: said.update(seq=True),
    "a list": lambda said: said.update(lineage=[]) or said.update(labels="abc"),
}


@pytest.mark.parametrize("kind", sorted(WRONG_STATEMENTS))
def test_a_signed_statement_that_says_nonsense_is_refused(tmp_path: Path, kind: str) -> None:
    path = made_up.write(tmp_path / "x.edgepkg", change=WRONG_STATEMENTS[kind])
    with pytest.raises(Refused, match="statement has"):
        package.read(path, TRUST)


def test_the_error_names_the_field(tmp_path: Path) -> None:
    path = made_up.write(tmp_path / "x.edgepkg", change=WRONG_STATEMENTS["variants.0.runtime"])
    with pytest.raises(Refused, match=r"'variants\.0\.runtime'"):
        package.read(path, TRUST)


def test_what_the_disk_gives_back_is_verified(tmp_path: Path) -> None:
    bundle = package.read(made_up.write(tmp_path / "x.edgepkg"), TRUST)
    package.unpack(bundle, tmp_path / "slot")
    place = tmp_path / "slot" / "model.onnx"
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    with pytest.raises(Refused, match=r"model\.onnx"):
        package.verify(tmp_path / "slot", json.loads((tmp_path / "slot" / "statement.json").read_text()))


def test_a_pipe_and_a_folder_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(Refused):
        package.read(tmp_path, TRUST)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="no plain file"):
        package.read(tmp_path / "pipe", TRUST)
    with pytest.raises(Refused, match="cannot be read"):
        package.read(tmp_path / "absent", TRUST)
