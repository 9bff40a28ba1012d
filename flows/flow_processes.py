"""The processes of flow runs on this machine: which one carries a run out, and what else works for it."""

import os
from collections.abc import Iterator
from contextlib import suppress

import psutil

from flows.deployments import FLOW_RUN_VARIABLE

ENGINES = {"prefect.engine", "prefect.runner._workspace_supervisor"}
"""What a worker starts for a run; the second becomes the first."""


def engine_processes() -> dict[str, psutil.Process]:
    """Flow run id -> the process of this machine that carries it out, without what that process started."""
    return {run: process for run, process in _with_flow_run() if _is_engine(process)}


def processes_of(run: str) -> list[psutil.Process]:
    """Everything that works for a run, this process excepted."""
    return [process for other, process in _with_flow_run() if other == run and process.pid != os.getpid()]


def _with_flow_run() -> Iterator[tuple[str, psutil.Process]]:
    for process in psutil.process_iter(["environ", "status"]):
        run = (process.info["environ"] or {}).get(FLOW_RUN_VARIABLE)
        if run and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield run, process


def _is_engine(process: psutil.Process) -> bool:
    """A worker starts its runs in sessions of their own; what a run forks looks the same, but has no session."""
    with suppress(psutil.Error, OSError):
        return bool(ENGINES.intersection(process.cmdline())) and os.getsid(process.pid) == process.pid
    return False
