"""``stillhouse up`` with its real server, worker, schedule and MLflow UI."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from compression.errors import InputError
from flows.ports import answers, free_port
from flows.server import running_server
from flows.server import up as start
from tasks.settings import settings
from tests.flows.running_up import ROOT, RunningUp, wait_for
from tests.flows.sleepy import left_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TICK = """
from pathlib import Path

from prefect import flow


@flow
def tick(text: str = "tock") -> str:
    with Path("ticks.txt").open("a") as file:
        file.write(text + "\\n")
    return text
"""

DEPLOYMENTS = """
name: test
deployments:
  - name: tick
    entrypoint: tick.py:tick
    parameters: {text: scheduled}
    schedules:
      - {cron: "* * * * *", timezone: "Europe/Berlin", slug: every-minute}
    work_pool: {name: stillhouse}
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    folder = tmp_path_factory.mktemp("up")
    (folder / "tick.py").write_text(TICK)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    started = RunningUp(folder, source=folder, deployments=folder / "prefect.yaml")
    yield started
    started.end()


def test_both_pages_answer_and_the_addresses_are_printed(up: RunningUp) -> None:
    text = up.log.read_text()
    for address in (up.state["prefect_url"], up.state["mlflow_url"]):
        assert address in text
        with urllib.request.urlopen(address, timeout=30) as response:
            assert response.status == 200


def test_a_schedule_makes_runs_and_the_worker_completes_one(up: RunningUp) -> None:
    """With SQLAlchemy 2.1 the server starts, and this never happens."""
    assert wait_for(lambda: up.runs("SCHEDULED") or up.runs("COMPLETED"), 60, "a scheduled run")
    (done, *_) = wait_for(lambda: up.runs("COMPLETED"), 240, "a completed scheduled run")
    assert done["auto_scheduled"]
    assert "scheduled" in (up.folder / "ticks.txt").read_text()


def test_training_is_limited_to_one_at_a_time(up: RunningUp) -> None:
    limits = up.api("/concurrency_limits/filter", {"limit": 50, "offset": 0})
    assert {limit["tag"]: limit["concurrency_limit"] for limit in limits}["training"] == 1


def test_a_second_up_says_where_the_first_one_runs(up: RunningUp) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up"], env=up.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert up.state["prefect_url"] in done.stderr


def test_a_child_that_dies_is_named_and_started_again_at_its_port(up: RunningUp) -> None:
    before = up.children()
    psutil.Process(before["MLflow UI"]).kill()
    after = wait_for(lambda: changed(up, "MLflow UI", before), 30, "another MLflow UI")
    assert {name for name in after if after[name] != before[name]} == {"MLflow UI"}
    wait_for(lambda: answers(f"{up.state['mlflow_url']}/health"), 120, "its answer")
    assert (
        f"MLflow UI (pid {before['MLflow UI']}) has ended with exit code -9; started again (1 of 3"
        in up.log.read_text()
    )


def test_a_child_that_keeps_dying_ends_all(up: RunningUp) -> None:
    """Last test of this module: it ends the servers."""
    for _ in range(2):
        before = up.children()
        psutil.Process(before["MLflow UI"]).kill()
        wait_for(lambda before=before: changed(up, "MLflow UI", before), 30, "another MLflow UI")
    psutil.Process(up.children()["MLflow UI"]).kill()
    assert up.process.wait(timeout=90) == 3
    assert "although it was started again 3 times" in up.log.read_text()
    assert "mlflow-ui.log" in up.log.read_text()
    assert not left_of(up.folder)
    assert not (up.folder / ".stillhouse" / "up.json").exists()


def changed(up: RunningUp, name: str, before: dict[str, int]) -> dict[str, int] | None:
    after = up.children()
    return after if after[name] != before[name] else None


def test_an_address_open_to_others_needs_a_password(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(InputError, match="'0.0.0.0' is open to other machines and no password is set") as caught:
        start(host="0.0.0.0")
    assert "PREFECT_SERVER_API_AUTH_STRING" in str(caught.value)
    with pytest.raises(InputError, match="'192.0.2.1' cannot be listened at"):
        start(host="192.0.2.1")


def test_results_are_neither_kept_nor_pickled(home: Path) -> None:
    code = """
from tasks.settings import prepare_prefect
prepare_prefect()
from prefect.settings import get_current_settings
results = get_current_settings().results
print(results.default_serializer, results.persist_by_default)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["json", "False"]


def test_a_port_in_use_is_refused_with_the_option_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"Port {port} for Prefect is in use") as caught:
            free_port("Prefect", port)
    assert "--prefect-port" in str(caught.value)
    assert "pid" in str(caught.value)


def test_a_server_of_somebody_else_at_the_port_is_not_taken_for_ours(home: Path) -> None:
    """As when another program takes the port between the look at it and the start."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    code = (
        "import sys; from flows import ports, server\n"
        "server.free_port = lambda name, *_: int(sys.argv[1]) if name == 'Prefect' else ports.any_port()\n"
        "sys.exit(server.up())"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        command = [sys.executable, "-c", code, str(other.server_port)]
        environment = {**os.environ, "STILLHOUSE_ROOT": str(home), "PREFECT_HOME": str(home / "prefect")}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
        other.shutdown()
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Prefect server (pid" in done.stdout
    assert "already in use" in done.stdout


def test_a_stale_state_file_is_no_running_server(home: Path) -> None:
    path = settings().home_dir / "up.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"program": {"pid": 2**22 - 3, "created": 0}, "prefect_url": "http://127.0.0.1:9"}))
    assert running_server() is None
    path.write_text("{")
    assert running_server() is None
