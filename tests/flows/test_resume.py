"""Killed anywhere and started again, a recipe ends as if nothing had happened; real processes, server and stores."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.killing import FOLDER, Place, artifacts, differing, faults, kill, parents, prefect_server
from tests.flows.test_compress import tiny_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(1800)]

TRAINED = ("teacher", "search", "distill", "quantize")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("server")) as api:
        yield api


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with one candidate so that measured latency decides nothing, and trainings that last seconds."""
    raw = tiny_recipe()
    for train in (*(teacher["source"]["train"] for teacher in raw["teachers"]), raw["distill"]["train"]):
        train |= {"epochs": 10, "checkpoint_every_steps": 10}
    raw["search"] |= {"spaces": raw["search"]["spaces"][1:], "trials": 1}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, recipe: Path, api: str) -> Place:
    place = Place(tmp_path_factory.mktemp("unbroken"), recipe, api)
    finish(place)
    return place


def finish(place: Place, *arguments: str) -> dict[str, Any]:
    """Let it run to its end; the summary it prints."""
    process = place.start(*arguments)
    assert process.wait() == 0, place.log.read_text()[-4000:]
    return json.loads(place.log.read_text().splitlines()[-1])


def wait_for(process: subprocess.Popen[bytes], ready: Callable[[], Any], place: Place) -> Any:
    """The first truthy answer while the process runs; None when it ends before."""
    deadline = time.monotonic() + 600
    while process.poll() is None:
        if found := ready():
            return found
        assert time.monotonic() < deadline, place.log.read_text()[-4000:]
        time.sleep(0.01)
    return None


def kinds_ended(place: Place) -> list[str]:
    """Kinds of stages of which one has been done, in order."""
    ended = (each["stage"] for each in place.seen() if each["what"] == "end")
    return list(dict.fromkeys(stage for stage in ended if stage != FOLDER))


def steps_of(place: Place) -> list[tuple[str, str, int]]:
    """(kind of stage, text, steps done) of every step of every training, in order."""
    found, stage = [], ""
    for each in place.seen():
        stage = each["stage"] if each["what"] == "begin" else stage
        if each["what"] == "step" and stage in TRAINED:
            found.append((stage, each["text"], each["done"]))
    return found


def flow_runs(api: str, state: str) -> int:
    from prefect.client.schemas.filters import FlowRunFilter

    from flows.deployments import connect

    wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": [state]}}})
    with connect(api) as client:
        return len(client.read_flow_runs(flow_run_filter=wanted))


def assert_as_unbroken(place: Place, unbroken: Place, api: str) -> None:
    compared, different = differing(place, unbroken)
    assert different == []
    assert compared == len(artifacts(unbroken))
    assert [(row["stage"], row["name"]) for row in place.lineage()] == [
        (row["stage"], row["name"]) for row in unbroken.lineage()
    ]
    assert faults(place.folder) == []
    assert parents(place.folder) == 1
    assert len(list((place.folder / "runs" / "digits").iterdir())) == 1
    assert flow_runs(api, "RUNNING") == 0


def test_an_undisturbed_run_leaves_nothing_behind(unbroken: Place) -> None:
    assert faults(unbroken.folder) == []
    assert parents(unbroken.folder) == 1
    assert {row["parent_run"] for row in unbroken.lineage()} != {""}
    assert all(row["cpu_seconds"] >= 0 and row["made_of"]["code"] for row in unbroken.lineage())


def test_killed_behind_every_kind_of_stage_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, recipe: Path, unbroken: Place, api: str
) -> None:
    """Each start is killed at a random moment within half a second of the first end of a new kind of stage."""
    place, random_ = Place(tmp_path, recipe, api), random.Random(0)
    kinds = kinds_ended(unbroken)
    assert len(kinds) > 15
    kills = 0
    for _ in range(2 * len(kinds)):
        before = len(kinds_ended(place))
        process = place.start()
        if not wait_for(process, lambda: len(kinds_ended(place)) > before, place):  # noqa: B023
            assert process.returncode == 0, place.log.read_text()[-4000:]
            break
        time.sleep(random_.uniform(0.0, 0.5))
        kill(process)
        kills += 1
    else:
        raise AssertionError("it never came to its end")
    assert kills >= len(kinds) // 2
    assert_as_unbroken(place, unbroken, api)


def test_killed_within_trainings_it_goes_on_from_their_checkpoints(
    tmp_path: Path, recipe: Path, unbroken: Place, api: str
) -> None:
    place, random_ = Place(tmp_path, recipe, api), random.Random(1)
    whole = len(steps_of(unbroken))
    for _ in range(8):
        seen = len(steps_of(place))
        until = seen + random_.randint(20, whole // 3)
        process = place.start()
        if not wait_for(process, lambda: len(steps_of(place)) >= until, place):  # noqa: B023
            assert process.returncode == 0, place.log.read_text()[-4000:]
            break
        kill(process)
    else:
        finish(place)
    again = len(steps_of(place)) - whole
    assert again <= 8 * 3 * 10, "no training began afresh: a kill repeats ten steps, and what its stage did besides"
    assert_as_unbroken(place, unbroken, api)


def test_asked_to_end_it_saves_the_step_at_hand(tmp_path: Path, recipe: Path, unbroken: Place, api: str) -> None:
    """Ctrl-C in a training: no step is done twice."""
    place = Place(tmp_path, recipe, api)
    process = place.start()
    assert wait_for(process, lambda: len(steps_of(place)) >= 33, place)
    os.kill(process.pid, signal.SIGINT)
    process.wait(60)
    assert process.returncode != 0
    (scratch,) = (tmp_path / ".stillhouse" / "scratch").iterdir()
    last = steps_of(place)[-1][2]
    assert max(int(path.name.split("-")[1]) for path in scratch.glob("step-*")) == last
    assert not list((tmp_path / ".stillhouse" / "running").iterdir())
    finish(place)
    assert len(steps_of(place)) == len(steps_of(unbroken))
    assert_as_unbroken(place, unbroken, api)


def test_a_killed_restart_from_a_stage_does_that_stage_again_once(tmp_path: Path, recipe: Path, api: str) -> None:
    place = Place(tmp_path, recipe, api)
    first = finish(place)
    before = {(row["stage"], row["name"]): row for row in place.lineage()}
    done = len(place.seen())
    process = place.start("--from", "sensitivity")
    redone = lambda: [each["stage"] for each in place.seen()[done:] if each["what"] == "end"]  # noqa: E731
    assert wait_for(process, lambda: "quantize" in redone(), place)
    kill(process)
    second = finish(place, "--from", "sensitivity")
    assert second["mlflow_run"] != first["mlflow_run"]
    assert parents(tmp_path) == 2
    assert [stage for stage in redone() if stage in ("sensitivity", "quantize")] == ["sensitivity", "quantize"]
    stages = [stage for stage in redone() if stage != FOLDER]
    assert not {"data", "teacher", "search", "distill"} & set(stages)
    after = {(row["stage"], row["name"]): row for row in place.lineage()}
    makers = {key: row["parent_run"] for key, row in after.items()}
    assert makers["teacher", "residual"] == first["mlflow_run"]
    assert makers["quantize", "student-0"] == makers["gate", "digits"] == second["mlflow_run"]
    assert after["quantize", "student-0"]["output"] == before["quantize", "student-0"]["output"]
    assert faults(tmp_path) == []


def test_two_starts_of_a_recipe_one_works_the_other_waits_or_leaves(
    tmp_path: Path, recipe: Path, unbroken: Place, api: str
) -> None:
    first = Place(tmp_path, recipe, api)
    waiting, leaving = Place(tmp_path, recipe, api), Place(tmp_path, recipe, api)
    waiting.log, leaving.log = tmp_path / "waiting.log", tmp_path / "leaving.log"
    waiting.events = leaving.events = tmp_path / "others.jsonl"
    started = [working := first.start()]
    try:
        assert wait_for(working, lambda: kinds_ended(first), first)
        started.append(patient := waiting.start())
        left = finish(leaving, "--if-running", "leave")
        assert left["outcome"] == "left"
        assert f"process {working.pid} on " in left["summary"]
        assert working.wait() == 0, first.log.read_text()[-4000:]
        assert patient.wait() == 0, waiting.log.read_text()[-4000:]
    finally:
        for process in started:
            if process.poll() is None:
                kill(process)
    assert [each for each in waiting.seen() if each["what"] == "begin" and each["stage"] != FOLDER] == []
    assert all(row["cached"] for row in waiting.lineage())
    assert faults(tmp_path) == []
    assert parents(tmp_path) == 2
    assert differing(waiting, unbroken)[1] == []
