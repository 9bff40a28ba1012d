"""``stillhouse up`` with its real server, worker, schedule and MLflow UI."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from compression.errors import InputError
from flows.server import free_port, running_server
from tasks.settings import settings
from tests.flows.running_up import RunningUp, wait_for

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


def test_when_a_child_dies_it_is_named_and_all_end(up: RunningUp) -> None:
    """Last test of this module: it ends the servers."""
    pids = {name: each["pid"] for name, each in up.state["children"].items()}
    psutil.Process(pids["MLflow UI"]).kill()
    assert up.process.wait(timeout=60) == 3
    assert "MLflow UI" in up.log.read_text()
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not (up.folder / ".stillhouse" / "up.json").exists()


def test_a_port_in_use_is_refused_with_the_option_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"Port {port} for Prefect is in use") as caught:
            free_port("Prefect", port)
    assert "--prefect-port" in str(caught.value)
    assert "pid" in str(caught.value)


def test_a_stale_state_file_is_no_running_server(home: Path) -> None:
    path = settings().home_dir / "up.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"program": {"pid": 2**22 - 3, "created": 0}, "prefect_url": "http://127.0.0.1:9"}))
    assert running_server() is None
    path.write_text("{")
    assert running_server() is None
