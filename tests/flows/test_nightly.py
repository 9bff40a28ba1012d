"""Nights with the real server, worker, store and MLflow: isolated, unchanged, changed, late, killed, twice at once."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from export.regression.compare import ALARMING, SAME_FILE
from tests.flows.running_up import ROOT, RunningUp, wait_for
from tests.flows.tiny_recipe import tiny_recipe

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.e2e, pytest.mark.timeout(1500)]

DEPLOYMENTS = """
name: test
deployments:
  - name: nightly
    entrypoint: flows/nightly.py:nightly
    tags: [stillhouse]
    parameters: {recipes: [tiny]}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
    work_pool: {name: stillhouse}
  - name: missed
    entrypoint: flows/nightly.py:nightly
    tags: [stillhouse]
    parameters: {recipes: [tiny]}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
    work_pool: {name: stillhouse}
"""
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
HOLDER = """
import sys, time
from flows.nightly import NIGHT
from tasks.running import running
with running(NIGHT):
    print("held", flush=True)
    time.sleep(600)
"""


def small_night(name: str) -> dict[str, Any]:
    raw = tiny_recipe(name, images=500, epochs=5)
    raw["quantize"] = {"kind": "qat", "train": {"epochs": 2, "batch_size": 64, "learning_rate": 0.0004}}
    raw |= {"sensitivity": None, "robustness": None, "attention": None}
    raw["targets"] = [{"kind": "onnxruntime", "name": "cpu", "precision": "int8"}]
    return raw


class Nights(RunningUp):
    """Servers with a good recipe, a long one and two that cannot run; how to start a night."""

    def night(self, *recipes: str, due: datetime | None = None, deployment: str = "nightly", **parameters: Any) -> str:
        """The id of a new run; with ``due`` one that was scheduled for then."""
        state: dict[str, Any] = {"type": "SCHEDULED"}
        if due is not None:
            state["state_details"] = {"scheduled_time": due.isoformat()}
        body = {"state": state, "parameters": {"recipes": list(recipes), **parameters}}
        return self.api(f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", body)["id"]

    def ended(self, id_: str) -> dict[str, Any]:
        """The run when it has ended."""
        return wait_for(lambda: run if (run := self.run(id_))["state_type"] in FINAL else None, 600, "the night's end")

    def rows(self) -> dict[str, dict[str, Any]]:
        """The newest night's table, by recipe."""
        return {row["recipe"]: row for row in json.loads(self.artifact("nightly")["data"])}

    def folders(self, recipe: str) -> list[Path]:
        place = self.folder / "runs" / recipe
        return sorted(place.iterdir()) if place.is_dir() else []

    def mlflow_runs(self) -> int:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder / 'mlruns' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("stillhouse")
        assert experiment is not None
        return len(client.search_runs([experiment.experiment_id], max_results=5000))


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    folder = tmp_path_factory.mktemp("nights")
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    (folder / "recipes").mkdir()
    recipes = {name: small_night(name) for name in ("tiny", "broken", "gone", "long")}
    recipes["broken"]["distil"] = {}
    recipes["long"]["teachers"][0]["source"]["train"] = {"epochs": 500, "batch_size": 8}
    for name, raw in recipes.items():
        (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    started = Nights(folder, source=ROOT, deployments=folder / "prefect.yaml")
    (folder / "recipes" / "gone.yaml").unlink()
    yield started
    started.end()


@pytest.fixture(scope="module")
def first(nights: Nights) -> dict[str, Any]:
    return nights.ended(nights.night("broken", "gone", "tiny"))


def test_a_broken_recipe_fails_alone(nights: Nights, first: dict[str, Any]) -> None:
    rows = nights.rows()
    assert first["state_name"] == "Failed", first["state"]
    assert "2 of 3 recipes failed: broken, gone." in first["state"]["message"]
    assert "distil" in rows["broken"]["summary"]
    assert "has no file" in rows["gone"]["summary"]
    assert rows["tiny"]["outcome"] == "accept", rows["tiny"]
    (folder,) = nights.folders("tiny")
    assert {"regression.html", "regression.md", "regression.json"} <= {file.name for file in folder.iterdir()}
    assert "no earlier accepted run" in nights.artifact("regression-tiny")["data"]


def test_the_server_refuses_a_recipe_that_has_no_file(nights: Nights) -> None:
    with pytest.raises(urllib.error.HTTPError, match="409") as refused:
        nights.night("nobody")
    assert "nobody" in refused.value.read().decode()


def test_the_recipe_is_a_subflow_in_a_process_of_its_own(nights: Nights, first: dict[str, Any]) -> None:
    body = {"flow_runs": {"parent_flow_run_id": {"any_": [first["id"]]}}}
    (child,) = nights.api("/flow_runs/filter", body)
    assert (child["name"], child["state_name"]) == ("compress-tiny", "Accepted")
    assert "nightly" in child["tags"]


def test_a_second_night_changes_nothing_and_says_so(nights: Nights, first: dict[str, Any]) -> None:
    before = nights.folders("tiny"), nights.mlflow_runs()
    run = nights.ended(nights.night("tiny"))
    assert run["state_name"] == "Unchanged", run["state"]
    assert "Nothing has changed in 1 recipe" in run["state"]["message"]
    assert (nights.folders("tiny"), nights.mlflow_runs()) == before
    assert nights.rows()["tiny"]["outcome"] == "unchanged"
    assert run["total_run_time"] < 30


def test_a_changed_recipe_is_compared_and_its_stage_is_named(nights: Nights, first: dict[str, Any]) -> None:
    raw = small_night("tiny")
    raw["quantize"]["train"]["epochs"] = 1
    (nights.folder / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(raw))
    run = nights.ended(nights.night("tiny"))
    before, now = nights.folders("tiny")
    regression = json.loads((now / "regression.json").read_text())
    (comparison,) = regression["comparisons"]
    assert (comparison["against"], comparison["run"]) == ("last good run", before.name)
    assert comparison["blame"]["origins"][0] == {
        "stage": "quantize",
        "name": "student-0",
        "causes": [{"kind": "recipe", "words": "quantize.train.epochs went from 2 to 1"}],
    }
    changes = [
        (each["name"], each["before"], each["now"]) for each in comparison["changes"] if each["kind"] == "recipe"
    ]
    assert changes == [("quantize.train.epochs", "2", "1")]
    rows = {row["what"]: row for row in comparison["rows"]}
    ships_another = json.loads((now / "summary.json").read_text())["ships"] == {"cpu": "student-0.int8"}
    assert ("timed tonight" if ships_another else SAME_FILE) in rows["latency"]["note"]
    assert rows["accuracy"]["change"] is not None
    assert run["state_name"] == ("Regressed" if regression["regressed"] else "Completed"), run["state"]
    assert regression["regressed"] == any(rows[what]["word"] == "worse" for what in ALARMING)
    markdown = nights.artifact("regression-tiny")["data"]
    assert "quantize.train.epochs went from 2 to 1" in markdown
    assert f"../{before.name}/report.html" in (now / "regression.html").read_text()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{nights.folder / 'mlruns' / 'mlflow.db'}")
    parent = json.loads((now / "summary.json").read_text())["mlflow_run"]
    assert {"regression.html", "regression.json"} <= {file.path for file in client.list_artifacts(parent)}
    assert client.get_run(parent).data.tags["regression.sentence"] == regression["sentence"]


COMMAND = """
import sys
from pathlib import Path
from rich.console import Console
from tasks.regression import show_regression
sys.exit(show_regression(Console(), *map(Path, sys.argv[1:])))
"""


def test_any_two_runs_are_compared_on_the_command_line(nights: Nights, first: dict[str, Any]) -> None:
    now, other = nights.folders("tiny")[0], nights.folders("tiny")[-1]
    night = (now / "regression.html").read_bytes()
    command = [sys.executable, "-c", COMMAND, str(now), str(other)]
    done = subprocess.run(
        command, env=nights.environment, cwd=nights.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert f"Against the chosen run, {other.name}" in done.stdout
    assert f"regression-{other.name}.html" in done.stdout
    assert (now / f"regression-{other.name}.html").is_file()
    assert (now / "regression.html").read_bytes() == night


def test_of_several_missed_nights_only_the_newest_runs(nights: Nights, first: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    ids = [nights.night("tiny", due=now - timedelta(hours=hours), deployment="missed") for hours in (54, 30, 6)]
    oldest, older, newest = (nights.ended(id_) for id_ in ids)
    assert [run["state_name"] for run in (oldest, older)] == ["Skipped", "Skipped"]
    for run in (oldest, older):
        assert run["state"]["message"].startswith("Skipped: superseded: it was due ")
    assert newest["state_name"] == "Unchanged", newest["state"]


def test_a_missed_night_whose_work_was_done_by_hand_since_is_skipped(nights: Nights, first: dict[str, Any]) -> None:
    late = nights.ended(nights.night("tiny", due=datetime.now(UTC) - timedelta(hours=7)))
    assert late["state_name"] == "Skipped", late["state"]
    assert "superseded" in late["state"]["message"]


def test_a_missed_night_is_skipped_by_policy(nights: Nights, first: dict[str, Any]) -> None:
    due = datetime.now(UTC) - timedelta(hours=5)
    late = nights.ended(nights.night("tiny", due=due, when_late="skip"))
    assert late["state_name"] == "Skipped", late["state"]
    assert "5.0 h ago, and later than 4.0 h is skipped" in late["state"]["message"]
    in_time = nights.ended(nights.night("tiny", due=due, when_late="skip", grace_hours=6.0))
    assert in_time["state_name"] == "Unchanged", in_time["state"]


@contextmanager
def a_night_at_work(nights: Nights) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=nights.environment, cwd=nights.folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "held"
        yield
    finally:
        process.kill()
        process.wait()


def test_two_nights_are_never_at_work_at_once(nights: Nights, first: dict[str, Any]) -> None:
    with a_night_at_work(nights):
        run = nights.ended(nights.night("tiny"))
    assert run["state_name"] == "Skipped", run["state"]
    assert "another night is at work" in run["state"]["message"]


def process_of(nights: Nights, night: str) -> psutil.Process:
    """The process of a night's subflow, once it trains."""
    body = {"flow_runs": {"parent_flow_run_id": {"any_": [night]}, "state": {"type": {"any_": ["RUNNING"]}}}}
    (child, *_) = wait_for(lambda: nights.api("/flow_runs/filter", body), 180, "the subflow")

    def with_its_id() -> psutil.Process | None:
        for process in psutil.process_iter(["environ", "cmdline"]):
            if child["id"] in (process.info["cmdline"] or []):
                return process
        return None

    return wait_for(with_its_id, 60, "its process")


def test_a_recipe_that_takes_its_process_with_it_does_not_end_the_night(nights: Nights, first: dict[str, Any]) -> None:
    night = nights.night("long", "tiny")
    os.kill(process_of(nights, night).pid, signal.SIGKILL)
    run = nights.ended(night)
    rows = nights.rows()
    assert run["state_name"] == "Failed", run["state"]
    assert rows["long"]["outcome"] == "crashed", rows
    assert "exit code -9" in rows["long"]["summary"]
    assert rows["tiny"]["outcome"] == "unchanged"


def test_a_cancelled_night_ends_its_recipe_too(nights: Nights, first: dict[str, Any]) -> None:
    night = nights.night("long", "tiny")
    process = process_of(nights, night)
    nights.cancel(night)
    process.wait(timeout=60)
    assert nights.ended(night)["state_type"] == "CANCELLED"
