"""Promotion: each limit below, inside and above its interval; anomalies; domination; who is asked when."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compression.statistics import Interval
from export.promotion import Promotion, VersionFacts, compare_versions, decide_promotion

YARDSTICK = "teacher-a.float32 of 900 KiB, batch 32"
SAMPLES = 2000


def right(wrong: int, start: int = 0) -> np.ndarray:
    """Answers that miss the images ``start`` to ``start + wrong``."""
    correct = np.ones(SAMPLES, bool)
    correct[start : start + wrong] = False
    return correct


def facts(version: int, *, wrong: int = 100, start: int = 0, ratio: float = 0.5, **other: Any) -> VersionFacts:
    correct = right(wrong, start)
    values: dict[str, Any] = {
        "version": version,
        "file": "student-0.int8",
        "sha256": f"sha-{version}",
        "precision": "int8",
        "accuracy": float(correct.mean()),
        "float_accuracy": 1.0,
        "ece": 0.02,
        "num_samples": SAMPLES,
        "size_bytes": 100_000,
        "latency_p50_ms": ratio,
        "latency_ratio": Interval(estimate=ratio, low=ratio, high=ratio),
        "yardstick": YARDSTICK,
        "data": "digits",
        "correct": correct,
        "answers": np.where(correct, 1, 0) + 2 * version,
    }
    return VersionFacts(**values | other)


CHAMPION = facts(1)
BETTER = facts(2, ratio=0.4)
AT_ONCE = Promotion(champion="when_better")


def outcome(config: Promotion, now: VersionFacts, name: str) -> str:
    decision = decide_promotion(config, now, CHAMPION)
    return next(check.outcome for check in decision.checks if check.name == name)


def test_a_better_version_is_promoted_at_once_or_after_a_person_agreed() -> None:
    at_once = decide_promotion(AT_ONCE, BETTER, CHAMPION)
    assert at_once.action == "promote"
    assert at_once.reasons == ("It needs 80 % of the champion's time.",)
    assert decide_promotion(Promotion(), BETTER, CHAMPION).action == "ask"
    never = decide_promotion(Promotion(champion="never"), BETTER, CHAMPION)
    assert never.action == "hold"
    assert "people" in never.reasons[0]


LIMITS = ("accuracy", "latency", "size", "calibration")


@pytest.mark.parametrize(
    ("name", "config", "now", "expected"),
    [
        # 20 images more are missed, 10 other ones gained: a drop of 0.5 points, bounds about 0 and 1
        *[
            ("accuracy", Promotion(max_accuracy_drop=limit), facts(2, wrong=110, start=10), expected)
            for limit, expected in [(0.02, "pass"), (0.005, "inconclusive"), (0.0, "inconclusive")]
        ],
        ("accuracy", Promotion(max_accuracy_drop=0.01), facts(2, wrong=200), "fail"),
        *[
            ("latency", Promotion(max_latency_ratio=1.1), facts(2, latency_ratio=found), expected)
            for found, expected in [
                (Interval(estimate=0.5, low=0.4, high=0.55), "pass"),
                (Interval(estimate=0.5, low=0.4, high=0.56), "inconclusive"),
                (Interval(estimate=0.6, low=0.55, high=0.7), "inconclusive"),
                (Interval(estimate=0.6, low=0.551, high=0.7), "fail"),
            ]
        ],
        *[
            ("size", Promotion(max_size_ratio=1.1), facts(2, size_bytes=size), expected)
            for size, expected in [(110_000, "pass"), (110_001, "fail"), (90_000, "pass")]
        ],
        *[
            ("calibration", Promotion(max_ece_increase=0.25), facts(2, ece=0.02 + increase), expected)
            for increase, expected in [(0.25, "pass"), (0.2501, "fail"), (-0.01, "pass")]
        ],
    ],
)
def test_each_limit_is_decided_on_the_bounds(name: str, config: Promotion, now: VersionFacts, expected: str) -> None:
    assert outcome(config, now, name) == expected
    decision = decide_promotion(config.model_copy(update={"champion": "when_better"}), now, CHAMPION)
    if expected != "pass":
        assert decision.action == "hold"
        assert decision.reasons
    if expected == "inconclusive":
        assert decide_promotion(config, now, CHAMPION).action == "ask"


def test_a_broken_limit_holds_even_where_people_are_asked_and_an_open_one_asks() -> None:
    broken = decide_promotion(Promotion(), facts(2, wrong=200), CHAMPION)
    assert broken.action == "hold"
    assert "above the limit" in broken.reasons[0]
    open_ = facts(2, ratio=0.4, latency_ratio=Interval(estimate=0.5, low=0.4, high=0.7))
    asked = decide_promotion(Promotion(), open_, CHAMPION)
    assert asked.action == "ask"
    assert "the data cannot tell" in asked.reasons[0]


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_that_is_switched_off_is_skipped(name: str) -> None:
    off = Promotion(
        max_accuracy_drop=None, max_latency_ratio=None, max_size_ratio=None, max_ece_increase=None, not_dominated=None
    )
    terrible = facts(2, wrong=1500, ratio=9.0, size_bytes=10**9, ece=0.9)
    assert outcome(off, terrible, name) == "skipped"
    off_at_once = off.model_copy(update={"champion": "when_better"})
    assert decide_promotion(off_at_once, terrible, CHAMPION).action == "promote"


@pytest.mark.parametrize("name", ["latency", "accuracy", "size", "calibration"])
def test_what_was_not_measured_is_never_passed(name: str) -> None:
    missing = {
        "latency": {"yardstick": "another machine"},
        "accuracy": {"correct": None, "accuracy": None},
        "size": {"size_bytes": None},
        "calibration": {"ece": None},
    }[name]
    assert outcome(Promotion(), replace(BETTER, **missing), name) == "inconclusive"
    assert decide_promotion(AT_ONCE, replace(BETTER, **missing), CHAMPION).action == "hold"


def test_the_noise_of_both_measurements_widens_the_latency_ratio() -> None:
    noisy = replace(BETTER, latency_noise_floor=0.3)
    found = compare_versions(noisy, CHAMPION).latency_ratio
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.8 / 1.3, 0.8 * 1.3))
    assert decide_promotion(AT_ONCE, noisy, CHAMPION).action == "hold"  # 20 % faster, 30 % noise


def test_a_version_that_is_worse_in_everything_is_dominated_and_an_equal_one_no_better_for_sure() -> None:
    loose = Promotion(max_accuracy_drop=1.0, max_latency_ratio=9.0, max_size_ratio=9.0)
    worse = facts(2, wrong=200, ratio=0.6, size_bytes=120_000)
    assert outcome(loose, worse, "not dominated") == "fail"
    assert decide_promotion(loose, worse, CHAMPION).action == "hold"
    equal = facts(2, start=5)
    assert outcome(loose, equal, "not dominated") == "inconclusive"
    assert decide_promotion(AT_ONCE, equal, CHAMPION).action == "hold"
    assert decide_promotion(Promotion(), equal, CHAMPION).action == "ask"
    anyway = AT_ONCE.model_copy(update={"not_dominated": None})
    assert decide_promotion(anyway, equal, CHAMPION).action == "promote"


@pytest.mark.parametrize(
    "better", [{"wrong": 20}, {"ratio": 0.45}, {"size_bytes": 98_000}], ids=["accuracy", "latency", "size"]
)
def test_better_in_one_thing_is_not_dominated(better: dict[str, Any]) -> None:
    assert outcome(Promotion(), facts(2, **better), "not dominated") == "pass"


def test_a_few_bytes_are_no_smaller_file() -> None:
    assert outcome(Promotion(), facts(2, start=5, size_bytes=99_500), "not dominated") == "inconclusive"


ANOMALIES = {
    "the gate says so": (facts(2, ratio=0.4, verdict="anomalous", verdict_because="Beats it by 9 %."), "Beats it"),
    "all right": (facts(2, wrong=0, ratio=0.4), "right on all 2000 images"),
    "nothing lost at 4 bits": (facts(2, ratio=0.4, precision="int4", float_accuracy=0.95), "4-bit weights"),
    "the champion's answers": (replace(BETTER, answers=CHAMPION.answers), "same answer to every test image"),
}


@pytest.mark.parametrize("name", ANOMALIES)
@pytest.mark.parametrize("config", [AT_ONCE, Promotion()])
def test_an_anomaly_always_asks_a_person(name: str, config: Promotion) -> None:
    now, said = ANOMALIES[name]
    decision = decide_promotion(config, now, CHAMPION)
    assert decision.action == "ask"
    assert any(said in reason for reason in decision.anomalies)
    assert said in decision.reasons[0]


@pytest.mark.parametrize("name", sorted(set(ANOMALIES) - {"the champion's answers"}))
def test_an_anomaly_asks_also_for_the_first_champion(name: str) -> None:
    assert decide_promotion(AT_ONCE, ANOMALIES[name][0], None).action == "ask"


def test_some_loss_at_4_bits_is_no_anomaly() -> None:
    now = facts(2, ratio=0.4, precision="int4", float_accuracy=0.9505)
    assert decide_promotion(AT_ONCE, now, CHAMPION).action == "promote"


@pytest.mark.parametrize(("policy", "expected"), [("when_better", "promote"), ("after_approval", "promote")])
def test_the_first_accepted_version_takes_the_empty_place(policy: Any, expected: str) -> None:
    decision = decide_promotion(Promotion(champion=policy), CHAMPION, None)
    assert decision.action == expected
    assert "no champion" in decision.reasons[0]
    assert decide_promotion(Promotion(champion="never"), CHAMPION, None).action == "hold"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(BETTER, version=1), "is the champion"),
        (replace(BETTER, sha256=CHAMPION.sha256), "very file of the champion"),
        (replace(BETTER, refused="Version 2 was rolled back: 'slow'."), "rolled back"),
        (replace(BETTER, verdict="regression"), "verdict is regression"),
    ],
    ids=["champion", "same file", "refused", "rejected"],
)
def test_what_is_never_promoted_by_policy(now: VersionFacts, said: str) -> None:
    decision = decide_promotion(AT_ONCE, now, CHAMPION)
    assert decision.action == "hold"
    assert said in decision.reasons[0]


def test_other_test_images_make_the_comparison_unpaired_and_wider() -> None:
    paired = compare_versions(facts(2, wrong=110, start=10), CHAMPION)
    unpaired = compare_versions(facts(2, wrong=110, start=10, data="new images"), CHAMPION)
    assert paired.paired
    assert not unpaired.paired
    assert paired.accuracy_drop is not None
    assert unpaired.accuracy_drop is not None
    assert unpaired.accuracy_drop.estimate == pytest.approx(paired.accuracy_drop.estimate)
    assert unpaired.accuracy_drop.low < paired.accuracy_drop.low
    assert unpaired.accuracy_drop.high > paired.accuracy_drop.high
    # Newcombe's method 10 by hand: 1900/2000 and 1890/2000
    assert (unpaired.accuracy_drop.low, unpaired.accuracy_drop.high) == pytest.approx((-0.00885, 0.01889), abs=2e-4)


def test_the_answers_of_other_images_are_never_called_identical() -> None:
    same = replace(BETTER, answers=CHAMPION.answers, data="new images")
    assert not compare_versions(same, CHAMPION).same_answers
