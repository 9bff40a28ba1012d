"""What work costs: CPU seconds, and energy where the machine tells it."""

import os
import resource
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

POWERCAP = Path("/sys/class/powercap")
SECONDS_BETWEEN_READINGS = 30.0
"""A counter starts again at zero after some minutes of full load; it must not do so twice between two readings."""


@dataclass
class _Counter:
    """Energy of one processor package (RAPL), in microjoules that start again at zero after ``span``."""

    file: Path
    span: int
    last: int
    total: int = 0

    def read(self) -> None:
        now = int(self.file.read_text())
        self.total += (now - self.last) % self.span
        self.last = now


class Meter:
    """Measures what happens inside its ``with`` block; the figures are of the moment they are asked for.

    CPU seconds are those of this process and of the children it has waited for. Energy is that of the machine's
    processor packages, whoever used them. Work that goes on beside the block is therefore counted too.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._counters = _counters(powercap)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_reading, name="energy", daemon=True)
        self._cpu = 0.0

    def __enter__(self) -> "Meter":
        self._cpu = _cpu_seconds()
        if self._counters:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    @property
    def cpu_seconds(self) -> float:
        """User and system time."""
        return _cpu_seconds() - self._cpu

    @property
    def energy_j(self) -> float | None:
        """Joules, or None where the machine does not tell."""
        with self._lock:
            self._read()
            return sum(each.total for each in self._counters) / 1e6 if self._counters else None

    def _keep_reading(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_READINGS):
            with self._lock:
                self._read()

    def _read(self) -> None:
        try:
            for counter in self._counters:
                counter.read()
        except (OSError, ValueError):  # it has told so far, and does no more
            self._counters = []


def _counters(powercap: Path) -> list[_Counter]:
    """One for each processor package that may be read; none if any may not."""
    found = []
    try:
        for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's too; parts of a package are intel-rapl:0:0
            if (folder / "name").read_text().startswith("package"):
                span = int((folder / "max_energy_range_uj").read_text()) + 1
                found.append(_Counter(folder / "energy_uj", span, int((folder / "energy_uj").read_text())))
    except (OSError, ValueError):
        return []
    return found


def _cpu_seconds() -> float:
    mine, children = os.times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.user + mine.system + children.ru_utime + children.ru_stime
