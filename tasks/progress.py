"""Progress of long work: a bar in the terminal, and an artifact in the Prefect UI that is not written too often."""

import time
from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""``report(text, done, total)``."""


def step_reporter(report: Report, text: str) -> Callable[[int, int], None]:
    """``on_step(done, total)`` for a training loop."""
    return lambda done, total: report(text, done, total)


class Throttle:
    """Passes a report on at most once per ``seconds``, and always the last one."""

    def __init__(self, report: Report, seconds: float) -> None:
        self.report = report
        self.seconds = seconds
        self._last = -seconds

    def __call__(self, text: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= self.seconds:
            self._last = now
            self.report(text, done, total)
