"""The gate: from evidence and a policy to a verdict with reasons.

Decided on interval bounds, never on point estimates: a limit is met when the whole interval meets it and
broken when the whole interval breaks it; anything else is inconclusive, and inconclusive ships nothing.
What a policy asks for and nobody measured is inconclusive too: "not run" is never "passed".
"""

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat

from compression.statistics import Interval
from compression.types import Frozen
from export.evidence import Evidence
from export.verdict import SEVERITY, Check, Outcome, Verdict

Share = Annotated[float, Field(ge=0, le=1)]

NOT_MEASURED = "not measured"
TOO_GOOD = "too good to be true"


class Policy(Frozen):
    """What a file must meet to ship. ``None`` switches a check off."""

    max_accuracy_drop: Share | None = 0.01
    """Most accuracy a student may lose to the best teacher; 0.01 is one point."""
    max_worst_class_drop: Share | None = 0.05
    """Most accuracy any single class may lose to the best teacher."""
    max_ece_increase: Share | None = 0.02
    """Most calibration error (ECE) a student may add to the best teacher's."""
    max_robust_gap_increase: Share | None = None
    """Most accuracy a file may lose on corrupted images beyond what it loses on clean ones; 0.02 is two points."""
    max_flips_float32: Share | None = 0.001
    """Largest share of answers a float32 file may give differently from the torch model."""
    max_flips_float16: Share | None = 0.005
    """The same for a float16 file."""
    max_flips_int8: Share | None = 0.01
    """The same for an int8 file, against the quantized model it came from; and for narrower ones, against the float
    model."""
    faster_than_parent: bool = True
    """The file must be faster than its parent by more than the noise floor."""
    max_latency_p95_ms: PositiveFloat | None = None
    """Latency budget of the target (95th percentile, in ms)."""
    max_size_kib: PositiveFloat | None = None
    """Size budget of the shipped file in KiB."""
    max_peak_rss_mib: PositiveFloat | None = None
    """Memory budget of a process that runs the file, in MiB."""
    max_accuracy_gain: Share | None = 0.02
    """A student better than its best teacher by more than this is not believed without a look."""


def decide(policy: Policy, evidence: Evidence) -> Verdict:
    """The verdict on one file; ``ships`` is its own name when it is accepted."""
    if not evidence.ran:
        reason = f"'{evidence.candidate}' was built, not run: this machine can't execute it. Nothing is proven."
        return Verdict(
            target=evidence.target,
            candidate=evidence.candidate,
            outcome="inconclusive",
            checks=(*_size(policy, evidence),),
            reasons=(reason,),
            ran=False,
        )
    checks = (
        *_anomalies(policy, evidence),
        *_accuracy(policy, evidence),
        *_parity(policy, evidence),
        *_latency(policy, evidence),
        *_size(policy, evidence),
    )
    outcome: Outcome = "accept"
    for check in checks:
        if check.outcome in ("fail", "inconclusive"):
            effect: Outcome = check.on_fail if check.outcome == "fail" else "inconclusive"
            outcome = max(outcome, effect, key=SEVERITY.__getitem__)
    blocking = tuple(check.reason for check in checks if check.outcome in ("fail", "inconclusive"))
    return Verdict(
        target=evidence.target,
        candidate=evidence.candidate,
        outcome=outcome,
        checks=checks,
        ships=evidence.candidate if outcome == "accept" else None,
        reasons=blocking or (f"'{evidence.candidate}' meets every limit of the policy.",),
    )


def bounded(
    name: str, found: Interval, limit: float, *, unit: str = "", digits: int = 3, on_fail: Outcome, what: str
) -> Check:
    """The check that ``found`` stays at or below ``limit``: pass, fail or inconclusive by its bounds."""
    shown = f"{_number(found.estimate, unit, digits)}, between {_number(found.low, unit, digits)} and "
    shown += f"{_number(found.high, unit, digits)}"
    expected = f"at most {_number(limit, unit, digits)}"
    confidence = f"with {found.level:.0%} confidence" if found.level else "with its interval"
    if found.high <= limit:
        outcome, reason = "pass", f"{what} is within the limit even at the worst end of its interval."
    elif found.low > limit:
        outcome, reason = "fail", f"{what} is {shown}, so it is above the limit {confidence} ({expected})."
    else:
        outcome = "inconclusive"
        reason = (
            f"{what} is {shown}: the limit ({_number(limit, unit, digits)}) lies inside, so the data cannot "
            "tell. More test samples, seeds or rounds would."
        )
    return Check(name=name, outcome=outcome, found=shown, expected=expected, reason=reason, on_fail=on_fail)


def _anomalies(policy: Policy, evidence: Evidence) -> Iterator[Check]:
    broken = sorted(name for name, value in _numbers(evidence) if not math.isfinite(value))
    yield Check(
        name="finite numbers",
        outcome="fail" if broken else "pass",
        found=f"not a number: {', '.join(broken)}" if broken else "all finite",
        expected="all finite",
        reason=f"Not finite: {', '.join(broken)}. Something is broken; look at the parity ladder."
        if broken
        else "Every measured value is a finite number.",
        on_fail="anomalous",
    )
    teacher, classes = evidence.teacher_accuracy, evidence.num_classes
    if teacher is not None and classes is not None and not teacher > 1 / classes:
        yield Check(
            name="teacher above chance",
            outcome="fail",
            found=f"{teacher:.1%}",
            expected=f"more than {1 / classes:.1%}",
            reason=f"The best teacher is right {teacher:.1%} of the time with {classes} classes: no better "
            "than guessing. Check its class order and preprocessing.",
            on_fail="anomalous",
        )
    drop, limit = evidence.accuracy_drop, policy.max_accuracy_gain
    if drop is None or limit is None or not drop.high < -limit:
        return
    yield Check(
        name=TOO_GOOD,
        outcome="fail",
        found=f"{-drop.estimate:.2%} better",
        expected=f"at most {limit:.2%} better than the best teacher",
        reason=f"The student beats its best teacher by {-drop.estimate:.2%}. Look for test images in the "
        "training data, or for a teacher that is fed the wrong preprocessing.",
        on_fail="anomalous",
    )


def _accuracy(policy: Policy, evidence: Evidence) -> Iterator[Check]:
    yield _limit(
        "accuracy drop",
        evidence.accuracy_drop,
        policy.max_accuracy_drop,
        "The accuracy lost to the best teacher",
    )
    yield _limit(
        "worst class",
        evidence.worst_class_drop,
        policy.max_worst_class_drop,
        "The accuracy the worst class lost to the best teacher",
    )
    if policy.max_robust_gap_increase is not None or evidence.robust_gap_increase is not None:
        yield _limit(
            "robustness",
            evidence.robust_gap_increase,
            policy.max_robust_gap_increase,
            "The accuracy lost on corrupted images beyond that lost on clean ones",
        )
    increase = None
    if evidence.ece is not None and evidence.teacher_ece is not None:
        increase = evidence.ece - evidence.teacher_ece
    yield _fact(
        "calibration",
        increase,
        policy.max_ece_increase,
        "Calibration error (ECE) added to the best teacher's",
        digits=4,
    )


def _parity(policy: Policy, evidence: Evidence) -> Iterator[Check]:
    limits = {
        "float32": policy.max_flips_float32,
        "float16": policy.max_flips_float16,
        "bfloat16": policy.max_flips_float16,
    }
    limit = limits.get(evidence.precision, policy.max_flips_int8)
    what = "The share of answers that differ from the torch model"
    check = _fact("parity", evidence.flips, limit, what, unit="%")
    if check.outcome == "fail" and limit is not None and evidence.flips is not None and evidence.num_samples:
        low = _wilson_low(evidence.flips, evidence.num_samples)
        if low <= limit:
            flipped = round(evidence.flips * evidence.num_samples)
            check = check.model_copy(
                update={
                    "outcome": "inconclusive",
                    "reason": f"{flipped} of {evidence.num_samples} answers differ from the torch model "
                    f"({evidence.flips:.2%}). That is above {limit:.2%}, yet so few samples could show it by "
                    "chance. Use more test samples.",
                }
            )
    yield check


def _latency(policy: Policy, evidence: Evidence) -> Iterator[Check]:
    ratio, floor = evidence.latency_ratio, evidence.latency_noise_floor
    name, parent = "faster than its parent", evidence.parent
    if not policy.faster_than_parent:
        yield _skipped(name)
    elif ratio is None or floor is None:
        yield _missing(name, "faster than the noise floor")
    else:
        threshold = max(1 - floor, 0.0)
        found = f"{ratio.estimate:.3f} of {parent}'s time, between {ratio.low:.3f} and {ratio.high:.3f}"
        expected = f"below {threshold:.3f} (noise floor {floor:.1%})"
        if ratio.high < threshold:
            outcome, reason = "pass", f"It needs {ratio.estimate:.0%} of {parent}'s time, beyond the noise."
        elif ratio.low >= threshold:
            outcome, reason = "fail", f"It is not faster than {parent}: {found}, expected {expected}."
        else:
            outcome, reason = (
                "inconclusive",
                f"Its time is {found}; a difference counts {expected}. More rounds on a quieter machine would tell.",
            )
        yield Check(name=name, outcome=outcome, found=found, expected=expected, reason=reason)
    yield _limit(
        "latency budget",
        evidence.latency_p95_ms,
        policy.max_latency_p95_ms,
        "p95 latency",
        unit="ms",
        on_fail="infeasible",
    )


def _size(policy: Policy, evidence: Evidence) -> Iterator[Check]:
    size = None if evidence.size_bytes is None else evidence.size_bytes / 1024
    yield _fact("size budget", size, policy.max_size_kib, "File size", unit="KiB", digits=1, on_fail="infeasible")
    if evidence.ran:
        peak = None if evidence.peak_rss_bytes is None else evidence.peak_rss_bytes / 2**20
        yield _fact(
            "memory budget",
            peak,
            policy.max_peak_rss_mib,
            "Peak memory of a process that runs it",
            unit="MiB",
            digits=1,
            on_fail="infeasible",
        )


def _limit(
    name: str,
    found: Interval | None,
    limit: float | None,
    what: str,
    *,
    unit: str = "%",
    on_fail: Outcome = "regression",
) -> Check:
    if limit is None:
        return _skipped(name, None if found is None else _number(found.estimate, unit, 3))
    if found is None or math.isnan(found.estimate + found.low + found.high):
        return _missing(name, f"at most {_number(limit, unit, 3)}", on_fail)
    return bounded(name, found, limit, unit=unit, on_fail=on_fail, what=what)


def _fact(
    name: str,
    found: float | None,
    limit: float | None,
    what: str,
    *,
    unit: str = "",
    digits: int = 3,
    on_fail: Outcome = "regression",
) -> Check:
    if limit is None:
        return _skipped(name, None if found is None else _number(found, unit, digits))
    if found is None or math.isnan(found):
        return _missing(name, f"at most {_number(limit, unit, digits)}", on_fail)
    shown, wanted = _number(found, unit, digits), f"at most {_number(limit, unit, digits)}"
    met = found <= limit
    reason = f"{what} is {shown}, {'within' if met else 'above'} the limit ({wanted})."
    return Check(
        name=name,
        outcome="pass" if met else "fail",
        found=shown,
        expected=wanted,
        reason=reason,
        on_fail=on_fail,
    )


def _skipped(name: str, found: str | None = None) -> Check:
    shown = NOT_MEASURED if found is None else found
    return Check(
        name=name,
        outcome="skipped",
        found=shown,
        expected="no limit",
        reason="The policy sets no limit here.",
    )


def _missing(name: str, expected: str, on_fail: Outcome = "regression") -> Check:
    return Check(
        name=name,
        outcome="inconclusive",
        found=NOT_MEASURED,
        expected=expected,
        reason=f"The policy asks for '{name}' ({expected}), and it was not measured.",
        on_fail=on_fail,
    )


def _number(value: float, unit: str, digits: int) -> str:
    if unit == "%":
        return f"{value * 100:.2f} %"
    return f"{value:.{digits}f} {unit}".strip()


def _wilson_low(share: float, samples: int) -> float:
    from compression.statistics import wilson

    return wilson(round(share * samples), samples).low


def _numbers(evidence: Evidence) -> Iterator[tuple[str, float]]:
    for name in type(evidence).model_fields:
        value = getattr(evidence, name)
        if isinstance(value, Interval):
            yield name, value.estimate + value.low + value.high
        elif isinstance(value, int | float):
            yield name, value
