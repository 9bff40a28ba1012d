"""Progress of everything that stages report: bars in a terminal, now and then a line in a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_active: "TerminalProgress | LineProgress | None" = None

SECONDS_BETWEEN_LINES = 30.0


class TerminalProgress:
    """One bar per kind of work; a bar that reaches its end stays, with the time it took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, text: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``text`` are finished."""
        if text not in self._bars:
            self._bars[text] = self._progress.add_task(text, total=total)
        self._progress.update(self._bars[text], completed=done, total=total)


class LineProgress:
    """A line when a kind of work ends, and every half minute while it goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, text: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` steps of ``text`` are finished, unless something was said just now."""
        now = time.monotonic()
        started = self._started.setdefault(text, now)
        if done < total and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        self._console.print(f"{text}: {done} of {total}, {now - started:.0f} s", markup=False, highlight=False)
        if done >= total:
            del self._started[text]


def bars(console: Console) -> Progress:
    """Bars with a count, the time that went by and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


@contextmanager
def terminal_progress(console: Console) -> Iterator[None]:
    """Show progress while the block runs."""
    global _active
    if not console.is_terminal:
        _active = LineProgress(console)
        try:
            yield
        finally:
            _active = None
        return
    with bars(console) as progress:
        _active = TerminalProgress(progress)
        try:
            yield
        finally:
            _active = None


def show(text: str, done: int, total: int) -> None:
    """Report progress, if ``terminal_progress`` is on."""
    if _active is not None:
        _active(text, done, total)
