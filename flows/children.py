"""Child processes: started with a log file, watched, and ended by pid without touching anyone else's."""

import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from compression.errors import StillhouseError
from flows import tied

PATIENCE_SECONDS = 12.0  # a polite end takes a server 1-3 s; after this it is killed
DRAIN_SECONDS = 18.0  # a worker's runs get 10 s of it
TAIL_LINES = 15
RESTARTS = 3
"""How often a program that ends by itself is started again ..."""
RESTARTS_SECONDS = 600.0
"""... within so many seconds; a program that ends more often will not run by being started."""


class ServerError(StillhouseError):
    """A server or worker ended, or did not get ready."""


@dataclass
class Child:
    """One running program of ours, and where its output goes."""

    name: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]
    created: float
    """Start time in seconds since the epoch; with the pid it identifies the process."""
    owns_descendants: bool = True
    """Whether what it started is of no use without it; a worker's flow runs go on."""
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    """Every descendant noticed so far; some start a session of their own."""
    restarts: list[float] = field(default_factory=list)
    """When it was started again, by the monotonic clock."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def require_alive(self) -> None:
        """Raises ServerError with the last lines of the log when the program has ended."""
        code = self.exit_code
        if code is not None:
            raise ServerError(
                f"{self.name} (pid {self.process.pid}) has ended with exit code {code}, expected it to keep running. "
                f"Last lines of {self.log}:\n{tail(self.log)}"
            )

    def start_again(self) -> None:
        """Start the ended program anew, with the same command and the same log."""
        self.restarts.append(time.monotonic())
        self.process, self.created = _launch(self.command, self.environment, self.folder, self.log)

    def restarts_within(self, seconds: float) -> int:
        """How often it was started again in the last ``seconds``."""
        return sum(time.monotonic() - when < seconds for when in self.restarts)

    def notice_descendants(self) -> None:
        """Remember the processes below this one, so that they are found even when it dies first."""
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.seen[process.pid] = process

    def identity(self) -> dict[str, Any]:
        """What a later program needs to find this one again."""
        return {"pid": self.process.pid, "created": self.created, "log": str(self.log)}


def start(name: str, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path) -> Child:
    """The started program, tied to this process, in a session of its own: Ctrl-C reaches only its parent."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    process, created = _launch(command, environment, folder, log)
    return Child(name, list(command), dict(environment), folder, log, process, created)


def _launch(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
) -> tuple[subprocess.Popen[bytes], float]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            tied.command(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    try:
        return process, psutil.Process(process.pid).create_time()
    except psutil.Error:
        return process, time.time()


def restart(child: Child) -> str:
    """Start an ended program again, and say so in a sentence.

    Raises:
        ServerError: it has ended too often; the last lines of its log are in the message.
    """
    done = child.restarts_within(RESTARTS_SECONDS)
    if done >= RESTARTS:
        raise ServerError(
            f"{child.name} (pid {child.process.pid}) has ended with exit code {child.exit_code} although it was "
            f"started again {done} times within {RESTARTS_SECONDS / 60:.0f} minutes, expected it to keep running. "
            f"Last lines of {child.log}:\n{tail(child.log)}"
        )
    sentence = (
        f"{child.name} (pid {child.process.pid}) has ended with exit code {child.exit_code}; "
        f"started again ({done + 1} of {RESTARTS} times in {RESTARTS_SECONDS / 60:.0f} minutes)."
    )
    if child.owns_descendants:
        end_processes(child.seen.values(), patience=3.0)  # they may hold its port
    child.start_again()
    return sentence


def end(children: Iterable[Child]) -> None:
    """End the programs and everything below them: asked first, killed when they do not follow.

    Workers end before the servers, so that their runs can still say how they ended.
    """
    programs = list(children)
    for child in programs:
        child.notice_descendants()
    _ask([child for child in programs if not child.owns_descendants], DRAIN_SECONDS)
    _ask([child for child in programs if child.owns_descendants], PATIENCE_SECONDS)
    end_processes([process for child in programs for process in child.seen.values()], patience=3.0)


def _ask(programs: Sequence[Child], patience: float) -> None:
    for child in programs:
        if child.exit_code is None:
            with suppress(ProcessLookupError):
                child.process.terminate()
    deadline = time.monotonic() + patience
    for child in programs:
        try:
            child.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def end_processes(processes: Iterable[psutil.Process], *, patience: float = PATIENCE_SECONDS) -> int:
    """How many of these processes still ran and were ended; psutil refuses a pid that was given to another."""
    alive = [process for process in processes if _is_alive(process)]
    for process in alive:
        with suppress(psutil.Error):
            process.terminate()
    _, stubborn = psutil.wait_procs(alive, timeout=patience)
    for process in stubborn:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stubborn, timeout=patience)
    return len(alive)


def find(identity: Mapping[str, Any]) -> psutil.Process | None:
    """The process that an ``identity()`` names, or None when it is gone or its pid belongs to another now."""
    try:
        process = psutil.Process(int(identity["pid"]))
        same = abs(process.create_time() - float(identity["created"])) < 1.0
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return process if same and _is_alive(process) else None


def with_descendants(process: psutil.Process) -> list[psutil.Process]:
    """The process and everything below it."""
    with suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return [process]


def listens(pid: int, port: int) -> bool:
    """Whether a process, or one below it, listens at a TCP port; so that nobody else's server is taken for ours."""
    with suppress(psutil.NoSuchProcess):
        for process in with_descendants(psutil.Process(pid)):
            with suppress(psutil.Error):
                here = process.net_connections("tcp")
                if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in here):
                    return True
    return False


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented; says so when there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"  (cannot be read: {error})"
    wanted = [line for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"  {line}" for line in wanted) or "  (empty)"


def write_json(path: Path, value: Any) -> None:
    """Replace a small file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
