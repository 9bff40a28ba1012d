"""A run under way is cancelled within seconds, outlives servers and workers, and dies with ``stillhouse up``."""

import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.flows.running_up import FINAL, RunningUp, wait_for
from tests.flows.sleepy import is_gone, left_of, lines, start_up, until_step

pytestmark = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    started = start_up(tmp_path_factory.mktemp("supervised"))
    yield started
    started.end()


def test_a_cancelled_training_stops_within_ten_seconds_and_keeps_its_checkpoint(up: RunningUp) -> None:
    run = up.start("compress", name="cancelled", steps=3000, every=100_000)
    flow = until_step(up.folder, "cancelled", 5)
    began = time.monotonic()
    up.cancel(run)
    found = up.reaches(run, *FINAL, seconds=10)
    wait_for(lambda: is_gone(flow.pid), max(0.1, began + 10 - time.monotonic()), "the end of the process")
    assert found["state_type"] == "CANCELLED"
    done = lines(up.folder, "cancelled", "steps")[-1]
    (kept,) = (up.folder / "cancelled-checkpoints").glob("step-*.pt")
    assert int(kept.name.split("-")[1]) >= done - 1
    assert "Crashed" not in up.states(run)


def test_a_run_cancelled_before_its_flow_has_begun_is_cancelled_too(up: RunningUp) -> None:
    run = up.start("compress", name="early")
    up.reaches(run, "PENDING", seconds=60)
    up.cancel(run)
    assert up.reaches(run, *FINAL, seconds=20)["state_type"] == "CANCELLED"
    time.sleep(8)  # two passes of the reconciler: nobody starts it again
    assert up.run(run)["state_type"] == "CANCELLED"
    assert not lines(up.folder, "early", "steps")


def test_a_training_goes_on_while_the_server_is_killed_and_started_again(up: RunningUp) -> None:
    run = up.start("compress", name="server-killed", steps=250)
    flow = until_step(up.folder, "server-killed", 5)
    before = up.children()["Prefect server"]
    psutil.Process(before).kill()
    wait_for(lambda: up.children()["Prefect server"] != before, 30, "another server")

    def answer() -> dict | None:
        try:
            return up.run(run)
        except (urllib.error.URLError, OSError):
            return None

    wait_for(answer, 120, "an answer of the server")
    found = up.reaches(run, *FINAL, seconds=300)
    assert found["state_type"] == "COMPLETED", found["state"]
    assert lines(up.folder, "server-killed", "steps") == list(range(1, 251))
    assert lines(up.folder, "server-killed", "ends") == [flow.pid]
    assert "Prefect server" in up.log.read_text()
    tasks = up.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert [task["state_type"] for task in tasks] == ["COMPLETED"]


def test_a_flow_outlives_its_worker_and_the_next_worker_leaves_it_alone(up: RunningUp) -> None:
    run = up.start("compress", name="worker-killed", steps=250)
    flow = until_step(up.folder, "worker-killed", 5)
    before = up.children()["Prefect worker"]
    psutil.Process(before).kill()
    tick = up.start("tick")
    assert up.reaches(tick, *FINAL, seconds=180)["state_type"] == "COMPLETED"
    found = up.reaches(run, *FINAL, seconds=300)
    assert found["state_type"] == "COMPLETED", found["state"]
    assert found["run_count"] == 1
    assert lines(up.folder, "worker-killed", "steps") == list(range(1, 251))
    assert lines(up.folder, "worker-killed", "starts") == [flow.pid]


def test_a_flow_without_worker_is_cancelled_too(up: RunningUp) -> None:
    run = up.start("compress", name="orphan", steps=3000)
    flow = until_step(up.folder, "orphan", 5)
    psutil.Process(up.children()["Prefect worker"]).kill()
    up.cancel(run)
    assert up.reaches(run, *FINAL, seconds=20)["state_type"] == "CANCELLED"
    wait_for(lambda: is_gone(flow.pid), 10, "the end of the process")


def test_when_up_is_killed_nothing_is_left(up: RunningUp) -> None:
    """Last test of this module: it ends the servers."""
    up.start("compress", name="left", steps=3000, every=100_000)
    until_step(up.folder, "left", 5)
    up.process.kill()
    up.process.wait()
    wait_for(lambda: not left_of(up.folder), 60, "the end of all that it had started")
    assert list((up.folder / "left-checkpoints").glob("step-*.pt"))
    assert Path(up.folder / ".stillhouse" / "up.json").exists()  # nobody was there to remove it; no harm
