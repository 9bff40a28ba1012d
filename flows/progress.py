"""Progress bars in the terminal for everything that stages report."""

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

_active: "TerminalProgress | None" = None


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


@contextmanager
def terminal_progress(console: Console) -> Iterator[None]:
    """Show bars while the block runs."""
    global _active
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        _active = TerminalProgress(progress)
        try:
            yield
        finally:
            _active = None


def show(text: str, done: int, total: int) -> None:
    """Move the terminal's bar, if there is a terminal."""
    if _active is not None:
        _active(text, done, total)
