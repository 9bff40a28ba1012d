"""The performance predictor: its target, how it judges itself, and when it stays silent."""

import json
import logging
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compression import profile
from compression.checkpoint import save_checkpoint
from compression.models import ModelSpec, build_model
from compression.search import Scale, Study
from compression.search.bank import PastTask, PastTrial, features_of, past_trials, task_of
from compression.search.filters import predictor
from compression.search.filters.predictor import (
    Fitted,
    Known,
    Predictor,
    Reference,
    held_out_correlation,
    parts_by_study,
    parts_by_trial,
    per_magnitude,
    rank_correlation,
)
from compression.search.samplers import RandomSearch
from compression.search.space import Workshop
from compression.search.study import StudyResult, run_study
from compression.search.trials import OBJECTIVES, Latency, Score, TrialResult
from compression.train import TrainConfig
from compression.zoo import PlainCnn
from tests.compression.tiny_data import tiny_dataset

DATA = tiny_dataset()
WIDTHS = (8, 16, 24, 32, 40, 48)
SPACE = Scale(
    base=PlainCnn(widths=(16,), depths=(1,), strides=(2,), stem_width=8), widths=(0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
)


def candidate(width: int, depth: int = 1) -> tuple[nn.Module, ModelSpec]:
    spec = ModelSpec(
        model=PlainCnn(widths=(width,), depths=(depth,), strides=(2,), stem_width=8),
        num_classes=DATA.num_classes,
        input_shape=DATA.input_shape,
        class_names=DATA.class_names,
        preprocessing=DATA.preprocessing,
    )
    with torch.random.fork_rng(devices=[]):
        return build_model(spec).eval(), spec


def quality(model: nn.Module) -> float:
    """An accuracy that grows with size."""
    return 1.0 - 1.5 / math.log(profile.params(model))


@cache
def known_nets() -> tuple[list[tuple[nn.Module, ModelSpec]], dict[int, dict[str, float]]]:
    nets = [candidate(width, depth) for width in WIDTHS for depth in (1, 2)]
    return nets, {number: features_of(*net) for number, net in enumerate(nets)}


def row_of(model: nn.Module, spec: ModelSpec, number: int = 0, **changes) -> TrialResult:
    macs = profile.macs(model, spec.input_shape)
    settings = {"state": "complete", "macs": macs, "digest": f"{number}", "accuracy": quality(model)}
    return TrialResult(number, "scale-plain_cnn", {"width": number}, **(settings | changes))


def bank(study: str = "a", *, task: PastTask | None = None, offset: float = 0.0, sign: float = 1.0) -> list[PastTrial]:
    """Twelve trials of one study; ``sign`` -1 makes large candidates bad."""
    nets, features = known_nets()
    rows = [
        row_of(*net, number, accuracy=0.5 + offset + sign * (quality(net[0]) - 0.8)) for number, net in enumerate(nets)
    ]
    return past_trials(
        rows,
        task=task or PastTask(data=study, data_hash=study, classes=4, input_shape=(1, 8, 8), train_images=64),
        study=study,
        objectives=OBJECTIVES,
        kinds={"scale-plain_cnn": "scale"},
        train=TrainConfig(epochs=1),
        features=features,
    )


def shop_of(folder: Path, past: list[PastTrial]) -> Workshop:
    return Workshop({}, DATA, seed=0, folder=folder, past=past)


def score(filter_: Predictor, shop: Workshop, width: int, rows: list[TrialResult] | None = None) -> float | None:
    model, spec = candidate(width)
    return filter_.score(model, spec, row_of(model, spec, 1000 + width, accuracy=None), rows or [], shop)


def report_of(shop: Workshop) -> dict:
    return json.loads((shop.folder / "predictor.json").read_text())


def known_sample(count: int, *, study: str = "s", task: str = "t", seed: int = 0, noise: bool = False) -> list[Known]:
    rng = np.random.default_rng(seed)
    facts = [{"a": float(rng.uniform()), "b": float(rng.uniform())} for _ in range(count)]
    accuracies = [0.5 + 0.4 * (float(rng.uniform()) if noise else each["a"]) for each in facts]
    return [Known(study, task, "scale", each, 1e6, found) for each, found in zip(facts, accuracies, strict=True)]


# --- the target


def test_target_by_hand():
    assert per_magnitude(0.9, 99.0) == pytest.approx(0.3)
    assert per_magnitude(0.9, 0.0) == 0.9
    sample = [Known("s", "t", "scale", {}, 99.0, accuracy) for accuracy in (0.3, 0.9)]
    reference = Reference.of(sample)
    assert (reference.mean, reference.std) == pytest.approx((0.2, 0.1))
    assert reference.standardised(0.9, 99.0) == pytest.approx(1.0)


@pytest.mark.parametrize("flops", [0.0, 1.0, 12_345.0, 3e9, 1e13])
@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.9731, 1.0])
def test_target_inverts_exactly(accuracy, flops):
    reference = Reference.of(known_sample(6))
    assert reference.restored(reference.standardised(accuracy, flops), flops) == pytest.approx(accuracy, abs=1e-14)


def test_reference_is_that_of_the_study_or_the_mean_of_its_task_or_of_all():
    one, two = known_sample(6, study="one", seed=1), known_sample(5, study="two", seed=2)
    other, few = known_sample(5, study="other", task="u", seed=3), known_sample(2, study="few", seed=4)
    references = {each[0].study: Reference.of(each) for each in (one, two, other)}
    fitted = Fitted([*one, *two, *other, *few], seed=0)
    assert fitted.reference(one[0]) == references["one"]
    of_task = fitted.reference(few[0])
    assert of_task.mean == pytest.approx((references["one"].mean + references["two"].mean) / 2)
    assert of_task.std == pytest.approx((references["one"].std + references["two"].std) / 2)
    of_all = fitted.reference(replace(few[0], study="new", task="v"))
    assert of_all.std == pytest.approx(sum(each.std for each in references.values()) / 3)
    assert Fitted(few, seed=0).reference(one[0]) == Reference.of(few), "there is nothing better"


def test_trials_of_equal_accuracy_and_size_are_no_division_by_zero():
    same = [replace(each, accuracy=0.5) for each in known_sample(8)]
    assert Fitted(same, seed=0).accuracies(same[:1]) == pytest.approx([0.5])


# --- how it judges itself


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.9, 7.0]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0.0


def test_parts_leave_out_each_trial_or_tenths_or_studies():
    assert parts_by_trial(known_sample(5), seed=0) == [0, 1, 2, 3, 4]
    many = parts_by_trial(known_sample(95), seed=0)
    assert sorted(many.count(part) for part in set(many)) == [9] * 5 + [10] * 5
    assert many == parts_by_trial(known_sample(95), seed=0) != parts_by_trial(known_sample(95), seed=1)
    mixed = [*known_sample(2, study="b"), *known_sample(1, study="a"), *known_sample(1, study="b")]
    assert parts_by_study(mixed) == [1, 1, 0, 1]


def test_correlation_is_high_where_facts_tell_and_low_where_they_do_not():
    telling, noise = known_sample(50), known_sample(50, noise=True)
    assert held_out_correlation(telling, parts_by_trial(telling, seed=0), seed=0) > 0.8
    assert abs(held_out_correlation(noise, parts_by_trial(noise, seed=0), seed=0)) < 0.3


def test_correlation_is_within_studies():
    """Two studies at other levels, ranked backwards inside: a pooled correlation would be high."""
    low, high = known_sample(20, study="low"), known_sample(20, study="high")
    low = [replace(each, accuracy=each.accuracy / 10) for each in low]
    high = [replace(each, accuracy=1.4 - each.accuracy) for each in high]
    both = [*low, *high]
    assert held_out_correlation(both, parts_by_study(both), seed=0) < -0.8


def test_correlation_is_unknown_where_nothing_is_left_to_compare():
    one = known_sample(20)
    assert held_out_correlation(one, parts_by_study(one), seed=0) is None
    small = [replace(each, study=str(number)) for number, each in enumerate(known_sample(8))]
    assert held_out_correlation(small, parts_by_trial(small, seed=0), seed=0) is None


# --- the filter


@pytest.fixture
def in_thirds(monkeypatch):
    """Trials are left out a third at a time: fewer fits."""
    monkeypatch.setattr(predictor, "MOST_LEFT_OUT", 1)
    monkeypatch.setattr(predictor, "FOLDS", 3)


@pytest.mark.usefixtures("in_thirds")
def test_predicts_accuracy_of_another_task_in_its_own_terms(tmp_path):
    """Two studies that agree on what is good, one at a higher level; the task at hand is a third."""
    shop = shop_of(tmp_path, [*bank("a"), *bank("b", offset=0.2)])
    found = [score(Predictor(), shop, width) for width in (8, 24, 48)]
    assert found == sorted(found)
    assert found[0] < found[1] < found[2]
    report = report_of(shop)
    assert (report["trials"], report["studies"], report["own"], report["used"]) == (24, 2, 0, True)
    assert report["leave_one_study_out"] > 0.8
    assert report["leave_one_out"] > 0.5
    again = shop_of(tmp_path / "again", shop.past)
    assert [score(Predictor(), again, width) for width in (8, 24, 48)] == found


@pytest.mark.usefixtures("in_thirds")
def test_own_trials_become_the_reference(tmp_path):
    shop = shop_of(tmp_path, [*bank("a"), *bank("b")])
    before = score(Predictor(), shop, 40)
    rows = []
    for number, width in enumerate((8, 16, 24, 32, 48)):
        model, spec = candidate(width)
        folder = tmp_path / f"trial-{number}"
        save_checkpoint(model, spec, folder)
        rows.append(row_of(model, spec, number, accuracy=quality(model) / 4, checkpoint=folder))
    after = score(Predictor(), shop, 40, rows)
    assert abs(after - quality(candidate(40)[0]) / 4) < 0.02 < abs(before - after)
    assert (report_of(shop)["own"], report_of(shop)["studies"]) == (5, 3)


def test_silent_with_too_few_trials(tmp_path, caplog):
    shop = shop_of(tmp_path, bank("a"))
    with caplog.at_level(logging.INFO):
        assert score(Predictor(), shop, 8) is score(Predictor(), shop, 16) is None
    assert report_of(shop)["used"] is False
    said = [record.getMessage() for record in caplog.records if "predictor" in record.getMessage()]
    assert said == ["predictor: not used, 12 trials are fewer than 20"]
    assert score(Predictor(min_trials=12), shop_of(tmp_path / "b", bank("a")), 8) is not None


@pytest.mark.usefixtures("in_thirds")
def test_silent_where_studies_contradict_each_other(tmp_path):
    shop = shop_of(tmp_path, [*bank("a"), *bank("b", sign=-1.0)])
    assert score(Predictor(), shop, 8) is None
    report = report_of(shop)
    assert report["leave_one_study_out"] < 0.0
    assert "studies left out" in report["reason"]
    assert score(Predictor(min_correlation=-1.0), shop_of(tmp_path / "b", shop.past), 8) is not None


def test_trials_of_this_study_in_the_bank_count_once(tmp_path):
    past = bank("a", task=task_of(DATA))
    shop = shop_of(tmp_path, [*past, *bank("b")])
    rows = [TrialResult(t.number, t.space, t.choices, "complete", accuracy=t.accuracy, macs=t.macs) for t in past]
    score(Predictor(), shop, 8, rows)
    assert report_of(shop)["trials"] == 12, "rows without a checkpoint teach nothing either"


# --- in a study


def search(tmp_path: Path, past: list[PastTrial], filter_: Predictor | None, trials: int) -> StudyResult:
    def train(model: nn.Module, _number: int, _folder: Path, _on_epoch) -> Score:
        return Score(quality(model))

    return run_study(
        Study(spaces=(SPACE,), trials=trials, train=TrainConfig(epochs=1), sampler=RandomSearch(), filter=filter_),
        parents={},
        dataset=DATA,
        seed=0,
        latency=lambda model: Latency(profile.params(model) / 1e4),
        train_trial=train,
        storage=tmp_path / "study.db",
        folder=tmp_path / "trials",
        past=past,
    )


@pytest.mark.usefixtures("in_thirds")
def test_a_study_leaves_out_what_the_bank_says_is_bad(tmp_path):
    past = [*bank("a"), *bank("b", offset=0.1)]
    found = search(tmp_path, past, Predictor(keep=0.5, first=1), 3)
    states = [trial.state for trial in found.trials]
    assert states.count("complete") == 3
    filtered = [trial for trial in found.trials if trial.state == "filtered"]
    complete = [trial for trial in found.trials if trial.state == "complete"]
    assert filtered
    assert min(trial.params for trial in complete[1:]) > max(trial.params for trial in filtered)
    assert all(trial.score is not None for trial in [*filtered, *complete])
    assert report_of(Workshop({}, DATA, 0, tmp_path / "trials" / "shop"))["used"]


def test_with_an_empty_bank_a_study_goes_as_without_a_filter(tmp_path):
    plain, silent = search(tmp_path / "a", [], None, 4), search(tmp_path / "b", [], Predictor(), 4)
    assert [(t.space, t.choices, t.state, t.score) for t in plain.trials] == [
        (t.space, t.choices, t.state, t.score) for t in silent.trials
    ]
