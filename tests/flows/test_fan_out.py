"""Units done ahead by other processes: what they do, and that a run's results do not depend on who did them."""

import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from compression.errors import InputError
from flows import fan_out
from flows.compress import plan, preflight
from flows.recipe import Recipe, load_recipe
from flows.units import Unit, UnitPlan, carry_out_unit
from tasks.settings import settings
from tasks.stage import StageIndex

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from flows.compress import run_recipe
from flows.recipe import load_recipe
if __name__ == "__main__":
    print(json.dumps(run_recipe(load_recipe(Path(sys.argv[1])), restart_from=(sys.argv[2:] or [None])[0])))
"""
DETERMINED = ("data", "teacher", "teacher_outputs", "select", "distill", "quantize")
"""Stages whose artifacts are a function of the recipe: nothing in them is timed."""
slow = [pytest.mark.servers, pytest.mark.long, pytest.mark.e2e, pytest.mark.timeout(1500)]


def checkpoints(home: Path) -> list[str]:
    """Of trainings that are under way. Folders may go while they are looked at, which ``Path.glob`` does not bear."""
    return glob.glob("*/step-*", root_dir=home / "scratch")  # noqa: PTH207


def two_of_each() -> dict[str, Any]:
    """Two teachers, two finalists, and as little as possible behind them."""
    raw = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    quick = {"epochs": 10, "batch_size": 16, "learning_rate": 0.004, "checkpoint_every_steps": 10}
    small = {"kind": "plain_cnn", "widths": [16], "depths": [1], "strides": [2], "stem_width": 8}
    raw["data"]["limit"] = 500
    raw["teachers"] = raw["teachers"][:2]
    for teacher in raw["teachers"]:
        teacher["model"] |= {"widths": [16, 16], "depths": [1, 1], "strides": [1, 2], "stem_width": 16}
        teacher["source"]["train"] = quick
    raw["search"] |= {
        "spaces": [{"kind": "scale", "base": small, "widths": [0.5, 1.0], "depths": [0]}],
        "trials": 2,
        "train": {"epochs": 1, "batch_size": 64},
        "max_macs_share": 1.0,
        "finalists": 2,
    }
    raw["distill"] |= {"train": quick, "views": 2}
    raw["quantize"] = {"kind": "qat", "train": {"epochs": 1, "batch_size": 64, "learning_rate": 0.0004}}
    raw["targets"] = raw["targets"][:1]
    raw["benchmark_rounds"] = 3
    raw |= {"sensitivity": None, "calibrate": None, "robustness": None, "attention": None}
    raw["policy"] = {
        "max_accuracy_drop": 1.0,
        "max_worst_class_drop": None,
        "max_ece_increase": None,
        "max_flips_int8": 0.5,
        "faster_than_parent": False,
        "max_accuracy_gain": None,
    }
    return raw


def stages_of(recipe: Recipe, unit: Unit) -> list[tuple[str, str]]:
    runner = UnitPlan(StageIndex(preflight(recipe)), unit)
    carry_out_unit(recipe, runner)
    return [(result.stage, result.name) for result in runner.results]


@pytest.fixture
def recipe(home: Path) -> Recipe:
    (home / "two.yaml").write_text(yaml.safe_dump(two_of_each()))
    return load_recipe(home / "two.yaml")


def test_a_teachers_unit_is_that_teacher_and_its_outputs(recipe: Recipe) -> None:
    assert stages_of(recipe, ("teacher", "depthwise")) == [
        ("data", "digits"),
        ("teacher", "depthwise"),
        ("teacher_outputs", "depthwise"),
    ]


def test_a_finalists_unit_ends_before_the_next_finalist(recipe: Recipe) -> None:
    found = stages_of(recipe, ("student", 1))
    own = [row for row in found if row[1].startswith("student-")]
    assert {("distill", "student-1"), ("distill", "student-1-control"), ("quantize", "student-1")} <= set(own)
    assert not any(name.startswith("student-0") for _, name in own)
    assert found[-1] in own, "it went on behind its own stages"
    assert {stage for stage, _ in found} <= {
        *("data", "teacher", "teacher_outputs", "select", "search", "distill", "quantize", "export"),
    }


def test_the_units_together_are_what_the_plan_has_up_to_the_finalists(recipe: Recipe) -> None:
    units: list[Unit] = [("teacher", "residual"), ("teacher", "depthwise"), ("student", 0), ("student", 1)]
    covered = {row for unit in units for row in stages_of(recipe, unit)}
    whole = {(result.stage, result.name) for result in plan(recipe)}
    assert covered <= whole
    assert {row for row in whole if row[1].startswith("student-")} <= covered


def test_a_plan_starts_no_worker(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_FAN_OUT", "processes")
    settings.cache_clear()
    before = len(psutil.Process().children(recursive=True))
    assert all(result.is_pending for result in plan(recipe))
    assert len(psutil.Process().children(recursive=True)) == before
    assert not (settings().home_dir / "fan_out").exists()


def test_a_back_end_that_is_not_installed_is_refused_with_its_extra(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("ray") is not None:
        pytest.skip("Ray is installed.")
    monkeypatch.setenv("STILLHOUSE_FAN_OUT", "ray")
    settings.cache_clear()
    with pytest.raises(InputError, match=r"stillhouse\[ray\]"):
        preflight(recipe)


def test_a_scheduler_that_does_not_answer_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_FAN_OUT", "dask")
    monkeypatch.setenv("STILLHOUSE_DASK_SCHEDULER", f"tcp://127.0.0.1:{free_port()}")
    settings.cache_clear()
    with pytest.raises(InputError, match="does not answer"):
        preflight(recipe)


def test_a_worker_with_another_store_says_so(recipe: Recipe) -> None:
    request = fan_out.Request(
        recipe=recipe.model_dump(mode="json"),
        unit=("teacher", "residual"),
        parent="",
        force_from=None,
        threads=1,
        proof="/nowhere/proof",
    )
    reply = fan_out.Reply.model_validate_json(fan_out.carry_out(request.model_dump_json()))
    assert "/nowhere/proof" in reply.error
    assert "same file system" in reply.error


# --- whole runs ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(place: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "STILLHOUSE_ROOT": str(place),
        "STILLHOUSE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **more,
    }


def started(place: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """A run that writes to a file: a script, since spawned workers import the main module again."""
    place.mkdir(exist_ok=True)
    (place / "two.yaml").write_text(yaml.safe_dump(two_of_each()))
    (place / "start.py").write_text(RUN)
    return subprocess.Popen(
        [sys.executable, "start.py", "two.yaml", *arguments],
        cwd=place,
        env=environment(place, **more),
        stdout=(place / "out").open("w"),
        stderr=(place / "log").open("w"),
        text=True,
    )


def finished(process: subprocess.Popen[str], place: Path) -> dict[str, Any]:
    assert process.wait(timeout=1300) == 0, (place / "log").read_text()[-6000:]
    summary = json.loads((place / "out").read_text().splitlines()[-1])
    return summary | {"lineage": json.loads((Path(summary["folder"]) / "lineage.json").read_text())}


def products(summary: dict[str, Any]) -> set[tuple[str, str]]:
    return {(row["stage"], row["output"]) for row in summary["lineage"] if row["stage"] in DETERMINED}


def children_of(place: Path, summary: dict[str, Any]) -> list[tuple[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stillhouse")
    assert experiment is not None
    query = f"tags.`mlflow.parentRunId` = '{summary['mlflow_run']}'"
    runs = client.search_runs([experiment.experiment_id], query)
    return [(run.data.tags["stage"], run.data.tags["stage_key"]) for run in runs if "stage_key" in run.data.tags]


def require_same_as(alone: dict[str, Any], place: Path, summary: dict[str, Any]) -> None:
    """The same artifacts, each shown once in MLflow, and really made by workers."""
    assert products(summary) == products(alone)
    children = children_of(place, summary)
    assert len(children) == len(set(children)) == len(summary["lineage"])
    assert not list((place / ".stillhouse" / "fan_out").iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in one process that all others are compared with."""
    place = tmp_path_factory.mktemp("alone")
    summary = finished(started(place), place)
    assert {row["name"] for row in summary["lineage"] if row["stage"] == "distill"} >= {"student-0", "student-1"}
    return summary


@contextmanager
def dask_cluster(place: Path) -> Iterator[str]:
    """A scheduler and two workers, each a process of its own as on a cluster."""
    address = f"tcp://127.0.0.1:{free_port()}"
    programs: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        log = (place / f"dask-{len(programs)}.log").open("wb")
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        programs.append(subprocess.Popen(command, env=environment(place), cwd=place, stdout=log, stderr=log))

    try:
        start("dask_scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
        for _ in range(2):
            start("dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny")
        from distributed import Client

        with Client(address, timeout=90) as client:
            client.wait_for_workers(2, timeout=120)
        yield address
    finally:
        for program in reversed(programs):
            program.terminate()
        for program in programs:
            try:
                program.wait(timeout=60)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


class TestProcesses:
    pytestmark = slow

    def test_two_processes_give_the_same_run(self, alone: dict[str, Any], tmp_path: Path) -> None:
        place = tmp_path / "run"
        summary = finished(started(place, STILLHOUSE_FAN_OUT="processes"), place)
        require_same_as(alone, place, summary)
        log = (place / "log").read_text()
        assert log.count("was done ahead") == 4, log[-4000:]
        assert "left to this process" not in log
        assert not [each for each in psutil.process_iter(["cmdline"]) if _is_worker_of(each, place)]

    def test_a_worker_killed_in_the_middle_costs_only_time(self, alone: dict[str, Any], tmp_path: Path) -> None:
        place = tmp_path / "run"
        process = started(place, STILLHOUSE_FAN_OUT="processes")
        wait_for(lambda: checkpoints(place / ".stillhouse"), process, place)
        victim = next(each for each in psutil.Process(process.pid).children() if _is_worker_of(each, place))
        victim.send_signal(signal.SIGKILL)
        summary = finished(process, place)
        require_same_as(alone, place, summary)
        assert "its worker has ended with exit code -9" in (place / "log").read_text()

    def test_a_run_that_is_ended_ends_its_workers(self, tmp_path: Path) -> None:
        place = tmp_path / "run"
        process = started(place, STILLHOUSE_FAN_OUT="processes")
        wait_for(lambda: checkpoints(place / ".stillhouse"), process, place)
        workers = [each for each in psutil.Process(process.pid).children() if _is_worker_of(each, place)]
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
        assert not [each for each in workers if each.is_running()]
        assert checkpoints(place / ".stillhouse"), "a checkpoint is kept"

    def test_from_a_stage_on_workers_do_it_again(self, alone: dict[str, Any]) -> None:
        place = Path(alone["folder"]).parents[2]
        summary = finished(started(place, "distill", STILLHOUSE_FAN_OUT="processes"), place)
        require_same_as(alone, place, summary)
        assert (place / "log").read_text().count("was done ahead") == 2


class TestCluster:
    pytestmark = slow

    @pytest.mark.parametrize(
        "kind", ["dask", pytest.param("ray", marks=pytest.mark.skipif(find_spec("ray") is None, reason="an extra"))]
    )
    def test_one_on_this_machine_gives_the_same_run(self, kind: str, alone: dict[str, Any], tmp_path: Path) -> None:
        place = tmp_path / "run"
        summary = finished(started(place, STILLHOUSE_FAN_OUT=kind), place)
        require_same_as(alone, place, summary)
        assert (place / "log").read_text().count("was done ahead") == 4

    def test_a_dask_scheduler_elsewhere_gives_the_same_run(self, alone: dict[str, Any], tmp_path: Path) -> None:
        place = tmp_path / "run"
        place.mkdir()
        with dask_cluster(place) as address:
            more = {"STILLHOUSE_FAN_OUT": "dask", "STILLHOUSE_DASK_SCHEDULER": address}
            summary = finished(started(place, **more), place)
        require_same_as(alone, place, summary)
        assert (place / "log").read_text().count("was done ahead") == 4


def _is_worker_of(process: psutil.Process, place: Path) -> bool:
    try:
        return "flows.fan_out" in process.cmdline() and process.environ().get("STILLHOUSE_ROOT") == str(place)
    except psutil.Error:
        return False


def wait_for(ready: Any, process: subprocess.Popen[str], place: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, (place / "log").read_text()[-4000:]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
