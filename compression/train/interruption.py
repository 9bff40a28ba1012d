"""Ctrl-C and SIGTERM arrive between steps: what a training has done is then whole, and can be saved.

Exceptions of other origin may still leave a step half done; ``is_whole`` tells.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

HELD = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Holds signals back between ``begin`` and ``end``; outside of the main thread it only keeps ``is_whole``.

    A signal that comes while another one is held is let through at once: somebody insists.
    """

    def __init__(self) -> None:
        self.is_whole = True
        """Nothing is half done."""
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: int | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in HELD:
                handler = signal.getsignal(number)
                if callable(handler):  # else the system ends the process, and there is nothing to hold back
                    self._before[number] = handler
                    signal.signal(number, self._came)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._came:
                signal.signal(number, handler)

    def begin(self) -> None:
        """Something changes from here on."""
        self.is_whole = False

    def end(self) -> None:
        """It has been done whole; a signal that came meanwhile is delivered now."""
        self.is_whole = True
        if self._held is not None:
            number, self._held = self._held, None
            self._before[number](number, None)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.is_whole or self._held is not None:
            self._before[number](number, frame)
        else:
            self._held = number
