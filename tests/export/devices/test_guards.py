"""Takes each guard of devices out, in a copy of the project: the test that needs it must fail, or it guards nothing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.export.devices import guards, guards_fleet
from tests.export.devices.cuts import ROOT
from tests.export.devices.guards import Mutant

MUTANTS = (*guards.MUTANTS, *guards_fleet.MUTANTS)
NEEDED = ("compression", "export", "tests")
SECONDS = 100
"""For one test without its guard; some guards end what would not end by itself."""


def run(project: Path, tests: Sequence[str]) -> tuple[int, dict[str, str]]:
    """(exit code, test -> PASSED, FAILED, ERROR or SKIPPED) of a run on a copy of the project."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "CI_REQUIRE_ROOT")}
    settings = {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    results = project / "results.xml"
    results.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", f"--timeout={SECONDS}", f"--junitxml={results}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        **{"cwd": project, "env": {**kept, **settings}, "capture_output": True, "text": True, "check": False},
        timeout=1800,
    )
    assert results.exists(), done.stdout[-3000:] + done.stderr[-1000:]
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"
        words = {"failure": "FAILED", "error": "ERROR", "skipped": "SKIPPED"}
        found[name] = next((words[part.tag] for part in case if part.tag in words), "PASSED")
    assert found, done.stdout[-3000:]
    return done.returncode, found


def outcomes(found: dict[str, str], test: str) -> set[str]:
    """Of a test, or of all its parameters."""
    return {outcome for name, outcome in found.items() if name == test or name.startswith(f"{test}[")}


@contextmanager
def without(mutant: Mutant, project: Path) -> Iterator[None]:
    """The copy with the guard taken out."""
    file = project / mutant.file
    source = file.read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_each_guard_is_where_the_list_says(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.new != mutant.old
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")


def test_each_guard_has_a_name_and_a_test_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        file, _, test = mutant.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), mutant.test


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as far as these tests need it."""
    folder = tmp_path_factory.mktemp("project")
    for name in NEEDED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    (folder / "tests" / "export" / "conftest.py").unlink()  # it imports torchao, which takes seconds
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> dict[str, str]:
    """What the tests say while every guard is there."""
    code, found = run(project, sorted({mutant.test for mutant in MUTANTS}))
    assert code == 0, [name for name, outcome in found.items() if outcome not in ("PASSED", "SKIPPED")]
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_without_a_guard_its_test_fails(mutant: Mutant, project: Path, whole: dict[str, str]) -> None:
    before = outcomes(whole, mutant.test)
    if before == {"SKIPPED"}:
        pytest.skip(f"{mutant.test} is skipped here")
    assert before <= {"PASSED", "SKIPPED"}
    with without(mutant, project):
        code, found = run(project, [mutant.test])
    assert code == 1
    assert "FAILED" in outcomes(found, mutant.test)
    assert "ERROR" not in outcomes(found, mutant.test)
