"""Whose work something is: a process, told apart from a later one that was given the same pid."""

import os
import socket
from functools import cache
from pathlib import Path

from compression.types import Frozen

_TICKS = os.sysconf("SC_CLK_TCK")


class Owner(Frozen):
    """A process of a machine. Small enough to travel as JSON or as tags."""

    host: str
    boot_id: str
    """Changes whenever the machine starts."""
    pid: int
    created: float
    """When the process started, in seconds after the machine did: nobody sets that clock."""

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        found = cls.of(os.getpid())
        if found is None:
            raise RuntimeError("/proc is not readable, expected Linux.")
        return found

    @classmethod
    def of(cls, pid: int) -> "Owner | None":
        """The process of this machine that has this pid now, or None."""
        created = _created(pid)
        if created is None:
            return None
        return cls(host=socket.gethostname(), boot_id=boot_id(), pid=pid, created=created)

    def is_alive(self) -> bool | None:
        """Whether it still runs; None on another machine, where nobody here can tell."""
        if self.host != socket.gethostname():
            return None
        return self.boot_id == boot_id() and _created(self.pid) == self.created

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def boot_id() -> str:
    """What the kernel calls this start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _created(pid: int) -> float | None:
    """Seconds from the machine's start to the process's; None when there is no such process, or only its remains."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    state, ticks = fields[0], fields[19]
    return None if state in ("Z", "X") else int(ticks) / _TICKS
