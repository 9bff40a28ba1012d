"""Promotion: may an accepted version become the champion, at once, after a person has looked, or not?

Decided on interval bounds like the gate: a limit is met when the whole interval meets it and broken when the whole
interval breaks it. What is too strange to believe is never decided without a person.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from compression.statistics import Interval, accuracy_drop, wilson
from compression.types import Frozen
from export.gate import NOT_MEASURED, Share, bounded
from export.verdict import Check, Outcome

SAME_SIZE = 0.01
"""Files whose sizes differ by less than this share count as equally large: names and notes in them differ."""


class Promotion(Frozen):
    """When an accepted model replaces the champion. ``None`` switches a limit off."""

    champion: Literal["when_better", "after_approval", "never"] = "after_approval"
    """``when_better``: at once if it meets every limit and is better in something. ``after_approval``: a person is
    asked unless a limit is broken. ``never``: only by hand. An accepted model takes an empty place unless ``never``.
    """
    approval_hours: Annotated[float, Field(gt=0, le=24 * 30)] = 24.0
    """How long a person has to answer; without an answer nothing is promoted."""
    max_accuracy_drop: Share | None = 0.01
    """Most accuracy it may lose to the champion on the test images; 0.01 is one point."""
    max_latency_ratio: PositiveFloat | None = 1.05
    """Most time it may need, as a multiple of the champion's."""
    max_size_ratio: PositiveFloat | None = 1.1
    """Largest file, as a multiple of the champion's."""
    max_ece_increase: Share | None = 0.02
    """Most calibration error (ECE) it may add to the champion's."""
    not_dominated: bool | None = True
    """It must be better than the champion in accuracy, latency or size; null lets a model pass that is no better."""


@dataclass(frozen=True)
class VersionFacts:
    """What is known of one registered version; ``None`` means "not measured"."""

    version: int
    file: str
    sha256: str
    verdict: Outcome = "accept"
    verdict_because: str = ""
    precision: str = ""
    accuracy: float | None = None
    float_accuracy: float | None = None
    """Accuracy of the float32 file of the same student."""
    ece: float | None = None
    num_samples: int | None = None
    """Test images behind accuracy and ECE."""
    size_bytes: int | None = None
    latency_p50_ms: float | None = None
    latency_ratio: Interval | None = None
    """Its time over that of ``yardstick``, measured side by side."""
    latency_noise_floor: float = 0.0
    """How far the yardstick strayed from itself meanwhile, as a share."""
    yardstick: str = ""
    """What its latency was measured beside: file, runtime, processor. Equal texts can be compared across nights."""
    data: str = ""
    """Digest of the dataset; with equal ones the answers can be compared image by image."""
    correct: NDArray[np.bool_] | None = None
    """Which test images it got right, [N]."""
    answers: NDArray[np.integer] | None = None
    """The class it chose for each test image, [N]."""
    refused: str = ""
    """Why policy must not take it (again): it was rolled back or declined."""


class Comparison(Frozen):
    """A version beside the champion."""

    champion: int
    accuracy_drop: Interval | None = None
    """The champion's accuracy minus its own; negative when it is better."""
    paired: bool = False
    """Compared image by image; otherwise as two shares of different samples, which tells less."""
    latency_ratio: Interval | None = None
    """Its time over the champion's, the noise of both measurements included."""
    size_ratio: float | None = None
    ece_increase: float | None = None
    same_answers: bool = False
    """Other weights, yet the same answer to every test image."""


class PromotionDecision(Frozen):
    """What becomes of a version, and why."""

    action: Literal["promote", "ask", "hold"]
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    comparison: Comparison | None = None
    """None without a champion."""

    @property
    def anomalies(self) -> tuple[str, ...]:
        """What is too strange to be decided without a person."""
        return tuple(check.reason for check in self.checks if check.on_fail == "anomalous" and check.outcome == "fail")


def decide_promotion(config: Promotion, now: VersionFacts, champion: VersionFacts | None) -> PromotionDecision:
    """Whether ``now`` is promoted, a person is asked, or the champion stays."""
    if champion is not None and now.version == champion.version:
        return PromotionDecision(action="hold", reasons=(f"Version {now.version} is the champion.",))
    comparison = compare_versions(now, champion) if champion is not None else None
    checks = (*_anomalies(now, comparison), *(_limits(config, comparison) if comparison is not None else ()))

    def decided(action: Literal["promote", "ask", "hold"], *reasons: str) -> PromotionDecision:
        return PromotionDecision(action=action, reasons=reasons, checks=checks, comparison=comparison)

    if now.verdict not in ("accept", "anomalous"):
        return decided("hold", f"The gate's verdict is {now.verdict}. {now.verdict_because}".strip())
    if now.refused:
        return decided("hold", now.refused)
    if champion is not None and now.sha256 == champion.sha256:
        return decided("hold", f"It is the very file of the champion, version {champion.version}: nothing changes.")
    if config.champion == "never":
        return decided("hold", "The policy leaves promotion to people (champion: never).", *_broken(checks))
    strange = tuple(check.reason for check in checks if check.on_fail == "anomalous")
    if strange:
        return decided("ask", *strange)
    if comparison is None:
        return decided(
            "promote",
            "The gate accepted it, and there is no champion that it could be worse than.",
        )
    broken, open_ = _broken(checks), tuple(check.reason for check in checks if check.outcome == "inconclusive")
    if broken:
        return decided("hold", *broken)
    if config.champion == "after_approval":
        return decided("ask", *_better(comparison), *open_, "The policy asks for a person's approval.")
    if open_:
        return decided("hold", *open_)
    return decided("promote", *(_better(comparison) or ("It meets every limit against the champion.",)))


def compare_versions(now: VersionFacts, champion: VersionFacts, *, seed: int = 0) -> Comparison:
    """Every difference that can be told from what was measured of both."""
    drop, paired = _accuracy_drop(now, champion, seed)
    same = now.sha256 != champion.sha256 and paired and now.answers is not None and champion.answers is not None
    size = now.size_bytes / champion.size_bytes if now.size_bytes and champion.size_bytes else None
    return Comparison(
        champion=champion.version,
        accuracy_drop=drop,
        paired=paired,
        latency_ratio=_latency_ratio(now, champion),
        size_ratio=size,
        ece_increase=None if now.ece is None or champion.ece is None else now.ece - champion.ece,
        same_answers=bool(same and np.array_equal(now.answers, champion.answers)),  # type: ignore[arg-type]
    )


def _accuracy_drop(now: VersionFacts, champion: VersionFacts, seed: int) -> tuple[Interval | None, bool]:
    mine, theirs = now.correct, champion.correct
    if mine is not None and theirs is not None and now.data == champion.data and len(mine) == len(theirs):
        return accuracy_drop(torch.from_numpy(theirs), torch.from_numpy(mine), seed=seed), True
    if now.accuracy is None or champion.accuracy is None or not now.num_samples or not champion.num_samples:
        return None, False
    # Newcombe 1998, method 10: the difference of two independent shares from their Wilson intervals
    own = wilson(round(now.accuracy * now.num_samples), now.num_samples)
    other = wilson(round(champion.accuracy * champion.num_samples), champion.num_samples)
    drop = other.estimate - own.estimate
    low = drop - math.hypot(other.estimate - other.low, own.high - own.estimate)
    high = drop + math.hypot(other.high - other.estimate, own.estimate - own.low)
    return Interval(estimate=drop, low=low, high=high, level=own.level), False


def _latency_ratio(now: VersionFacts, champion: VersionFacts) -> Interval | None:
    """Both were timed beside the same yardstick; the bounds take the worst of both intervals and noise floors."""
    mine, theirs = now.latency_ratio, champion.latency_ratio
    if mine is None or theirs is None or not now.yardstick or now.yardstick != champion.yardstick:
        return None
    noise = (1 + now.latency_noise_floor) * (1 + champion.latency_noise_floor)
    return Interval(
        estimate=mine.estimate / theirs.estimate,
        low=mine.low / theirs.high / noise,
        high=mine.high / theirs.low * noise,
        level=mine.level,
    )


def _anomalies(now: VersionFacts, comparison: Comparison | None) -> Iterator[Check]:
    """Only what is strange; nothing to say about a version that is not."""
    if now.verdict == "anomalous":
        because = now.verdict_because or "It is better than its teachers by more than is believed."
        yield _anomaly("the gate's verdict", "anomalous", "accept", because)
    if now.accuracy == 1.0:
        yield _anomaly(
            "perfect accuracy",
            "100 %",
            "less than 100 %",
            f"It is right on all {now.num_samples or 'test'} images. Look for test images in the training data, or "
            "for labels that the images give away.",
        )
    if now.precision == "int4" and None not in (now.accuracy, now.float_accuracy):
        drop = now.float_accuracy - now.accuracy  # type: ignore[operator]
        if drop <= 0:
            yield _anomaly(
                "nothing lost at 4 bits",
                f"{100 * drop:.2f} %",
                "some loss",
                "Its 4-bit weights cost no accuracy against its own float32 file. Check that the file holds 4-bit "
                "weights, and that it is the file that was measured.",
            )
    if comparison is not None and comparison.same_answers:
        yield _anomaly(
            "the champion's answers",
            "the same answer to every test image",
            "a few other answers",
            f"It has other weights than version {comparison.champion} and gives the same answer to every test image. "
            "Check that not the same file was measured twice.",
        )


def _anomaly(name: str, found: str, expected: str, reason: str) -> Check:
    return Check(name=name, outcome="fail", found=found, expected=expected, reason=reason, on_fail="anomalous")


def _limits(config: Promotion, found: Comparison) -> Iterator[Check]:
    champion = f"the champion (version {found.champion})"
    yield _limit("accuracy", found.accuracy_drop, config.max_accuracy_drop, f"The accuracy lost to {champion}", "%")
    yield _limit("latency", found.latency_ratio, config.max_latency_ratio, f"Its time over that of {champion}")
    yield _limit("size", _exact(found.size_ratio), config.max_size_ratio, f"Its size over that of {champion}")
    yield _limit(
        "calibration", _exact(found.ece_increase), config.max_ece_increase, f"Calibration error added to {champion}"
    )
    yield _dominated(config, found)


def _limit(name: str, found: Interval | None, limit: float | None, what: str, unit: str = "") -> Check:
    shown = NOT_MEASURED if found is None else _shown(found, unit)
    if limit is None:
        return _check(name, "skipped", shown, "no limit", "The policy sets no limit here.")
    wanted = f"at most {_number(limit, unit)}"
    if found is None:
        reason = f"{what} can't be told: the two were not measured in a way that can be compared."
        return _check(name, "inconclusive", shown, wanted, reason)
    if found.low < found.high:
        return bounded(name, found, limit, unit=unit, on_fail="regression", what=what)
    met = found.high <= limit
    reason = f"{what} is {shown}, {'within' if met else 'above'} the limit ({wanted})."
    return _check(name, "pass" if met else "fail", shown, wanted, reason)


def _dominated(config: Promotion, found: Comparison) -> Check:
    """Whether the champion is at least as good in everything and better in something."""
    name, wanted = "not dominated", "better than the champion in accuracy, latency or size"
    better = _better(found)
    if not config.not_dominated:
        return _check(name, "skipped", "; ".join(better) or "no better for sure", "no limit", "Not asked for.")
    if better:
        return _check(name, "pass", "; ".join(better), wanted, better[0])
    drop, ratio, size = found.accuracy_drop, found.latency_ratio, found.size_ratio
    if drop is None or ratio is None or size is None:
        return _check(name, "inconclusive", NOT_MEASURED, wanted, "Not all of accuracy, latency and size are known.")
    worse = drop.low > 0 or ratio.low > 1 or size > 1 + SAME_SIZE
    if drop.low >= 0 and ratio.low >= 1 and worse:
        reason = f"Version {found.champion}, the champion, is at least as good in accuracy, latency and size."
        return _check(name, "fail", "worse or equal in everything", wanted, reason)
    reason = "It is not better than the champion in accuracy, latency or size beyond doubt."
    return _check(name, "inconclusive", "no better for sure", wanted, reason)


def _better(found: Comparison) -> tuple[str, ...]:
    """In what it beats the champion beyond doubt."""
    said = []
    if found.accuracy_drop is not None and found.accuracy_drop.high < 0:
        said.append(f"It is more accurate than the champion by {-100 * found.accuracy_drop.estimate:.2f} points.")
    if found.latency_ratio is not None and found.latency_ratio.high < 1:
        said.append(f"It needs {100 * found.latency_ratio.estimate:.0f} % of the champion's time.")
    if found.size_ratio is not None and found.size_ratio < 1 - SAME_SIZE:
        said.append(f"Its file has {100 * found.size_ratio:.0f} % of the champion's size.")
    return tuple(said)


def _broken(checks: tuple[Check, ...]) -> tuple[str, ...]:
    return tuple(check.reason for check in checks if check.outcome == "fail")


def _exact(value: float | None) -> Interval | None:
    return None if value is None else Interval(estimate=value, low=value, high=value)


def _check(name: str, outcome: Literal["pass", "fail", "inconclusive", "skipped"], *texts: str) -> Check:
    found, expected, reason = texts
    return Check(name=name, outcome=outcome, found=found, expected=expected, reason=reason)


def _shown(found: Interval, unit: str) -> str:
    if found.low == found.high:
        return _number(found.estimate, unit)
    return f"{_number(found.estimate, unit)}, between {_number(found.low, unit)} and {_number(found.high, unit)}"


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.2f} %" if unit == "%" else f"{value:.3f}"
