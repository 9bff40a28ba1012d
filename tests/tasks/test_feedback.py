"""What devices report, in MLflow and for the latency model: a real store, a real bundle, an agent that installs it."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compression.errors import CompressionError, InputError
from compression.search import Design, Study
from compression.train import TrainConfig
from compression.zoo import ResidualCnn
from export.devices.registry import Rollout
from export.latency_model import points_of
from flows.compress import run_recipe
from flows.latency import show_latency
from flows.models import show_models
from flows.recipe import parse_recipe
from tasks import feedback, registry, tracking
from tasks.artifacts import Artifact, Store
from tasks.search import check_device, search
from tasks.settings import settings
from tasks.stage import Stage, StageResult, use_runner
from tests.flows.registered import add_version
from tests.flows.tiny_recipe import tiny_recipe
from tests.tasks.killed_client import Killed, Kills
from tests.tasks.reported import (
    MODEL,
    NETS,
    SHAPE,
    Fleet,
    Lab,
    forget,
    history,
    run_of,
    table,
    table_here,
)


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One for all tests here: making MLflow's tables and installing a bundle take seconds."""
    caches = (settings, tracking.client, tracking.experiment_id)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("feedback")
        patch.setenv("STILLHOUSE_ROOT", str(folder))
        patch.setenv("STILLHOUSE_LATENCY_NETWORKS", str(NETS))
        patch.delenv("STILLHOUSE_MLFLOW_URI", raising=False)
        for cache in caches:
            cache.cache_clear()
        yield Lab(folder)
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def fleet(tmp_path: Path, lab: Lab) -> Iterator[Fleet]:
    found = Fleet(tmp_path, lab)
    yield found
    found.registry.close()
    forget()


# --- the rollout's run


def test_a_rollout_is_one_child_run_with_what_each_device_measured(lab: Lab, fleet: Fleet, tmp_path: Path) -> None:
    rollout = fleet.start(lab.statement)
    assert fleet.registry.receive(lab.report), "the agent's own words"
    made = fleet.record(lab.statement, rollout)
    found = run_of(rollout)
    assert found.info.run_id == made
    assert (found.info.status, found.data.tags["mlflow.parentRunId"]) == ("RUNNING", lab.parent)
    assert (found.data.metrics["devices_good"], found.data.metrics["devices_failed"]) == (1, 0)
    for key in ("p50_ms", "p95_ms", "memory_mib", "max_abs"):
        assert found.data.metrics[f"{key}.lab-1"] == lab.report[key]
    fleet.says("lab-2", lab.statement, p50_ms=2.0)
    fleet.says("lab-3", lab.statement, p50_ms=6.0)
    fleet.registry.set_state(rollout.id, "done", "3 of 3 devices have it.")
    assert fleet.record(lab.statement, rollout) == made
    assert made is not None
    found = run_of(rollout)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["devices_good"] == 3
    assert (found.data.metrics["p50_ms_median"], found.data.metrics["p50_ms_max"]) == (2.0, 6.0)
    assert [step for step, _, _ in history(made)["devices_good"]] == [1, 3], "how it went is a curve"
    assert found.data.params["seq"] == "1"
    assert found.data.params["bundle_sha256"] == lab.statement.content.sha256
    assert found.data.params["policy.canary"] == "1"
    rows = table(made, tmp_path)
    assert sorted(rows) == ["lab-1", "lab-2", "lab-3"]
    assert rows["lab-1"]["outcome"] == "committed"
    assert json.loads(rows["lab-1"]["facts"])["isa"] == lab.status["facts"]["isa"]


def test_doing_it_again_changes_nothing(lab: Lab, fleet: Fleet) -> None:
    rollout = fleet.start(lab.statement)
    for number, name in enumerate(fleet.names, start=1):
        fleet.says(name, lab.statement, p50_ms=float(number))
    fleet.registry.set_state(rollout.id, "done")
    made = fleet.record(lab.statement, rollout)
    assert made is not None
    before = history(made), registry.versions(MODEL), len(tracking.children(lab.parent))
    assert fleet.record(lab.statement, rollout) == made
    assert (history(made), registry.versions(MODEL), len(tracking.children(lab.parent))) == before


def test_an_aborted_rollout_failed_and_says_why_and_who_was_silent(lab: Lab, fleet: Fleet, tmp_path: Path) -> None:
    rollout = fleet.start(lab.statement)
    fleet.says("lab-1", lab.statement, "refused", text="Its answers differ by up to 3 from the golden ones.")
    fleet.registry.mark(rollout.id, ["lab-2", "lab-3"], "withdrawn")
    fleet.registry.set_state(rollout.id, "aborted", "1 of 1 devices failed, more than 0.")
    made = fleet.record(lab.statement, rollout)
    assert made is not None
    found = run_of(rollout)
    assert found.info.status == "FAILED"
    assert (found.data.metrics["devices_good"], found.data.metrics["devices_failed"]) == (0, 1)
    assert found.data.tags["rollout.reason"] == "1 of 1 devices failed, more than 0."
    rows = table(made, tmp_path)
    assert {name: row["outcome"] for name, row in rows.items()} == {
        **{"lab-1": "refused", "lab-2": "withdrawn", "lab-3": "withdrawn"}
    }
    assert "golden" in rows["lab-1"]["reason"]


def test_a_device_that_goes_back_later_counts_as_failed(lab: Lab, fleet: Fleet) -> None:
    rollout = fleet.start(lab.statement)
    fleet.says("lab-1", lab.statement)
    fleet.record(lab.statement, rollout)
    fleet.says("lab-1", lab.statement, "rolled back", text="The server was started 4 times within 60 s.")
    fleet.record(lab.statement, rollout)
    metrics = run_of(rollout).data.metrics
    assert (metrics["devices_good"], metrics["devices_failed"]) == (0, 1)


def test_measurements_that_are_no_numbers_are_left_out(lab: Lab, fleet: Fleet, tmp_path: Path) -> None:
    rollout = fleet.start(lab.statement)
    fleet.says("lab-1", lab.statement, p50_ms="fast", p95_ms=float("inf"), max_abs=None)
    fleet.says("lab-2", lab.statement, p50_ms=2.0)
    made = fleet.record(lab.statement, rollout)
    assert made is not None
    metrics = run_of(rollout).data.metrics
    assert (metrics["devices_good"], metrics["p50_ms_median"], metrics["p50_ms.lab-2"]) == (2, 2.0, 2.0)
    assert not {"p50_ms.lab-1", "p95_ms.lab-1", "max_abs.lab-1"} & set(metrics)
    assert table(made, tmp_path)["lab-1"]["p50_ms"] == ""


@pytest.mark.slow
def test_killed_before_any_call_it_is_whole_when_it_is_done_again(
    lab: Lab, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(rollout: Rollout) -> Any:
        run = run_of(rollout)
        values = {key: [(step, value) for step, value, _ in rows] for key, rows in history(run.info.run_id).items()}
        return run.info.status, values, feedback.running_on(MODEL), [each.path for each in files(run.info.run_id)]

    def files(run_id: str) -> list[Any]:
        return tracking.client().list_artifacts(run_id)

    whole, number = None, 0
    while True:
        statement = fleet.bundle(number + 10, version="2")
        rollout = fleet.start(statement)
        for name in fleet.names[:2]:
            fleet.says(name, statement, p50_ms=3.0)
        fleet.says("lab-3", statement, "refused")
        fleet.registry.set_state(rollout.id, "aborted", "1 of 3 devices failed, more than 0.")
        if number % 2:  # so that there is something to move
            feedback._write(registry.find(MODEL, 3), {"lab-1": {}, "lab-9": {}})
            feedback._write(registry.find(MODEL, 2), {})
        else:
            feedback._write(registry.find(MODEL, 3), {"lab-9": {}})
            feedback._write(registry.find(MODEL, 2), {"lab-3": {}})
        with monkeypatch.context() as patch:
            client = Kills(tracking.client(), number)
            patch.setattr(tracking, "client", lambda client=client: client)
            try:
                fleet.record(statement, rollout)
            except Killed:
                done = False
            else:
                done = True
        fleet.record(statement, rollout)
        found = state(rollout)
        whole = whole or found
        assert found == whole, f"killed before call {number}"
        if done:
            break
        number += 1
    assert number >= 8
    assert whole is not None
    assert (whole[0], whole[2]) == ("FAILED", {2: ["lab-1", "lab-2"], 3: ["lab-9"]})


# --- which device runs what


def test_versions_say_who_runs_them_and_devices_move(lab: Lab, fleet: Fleet) -> None:
    first, second, back = fleet.bundle(1), fleet.bundle(2), fleet.bundle(3, version="1")
    rollout = fleet.start(first)
    for name in fleet.names:
        fleet.says(name, first, p50_ms=1.5)
    fleet.registry.set_state(rollout.id, "done")
    fleet.record(first, rollout)
    assert feedback.running_on(MODEL) == {1: ["lab-1", "lab-2", "lab-3"]}
    said = json.loads(registry.find(MODEL, 1).tags["devices"])
    assert said["lab-2"] == {"seq": 1, "sha256": first.content.sha256[:12], "p50_ms": 1.5}

    rollout = fleet.start(second)
    fleet.says("lab-1", second)
    fleet.says("lab-2", second, "refused")
    fleet.registry.set_state(rollout.id, "aborted")
    fleet.record(second, rollout)
    assert feedback.running_on(MODEL) == {1: ["lab-2", "lab-3"], 2: ["lab-1"]}

    rollout = fleet.start(back)
    fleet.says("lab-1", back)
    fleet.registry.set_state(rollout.id, "done")
    fleet.record(back, rollout)
    assert feedback.running_on(MODEL) == {1: ["lab-1", "lab-2", "lab-3"]}
    assert "devices" not in registry.find(MODEL, 2).tags
    assert json.loads(registry.find(MODEL, 1).tags["devices"])["lab-1"]["seq"] == 3


def test_a_device_that_rolled_back_by_itself_is_at_the_version_before(lab: Lab, fleet: Fleet) -> None:
    for seq in (1, 2):
        rollout = fleet.start(fleet.bundle(seq))
        fleet.says("lab-1", fleet.bundle(seq))
        fleet.registry.set_state(rollout.id, "done")
    fleet.says("lab-1", fleet.bundle(2), "rolled back", text="asked")
    fleet.record(fleet.bundle(2), rollout)
    assert feedback.running_on(MODEL) == {1: ["lab-1"]}
    others = [report for report in fleet.reports if report["device"] != "lab-1"]
    feedback.record(fleet.bundle(2), fleet.registry.rollout(rollout.id), others, fleet.registry.devices())
    assert feedback.running_on(MODEL) == {1: ["lab-1"]}, "of which nothing new was told"


def test_a_device_with_another_model_leaves_the_versions_of_this_one(lab: Lab, fleet: Fleet) -> None:
    rollout = fleet.start(lab.statement)
    fleet.says("lab-1", lab.statement)
    fleet.record(lab.statement, rollout)
    assert feedback.running_on(MODEL) == {1: ["lab-1"]}
    if not registry.versions("letters"):
        add_version("letters", sha256=lab.statement.models()[0].sha256)
    other = fleet.bundle(5, version="1").model_copy(update={"name": "letters"})
    rollout = fleet.start(other)
    fleet.says("lab-1", other)
    fleet.record(other, rollout)
    assert (feedback.running_on(MODEL), feedback.running_on("letters")) == ({}, {1: ["lab-1"]})


def test_devices_that_were_not_asked_stay_where_they_are(lab: Lab, fleet: Fleet) -> None:
    feedback._write(registry.find(MODEL, 3), {"far-away": {"seq": 3, "sha256": "0" * 12, "p50_ms": None}})
    rollout = fleet.start(lab.statement)
    fleet.says("lab-1", lab.statement)
    fleet.record(lab.statement, rollout)
    assert feedback.running_on(MODEL) == {1: ["lab-1"], 3: ["far-away"]}


def test_a_device_that_is_removed_leaves_all_versions_and_nobody_else_does(lab: Lab, fleet: Fleet) -> None:
    rollout = fleet.start(lab.statement)
    for name in fleet.names:
        fleet.says(name, lab.statement)
    fleet.record(lab.statement, rollout)
    assert feedback.forget("lab-2") == 1
    assert feedback.running_on(MODEL) == {1: ["lab-1", "lab-3"]}
    assert feedback.forget("lab-2") == 0
    assert [feedback.forget(name) for name in ("lab-1", "lab-3")] == [1, 1]
    assert feedback.running_on(MODEL) == {}


def test_many_devices_take_several_tags_and_few_again_one() -> None:
    entry = {"seq": 100_000, "sha256": "a" * 12, "p50_ms": 1.2345678901234567}
    many = {f"{'device':x<41}-{number:04d}": entry for number in range(130)}
    feedback._write(registry.find(MODEL, 1), many)
    tags = {key: text for key, text in registry.find(MODEL, 1).tags.items() if key.startswith("devices")}
    assert sorted(tags) == ["devices", "devices.2", "devices.3"]
    assert max(map(len, tags.values())) > 4000, "so that the bound means something"
    assert feedback.running_on(MODEL) == {1: sorted(many)}
    few = dict(list(many.items())[:3])
    feedback._write(registry.find(MODEL, 1), few)
    assert feedback.running_on(MODEL) == {1: sorted(few)}
    forget()


def test_models_name_shows_the_devices_of_each_version(lab: Lab, fleet: Fleet) -> None:
    console = Console(file=io.StringIO(), width=200)
    show_models(console, MODEL)
    rollout = fleet.start(lab.statement)
    for name in fleet.names[:2]:
        fleet.says(name, lab.statement)
    fleet.record(lab.statement, rollout)
    assert isinstance(console.file, io.StringIO)
    assert "runs on" not in console.file.getvalue()
    show_models(console, MODEL)
    assert "version 1 runs on lab-1, lab-2\n" in console.file.getvalue()


# --- what MLflow does not know


def test_a_run_that_mlflow_does_not_know_is_a_note_and_versions_are_tagged_all_the_same(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    deleted = tracking._create("gone", {})
    tracking.client().delete_run(deleted.id)
    for seq, run in enumerate(("f" * 32, deleted.id, None, "it's"), start=1):
        lineage = fleet.lab.statement.lineage.model_copy(update={"mlflow_run": run})
        statement = fleet.bundle(seq, version="1").model_copy(update={"lineage": lineage})
        rollout = fleet.start(statement)
        fleet.says("lab-1", statement)
        fleet.registry.set_state(rollout.id, "done")
        caplog.clear()
        assert fleet.record(statement, rollout) is None
        assert f"does not know its run '{run}'" in caplog.text
        assert feedback.running_on(MODEL) == {1: ["lab-1"]}


@pytest.mark.parametrize("version", ["unregistered", "99"])
def test_a_version_that_mlflow_does_not_know_is_a_note(
    fleet: Fleet, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    statement = fleet.bundle(2, version=version)
    rollout = fleet.start(statement)
    fleet.says("lab-1", statement)
    assert fleet.record(statement, rollout) is not None
    assert f"no version '{version}' of model '{MODEL}'" in caplog.text
    assert feedback.running_on(MODEL) == {}


def test_a_version_of_another_server_with_the_same_number_gets_no_tag(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    number = add_version(MODEL, sha256="another model")
    statement = fleet.bundle(2, version=str(number))
    rollout = fleet.start(statement)
    fleet.says("lab-1", statement)
    assert fleet.record(statement, rollout) is not None
    assert "another model than the bundle's" in caplog.text
    assert feedback.running_on(MODEL) == {}


def test_where_there_is_no_store_none_is_made(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = fleet.start(fleet.lab.statement)
    monkeypatch.setenv("STILLHOUSE_MLFLOW_URI", f"sqlite:///{tmp_path / 'none' / 'mlflow.db'}")
    settings.cache_clear()
    try:
        assert fleet.record(fleet.lab.statement, rollout) is None
    finally:
        monkeypatch.undo()
        settings.cache_clear()
    assert not (tmp_path / "none").exists()


# --- the latency model


@pytest.fixture
def points(lab: Lab) -> Iterator[Callable[[str], Any]]:
    """What is kept of a device; afterwards nothing is."""
    folder = settings().home_dir / "latency"
    yield lambda device: points_of(folder, device)
    for path in folder.rglob("*.json*"):
        path.unlink()


def test_what_a_device_measured_is_a_point_of_its_latency_model(
    lab: Lab, fleet: Fleet, points: Callable[[str], Any]
) -> None:
    fleet.registry.receive(lab.report)
    fleet.says("lab-2", lab.statement, "refused")
    assert feedback.feed_latency(lab.statement, fleet.reports, fleet.registry.devices()) == 1
    assert feedback.feed_latency(lab.statement, fleet.reports, fleet.registry.devices()) == 0
    (found,) = points("lab-1")
    assert found.p50_ms == lab.report["p50_ms"]
    assert (found.variant, found.precision, found.input_shape) == (lab.report["variant"], "float32", SHAPE)
    assert found.model_sha256 == lab.statement.models()[0].sha256
    assert found.facts["isa"] == lab.status["facts"]["isa"]
    assert points("lab-2") == ()
    assert not list((settings().home_dir / "latency").glob("*.json")), "no table is measured for it"
    fitted = table_here()
    assert found.predicted_ms(lambda shape, batch: fitted) == fitted.predict_ms(lab.net, SHAPE)


def test_the_same_model_in_a_newer_bundle_replaces_its_point(
    lab: Lab, fleet: Fleet, points: Callable[[str], Any]
) -> None:
    for seq, p50_ms in ((1, 1.0), (2, 2.0)):
        fleet.says("lab-1", fleet.bundle(seq), p50_ms=p50_ms)
    for seq, changed in ((1, 1), (2, 1), (1, 0)):
        assert feedback.feed_latency(fleet.bundle(seq), fleet.reports, []) == changed
        newest = max(seq, points("lab-1")[0].seq)
        assert [(each.seq, each.p50_ms) for each in points("lab-1")] == [(newest, float(newest))]


@pytest.mark.parametrize("wrong", [{"p50_ms": -1.0}, {"p50_ms": "fast"}, {"p50_ms": None}, {"variant": "other"}])
def test_a_report_without_sense_adds_nothing_and_the_others_count(
    lab: Lab, fleet: Fleet, points: Callable[[str], Any], wrong: dict[str, Any]
) -> None:
    fleet.says("lab-1", lab.statement, **wrong)
    fleet.says("lab-2", lab.statement)
    assert feedback.feed_latency(lab.statement, fleet.reports, []) == 1
    assert (len(points("lab-1")), len(points("lab-2"))) == (0, 1)


def test_a_bundle_whose_run_or_store_is_elsewhere_adds_nothing(
    lab: Lab, fleet: Fleet, points: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    fleet.says("lab-1", lab.statement)
    away = lab.statement.model_copy(update={"lineage": lab.statement.lineage.model_copy(update={"run": "away"})})
    assert feedback.feed_latency(away, fleet.reports, []) == 0
    assert "is not on this machine" in caplog.text
    place = Store(settings().store_dir).place(lab.checkpoint)
    place.rename(place.with_name("hidden"))
    try:
        assert feedback.feed_latency(lab.statement, fleet.reports, []) == 0
    finally:
        place.with_name("hidden").rename(place)
    assert "is missing from" in caplog.text
    assert points("lab-1") == ()


def feed(lab: Lab, fleet: Fleet, times: float) -> None:
    """A report of a device that takes so many times as long as is predicted here."""
    fleet.says("lab-1", lab.statement, p50_ms=times * table_here().predict_ms(lab.net, SHAPE))
    assert feedback.feed_latency(lab.statement, fleet.reports, []) == 1


@pytest.mark.usefixtures("points")
def test_latency_of_a_device_shows_its_factor_and_what_checkpoints_take_there(lab: Lab, fleet: Fleet) -> None:
    checkpoint = Store(settings().store_dir).open(lab.checkpoint)

    def shown(**how: Any) -> str:
        console = Console(file=io.StringIO(), width=200)
        show_latency(console, SHAPE, (1,), (checkpoint,), device="lab-1", **how)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    with pytest.raises(InputError, match="Device 'lab-1' has no measured model, expected one. Roll a bundle out"):
        shown()
    feed(lab, fleet, 3.0)
    here = table_here().predict_ms(lab.net, SHAPE)
    text = shown()
    assert "Device lab-1 takes 3 times as long as predicted here (onnxruntime, float32): 1 model." in text
    assert f"{3 * here:.3f} ms on lab-1" in text
    (row,) = json.loads(shown(as_json=True))
    assert row["device"]["factor"] == pytest.approx(3.0, rel=1e-3)
    assert row["device"]["predicted_ms"][str(checkpoint)] == pytest.approx(3.0 * here, rel=1e-3)
    with pytest.raises(InputError, match="measured at batch 1, expected no other batch"):
        show_latency(Console(file=io.StringIO()), SHAPE, (32,), (), device="lab-1")


class Noting:
    """A runner that keeps the key of what it is asked for."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.inputs: dict[str, Any] = {}

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        self.keys.append(stage.key(name, inputs))
        self.inputs = dict(inputs)
        return StageResult(stage=stage.name, name=name, key="", artifact=Artifact(kind="", sha256="", size_bytes=0))


SPACES = (Design(base=ResidualCnn(), widths=((8, 16), (16, 32), (32, 64))),)


def study(**changes: Any) -> Study:
    return Study.model_validate({"spaces": SPACES, "train": TrainConfig(epochs=1), **changes})


@pytest.mark.usefixtures("points")
def test_a_budget_on_a_device_is_refused_before_the_device_has_reported_and_its_factor_makes_another_stage(
    lab: Lab, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    noting = Noting()
    on_device = study(device="lab-1", max_latency_ms=6.0, batch=1)

    def asked(config: Study) -> str:
        with use_runner(noting):
            search(name="study", config=config, seed=0)
        return noting.keys[-1]

    with pytest.raises(InputError, match="Device 'lab-1' has no measured model"):
        asked(on_device)
    with pytest.raises(InputError, match="no measured model"):
        check_device(on_device)
    asked(study())
    assert "device_factor" not in noting.inputs
    fleet.says("lab-1", lab.statement)
    feedback.feed_latency(lab.statement, fleet.reports, [])
    with pytest.raises(InputError, match="images 1x8x8.*Measure it: stillhouse latency 1x8x8 --batch 1"):
        asked(on_device)
    for path in (settings().home_dir / "latency").rglob("lab-1.jsonl"):
        path.unlink()
    here = table_here().predict_ms(lab.net, SHAPE)
    keys = set()
    for seq, times in ((2, 3.0), (3, 5.0)):
        fleet.says("lab-1", fleet.bundle(seq), p50_ms=times * here)
        feedback.feed_latency(fleet.bundle(seq), fleet.reports, [])
        keys.add(asked(on_device))
        assert noting.inputs["device_factor"] == pytest.approx(times, rel=1e-3)
        assert asked(on_device) in keys, "the same factor is the same stage"
    assert len(keys) == 2
    check_device(on_device)


def test_a_device_needs_a_budget_for_one_image() -> None:
    for changes in ({"batch": 1}, {"max_latency_ms": 5.0}, {"max_latency_share": 0.5, "batch": 1}):
        with pytest.raises(ValueError, match="device is 'lab-1'.*Set max_latency_ms, and batch to 1"):
            study(device="lab-1", **changes)
    assert study(device="lab-1", max_latency_ms=5.0, batch=1).device == "lab-1"


@pytest.mark.slow
@pytest.mark.usefixtures("points")
def test_a_search_keeps_the_budget_on_the_device(lab: Lab, fleet: Fleet) -> None:
    feed(lab, fleet, 1000.0)
    raw = tiny_recipe("on-device", epochs=1)

    def found(max_latency_ms: float) -> dict[str, Any]:
        raw["search"] |= {"device": "lab-1", "max_latency_ms": max_latency_ms, "batch": 1}
        folder = Path(run_recipe(parse_recipe(raw))["folder"])
        (row,) = [each for each in json.loads((folder / "lineage.json").read_text()) if each["stage"] == "search"]
        return row["metrics"]

    with pytest.raises(CompressionError, match="latency_p50_ms .* is over 0.001"):
        found(1.0)
    metrics = found(1e5)
    assert metrics["device_factor"] == pytest.approx(1000.0, rel=1e-3)
    assert metrics["finalist_device_p50_ms"] == pytest.approx(1000.0 * metrics["finalist_latency_p50_ms"], rel=1e-3)
