"""Long work is seen in a terminal and in a log file alike."""

import io

import pytest
from rich.console import Console

from flows import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_half_minute_and_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    with progress.terminal_progress(Console(file=out, force_terminal=False, width=80)):
        for done in range(1, 101):
            clock[0] += 1.0
            progress.show("training teacher residual", done, 100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "training teacher residual: 30 of 100, 29 s"
    assert lines[-1] == "training teacher residual: 100 of 100, 99 s"
    assert len(lines) == 4


def test_short_work_in_a_log_file_is_one_line_each(clock: list[float]) -> None:
    out = io.StringIO()
    with progress.terminal_progress(Console(file=out, force_terminal=False, width=80)):
        for name in ("a", "b"):
            for done in (1, 2):
                progress.show(name, done, 2)
    assert out.getvalue().splitlines() == ["a: 2 of 2, 0 s", "b: 2 of 2, 0 s"]


def test_a_terminal_gets_bars() -> None:
    out = io.StringIO()
    with progress.terminal_progress(Console(file=out, force_terminal=True, width=100)):
        progress.show("training student-0", 3, 3)
    assert "training student-0" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_nothing_is_shown_outside_of_the_block() -> None:
    progress.show("training", 1, 2)
    assert progress._active is None
