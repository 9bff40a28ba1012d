"""Starts a program that ends with the process that started it: ``tied.py PARENT SIGNAL PROGRAM [ARGUMENT ...]``.

On Linux the kernel sends the signal (a number) when the parent (a pid) dies, however it dies; for each of its threads
once, so the program has to bear it more than once. What the program starts itself is not tied. The kernel watches the
thread that started the program: start tied programs from a thread that lasts. On other systems nothing is tied, and
the next ``stillhouse up`` ends what it finds on record.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
PARENT_GONE = 75
"""Exit code when the parent died before it could be watched."""


def command(program: Sequence[str], number: int = signal.SIGTERM) -> list[str]:
    """The command that starts a program tied to this process; it keeps the pid."""
    return [sys.executable, "-I", __file__, str(os.getpid()), str(int(number)), *program]


def tie(parent: int, number: int) -> None:
    """Have the kernel send a signal to this process when ``parent`` dies; it survives ``exec``."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:
        sys.exit(PARENT_GONE)


if __name__ == "__main__":
    tie(int(sys.argv[1]), int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])
