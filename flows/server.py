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
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from compression.errors import InputError
from flows import children, deployments
from flows.children import Child, ServerError
from tasks.settings import prepare_prefect, settings

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
DEFAULT_PORTS = {"Prefect": 4200, "MLflow": 5000}
START_SECONDS = 180.0
OPTIONS = {"Prefect": "--prefect-port", "MLflow": "--mlflow-port"}


@dataclass(frozen=True)
class Running:
    """Where the servers of a running ``stillhouse up`` answer."""

    prefect_url: str
    """Address of the Prefect UI."""
    prefect_api: str
    mlflow_url: str
    """Address of the MLflow UI."""


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
    found = Running(**{key: state[key] for key in ("prefect_url", "prefect_api", "mlflow_url")})
    return found if _answers(f"{found.prefect_api}/health") else None


def up(
    prefect_port: int | None = None,
    mlflow_port: int | None = None,
    *,
    stop: threading.Event | None = None,
    deployments_file: Path | None = None,
    folder: Path | None = None,
    console: Console | None = None,
) -> int:
    """Run until Ctrl-C, SIGTERM or ``stop``; returns the exit code: 0 after a wanted end, 3 when a child died.

    Args:
        prefect_port: Port of the Prefect server; None: 4200 or the next free one.
        mlflow_port: Port of the MLflow UI; None: 5000 or the next free one.
        stop: Ends it from another thread.
        deployments_file: What to register; default ``prefect.yaml``.
        folder: Where flows are loaded from; default the project's root.
        console: Where to print.

    Raises:
        InputError: a port is taken, or another ``stillhouse up`` runs already.
    """
    console = console or Console()
    already = running_server()
    if already is not None:
        raise InputError(
            f"`stillhouse up` runs here already: Prefect {already.prefect_url}, MLflow {already.mlflow_url}. "
            "Use it, or end it with Ctrl-C first."
        )
    ports = {"Prefect": free_port("Prefect", prefect_port), "MLflow": free_port("MLflow", mlflow_port)}
    stop = stop or threading.Event()
    folder = folder or settings().root
    file = deployments_file or folder / "prefect.yaml"
    programs: list[Child] = []
    with _ending_on_signals(stop):
        try:
            found = _start(programs, ports, file, folder, console, stop)
            _announce(found, console)
            _watch(programs, stop)
        except ServerError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            return 3
        finally:
            state_path().unlink(missing_ok=True)
            with console.status("Ending the servers"):
                children.end(reversed(programs))
    console.print("All servers have ended.")
    return 0


def free_port(name: str, wanted: int | None) -> int:
    """``wanted`` if it is free, else an error that names who holds it; without a wish the first free one.

    Raises:
        InputError: the wanted port is taken.
    """
    if wanted is not None:
        if _is_free(wanted):
            return wanted
        raise InputError(
            f"Port {wanted} for {name} is in use{_holder(wanted)}, expected a free one. "
            f"Choose another with {OPTIONS[name]}, or leave the option out for a free one."
        )
    first = DEFAULT_PORTS[name]
    return next(port for port in range(first, first + 2000) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    with suppress(psutil.Error, PermissionError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by '{psutil.Process(connection.pid).name()}' (pid {connection.pid})"
    return ""


def child_environment(ports: Mapping[str, int], folder: Path) -> dict[str, str]:
    """What every child sees: this project's Prefect home and server, MLflow's place, no job runners."""
    prepare_prefect()
    api = f"http://{HOST}:{ports['Prefect']}/api"
    return {
        **os.environ,
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_UI_API_URL": api,  # without it the page calls port 4200 whatever the server's port is
        "PREFECT_UI_API_URL": api,
        "STILLHOUSE_MLFLOW_UI": f"http://{HOST}:{ports['MLflow']}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _start(
    programs: list[Child], ports: Mapping[str, int], file: Path, folder: Path, console: Console, stop: threading.Event
) -> Running:
    environment = child_environment(ports, folder)
    logs = settings().home_dir / "logs"
    api = environment["PREFECT_API_URL"]
    found = Running(f"http://{HOST}:{ports['Prefect']}", api, environment["STILLHOUSE_MLFLOW_UI"])

    def start(name: str, command: list[str]) -> Child:
        log = logs / f"{name.lower().replace(' ', '-')}.log"
        program = children.start(name, command, environment=environment, folder=folder, log=log)
        programs.append(program)
        return program

    python = [sys.executable, "-m"]
    server = start(
        "Prefect server", [*python, "prefect", "server", "start", "--host", HOST, "--port", str(ports["Prefect"])]
    )
    artifacts = (settings().mlruns_dir / "artifacts").as_uri()
    settings().mlruns_dir.mkdir(parents=True, exist_ok=True)
    store = ["--backend-store-uri", settings().tracking_uri, "--default-artifact-root", artifacts]
    mlflow = None
    if not settings().tracking_uri.startswith("http"):
        command = [
            *python,
            "mlflow",
            "server",
            *store,
            "--host",
            HOST,
            "--port",
            str(ports["MLflow"]),
            "--workers",
            "1",
        ]
        mlflow = start("MLflow UI", command)
    with console.status("Starting the Prefect server"):
        _until(lambda: _answers(f"{api}/health"), server, stop)
    client = deployments.connect(api)
    deployments.prepare_pool(client)
    settled = deployments.settle_interrupted_runs(client, reason="Its process was gone when `stillhouse up` started.")
    for name in settled:
        console.print(f"Flow run '{name}' had no process any more; marked as crashed. Start it again to resume.")
    with console.status("Registering the deployments"):
        register(file, folder, environment)
    since = datetime.now(UTC)
    worker = start("Prefect worker", deployments.worker_command())
    with console.status("Starting the worker"):
        _until(lambda: deployments.worker_is_online(client, since=since), worker, stop)
    if mlflow is not None:
        with console.status("Starting the MLflow UI"):
            _until(lambda: _answers(f"{found.mlflow_url}/health"), mlflow, stop)
    program = psutil.Process()
    state = {
        "program": {"pid": program.pid, "created": program.create_time()},
        "prefect_url": found.prefect_url,
        "prefect_api": found.prefect_api,
        "mlflow_url": found.mlflow_url,
        "children": {each.name: each.identity() for each in programs},
    }
    children.write_json(state_path(), state)
    return found


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


def _watch(programs: list[Child], stop: threading.Event) -> None:
    while not stop.wait(1.0):
        for program in programs:
            program.require_alive()
            program.notice_descendants()


def _announce(found: Running, console: Console) -> None:
    console.print(f"Prefect UI:  [link={found.prefect_url}]{found.prefect_url}[/link]")
    console.print(f"MLflow UI:   [link={found.mlflow_url}]{found.mlflow_url}[/link]")
    console.print(
        "Start a run: Deployments > compress > Run, or `stillhouse compress recipes/digits.yaml` in another terminal."
    )
    console.print(f"Logs are in {settings().home_dir / 'logs'}. Ctrl-C ends everything.")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


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
