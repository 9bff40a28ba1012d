"""Processes are killed for real: their death is noticed, marked in Prefect and MLflow, and the same run goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.reconcile import reconcile
from tasks import tracking
from tasks.owner import Owner
from tasks.running import leases, running
from tests.flows.running_up import FINAL, RunningUp, wait_for
from tests.flows.sleepy import lines, start_up, until_step

EVERY = 10
"""Steps between the checkpoints of the flow."""

SHOW = "from rich.console import Console; from flows.reconcile import show_reconciled; show_reconciled(Console())"

with_servers = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_RESTARTS", "1")
        started = start_up(tmp_path_factory.mktemp("reconciled"))
    yield started
    started.end()


def statuses(up: RunningUp, name: str) -> list[str]:
    """In MLflow: the recipe's run first, then the stage's."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{up.folder / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stillhouse")
    assert experiment is not None
    (parent, *more) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert not more
    below = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return [run.info.status for run in (parent, *below)]


def assert_it_went_on(up: RunningUp, run: str, name: str, steps: int) -> None:
    found = up.reaches(run, "COMPLETED", "CANCELLED", seconds=300)
    assert found["state_type"] == "COMPLETED"
    assert found["run_count"] == 2
    done = lines(up.folder, name, "steps")
    assert set(done) == set(range(1, steps + 1))
    assert len(done) - steps <= EVERY
    assert len(lines(up.folder, name, "starts")) == 2
    assert len(lines(up.folder, name, "ends")) == 1
    assert statuses(up, name) == ["FINISHED", "FINISHED"]
    tasks = up.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert sorted(task["state_type"] for task in tasks) == ["COMPLETED", "CRASHED"]


@pytest.mark.parametrize("also_the_worker", [False, True], ids=["flow", "flow and worker"])
class TestKilled:
    pytestmark = with_servers

    def test_the_death_is_noticed_and_the_same_run_goes_on(self, up: RunningUp, also_the_worker: bool) -> None:
        name = f"killed-{int(also_the_worker)}"
        run = up.start("compress", name=name, steps=60, every=EVERY)
        flow = until_step(up.folder, name, 25)
        if also_the_worker:
            psutil.Process(up.children()["Prefect worker"]).kill()
        flow.kill()
        wait_for(lambda: "Crashed" in up.states(run), 60, "word of the crash")
        wait_for(lambda: statuses(up, name) == ["KILLED", "KILLED"], 60, "its end in MLflow")
        assert_it_went_on(up, run, name, 60)


class TestOthers:
    pytestmark = with_servers

    def test_a_node_that_is_drained_saves_and_the_run_goes_on(self, up: RunningUp) -> None:
        run = up.start("compress", name="drained", steps=60, every=100_000)
        flow = until_step(up.folder, "drained", 25)
        flow.terminate()
        wait_for(lambda: list((up.folder / "drained-checkpoints").glob("step-*.pt")), 10, "a checkpoint")
        wait_for(lambda: up.run(run)["state_type"] != "RUNNING", 60, "another state than RUNNING")
        assert_it_went_on(up, run, "drained", 60)

    def test_a_living_run_is_left_alone(self, up: RunningUp) -> None:
        run = up.start("compress", name="living", steps=200, every=EVERY)
        until_step(up.folder, "living", 5)
        done = subprocess.run(
            [sys.executable, "-c", SHOW],
            env=up.environment, capture_output=True, text=True, check=False, cwd=up.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Nothing to settle" in done.stdout
        assert up.reaches(run, *FINAL, seconds=200)["state_type"] == "COMPLETED"
        assert "Crashed" not in up.states(run)

    def test_what_crashes_too_often_or_is_of_another_deployment_stays_crashed(self, up: RunningUp) -> None:
        often = up.start("compress", name="often", steps=3000, every=EVERY)
        until_step(up.folder, "often", 5).kill()
        before = len(lines(up.folder, "often", "steps"))
        until_step(up.folder, "often", before + 5, starts=2).kill()
        other = up.start("other", name="other", steps=3000, every=EVERY)
        until_step(up.folder, "other", 5).kill()
        for run, name in ((often, "often"), (other, "other")):
            wait_for(lambda run=run: up.run(run)["state_type"] == "CRASHED", 60, f"the crash of {name}")
            wait_for(lambda name=name: statuses(up, name) == ["KILLED", "KILLED"], 60, f"the end of {name} in MLflow")
        time.sleep(12)  # two passes
        assert {up.run(run)["state_type"] for run in (often, other)} == {"CRASHED"}

    def test_the_server_ends_a_pause_whose_time_is_over(self, up: RunningUp) -> None:
        run = up.api("/flow_runs/", {"flow_id": up.deployment("other")["flow_id"], "state": {"type": "RUNNING"}})["id"]
        soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
        details = {"pause_timeout": soon, "pause_reschedule": True}
        paused = {"type": "PAUSED", "name": "Suspended", "state_details": details}
        up.api(f"/flow_runs/{run}/set_state", {"state": paused, "force": True})
        assert up.reaches(run, *FINAL, seconds=60)["state_type"] == "FAILED"


def lease_of(owner: Owner, recipe: str) -> Path:
    """A lease file of a recipe that ``owner`` runs, with an MLflow run under way."""
    with running(recipe) as held:
        lease = held.lease.model_copy(update={"owner": owner, "waiting": False})
        folder = Path(os.environ["STILLHOUSE_ROOT"]) / ".stillhouse" / "running"
        path = folder / f"{lease.id}0.json"
        path.write_text(lease.model_copy(update={"id": f"{lease.id}0"}).model_dump_json())
    return path


def test_without_a_server_the_dead_lose_their_lease_and_their_mlflow_run(home: Path) -> None:
    code = """
from tasks import tracking
from tasks.running import running
import os, signal
with running("gone") as held, tracking.recipe_run("gone", {}, {"recipe": "gone"}) as run:
    held.note(mlflow_run=run.id)
    print(run.id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    (run,) = done.stdout.split()
    assert tracking.client().get_run(run).info.status == "RUNNING"
    with running("alive") as held, tracking.recipe_run("alive", {}, {"recipe": "alive"}) as alive:
        held.note(mlflow_run=alive.id)
        settled = reconcile(None)
        assert [(each.action, each.what) for each in settled] == [
            ("killed", f"MLflow run {run}"),
            ("released", "recipe gone"),
        ]
        assert [lease.recipe for lease in leases()] == ["alive"]
        assert tracking.client().get_run(alive.id).info.status == "RUNNING"
    assert tracking.client().get_run(run).info.status == "KILLED"
    assert reconcile(None) == []


def test_another_machines_lease_counts_until_nobody_has_touched_it_for_long(home: Path) -> None:
    elsewhere = Owner.me().model_copy(update={"host": "elsewhere"})
    path = lease_of(elsewhere, "far")
    assert reconcile(None) == []
    assert path.exists()
    long_ago = time.time() - 120
    os.utime(path, (long_ago, long_ago))
    assert [(each.action, each.what) for each in reconcile(None)] == [("released", "recipe far")]
    assert not path.exists()
