"""A Prefect server for as long as somebody needs it: for runs from the command line without ``stillhouse up``.

A keeper process starts the server and ends it when its last user is gone. Users hold a shared lock on a file, which
the kernel releases however they die, so no server is left behind. Two runs share one server: two servers on one SQLite
database would run every service twice and lock each other out. The database is the project's, so records stay.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock
from rich.console import Console

from flows import children
from flows.children import Child, ServerError
from flows.ports import HOST, answers, any_port
from tasks.running import leases
from tasks.settings import SOURCE_ROOT, prepare_prefect, settings

START_SECONDS = 180.0
LINGER_SECONDS = 3.0
"""A server without users lives on for so long: late events arrive, and the next run finds it."""
POLL_SECONDS = 0.5
STARTS = 3
"""How often a server that ends before it answers is started, each time on another port."""


@contextmanager
def temporary_server(console: Console | None = None) -> Iterator[str]:
    """Have a Prefect server while the block runs; gives the address of its API, which Prefect uses in the block.

    Where ``PREFECT_API_URL`` names a server already, that is it, and nothing is started.

    Raises:
        ServerError: the server does not start; the last lines of its log are in the message.
    """
    prepare_prefect()
    if given := os.environ.get("PREFECT_API_URL"):
        yield given
        return
    console = console or Console(quiet=True)
    with _using():
        with console.status("Starting a temporary Prefect server"):
            api = _find_or_start()
        before = use_api(api)
        try:
            _settle_the_dead(api)
            yield api
        finally:
            _send_what_waits()
            use_api(before)


def _settle_the_dead(api: str) -> None:
    """Nobody else does for runs from the command line."""
    if any(not lease.is_alive() for lease in leases()):
        from flows.deployments import connect
        from flows.reconcile import reconcile

        with connect(api) as client:
            reconcile(client)


def use_api(api: str | None) -> str | None:
    """Point Prefect, and every process started from here, at a server; gives the one it pointed at before."""
    before = os.environ.pop("PREFECT_API_URL", None)
    if api is not None:
        os.environ["PREFECT_API_URL"] = api
    refresh_settings()
    return before


def refresh_settings() -> None:
    """Have Prefect read the environment again, if it was imported and has read it already."""
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def living_server() -> str | None:
    """The API of this project's temporary server, if one runs."""
    try:
        state = json.loads(state_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    alive = children.find(state.get("keeper", {})) is not None
    return state["api"] if alive and answers(f"{state['api']}/health") else None


def state_path() -> Path:
    """The file that says where the temporary server answers."""
    return settings().home_dir / "temporary-server.json"


def _users_path() -> Path:
    return settings().home_dir / "temporary-server.users"


def _log_path() -> Path:
    return settings().home_dir / "logs" / "temporary-prefect-server.log"


@contextmanager
def _using() -> Iterator[None]:
    """Count as a user; waits while the keeper ends a server."""
    _users_path().parent.mkdir(parents=True, exist_ok=True)
    with _users_path().open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _find_or_start() -> str:
    locks = settings().home_dir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "temporary-server.lock"):
        found = living_server()
        if found is not None:
            return found
        state_path().unlink(missing_ok=True)
        return _start_keeper()


def _start_keeper() -> str:
    log = _log_path().with_name("temporary-server-keeper.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "flows.temporary_server"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while keeper.poll() is None and time.monotonic() < deadline:
        if state_path().exists():
            return json.loads(state_path().read_text(encoding="utf-8"))["api"]
        time.sleep(0.05)
    keeper.terminate()
    raise ServerError(
        f"The temporary Prefect server did not start. Last lines of {log}:\n{children.tail(log)}\n"
        f"Last lines of {_log_path()}:\n{children.tail(_log_path())}"
    )


def _send_what_waits() -> None:
    """Events and log lines are sent by threads; the server should get them before it ends."""
    if "prefect.events.worker" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(timeout=5.0, at_exit=False)


def keep() -> None:
    """The keeper's life: start the server, write down where it answers, end it when nobody uses it any more."""
    with _users_path().open("ab") as users:
        server: Child | None = None
        try:
            server = _start_server(users)
            if server is not None:
                _until_unused(server, users)
        finally:
            state_path().unlink(missing_ok=True)
            children.end([server] if server is not None else [])


def _start_server(users: IO[Any]) -> Child | None:
    """The answering server, or None when its users went before it was ready."""
    for start in range(STARTS):
        api = f"http://{HOST}:{any_port()}/api"
        server = children.start(
            "Temporary Prefect server",
            server_command(api),
            environment=server_environment(api),
            folder=settings().home_dir,
            log=_log_path(),
        )
        while server.exit_code is None and not answers(f"{api}/health"):
            if _unused(users):
                children.end([server])
                return None
            time.sleep(0.1)
        if server.exit_code is None:
            me = psutil.Process()
            keeper = {"pid": me.pid, "created": me.create_time()}
            children.write_json(state_path(), {"keeper": keeper, "server": server.identity(), "api": api})
            return server
        if start == STARTS - 1:
            server.require_alive()
    return None


def server_command(api: str) -> list[str]:
    """The command of a Prefect server that answers at ``api``."""
    host, _, port = api.removeprefix("http://").removesuffix("/api").partition(":")
    return [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", port]


def server_environment(api: str) -> dict[str, str]:
    """No schedules here: without a worker their runs would only come late."""
    return {
        **os.environ,
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_UI_API_URL": api,
        "PREFECT_UI_API_URL": api,
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    }


def _until_unused(server: Child, users: IO[Any]) -> None:
    """Returns with the users' lock held, so that a new user waits until the server has ended."""
    free_since: float | None = None
    while True:
        time.sleep(POLL_SECONDS)
        if server.exit_code is not None:
            children.restart(server)
        if not _unused(users):
            free_since = None
            continue
        free_since = free_since or time.monotonic()
        if time.monotonic() - free_since >= LINGER_SECONDS and _lock_alone(users):
            return


def _unused(users: IO[Any]) -> bool:
    alone = _lock_alone(users)
    if alone:
        fcntl.flock(users, fcntl.LOCK_UN)
    return alone


def _lock_alone(users: IO[Any]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    prepare_prefect()
    keep()
