"""Aliases of registered models on a real MLflow store: promotion, rollback, and a kill between any two calls."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.gate import TOO_GOOD
from export.latency import AGAIN, BenchmarkResult, NoiseFloor, timing_of
from export.targets import OnnxRuntimeTarget
from export.verdict import Check, RunVerdict, Verdict
from tasks import registry, tracking
from tasks.artifacts import Artifact, Store, file_digest
from tasks.gate import can_register, register
from tasks.promotion import decide, facts_of
from tasks.registry import RegistryError
from tasks.settings import settings
from tasks.stage import DirectRunner, StageIndex, StageResult
from tests.flows.registered import add_version
from tests.tasks.killed_client import Killed, Kills

ROOT = Path(__file__).resolve().parents[2]


numbers = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def one_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One store for all tests here, each with a model of its own: making the tables takes seconds."""
    caches = (settings, tracking.client, tracking.experiment_id)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("registry")
        patch.setenv("STILLHOUSE_ROOT", str(folder))
        for cache in caches:
            cache.cache_clear()
        Store(settings().store_dir).prepare()
        yield folder
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def model() -> str:
    return f"model-{next(numbers)}"


def killed_at_each_call(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], Any], check: Callable[[int], Any]) -> int:
    """``act(number)`` killed before its call ``number``, then ``check(number)``; until it comes to its end."""
    for number in range(60):
        with monkeypatch.context() as patch:
            client = Kills(tracking.client(), number)
            patch.setattr(tracking, "client", lambda client=client: client)
            try:
                act(number)
            except Killed:
                done = False
            else:
                done = True
        check(number)
        if done:
            return number
    raise AssertionError("it never comes to its end")


def aliases(name: str) -> dict[str, int]:
    return {alias: each.version for each in registry.versions(name) for alias in each.aliases}


def three(name: str) -> None:
    for _ in range(3):
        add_version(name)


def test_promotion_keeps_the_old_champion_as_previous_and_says_who_and_why(model: str) -> None:
    three(model)
    registry.promote(model, 1, by="policy", reason="the first")
    assert aliases(model) == {"candidate": 3, "champion": 1}
    registry.promote(model, 2, by="ada", reason="faster")
    assert aliases(model) == {"candidate": 3, "champion": 2, "previous": 1}
    champion = registry.champion(model)
    assert champion is not None
    assert champion.version == 2
    assert champion.run_id
    assert champion.tags["promoted_by"] == "ada"
    assert champion.tags["promoted_because"] == "faster"
    assert champion.tags["file"] == "student-0.int8"
    rows = registry.history(model)
    assert [(row["event"], row["version"], row["by"]) for row in rows] == [
        ("promoted", 1, "policy"),
        ("promoted", 2, "ada"),
    ]
    assert rows[1]["at"] == champion.tags["promoted_at"]


def test_promoting_the_champion_again_changes_nothing(model: str) -> None:
    three(model)
    registry.promote(model, 1, by="a", reason="x")
    registry.promote(model, 2, by="a", reason="x")
    before = registry.versions(model)
    registry.promote(model, 2, by="b", reason="y")
    assert registry.versions(model) == before
    assert len(registry.history(model)) == 2


def test_rollback_goes_back_step_by_step_and_refuses_where_nothing_is_left(model: str) -> None:
    three(model)
    for version in (1, 2, 3):
        registry.promote(model, version, by="a", reason="x")
    assert registry.rollback(model, by="b", reason="wrong on Mondays").version == 2
    assert aliases(model) == {"candidate": 3, "champion": 2, "previous": 1}
    bad = registry.find(model, 3)
    assert bad.was_rolled_back
    assert bad.tags["rolled_back_because"] == "wrong on Mondays"
    assert bad.tags["rolled_back_by"] == "b"
    assert registry.rollback(model, by="b", reason="and this one").version == 1
    assert aliases(model) == {"candidate": 3, "champion": 1}
    with pytest.raises(RegistryError, match="no previous champion"):
        registry.rollback(model, by="b", reason="again")
    assert aliases(model)["champion"] == 1
    assert [row["event"] for row in registry.history(model)] == ["promoted"] * 3 + ["rolled back"] * 2


def test_what_was_rolled_back_is_not_promoted_by_policy_under_any_number_but_may_be_by_a_person(model: str) -> None:
    three(model)
    add_version(model, sha256=f"{model}-2", accuracy=0.99)
    registry.promote(model, 1, by="a", reason="x")
    registry.promote(model, 2, by="a", reason="x")
    registry.rollback(model, by="ada", reason="slow in the field")
    for version in (2, 4):
        decision = decide(registry.find(model, version))
        assert decision.action == "hold"
        assert "slow in the field" in decision.reasons[0]
    registry.promote(model, 2, by="ada", reason="the device was at fault")
    assert not registry.find(model, 2).was_rolled_back
    assert aliases(model) == {"candidate": 4, "champion": 2, "previous": 1}
    registry.rollback(model, by="ada", reason="no, it was not")
    assert aliases(model) == {"candidate": 4, "champion": 1}


def test_unknown_models_and_versions_are_refused_with_those_that_are_there(model: str) -> None:
    three(model)
    with pytest.raises(RegistryError, match=f"expected one of the registered models: .*{model}"):
        registry.find("nobody")
    with pytest.raises(RegistryError, match="no version 9, expected one of its versions: 3, 2, 1"):
        registry.promote(model, 9, by="a", reason="x")
    with pytest.raises(RegistryError, match="no champion"):
        registry.rollback(model, by="a", reason="x")
    assert registry.find(model).version == 3
    assert registry.champion(model) is None


@pytest.mark.slow
def test_a_promotion_killed_between_any_two_calls_leaves_a_champion_and_is_completed(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(number: int) -> None:
        registry.promote(f"{model}-{number}", 3, by="ada", reason="better")

    def check(number: int) -> None:
        name = f"{model}-{number}"
        assert aliases(name)["champion"] in (2, 3)
        registry.promote(name, 3, by="bob", reason="again")
        assert aliases(name) == {"candidate": 3, "champion": 3, "previous": 2}
        tags = registry.find(name, 3).tags
        by = "ada" if number else "bob"  # before its first call nothing was written down
        assert (tags["promoted_by"], tags["replaced"]) == (by, "2")
        assert [row["version"] for row in registry.history(name)] == [1, 2, 3]
        prepare(number + 1)

    def prepare(number: int) -> None:
        three(f"{model}-{number}")
        for version in (1, 2):
            registry.promote(f"{model}-{number}", version, by="a", reason="x")

    prepare(0)
    assert killed_at_each_call(monkeypatch, act, check) >= 7


@pytest.mark.slow
def test_a_rollback_killed_between_any_two_calls_goes_back_one_step_and_no_further(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(number: int) -> None:
        three(f"{model}-{number}")
        for version in (1, 2, 3):
            registry.promote(f"{model}-{number}", version, by="a", reason="x")

    def act(number: int) -> None:
        registry.rollback(f"{model}-{number}", by="ada", reason="bad")

    def check(number: int) -> None:
        name = f"{model}-{number}"
        assert aliases(name)["champion"] in (2, 3)
        whole = registry.history(name)[-1]["event"] == "rolled back"
        after = registry.champion(name) if whole else registry.rollback(name, by="bob", reason="bad")
        pending = "pending" in tracking.client().get_registered_model(name).tags
        if pending:  # only the last call, which strikes it off, was missing
            after = registry.rollback(name, by="bob", reason="bad")
        assert after is not None
        assert after.version == 2
        assert aliases(name) == {"candidate": 3, "champion": 2, "previous": 1}
        assert [row["event"] for row in registry.history(name)] == ["promoted"] * 3 + ["rolled back"]
        assert registry.find(name, 3).was_rolled_back
        prepare(number + 1)

    prepare(0)
    assert killed_at_each_call(monkeypatch, act, check) >= 7


def test_a_rollback_after_a_killed_promotion_takes_the_promoted_version_back(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(model)
    registry.promote(model, 1, by="a", reason="x")
    registry.promote(model, 2, by="a", reason="x")
    with monkeypatch.context() as patch:
        client = Kills(tracking.client(), 2)  # the champion is set, previous is still version 1
        patch.setattr(tracking, "client", lambda: client)
        with pytest.raises(Killed):
            registry.promote(model, 3, by="ada", reason="x")
    assert aliases(model) == {"candidate": 3, "champion": 3, "previous": 1}
    assert registry.rollback(model, by="bob", reason="bad").version == 2
    assert aliases(model) == {"candidate": 3, "champion": 2, "previous": 1}


PROMOTE = """
import sys
from tasks import registry
registry.promote(sys.argv[2], int(sys.argv[1]), by=f"process {sys.argv[1]}", reason="race")
"""


@pytest.mark.slow
def test_two_processes_at_once_take_turns(model: str) -> None:
    three(model)
    registry.promote(model, 1, by="a", reason="x")
    racers = [subprocess.Popen([sys.executable, "-c", PROMOTE, number, model], cwd=ROOT) for number in ("2", "3")]
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0]
    rows = registry.history(model)
    assert [row["version"] for row in rows[:1]] == [1]
    assert {row["version"] for row in rows[1:]} == {2, 3}
    assert [row["previous"] for row in rows] == [None, 1, rows[1]["version"]]
    assert aliases(model) == {"candidate": 3, "champion": rows[2]["version"], "previous": rows[1]["version"]}


# The stage that registers


def accepted(file: str) -> RunVerdict:
    target = Verdict(target="cpu", candidate=file, outcome="accept", checks=(), ships=file)
    return RunVerdict(outcome="accept", summary="", targets={"cpu": target})


def anomalous(file: str, *failed: str) -> RunVerdict:
    checks = tuple(
        Check(name=name, outcome="fail", found="", expected="", reason=f"It fails at {name}.", on_fail="anomalous")
        for name in failed
    )
    reasons = tuple(check.reason for check in checks)
    target = Verdict(target="cpu", candidate=file, outcome="anomalous", checks=checks, reasons=reasons)
    return RunVerdict(outcome="anomalous", summary="", targets={"cpu": target})


def inputs(verdict: RunVerdict, lineage: str = "lineage") -> dict[str, Any]:
    """What the stage takes, with a real ONNX file, evaluation and benchmark in the store."""
    store = Store(settings().store_dir)
    file, reference = "student-0.int8", "teacher-a.float32"
    with store.put("graph") as graph:
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("images", "logits")]
        node = helper.make_node("Identity", ["images"], ["logits"])
        body = helper.make_graph([node], "g", value[:1], value[1:])
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, graph.folder / "model.onnx")
        digest = file_digest(graph.folder / "model.onnx")
    correct = np.arange(200) >= 10
    metrics = {"accuracy": 0.95, "ece": 0.02, "num_samples": 200}
    with store.put("evaluation") as evaluation:
        every = {file: metrics, "student-0.float32": metrics | {"accuracy": 0.955}}
        (evaluation.folder / "evaluation.json").write_text(json.dumps({"metrics": every}))
        np.save(evaluation.folder / f"{file}.correct.npy", correct)
        np.save(evaluation.folder / f"{file}.answers.npy", np.arange(200) % 3)
    rounds = [np.array([2.0, 2.1]), np.array([2.0, 2.2]), np.array([1.9, 2.0])]
    mine = [each / 2 for each in rounds]
    floor = NoiseFloor(batch=32, ratio=1.0, ratio_iqr=(1.0, 1.0), spread=0.03)
    timing = BenchmarkResult(
        reference=reference,
        rows=(
            timing_of(file, 32, mine, rounds, {"size_bytes": 5000.0}, seed=0),
            timing_of(reference, 32, rounds, rounds, {"size_bytes": 20480.0}, seed=0),
            timing_of(reference + AGAIN, 32, rounds, rounds, {"size_bytes": 20480.0}, seed=0),
        ),
        noise_floors=(floor,),
        failures={},
        environment={"cpu": "a cpu", "threads": 1, "onnxruntime": "1.31.1"},
    )
    with store.put("benchmark") as benchmark:
        (benchmark.folder / "latency.json").write_text(timing.model_dump_json())

    def result(stage: str, artifact: Artifact, info: dict[str, Any] | None = None) -> StageResult:
        return StageResult(stage=stage, name="x", key=stage, artifact=artifact, info=info or {})

    data = Artifact(kind="dataset", sha256="d" * 64, size_bytes=1)
    return {
        "verdict": result("gate", data, verdict.model_dump(mode="json")),
        "targets": (OnnxRuntimeTarget(batch_sizes=(32, 1)),),
        "files": {file: result("export", graph.done(), {"form": "int8", "sha256": digest})},
        "data": result("data", data),
        "evaluation": result("evaluate", evaluation.done()),
        "benchmark": result("benchmark", benchmark.done()),
        "lineage": lineage,
    }


def run_register(model: str, given: dict[str, Any], parent: str) -> StageResult:
    """The stage in a runner of its own, as a start of the program makes one."""
    index = StageIndex(Store(settings().store_dir))
    return DirectRunner(index=index, parent_run=tracking.Run(parent)).run(register, model, given)


@pytest.fixture
def parent() -> str:
    return tracking._create("recipe", {"stage": "recipe"}).id


def test_registration_records_what_the_comparison_needs(model: str, parent: str) -> None:
    result = run_register(model, inputs(accepted("student-0.int8")), parent)
    assert result.info == {"model": model, "version": 1, "alias": "candidate", "file": "student-0.int8"}
    version = registry.find(model)
    assert version.tags["mlflow_run"] == parent
    assert version.tags["verdict"] == "accept"
    facts = facts_of(version)
    assert (facts.accuracy, facts.float_accuracy, facts.ece, facts.num_samples) == (0.95, 0.955, 0.02, 200)
    assert facts.size_bytes == 5000
    assert facts.latency_p50_ms == pytest.approx(1.0)
    assert facts.latency_ratio is not None
    assert facts.latency_ratio.estimate == pytest.approx(0.5)
    assert facts.latency_noise_floor == 0.03
    assert "teacher-a.float32 of 20 KiB, batch 32" in facts.yardstick
    assert facts.correct is not None
    assert facts.correct.sum() == 190
    assert facts.answers is not None


def test_killed_in_the_middle_and_started_again_it_registers_one_version(
    model: str, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(accepted("student-0.int8"), model)
    killed: list[int] = []

    def check(number: int) -> None:
        killed.append(number)
        assert len(registry.versions(model)) <= 1
        for version in registry.versions(model):
            assert version.tags["sha256"] == given["files"]["student-0.int8"].info["sha256"]

    killed_at_each_call(monkeypatch, lambda number: run_register(model, given, parent), check)
    assert len(killed) >= 3  # before the model, the version and the alias were made
    (version,) = registry.versions(model)
    assert version.aliases == ("candidate",)
    assert facts_of(version).accuracy == 0.95
    logged = tracking.client().search_logged_models([tracking.experiment_id()])
    assert [each.status.name for each in logged if each.tags["lineage"] == model] == ["READY"]


def test_the_same_file_of_the_same_lineage_is_one_version_and_of_another_a_second(model: str, parent: str) -> None:
    verdict = accepted("student-0.int8")
    run_register(model, inputs(verdict), parent)
    other = tracking._create("recipe", {"stage": "recipe"}).id
    index = StageIndex(Store(settings().store_dir))
    again = DirectRunner(index=index, parent_run=tracking.Run(other), force_from="register")
    assert again.run(register, model, inputs(verdict)).info["version"] == 1
    assert run_register(model, inputs(verdict, "another lineage"), other).info["version"] == 2


def test_a_file_that_is_merely_too_good_is_registered_for_a_person_but_is_no_candidate(model: str, parent: str) -> None:
    verdict = anomalous("student-0.int8", TOO_GOOD)
    assert can_register(verdict.model_dump())
    assert run_register(model, inputs(verdict), parent).info["alias"] == "none"
    (version,) = registry.versions(model)
    assert version.aliases == ()
    decision = decide(version)
    assert decision.action == "ask"
    assert decision.anomalies == (f"It fails at {TOO_GOOD}.",)
    assert not can_register(anomalous("student-0.int8", TOO_GOOD, "finite numbers").model_dump())
    assert not can_register(anomalous("student-0.int8", "teacher above chance").model_dump())
    assert not can_register({})
