import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.statistics import Interval
from export.evidence import Evidence, worst_class_drop
from export.gate import Policy, bounded, decide
from export.shipping import choose_shipped, why_not_faster
from export.verdict import SEVERITY, RunVerdict, Verdict, combine

POLICY = Policy(max_latency_p95_ms=1.0, max_size_kib=100.0, max_peak_rss_mib=100.0)


def interval(low: float, high: float | None = None) -> Interval:
    high = low if high is None else high
    return Interval(estimate=(low + high) / 2, low=low, high=high, level=0.95)


def evidence(**changes) -> Evidence:
    """A candidate that meets every limit of ``POLICY``, but for the changes."""
    good = {
        "target": "cpu",
        "candidate": "student.float32",
        "precision": "float32",
        "num_samples": 10_000,
        "num_classes": 10,
        "accuracy": 0.92,
        "teacher_accuracy": 0.925,
        "accuracy_drop": interval(0.002, 0.008),
        "worst_class_drop": interval(0.0, 0.03),
        "ece": 0.012,
        "teacher_ece": 0.010,
        "flips": 0.0,
        "latency_ratio": interval(0.29, 0.31),
        "latency_noise_floor": 0.05,
        "latency_p50_ms": 0.5,
        "latency_p95_ms": interval(0.6, 0.7),
        "size_bytes": 50 * 1024,
        "peak_rss_bytes": 60 * 2**20,
    }
    return Evidence(**(good | changes))


def check_of(verdict: Verdict, name: str):
    return next(check for check in verdict.checks if check.name == name)


def test_a_candidate_within_every_limit_ships():
    verdict = decide(POLICY, evidence())
    assert verdict.outcome == "accept"
    assert verdict.ships == "student.float32"
    assert {check.outcome for check in verdict.checks} == {"pass"}
    assert verdict.reasons == ("'student.float32' meets every limit of the policy.",)


EDGES = [
    # what changes, the check, its outcome, the verdict
    ({"accuracy_drop": interval(0.0, 0.01)}, "accuracy drop", "pass", "accept"),
    ({"accuracy_drop": interval(0.0, 0.0101)}, "accuracy drop", "inconclusive", "inconclusive"),
    ({"accuracy_drop": interval(0.01, 0.02)}, "accuracy drop", "inconclusive", "inconclusive"),
    ({"accuracy_drop": interval(0.0101, 0.02)}, "accuracy drop", "fail", "regression"),
    ({"accuracy_drop": None}, "accuracy drop", "inconclusive", "inconclusive"),
    ({"worst_class_drop": interval(0.02, 0.05)}, "worst class", "pass", "accept"),
    ({"worst_class_drop": interval(0.02, 0.09)}, "worst class", "inconclusive", "inconclusive"),
    ({"worst_class_drop": interval(0.06, 0.09)}, "worst class", "fail", "regression"),
    ({"ece": 0.029}, "calibration", "pass", "accept"),
    ({"ece": 0.031}, "calibration", "fail", "regression"),
    ({"ece": None}, "calibration", "inconclusive", "inconclusive"),
    ({"flips": 0.001}, "parity", "pass", "accept"),
    ({"flips": 0.0011}, "parity", "inconclusive", "inconclusive"),
    ({"flips": 0.01}, "parity", "fail", "regression"),
    ({"flips": 0.01, "precision": "int8"}, "parity", "pass", "accept"),
    ({"flips": 0.05, "precision": "int8"}, "parity", "fail", "regression"),
    ({"flips": 0.005, "precision": "float16"}, "parity", "pass", "accept"),
    ({"flips": 1 / 360, "num_samples": 360}, "parity", "inconclusive", "inconclusive"),
    ({"flips": 0.0011, "num_samples": None}, "parity", "fail", "regression"),
    ({"flips": None}, "parity", "inconclusive", "inconclusive"),
    ({"latency_ratio": interval(0.90, 0.94)}, "faster than its parent", "pass", "accept"),
    ({"latency_ratio": interval(0.90, 0.95)}, "faster than its parent", "inconclusive", "inconclusive"),
    ({"latency_ratio": interval(0.94, 1.10)}, "faster than its parent", "inconclusive", "inconclusive"),
    ({"latency_ratio": interval(0.951, 0.96)}, "faster than its parent", "fail", "regression"),
    ({"latency_ratio": interval(1.2, 1.3)}, "faster than its parent", "fail", "regression"),
    ({"latency_noise_floor": None}, "faster than its parent", "inconclusive", "inconclusive"),
    ({"latency_p95_ms": interval(0.9, 1.0)}, "latency budget", "pass", "accept"),
    ({"latency_p95_ms": interval(0.9, 1.1)}, "latency budget", "inconclusive", "inconclusive"),
    ({"latency_p95_ms": interval(1.01, 1.1)}, "latency budget", "fail", "infeasible"),
    ({"size_bytes": 100 * 1024}, "size budget", "pass", "accept"),
    ({"size_bytes": 100 * 1024 + 1}, "size budget", "fail", "infeasible"),
    ({"peak_rss_bytes": 100 * 2**20 + 1}, "memory budget", "fail", "infeasible"),
    ({"accuracy_drop": interval(-0.04, -0.02)}, "accuracy drop", "pass", "accept"),
    ({"accuracy_drop": interval(-0.04, -0.021)}, "too good to be true", "fail", "anomalous"),
    ({"teacher_accuracy": 0.1}, "teacher above chance", "fail", "anomalous"),
    ({"ece": math.nan}, "finite numbers", "fail", "anomalous"),
    ({"latency_ratio": interval(0.1, math.inf)}, "finite numbers", "fail", "anomalous"),
]


@pytest.mark.parametrize(("changes", "name", "outcome", "verdict"), EDGES)
def test_edges(changes, name, outcome, verdict):
    decided = decide(POLICY, evidence(**changes))
    check = check_of(decided, name)
    assert (check.outcome, decided.outcome) == (outcome, verdict)
    assert check.found
    assert check.expected
    assert check.reason.endswith(".")
    assert (decided.ships is None) == (verdict != "accept")
    if verdict != "accept":
        assert check.reason in decided.reasons


def test_the_worst_answer_decides_and_every_reason_is_told():
    verdict = decide(POLICY, evidence(ece=0.5, size_bytes=10**9, flips=None))
    assert verdict.outcome == "infeasible"
    assert len(verdict.reasons) == 3
    assert decide(POLICY, evidence(ece=0.5, size_bytes=10**9, teacher_accuracy=0.05)).outcome == "anomalous"


def test_a_check_the_policy_switches_off_is_skipped_and_decides_nothing():
    off = Policy(
        max_accuracy_drop=None,
        max_worst_class_drop=None,
        max_ece_increase=None,
        max_flips_float32=None,
        max_accuracy_gain=None,
        faster_than_parent=False,
    )
    nothing = Evidence(target="cpu", candidate="a", precision="float32")
    verdict = decide(off, nothing)
    assert verdict.outcome == "accept"
    assert {check.outcome for check in verdict.checks if check.name != "finite numbers"} == {"skipped"}


def test_what_was_measured_is_shown_even_where_nothing_limits_it():
    verdict = decide(Policy(max_accuracy_drop=None), evidence())
    assert check_of(verdict, "accuracy drop").found == "0.50 %"
    assert check_of(verdict, "size budget").found == "50.0 KiB"
    assert check_of(verdict, "latency budget").found == "0.650 ms"


def test_what_the_policy_asks_for_and_nobody_measured_is_never_passed():
    verdict = decide(POLICY, Evidence(target="cpu", candidate="a", precision="float32"))
    assert verdict.outcome == "inconclusive"
    missing = [check for check in verdict.checks if check.name != "finite numbers"]
    assert {check.outcome for check in missing} == {"inconclusive"}
    assert {check.found for check in missing} == {"not measured"}


def test_an_engine_that_was_built_and_not_run_is_not_accepted():
    built = decide(POLICY, evidence(ran=False))
    assert (built.outcome, built.ships, built.ran) == ("inconclusive", None, False)
    assert "built, not run" in built.reasons[0]
    assert [check.name for check in built.checks] == ["size budget"]
    both = combine({"cpu": decide(POLICY, evidence()), "rtx": built})
    assert both.outcome == "accept"
    assert "rtx: built, not run here" in both.summary
    assert combine({"rtx": built}).outcome == "inconclusive"
    assert combine({}).outcome == "inconclusive"
    assert RunVerdict.model_validate_json(both.model_dump_json()) == both


def test_a_run_is_as_good_as_its_worst_target():
    bad = decide(POLICY, evidence(ece=0.5))
    run = combine({"a": decide(POLICY, evidence()), "b": bad})
    assert run.outcome == "regression"
    assert "'student.float32' ships" in run.summary
    assert bad.reasons[0] in run.summary


WORSE = {
    "accuracy_drop": lambda e, by: {"accuracy_drop": moved(e.accuracy_drop, by / 50)},
    "worst_class_drop": lambda e, by: {"worst_class_drop": moved(e.worst_class_drop, by / 10)},
    "ece": lambda e, by: {"ece": e.ece + by / 20},
    "flips": lambda e, by: {"flips": min(e.flips + round(by * 500) / 10_000, 1.0)},
    "latency_ratio": lambda e, by: {"latency_ratio": moved(e.latency_ratio, by)},
    "latency_p95_ms": lambda e, by: {"latency_p95_ms": moved(e.latency_p95_ms, by)},
    "size_bytes": lambda e, by: {"size_bytes": e.size_bytes + round(by * 10**5)},
    "peak_rss_bytes": lambda e, by: {"peak_rss_bytes": e.peak_rss_bytes + round(by * 10**8)},
}


def moved(interval_: Interval, by: float) -> Interval:
    return Interval(estimate=interval_.estimate + by, low=interval_.low + by, high=interval_.high + by, level=0.95)


@st.composite
def candidates(draw) -> Evidence:
    def around(low: float, high: float, width: float) -> Interval:
        center, half = draw(st.floats(low, high)), draw(st.floats(0, width))
        return Interval(estimate=center, low=center - half, high=center + half, level=0.95)

    return evidence(
        precision=draw(st.sampled_from(["float32", "float16", "int8"])),
        accuracy_drop=around(-0.015, 0.03, 0.01),
        worst_class_drop=around(0, 0.1, 0.05),
        ece=draw(st.floats(0, 0.06)),
        flips=draw(st.integers(0, 300)) / 10_000,
        latency_ratio=around(0.2, 1.4, 0.15),
        latency_p95_ms=around(0.3, 1.5, 0.2),
        size_bytes=draw(st.integers(1, 200 * 1024)),
        peak_rss_bytes=draw(st.integers(1, 200 * 2**20)),
    )


@given(candidates(), st.sampled_from(sorted(WORSE)), st.floats(0, 1))
def test_a_worse_candidate_never_gets_a_better_outcome(candidate, what, by):
    worse = candidate.model_copy(update=WORSE[what](candidate, by))
    before, after = decide(POLICY, candidate), decide(POLICY, worse)
    if before.outcome != "anomalous":  # too good to be believed: there, worse is more credible
        assert SEVERITY[after.outcome] >= SEVERITY[before.outcome]


@given(candidates(), st.floats(0, 0.05), st.floats(0, 0.05))
def test_a_stricter_policy_never_gives_a_better_outcome(candidate, first, second):
    strict, loose = sorted((first, second))
    outcomes = [decide(POLICY.model_copy(update={"max_accuracy_drop": x}), candidate).outcome for x in (strict, loose)]
    assert SEVERITY[outcomes[0]] >= SEVERITY[outcomes[1]]


@given(candidates())
def test_more_data_never_contradicts_a_decision(candidate):
    # A narrower interval around the same estimate may settle what was open, never turn a pass into a fail.
    drop = candidate.accuracy_drop
    narrower = interval((drop.low + drop.estimate) / 2, (drop.high + drop.estimate) / 2)
    found = [
        bounded("drop", x, 0.01, unit="%", on_fail="regression", what="The drop").outcome for x in (drop, narrower)
    ]
    assert (found[0], found[1]) not in {("pass", "fail"), ("fail", "pass")}


def files(**int8) -> list[Evidence]:
    """A float32 and an int8 file of one student; ``int8`` changes the latter."""
    small = {
        "candidate": "student.int8",
        "precision": "int8",
        "latency_ratio": interval(0.15, 0.17),
        "latency_p50_ms": 0.2,
    }
    return [evidence(), evidence(**(small | int8))]


def test_the_fastest_file_that_passes_ships():
    verdict = choose_shipped(POLICY, files())
    assert verdict.ships == "student.int8"
    assert "fastest of the 2 files that pass" in verdict.reasons[0]
    assert choose_shipped(POLICY, files()[::-1]).ships == "student.int8"


@pytest.mark.parametrize(
    ("ratio", "ships"),
    [(0.28, "student.int8"), (0.284, "student.int8"), (0.286, "student.float32"), (0.45, "student.float32")],
)
def test_int8_has_to_be_faster_by_more_than_the_noise_floor(ratio, ships):
    # The float file needs 0.30 of its parent's time and the noise floor is 5 %: the border is 0.285.
    assert choose_shipped(POLICY, files(latency_ratio=interval(ratio))).ships == ships


def test_when_float_ships_the_reasons_say_why():
    slow = {"latency_ratio": interval(0.45), "latency_p50_ms": 0.31}
    verdict = choose_shipped(POLICY, files(**slow, integer_share=0.4, vnni=False, num_nodes=40))
    said = " ".join(verdict.reasons)
    assert verdict.ships == "student.float32"
    assert "'student.int8' is not faster than 'student.float32' by more than the noise floor of 5.0%" in said
    assert "Only 40% of the weight layers" in said
    assert "without VNNI" in said
    assert "The net is tiny: 40 operators take 7.8 µs each" in said


def test_a_cause_that_does_not_hold_is_not_named():
    slow = evidence(precision="int8", integer_share=1.0, vnni=True, num_nodes=40, latency_p50_ms=5.0)
    said = " ".join(why_not_faster(slow, evidence()))
    assert "integer kernels" not in said
    assert "VNNI" not in said
    assert "tiny" not in said
    assert "no single cause" in said


def test_an_int8_file_that_fails_leaves_the_float_file_and_says_so():
    verdict = choose_shipped(POLICY, files(flips=0.2))
    assert (verdict.outcome, verdict.ships) == ("accept", "student.float32")
    assert any(reason.startswith("'student.int8' does not ship (regression)") for reason in verdict.reasons)


def test_int8_ships_when_float_misses_the_size_budget():
    big, small = files(latency_ratio=interval(0.30))
    big = big.model_copy(update={"size_bytes": 10**6})
    verdict = choose_shipped(POLICY, [big, small])
    assert verdict.ships == "student.int8"
    assert "only file that passes" in verdict.reasons[0]


def test_when_nothing_passes_the_closest_file_is_explained():
    verdict = choose_shipped(
        POLICY, [evidence(size_bytes=10**9), evidence(candidate="b", accuracy_drop=interval(0, 0.02))]
    )
    assert (verdict.outcome, verdict.candidate, verdict.ships) == ("inconclusive", "b", None)
    assert "More test samples" in verdict.reasons[0]
    assert "infeasible" in verdict.reasons[1]


def test_files_of_two_targets_or_none_are_refused():
    with pytest.raises(ValueError, match="exactly one target"):
        choose_shipped(POLICY, [evidence(), evidence(target="other")])
    with pytest.raises(ValueError, match="exactly one target"):
        choose_shipped(POLICY, [])


@given(st.lists(candidates(), min_size=1, max_size=4))
def test_what_ships_is_accepted_alone_and_nothing_passing_is_clearly_faster(drawn):
    named = [candidate.model_copy(update={"candidate": f"file{i}"}) for i, candidate in enumerate(drawn)]
    verdict = choose_shipped(POLICY, named)
    alone = {c.candidate: decide(POLICY, c) for c in named}
    passing = [c for c in named if alone[c.candidate].outcome == "accept"]
    assert (verdict.ships is not None) == bool(passing)
    if passing:
        shipped = next(c for c in named if c.candidate == verdict.ships)
        assert shipped in passing
        assert all(c.latency_ratio.estimate >= shipped.latency_ratio.estimate * (1 - 0.05) for c in passing)


def test_the_worst_class_is_found_and_its_interval_pays_for_the_choice():
    labels = torch.arange(10).repeat_interleave(100)
    teacher = torch.ones(1000, dtype=torch.bool)
    student = teacher.clone()
    student[300:330] = False
    drop = worst_class_drop(teacher, student, labels, seed=0)
    assert drop.estimate == pytest.approx(0.3)
    assert drop.level == pytest.approx(0.995)
    assert drop.low < 0.2 < 0.4 < drop.high
