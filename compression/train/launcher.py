"""Starts the processes of one training, one for each device, and ends all of them when one ends badly.

The processes meet as under torchrun. What they do is a module that reads JSON from a file and calls ``serve``; what
they report are lines of JSON on standard output, read by ``on_message``. Each ends by itself when the process that
started it is gone.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from compression import errors
from compression.errors import CompressionError, StillhouseError

PATIENCE_SECONDS = 10.0
"""For each rank to end in order before it is killed."""
TAIL_LINES = 12


def launch(
    command: Sequence[str],
    devices: int,
    *,
    what: str,
    logs: Path,
    on_message: Callable[[Mapping[str, Any]], None],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``command`` once for each device and wait for the last of them; the first rank's messages are passed on.

    Args:
        command: what each rank runs.
        devices: number of ranks, all on this machine.
        what: names the training in errors.
        logs: folder for ``rank-<n>.log``, what the ranks print besides messages.
        on_message: gets each JSON object that the first rank prints, in the caller's thread.
        environment: in place of the caller's.

    Raises:
        StillhouseError: a rank has raised it; the type is kept.
        CompressionError: a rank has ended without saying why, or was killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    messages: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    port = _free_port()
    ranks: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    said: dict[int, dict[str, Any]] = {}
    try:
        for rank in range(devices):
            meeting = _meeting(rank, devices, port)
            with (logs / f"rank-{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**(os.environ if environment is None else environment), **meeting},
                    start_new_session=True,
                )
            ranks.append(process)
            reader = threading.Thread(target=_read, args=(rank, process.stdout, messages), daemon=True)
            reader.start()
            readers.append(reader)
        while True:
            _pass_on(messages, said, on_message)
            codes = [process.poll() for process in ranks]
            if any(codes) or None not in codes:
                break
            time.sleep(0.05)
        failed = any(codes)
        if failed:
            _wait(ranks, seconds=2.0)  # those that a lost connection ends say so themselves
            codes = [process.poll() for process in ranks]
    finally:
        _end(ranks)
        for reader in readers:
            reader.join(timeout=5)
        _pass_on(messages, said, on_message)
    if failed:
        raise _reason(what, codes, said, logs)


def serve(work: Callable[[], None]) -> NoReturn:
    """Called by a rank: do its work and leave with an exit code; it also ends when what started it is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 0
    try:
        work()
    except StillhouseError as error:
        tell(error=type(error).__name__, text=str(error))
        code = 3
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # threads of a broken process group would abort an ordinary exit


def tell(**message: Any) -> None:
    """Called by a rank: one message to the process that started it."""
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def _meeting(rank: int, devices: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(devices), "LOCAL_WORLD_SIZE": str(devices)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "TORCHELASTIC_RUN_ID": f"stillhouse-{port}",
    }


def _read(rank: int, stream: IO[str] | None, messages: "queue.SimpleQueue[tuple[int, dict[str, Any]]]") -> None:
    for line in stream or ():
        with suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                messages.put((rank, message))


def _pass_on(
    messages: "queue.SimpleQueue[tuple[int, dict[str, Any]]]",
    said: dict[int, dict[str, Any]],
    on_message: Callable[[Mapping[str, Any]], None],
) -> None:
    with suppress(queue.Empty):
        while True:
            rank, message = messages.get_nowait()
            if "error" in message:
                said[rank] = message
            elif rank == 0:
                on_message(message)


def _reason(what: str, codes: Sequence[int | None], said: Mapping[int, dict[str, Any]], logs: Path) -> StillhouseError:
    """The error to raise: what a rank said, else which one was killed, else which ended first."""
    for message in said.values():
        kind = getattr(errors, message["error"], CompressionError)
        return kind(message["text"])
    bad = [rank for rank, code in enumerate(codes) if code]
    killed = [rank for rank in bad if (codes[rank] or 0) < 0]
    rank = (killed or bad)[0]
    code = codes[rank] or 0
    how = f"was ended by signal {-code}" if code < 0 else f"has ended with exit code {code}"
    log = logs / f"rank-{rank}.log"
    return CompressionError(
        f"Training of {what} has lost process {rank} of {len(codes)}: it {how}, expected all to end well. The last "
        f"checkpoint is kept: start again. Last lines of {log}:\n{_tail(log)}"
    )


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"


def _end(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """The first rank first, so that it leaves while the others still answer and not because they left."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(ranks: Sequence[subprocess.Popen[str]], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
