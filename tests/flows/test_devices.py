"""Stages that train in two processes because STILLHOUSE_DEVICES says so."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.errors import CompressionError
from compression.teacher_outputs import OutputsSpec
from flows.recipe import Recipe, load_recipe
from tasks import tracking
from tasks.artifacts import Store
from tasks.data import prepare_data, source_digest
from tasks.distill import distill_student
from tasks.settings import settings
from tasks.stage import DirectRunner, StageIndex, StageResult, use_runner
from tasks.teachers import make_teacher, store_outputs
from tests.flows.test_fan_out import checkpoints, two_of_each

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

EPOCHS = 10
TOLERANCE = 1e-5
"""Relative, of losses; 4e-8 was measured. Weights are no measure here: the gradient of a bias before a layer norm is
nothing but rounding, and Adam makes whole steps of it without any effect."""


@pytest.fixture
def recipe(home: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    raw = two_of_each()
    for teacher in raw["teachers"]:  # without batch norm, where two devices make what one makes
        teacher["model"] = {"kind": "mixer", "width": 16, "depth": 1, "patch_size": 2, "stem": "patch"}
    (home / "two.yaml").write_text(yaml.safe_dump(raw))
    set_devices(2, monkeypatch)
    return load_recipe(home / "two.yaml")


def set_devices(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_DEVICES", str(count))
    monkeypatch.setenv("STILLHOUSE_ACCELERATOR", "cpu")
    settings.cache_clear()


class Chain:
    """The few stages that these tests want, through the store and a run of their own."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.store = Store(settings().store_dir)
        self.store.prepare()
        self.progress: list[tuple[str, int, int]] = []

    def _runner(self) -> DirectRunner:
        run = tracking.client().create_run(tracking.experiment_id())
        return DirectRunner(
            index=StageIndex(self.store),
            parent_run=tracking.Run(run.info.run_id),
            report=lambda *row: self.progress.append(row),
        )

    def data(self) -> StageResult:
        with use_runner(self._runner()):
            source = self.recipe.data
            return prepare_data(
                name="digits",
                config=source,
                source=source_digest(source),
                seed=0,
                unlabelled=None,
                unlabelled_source="",
            )

    def teacher(self, seed: int = 0) -> StageResult:
        data = self.data()
        with use_runner(self._runner()):
            return make_teacher(
                name="residual",
                teacher=self.recipe.teachers[0],
                weights="",
                data=data,
                augment=self.recipe.augment,
                seed=seed,
            )

    def student(self) -> StageResult:
        """A copy of another teacher, taught by the first one."""
        data, teacher, other = self.data(), self.teacher(), self.teacher(seed=1)
        with self.store.put("search") as draft:
            model, spec = load_checkpoint(self.store.open(other.artifact))
            save_checkpoint(model, spec, draft.folder / "finalists" / "0")
        found = StageResult(stage="search", name="study", key="0", artifact=draft.done())
        with use_runner(self._runner()):
            spec = OutputsSpec(views=self.recipe.distill.views, seed=0, augment=self.recipe.augment)
            outputs = store_outputs(name="residual", teacher=teacher, data=data, spec=spec)
            return distill_student(
                name="student-0",
                config=self.recipe.distill,
                search=found,
                finalist=0,
                panel={"residual": outputs},
                teachers={},
                data=data,
                augment=self.recipe.augment,
                seed=0,
                files={},
            )

    def again(self, result: StageResult) -> None:
        StageIndex(self.store).forget(result.key)

    def weights(self, result: StageResult) -> dict[str, torch.Tensor]:
        return load_checkpoint(self.store.open(result.artifact))[0].state_dict()


def rank_log(rank: int) -> str:
    return (settings().home_dir / "logs" / "ranks" / f"rank-{rank}.log").read_text()


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def require_same_curve(left: StageResult, right: StageResult) -> None:
    assert len(left.info["history"]) == len(right.info["history"]) == EPOCHS
    for one, other in zip(left.info["history"], right.info["history"], strict=True):
        for key in ("loss", "validation_nll"):
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE), (one["epoch"], key)


def ranks_of_this_process() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "tasks.devices" in " ".join(each.cmdline())]


def test_two_processes_train_a_teacher_to_what_one_makes_of_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(recipe)
    by_two = chain.teacher()
    assert "MEMBER: 2/2" in rank_log(1), "there was no second process"
    assert {text for text, _, _ in chain.progress} == {"training teacher residual"}
    assert tracking.client().get_run(by_two.run_id).info.status == "FINISHED"
    curve = tracking.client().get_metric_history(by_two.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(EPOCHS)), "every epoch once, by one process"
    assert not list(chain.store.partial.iterdir())
    chain.again(by_two)
    set_devices(1, monkeypatch)
    by_one = chain.teacher()
    assert by_one.key == by_two.key, "devices are a fact of the machine, no input"
    assert by_one.run_id != by_two.run_id
    require_same_curve(by_one, by_two)
    assert by_two.metrics["nll"] == pytest.approx(by_one.metrics["nll"], rel=TOLERANCE)


def test_two_processes_distil_a_student_to_what_one_makes_of_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(recipe)
    by_two = chain.student()
    assert {"training teacher residual", "training student-0"} == {
        text for text, _, _ in chain.progress if "training" in text
    }
    assert [row["epoch"] for row in by_two.info["history"]] == list(range(EPOCHS))
    chain.again(by_two)
    set_devices(1, monkeypatch)
    by_one = chain.student()
    assert by_one.run_id != by_two.run_id
    require_same_curve(by_one, by_two)


def test_a_killed_rank_fails_the_stage_and_the_next_start_goes_on(recipe: Recipe) -> None:
    chain = Chain(recipe)
    unbroken = chain.weights(chain.teacher())
    chain.again(chain.teacher())

    def kill() -> None:
        while not checkpoints(settings().home_dir):
            time.sleep(0.01)
        ranks_of_this_process()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(CompressionError, match=r"'residual' on 2 devices has lost process 1 of 2.*signal 9"):
        chain.teacher()
    killer.join()
    assert not ranks_of_this_process()
    chain.progress.clear()
    resumed = chain.teacher()
    assert "Training goes on at epoch" in rank_log(0)
    assert chain.progress[0][1] > 1
    assert furthest(chain.weights(resumed), unbroken) == 0.0


def test_interrupted_it_leaves_no_rank_and_a_checkpoint(recipe: Recipe) -> None:
    chain = Chain(recipe)

    def interrupt() -> None:
        while not checkpoints(settings().home_dir):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        chain.teacher()
    stopper.join()
    assert not ranks_of_this_process()
    assert checkpoints(settings().home_dir)
