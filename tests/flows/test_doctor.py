from pathlib import Path

import pytest
from rich.console import Console

from flows import doctor
from tasks.settings import settings


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks()}


def test_a_working_machine_is_reported_as_such(home: Path) -> None:
    found = by_name()
    for name in ("python", "disk", "store", "torch", "onnxruntime", "fastapi", "sqlalchemy", "prefect", "mlflow"):
        assert found[name].status == "ok", found[name]
    assert "CPU" in found["onnxruntime"].found
    console = Console(record=True, width=200)
    assert doctor.report(console) == 0
    assert "Runs work here" in console.export_text()


def test_what_is_missing_comes_with_a_way_out(home: Path) -> None:
    for check in doctor.checks():
        if check.status == "missing" or check.found == "not installed":
            assert check.way_out, check


def test_an_unwritable_store_is_a_row_and_an_exit_code(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("in the way")
    monkeypatch.setenv("STILLHOUSE_HOME", str(home / "file"))
    settings.cache_clear()
    assert by_name()["store"].status == "missing"
    assert doctor.report(Console(quiet=True)) == 3


def test_a_look_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def _broken():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "LOOKS", (_broken,))
    (check,) = doctor.checks()
    assert check.status == "warn"
    assert "no such thing" in check.found


def test_versions_that_break_the_servers_are_named(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: {"fastapi": "0.165.0", "sqlalchemy": "2.1.9"}.get(package))
    found = by_name()
    assert found["fastapi"].status == "missing"
    assert "does not start" in found["fastapi"].way_out
    assert found["sqlalchemy"].status == "missing"
    assert "schedules" in found["sqlalchemy"].way_out
