"""The study: budgets, duplicates, failures, resuming after a kill, and what is read off the trials."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint
from compression.data.dataset import Dataset, Split
from compression.errors import ArtifactError, CompressionError
from compression.models import ModelSpec, build_model
from compression.search import Prune, Scale, Study
from compression.search.candidate import OnEpoch, digest_of
from compression.search.filters import Inherited
from compression.search.samplers import Nsga2, RandomSearch, Tpe
from compression.search.scale import scale_model
from compression.search.space import Operator
from compression.search.study import run_study
from compression.search.trials import COLUMNS, Latency, Score, TrialResult
from compression.train import TrainConfig
from compression.types import Preprocessing
from compression.zoo import PlainCnn

BASE = PlainCnn(widths=(32, 32), depths=(1, 1), strides=(2, 2), stem_width=16)
PREPROCESSING = Preprocessing(scale=255.0, mean=(0.5,), std=(0.25,))
PRUNE = Prune(parent="teacher", ratios=(0.25, 0.5, 0.75))
SCALE = Scale(base=BASE, widths=(0.5, 1.0, 2.0), depths=(0, 1))


def dataset_of(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(start: int) -> Split:
        images = torch.randint(0, 256, (count, 1, 12, 12), generator=generator, dtype=torch.uint8)
        return Split(images=images, labels=torch.arange(count) % 3, ids=torch.arange(start, start + count))

    return Dataset(
        name="noise",
        class_names=("a", "b", "c"),
        preprocessing=PREPROCESSING,
        train=split(0),
        validation=split(count),
        calibration=split(2 * count),
        test=split(3 * count),
        hashes={"train": "0" * 64},
        warnings=(),
    )


def spec_of() -> ModelSpec:
    return ModelSpec(
        model=BASE,
        num_classes=3,
        input_shape=(1, 12, 12),
        class_names=("a", "b", "c"),
        preprocessing=PREPROCESSING,
    )


def teacher_of(seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    spec = spec_of()
    torch.manual_seed(seed)
    return build_model(spec).eval(), spec


def config_of(**changes) -> Study:
    return Study(**({"spaces": (PRUNE, SCALE), "trials": 6, "train": TrainConfig(epochs=1)} | changes))


def latency_ms(model: nn.Module) -> float:
    return profile.params(model) / 1e4


def latency(model: nn.Module) -> Latency:
    """A deterministic stand-in for a clock: more parameters, more time."""
    assert not model.training
    return Latency(latency_ms(model), 1.5 * latency_ms(model))


class Trainer:
    """Nudges the weights and reports an accuracy that grows with size; remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, model: nn.Module, number: int, folder: Path, on_epoch: OnEpoch) -> Score:
        self.calls.append((number, profile.params(model)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.pt").write_bytes(b"x")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        accuracy = 1.0 - 1.0 / np.log(profile.params(model))
        on_epoch(accuracy)
        return Score(accuracy, ece=0.1 - accuracy / 100)


def search(tmp_path: Path, config: Study | None = None, *, train=None, **changes):
    arguments = {
        "parents": {"teacher": teacher_of()},
        "dataset": dataset_of(),
        "seed": 0,
        "latency": latency,
        "train_trial": train or Trainer(),
        "storage": tmp_path / "study.db",
        "folder": tmp_path / "trials",
    }
    return run_study(config or config_of(), **(arguments | changes))


def rows_of(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "trials" / "trials.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outline(result) -> list[tuple]:
    return [(t.number, t.space, tuple(sorted(t.choices.items())), t.state, t.accuracy) for t in result.trials]


# --- running


def test_every_trial_is_a_row_and_finalists_load(tmp_path):
    seen: list[TrialResult] = []
    trainer = Trainer()
    result = search(tmp_path, config_of(finalists=2), train=trainer, on_trial=seen.append)
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(complete) == len(trainer.calls) == 6
    assert [trial.number for trial in seen] == [trial.number for trial in result.trials]
    assert {trial.space for trial in complete} == {"prune-teacher-magnitude", "scale-plain_cnn"}
    assert 0.0 < result.hypervolume < 1.0

    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["number"]) for row in rows] == [trial.number for trial in result.trials]
    assert {int(row["number"]) for row in rows if row["on_front"] == "True"} == {trial.number for trial in result.front}
    assert json.loads(rows[0]["choices"]) == result.trials[0].choices

    assert len(result.finalists) == 2
    for trial, folder in zip(result.chosen, result.finalists, strict=True):
        model, spec = load_checkpoint(folder)
        assert profile.params(model) == trial.params
        assert digest_of(model, spec) == trial.digest, "a finalist starts as it was before the trial"
        assert profile.macs(model, spec.input_shape) == trial.macs
    assert not list((tmp_path / "trials" / "training").glob("*/*")), "step checkpoints are cleared"


def test_first_trials_are_the_middle_and_the_extremes_of_each_space(tmp_path):
    result = search(tmp_path)
    first = [(trial.space, trial.choices) for trial in result.trials[:6]]
    assert first == [
        ("prune-teacher-magnitude", {"ratio": 0.5}),
        ("scale-plain_cnn", {"width": 1.0, "depth": 1}),
        ("prune-teacher-magnitude", {"ratio": 0.25}),
        ("scale-plain_cnn", {"width": 0.5, "depth": 0}),
        ("prune-teacher-magnitude", {"ratio": 0.75}),
        ("scale-plain_cnn", {"width": 2.0, "depth": 1}),
    ]


@pytest.mark.parametrize("sampler", [Nsga2(population=2), Tpe(warm_up_trials=2), RandomSearch()])
def test_equal_seeds_search_alike_and_exhaust_small_spaces_once(tmp_path, sampler):
    spaces = (Prune(parent="teacher", ratios=(0.25, 0.5)), Scale(base=BASE, widths=(0.5, 1.0, 2.0)))
    config = config_of(spaces=spaces, trials=50, sampler=sampler)
    first = search(tmp_path / "a", config)
    second = search(tmp_path / "b", config)
    assert outline(first) == outline(second)
    trained = [(t.space, tuple(sorted(t.choices.items()))) for t in first.trials if t.state == "complete"]
    assert len(trained) == len(set(trained)) == 2 + 3


def test_candidates_over_budget_are_rows_that_never_trained_and_cost_no_trial(tmp_path):
    teacher, spec = teacher_of()
    budget = int(0.4 * profile.macs(teacher, spec.input_shape))
    trainer = Trainer()
    config = config_of(trials=4, max_macs_share=0.4, prefer="latency")
    result = search(tmp_path, config, train=trainer, best_teacher="teacher")
    infeasible = [trial for trial in result.trials if trial.state == "infeasible"]
    assert infeasible
    assert all(trial.macs > budget and "macs" in trial.reason for trial in infeasible)
    assert all(trial.accuracy is None and trial.checkpoint is None for trial in infeasible)
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(complete) == len(trainer.calls) > 0
    assert all(trial.macs <= budget for trial in complete)
    unseen = 9 - len({(t.space, tuple(t.choices.items())) for t in result.trials})
    assert len(complete) == 4 or unseen == 0


@pytest.mark.parametrize("limit", ["max_latency_ms", "max_size_kib"])
def test_latency_and_size_are_budgets_too(tmp_path, limit):
    teacher, _ = teacher_of()
    value = {"max_latency_ms": latency_ms(teacher) * 0.6, "max_size_kib": profile.state_bytes(teacher) / 1700}
    result = search(tmp_path, config_of(trials=3, **{limit: value[limit]}))
    states = {trial.state for trial in result.trials}
    assert "infeasible" in states
    column = "latency_p50_ms" if limit == "max_latency_ms" else "size_bytes"
    assert all(column in trial.reason for trial in result.trials if trial.state == "infeasible")


def test_nothing_within_budget_is_an_error_that_says_why(tmp_path):
    with pytest.raises(CompressionError, match=r"0 complete candidates.*infeasible: macs .* is over 10"):
        search(tmp_path, config_of(max_macs=10))
    assert {row["state"] for row in rows_of(tmp_path)} <= {"infeasible", "duplicate"}


def test_one_architecture_is_not_trained_twice(tmp_path):
    close = Prune(parent="teacher", ratios=(0.5, 0.51, 0.52))
    trainer = Trainer()
    result = search(tmp_path, config_of(spaces=(close,), trials=3), train=trainer)
    assert len(trainer.calls) == 1
    reasons = [trial.reason for trial in result.trials if trial.state == "duplicate"]
    assert "same architecture and weights as trial 0" in reasons


def test_criteria_compete_although_they_give_one_architecture(tmp_path):
    spaces = tuple(Prune(parent="teacher", ratios=(0.5,), criterion=criterion) for criterion in ("magnitude", "taylor"))
    result = search(tmp_path, config_of(spaces=spaces, trials=2))
    assert [trial.state for trial in result.trials] == ["complete", "complete"]
    assert {trial.space for trial in result.trials} == {"prune-teacher-magnitude", "prune-teacher-taylor"}


def test_a_failing_candidate_is_a_row_and_the_others_go_on(tmp_path):
    trainer = Trainer()

    def fragile(model: nn.Module, number: int, folder: Path, on_epoch: OnEpoch) -> Score:
        if number == 1:
            raise CompressionError("loss is nan")
        return Score(float("nan")) if number == 2 else trainer(model, number, folder, on_epoch)

    result = search(tmp_path, train=fragile)
    assert [trial.state for trial in result.trials[:3]] == ["complete", "failed", "failed"]
    assert result.trials[1].reason == "CompressionError: loss is nan"
    assert "accuracy nan" in result.trials[2].reason
    assert len(trainer.calls) == 4, "failures count as trials"
    assert not any(trial.on_front for trial in result.trials if trial.state == "failed")


def test_an_unusable_store_is_raised_and_the_trial_runs_again(tmp_path):
    def full(_model: nn.Module, _number: int, _folder: Path, _on_epoch: OnEpoch) -> Score:
        raise ArtifactError("store is full")

    with pytest.raises(ArtifactError):
        search(tmp_path, train=full)
    trainer = Trainer()
    search(tmp_path, train=trainer)
    assert trainer.calls[0][0] == 0


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("CUDA out of memory"), ArithmeticError("nan")])
def test_a_trial_out_of_memory_or_diverged_is_a_row(tmp_path, error):
    trainer = Trainer()

    def fragile(model: nn.Module, number: int, folder: Path, on_epoch: OnEpoch) -> Score:
        if number == 0:
            raise error
        return trainer(model, number, folder, on_epoch)

    result = search(tmp_path, config_of(trials=3), train=fragile)
    assert result.trials[0].state == "failed"
    assert result.trials[0].reason == f"{type(error).__name__}: {error}"
    assert len(trainer.calls) == 2


def test_a_space_of_one_is_searched_once(tmp_path):
    trainer = Trainer()
    result = search(tmp_path, config_of(spaces=(Scale(base=BASE, widths=(1.0,)),), trials=5), train=trainer)
    assert len(trainer.calls) == len(result.trials) == len(result.finalists) == 1
    assert 0 < result.hypervolume < 1


def test_an_impossible_budget_names_the_bound_and_how_near_the_best_came(tmp_path):
    smallest = profile.macs(scale_model(SCALE, spec_of(), width=0.5, depth=0, seed=0)[0], (1, 12, 12))
    budget = smallest // 2
    with pytest.raises(CompressionError, match="The nearest, trial") as caught:
        search(tmp_path, config_of(spaces=(SCALE,), max_macs=budget))
    assert f"{smallest / budget - 1:.1%} over: macs {smallest} is over {budget}" in str(caught.value)
    assert '"depth": 0, "width": 0.5' in str(caught.value)


def test_a_latency_budget_may_be_a_share_of_the_teachers(tmp_path):
    teacher, _ = teacher_of()
    result = search(tmp_path, config_of(trials=9, max_latency_share=0.5), best_teacher="teacher")
    limit = 0.5 * latency_ms(teacher)
    complete = [trial for trial in result.trials if trial.state == "complete"]
    over = [trial for trial in result.trials if trial.state == "infeasible"]
    assert complete
    assert over
    assert all(trial.latency_p50_ms <= limit for trial in complete)
    assert all(trial.latency_p50_ms > limit and trial.excess > 0 for trial in over)


def test_objectives_decide_what_the_front_is_of(tmp_path):
    def worse_when_larger(model: nn.Module, number: int, folder: Path, on_epoch: OnEpoch) -> Score:
        del number, folder, on_epoch
        return Score(0.5, ece=profile.params(model) / 1e6)

    objectives = ("accuracy", "ece", "macs")
    result = search(tmp_path, config_of(objectives=objectives), train=worse_when_larger, best_teacher="teacher")
    complete = [trial for trial in result.trials if trial.state == "complete"]
    least = min(complete, key=lambda trial: trial.ece)
    assert least in [replace(trial, on_front=True) for trial in result.front]
    assert all(trial.ece <= least.ece or trial.macs < least.macs for trial in result.front)
    with pytest.raises(ValueError, match="with accuracy"):
        config_of(objectives=("ece", "macs"))


class Predicted:
    """Predicts half of what the clock says."""

    batch = 32

    def predict_ms(self, model: nn.Module, input_shape: tuple[int, int, int]) -> float:
        assert input_shape == (1, 12, 12)
        return latency_ms(model) / 2

    def operators_ms(self, operators: Sequence[Operator]) -> list[float]:
        return [1.0] * len(operators)


def test_predicted_latency_saves_the_clock_and_finalists_are_timed(tmp_path):
    timed: list[float] = []

    def clock(model: nn.Module) -> Latency:
        timed.append(latency_ms(model))
        return latency(model)

    config = config_of(trials=9, latency="predicted", finalists=2)
    result = search(tmp_path, config, latency=clock, latency_model=Predicted())
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(result.chosen) == 2
    assert 2 <= len(timed) < len(complete)
    assert all(trial.latency_p50_ms in timed for trial in result.chosen)
    guessed = [trial for trial in complete if trial.latency_p50_ms == trial.latency_predicted_ms]
    assert len(guessed) == len(complete) - len(timed)


def test_a_finalist_over_budget_when_timed_makes_place_for_the_next(tmp_path):
    teacher, _ = teacher_of()
    limit = 0.6 * latency_ms(teacher)
    config = config_of(trials=9, latency="predicted", max_latency_ms=limit)
    result = search(tmp_path, config, latency_model=Predicted())
    assert result.chosen[0].latency_p50_ms <= limit
    fell = [trial for trial in result.trials if "when it was timed" in trial.reason]
    assert fell
    assert all(trial.state == "infeasible" and trial.latency_p50_ms > limit for trial in fell)
    with pytest.raises(CompressionError, match="no latency model"):
        search(tmp_path / "without", config)


class ByWidth(Inherited):
    """Higher for smaller networks."""

    def score(self, model, spec, row, rows, shop) -> float | None:
        assert row.latency_p50_ms is not None
        assert not model.training
        return None if row.macs is None else -float(row.macs)


def test_filtered_candidates_are_rows_that_never_trained(tmp_path):
    trainer = Trainer()
    config = config_of(spaces=(SCALE,), trials=6).model_copy(update={"filter": ByWidth(keep=0.5, first=2)})
    result = search(tmp_path, config, train=trainer)
    filtered = [trial for trial in result.trials if trial.state == "filtered"]
    trained = [trial for trial in result.trials if trial.state == "complete"]
    assert filtered
    assert all(trial.accuracy is None and "low among those so far" in trial.reason for trial in filtered)
    assert len(trained) == len(trainer.calls)
    assert {trial.score for trial in result.trials if trial.score is not None} >= {t.score for t in filtered}
    for trial in filtered:
        earlier = [t.score for t in result.trials if t.number < trial.number and t.score is not None]
        assert sum(score > trial.score for score in earlier) >= 0.5 * (len(earlier) + 1)


def test_a_trial_far_behind_its_rivals_is_stopped(tmp_path):
    epochs: dict[int, int] = {}

    def two_epochs(model: nn.Module, number: int, folder: Path, on_epoch: OnEpoch) -> Score:
        largest = profile.params(model) > 20_000
        for epoch in range(3):
            epochs[number] = epoch + 1
            on_epoch(0.2 if largest else 0.6 + 0.1 * epoch)
        return Score(0.2 if largest else 0.9)

    result = search(tmp_path, config_of(trials=9, stop_behind=0.1), train=two_epochs)
    stopped = [trial for trial in result.trials if trial.state == "stopped"]
    assert stopped
    for trial in stopped:
        assert epochs[trial.number] == 1
        assert trial.curve == (0.2,)
        assert "after epoch 1 is more than 0.1 below 0.6000" in trial.reason
        assert not trial.on_front
    assert not list((tmp_path / "trials" / "training").glob("*/*")), "step checkpoints are cleared"


# --- resuming


def test_a_finished_study_trains_nothing_and_a_longer_one_goes_on(tmp_path):
    first = search(tmp_path, config_of(trials=3))
    trainer = Trainer()
    assert outline(search(tmp_path, config_of(trials=3), train=trainer)) == outline(first)
    assert trainer.calls == []
    longer = search(tmp_path, config_of(trials=5), train=trainer)
    assert len(trainer.calls) == 2
    assert outline(longer)[:3] == outline(first)


def test_a_changed_search_is_not_mixed_into_an_old_study(tmp_path):
    search(tmp_path, config_of(trials=1))
    with pytest.raises(CompressionError, match=r"trials of another search.*file of its own"):
        search(tmp_path, config_of(trials=1), parents={"teacher": teacher_of(seed=1)})
    with pytest.raises(CompressionError, match="another search"):
        search(tmp_path, config_of(trials=1), seed=1)


def test_a_lost_checkpoint_is_no_finalist(tmp_path):
    first = search(tmp_path, config_of(trials=3))
    (first.finalists[0] / "spec.json").unlink()
    again = search(tmp_path, config_of(trials=3))
    assert again.trials[first.chosen[0].number].state == "failed"
    assert again.finalists[0] != first.finalists[0]


SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_study import SCALE, Nsga2, Trainer, config_of, search

root = Path(sys.argv[1])
train = Trainer()

def traced(model, number, folder, on_epoch):
    with (root / "calls").open("a") as file:
        file.write(f"{{number}}\\n")
    if number == 2 and not (root / "hung").exists():
        (root / "hung").touch()
        time.sleep(120)
    return train(model, number, folder, on_epoch)

search(root, config_of(spaces=(SCALE,), trials=5, sampler=Nsga2(population=2)), train=traced)
"""


def test_killed_in_a_trial_it_repeats_that_one_only_and_ends_the_same(tmp_path):
    """A real SIGKILL while trial 2 trains; the study then ends as one that was never interrupted."""
    script = tmp_path / "study.py"
    script.write_text(textwrap.dedent(SCRIPT.format(here=str(Path(__file__).parent))))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(command, env=environment, cwd=root) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "hung").exists():
            assert process.poll() is None, "the study ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = rows_of(tmp_path)
    assert [row["number"] for row in before] == ["0", "1"]

    subprocess.run(command, env=environment, cwd=root, check=True, timeout=240)
    calls = [int(line) for line in (tmp_path / "calls").read_text().split()]
    assert calls[:4] == [0, 1, 2, 2]
    assert all(calls.count(number) == 1 for number in calls if number != 2)
    after = rows_of(tmp_path)
    assert [row["seconds"] for row in after[:2]] == [row["seconds"] for row in before], "finished trials stay"

    uninterrupted = search(tmp_path / "other", config_of(spaces=(SCALE,), trials=5, sampler=Nsga2(population=2)))
    assert [(row["space"], json.loads(row["choices"]), row["state"]) for row in after] == [
        (trial.space, trial.choices, trial.state) for trial in uninterrupted.trials
    ]


def test_a_trial_that_takes_the_process_down_again_and_again_has_failed(tmp_path):
    trainer = Trainer()
    attempts: list[int] = []

    def deadly(model: nn.Module, number: int, folder: Path, on_epoch: OnEpoch) -> Score:
        if number == 1:
            attempts.append(number)
            raise KeyboardInterrupt  # nothing after it runs, as when the kernel ends the process
        return trainer(model, number, folder, on_epoch)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, config_of(trials=3), train=deadly)
    result = search(tmp_path, config_of(trials=3), train=deadly)
    assert attempts == [1, 1, 1]
    assert result.trials[1].state == "failed"
    assert result.trials[1].reason == "the process ended 3 times while it ran; was it out of memory?"
    assert [number for number, _ in trainer.calls] == [0, 2]


def test_one_process_at_a_time(tmp_path):
    def nested(_model: nn.Module, _number: int, _folder: Path, _on_epoch: OnEpoch) -> Score:
        with pytest.raises(CompressionError, match="another process"):
            search(tmp_path, config_of(trials=1))
        return Score(0.5)

    search(tmp_path, config_of(trials=1), train=nested)


# --- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spaces": (Prune(parent="nobody"),)}, "parent 'nobody', expected one of teacher"),
        ({"max_macs_share": 0.5}, "no best teacher"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(CompressionError, match=message):
        search(tmp_path, config_of(**changes))
    assert not (tmp_path / "study.db").exists()


def test_config_survives_json():
    config = config_of(max_macs=1000, finalists=3)
    assert Study.model_validate_json(config.model_dump_json()) == config
