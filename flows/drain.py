"""Runs a worker whose flow runs end in peace: ``python -m flows.drain PROGRAM [ARGUMENT ...]``.

A worker of Prefect's kills its flow runs the moment it is asked to end. Here they are asked first and get ten seconds:
a training saves its state. When this program is killed, the worker is killed too, and its flow runs go on.
"""

import os
import signal
import subprocess
import sys
import threading

import psutil

from flows import children, tied
from flows.flow_processes import engine_processes

DRAIN_SECONDS = 10.0
POLL_SECONDS = 0.5


def main(command: list[str]) -> int:
    """Run the worker until it ends, or this process gets SIGTERM or SIGINT; its exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    worker = subprocess.Popen(tied.command(command, signal.SIGKILL))
    while not stop.wait(POLL_SECONDS):
        if worker.poll() is not None:
            return worker.returncode if worker.returncode >= 0 else 128 - worker.returncode
    below = {process.pid for process in children.with_descendants(psutil.Process(worker.pid))}
    runs = [process for process in engine_processes().values() if process.pid in below]
    children.end_processes(runs, patience=DRAIN_SECONDS)
    worker.terminate()
    try:
        worker.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main(sys.argv[1:]))
