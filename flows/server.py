"""``stillhouse up``: Prefect server, worker and MLflow UI as child processes, with the deployments registered."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console

from compression.errors import InputError
from flows import children, deployments, temporary_server
from flows.children import Child, ServerError
from flows.ports import HOST, answers, free_port, is_free, is_loopback, require_address
from tasks.settings import prepare_prefect, settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from flows.reconcile import Settled

logger = logging.getLogger(__name__)

START_SECONDS = 180.0
RECONCILE_SECONDS = 5.0
"""How long after a pass of the reconciler the next one begins."""


@dataclass(frozen=True)
class Running:
    """Where the servers of a running ``stillhouse up`` answer."""

    prefect_url: str
    """Address of the Prefect UI."""
    prefect_api: str
    mlflow_url: str
    """Address of the MLflow UI."""
    devices_url: str = ""
    """Where devices pull and report, if there are any."""


def state_path() -> Path:
    """The file that says what runs."""
    return settings().home_dir / "up.json"


def running_server() -> Running | None:
    """The servers of a live ``stillhouse up`` of this project, or None."""
    try:
        state = json.loads(state_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if children.find(state.get("program", {})) is None:
        return None
    found = Running(**{each.name: state[each.name] for each in fields(Running) if each.name in state})
    return found if answers(f"{found.prefect_api}/health") else None


def use_running_server() -> str | None:
    """Point Prefect, in this process, at the server of ``stillhouse up`` if one runs; the address of its API."""
    found = running_server()
    if found is None:
        return None
    temporary_server.use_api(found.prefect_api)
    os.environ["STILLHOUSE_MLFLOW_UI"] = found.mlflow_url
    return found.prefect_api


@contextmanager
def prefect_server(console: Console, what: str) -> Iterator[None]:
    """Have a Prefect server while the block runs: that of `stillhouse up`, or a temporary one."""
    found = use_running_server()
    if found is not None:
        console.print(f"[bold]{what}[/bold]: running with Prefect at {found}.")
        yield
        return
    with temporary_server.temporary_server(console):
        console.print(
            f"[bold]{what}[/bold]: running with a temporary Prefect server (`stillhouse up` starts a lasting one)."
        )
        yield


def up(
    prefect_port: int | None = None,
    mlflow_port: int | None = None,
    *,
    host: str = HOST,
    stop: threading.Event | None = None,
    deployments_file: Path | None = None,
    folder: Path | None = None,
    console: Console | None = None,
) -> int:
    """Run until Ctrl-C, SIGTERM or ``stop``; returns the exit code: 0 after a wanted end, 3 when a child kept dying.

    Args:
        prefect_port: Port of the Prefect server; None: 4200 or the next free one.
        mlflow_port: Port of the MLflow UI; None: 5000 or the next free one.
        host: Address the Prefect server listens at. The MLflow UI, which asks nobody who they are, is only for this
            machine.
        stop: Ends it from another thread.
        deployments_file: What to register; default ``prefect.yaml``.
        folder: Where flows are loaded from; default the project's root.
        console: Where to print.

    Raises:
        InputError: a port is taken, the address is open to others without a password, or another server of this
            project runs already.
    """
    console = console or Console()
    prepare_prefect()
    _refuse_a_second()
    _require_password(host)
    ports = {"Prefect": free_port("Prefect", prefect_port, host), "MLflow": free_port("MLflow", mlflow_port)}
    stop = stop or threading.Event()
    folder = folder or settings().root
    file = deployments_file or folder / "prefect.yaml"
    programs: list[Child] = []
    with _ending_on_signals(stop):
        try:
            found = _start(programs, ports, host, file, folder, console, stop)
            _announce(found, console)
            _watch(found, programs, console, stop)
        except ServerError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            return 3
        finally:
            state_path().unlink(missing_ok=True)
            with console.status("Ending the servers"):
                children.end(reversed(programs))
    console.print("All servers have ended.")
    return 0


def _refuse_a_second() -> None:
    already = running_server()
    if already is not None:
        raise InputError(
            f"`stillhouse up` runs here already: Prefect {already.prefect_url}, MLflow {already.mlflow_url}. "
            "Use it, or end it with Ctrl-C first."
        )
    temporary = temporary_server.living_server()
    if temporary is not None and not os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL"):
        raise InputError(
            f"A recipe runs here with a temporary Prefect server at {temporary.removesuffix('/api')}, expected none: "
            "two servers on one SQLite database lock each other out. Wait for the recipe's end, or look at it there."
        )
    _end_recorded()


def _end_recorded() -> None:
    """End what an earlier ``stillhouse up`` left running, where the kernel did not."""
    try:
        state = json.loads(state_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    left = [children.find(identity) for identity in state.get("children", {}).values()]
    children.end_processes(each for process in left if process for each in children.with_descendants(process))


def _require_password(host: str) -> None:
    """Others may come in only with a password; our own programs then use it too."""
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING

    password = PREFECT_SERVER_API_AUTH_STRING.value()
    if not is_loopback(host):
        require_address(host)
        if not password:
            raise InputError(
                f"Address '{host}' is open to other machines and no password is set, expected one: whoever reaches the "
                "server can run code here. Set PREFECT_SERVER_API_AUTH_STRING=user:password, or leave --host out."
            )
    if password:
        os.environ.setdefault("PREFECT_API_AUTH_STRING", str(password))
        temporary_server.refresh_settings()


def child_environment(ports: Mapping[str, int], folder: Path, host: str = HOST) -> dict[str, str]:
    """What every child sees: this project's Prefect home and server, MLflow's place, no job runners."""
    prepare_prefect()
    here = HOST if host == "0.0.0.0" else host
    shown = socket.gethostname() if host == "0.0.0.0" else host
    api_for_pages = f"http://{shown}:{ports['Prefect']}/api"
    known = {name: value for name, value in os.environ.items() if not name.startswith("STILLHOUSE_NOTIFY_")}
    return {
        **known,
        "PREFECT_API_URL": f"http://{here}:{ports['Prefect']}/api",
        "PREFECT_SERVER_UI_API_URL": api_for_pages,  # without it the page calls port 4200 whatever the server's port is
        "PREFECT_UI_API_URL": api_for_pages,
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "5"),
        "STILLHOUSE_MLFLOW_UI": f"http://{HOST}:{ports['MLflow']}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _start(
    programs: list[Child],
    ports: Mapping[str, int],
    host: str,
    file: Path,
    folder: Path,
    console: Console,
    stop: threading.Event,
) -> Running:
    environment = child_environment(ports, folder, host)
    logs = settings().home_dir / "logs"
    api = environment["PREFECT_API_URL"]
    page = environment["PREFECT_UI_API_URL"].removesuffix("/api")
    found = Running(page, api, environment["STILLHOUSE_MLFLOW_UI"])

    def start(name: str, command: list[str]) -> Child:
        log = logs / f"{name.lower().replace(' ', '-')}.log"
        program = children.start(name, command, environment=environment, folder=folder, log=log)
        programs.append(program)
        return program

    python = [sys.executable, "-m"]
    server = start(
        "Prefect server", [*python, *"prefect server start --host".split(), host, "--port", str(ports["Prefect"])]
    )
    settings().mlruns_dir.mkdir(parents=True, exist_ok=True)
    mlflow = None
    if not settings().tracking_uri.startswith("http"):
        artifacts = (settings().mlruns_dir / "artifacts").as_uri()
        store = ["--backend-store-uri", settings().tracking_uri, "--default-artifact-root", artifacts]
        place = ["--host", HOST, "--port", str(ports["MLflow"]), "--workers", "1"]
        mlflow = start("MLflow UI", [*python, "mlflow", "server", *store, *place])
    with console.status("Starting the Prefect server"):
        _until(
            lambda: children.listens(server.process.pid, ports["Prefect"]) and answers(f"{api}/health"), server, stop
        )
    client = deployments.connect(api)
    deployments.prepare_pool(client)
    for each in _reconcile(client):
        console.print(str(each), markup=False, highlight=False)
    with console.status("Registering the deployments"):
        register(file, folder, environment)
        deployments.refuse_unknown_parameters(client)
    from flows import automations  # it imports Prefect, which takes seconds

    for line in automations.prepare(client):
        console.print(line, markup=False, highlight=False)
    since = datetime.now(UTC)
    worker = start("Prefect worker", deployments.worker_command())
    worker.owns_descendants = False
    with console.status("Starting the worker"):
        _until(lambda: deployments.worker_is_online(client, since=since), worker, stop)
    found = _with_device_server(found, start, console)
    if mlflow is not None:
        with console.status("Starting the MLflow UI"):
            _until(lambda: _is_ready(mlflow, ports["MLflow"], f"{found.mlflow_url}/health"), mlflow, stop)
    _write_state(found, programs)
    return found


def _with_device_server(found: Running, start: Callable[[str, list[str]], Child], console: Console) -> Running:
    """Also what devices talk to, where there are devices."""
    if not (settings().devices_dir / "repository" / "metadata").is_dir():
        return found
    host, _, port = settings().device_address.rpartition(":")
    if not is_free(int(port), host):
        console.print(f"Devices: {host}:{port} is taken, so that no device server was started.", highlight=False)
        return found
    start("Device server", [sys.executable, "-m", "flows.cli", "devices", "serve"])
    return replace(found, devices_url=f"http://{host}:{port}")


def _write_state(found: Running, programs: list[Child]) -> None:
    program = psutil.Process()
    state = {
        "program": {"pid": program.pid, "created": program.create_time()},
        "prefect_url": found.prefect_url,
        "prefect_api": found.prefect_api,
        "mlflow_url": found.mlflow_url,
        "devices_url": found.devices_url,
        "children": {each.name: each.identity() for each in programs},
    }
    children.write_json(state_path(), state)


def _reconcile(client: "SyncPrefectClient") -> "list[Settled]":
    from flows.reconcile import reconcile

    return reconcile(client, starting=True)


def register(file: Path, folder: Path, environment: Mapping[str, str]) -> None:
    """Register every deployment of a file with the server.

    Raises:
        ServerError: Prefect refused; its words are in the message.
    """
    done = subprocess.run(
        deployments.registration_command(file),
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServerError(
            f"Deployments of '{file}' were refused (exit code {done.returncode}), expected all to be registered. "
            f"Prefect's words:\n{(done.stdout + done.stderr)[-2500:]}"
        )


def _is_ready(program: Child, port: int, health: str) -> bool:
    return children.listens(program.process.pid, port) and answers(health)


def _until(ready: Callable[[], bool], program: Child, stop: threading.Event) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        program.require_alive()
        if stop.wait(0.3):
            raise ServerError("Stopped before everything had started.")
        if time.monotonic() > deadline:
            raise ServerError(
                f"{program.name} did not answer within {START_SECONDS:.0f} s. "
                f"Last lines of {program.log}:\n{children.tail(program.log)}"
            )


def _watch(found: Running, programs: list[Child], console: Console, stop: threading.Event) -> None:
    """Until ``stop``: start what dies again, and have the reconciler look around.

    Raises:
        ServerError: a program keeps dying.
    """
    from flows.reconcile import wait_and_reconcile

    def say(text: object) -> None:
        console.print(str(text), markup=False, highlight=False, soft_wrap=True)

    threading.Thread(
        target=wait_and_reconcile, args=(found.prefect_api, RECONCILE_SECONDS, stop, say), name="reconcile", daemon=True
    ).start()
    while not stop.wait(1.0):
        for program in programs:
            if program.exit_code is None:
                program.notice_descendants()
                continue
            say(children.restart(program))
            _write_state(found, programs)


def _announce(found: Running, console: Console) -> None:
    console.print(f"Prefect UI:  [link={found.prefect_url}]{found.prefect_url}[/link]")
    console.print(f"MLflow UI:   [link={found.mlflow_url}]{found.mlflow_url}[/link]")
    if found.devices_url:
        console.print(f"Devices:     {found.devices_url} (repository and reports)", highlight=False)
    console.print(
        "Start a run: Deployments > compress > Run, or `stillhouse compress recipes/digits.yaml` in another terminal."
    )
    console.print(f"Logs are in {settings().home_dir / 'logs'}. Ctrl-C ends everything.")


class _ending_on_signals:  # noqa: N801  (reads as what it does in a with statement)
    """Turns Ctrl-C and SIGTERM into ``stop`` while the block runs; only possible in the main thread."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda *_: self._stop.set())

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
