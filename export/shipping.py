"""Which of a target's files ships: the fastest one that passes, and plain float when nothing is gained."""

from collections.abc import Mapping, Sequence

from export.diagnosis import Diagnosis
from export.evidence import Evidence
from export.findings import MICROSECONDS_PER_NODE, tiny_net
from export.findings_int8 import few_integer_layers, without_vnni
from export.gate import Policy, decide
from export.verdict import Check, Verdict, best_of

PRECISION_ORDER = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 1,
    "int8": 2,
    "int8-arm": 2,
    "int8-ptq": 2,
    "int8-symmetric": 2,
    "fp8": 2,
    "int4": 3,
}
"""Simplest first: among equally fast files the one with the least rounding ships."""


def choose_shipped(
    policy: Policy, files: Sequence[Evidence], diagnoses: Mapping[str, Diagnosis] | None = None
) -> Verdict:
    """The verdict on one target, from the evidence on each of its files.

    The fastest file that passes ships. A file counts as faster only beyond the noise floor; among those
    that are not told apart the one with the highest precision ships, and the reasons say why a smaller
    number format gained nothing. ``checks`` are those of the file that ships, or of the one that came
    closest when none does.

    Args:
        policy: The limits.
        files: Evidence on each file of the target.
        diagnoses: Candidate -> its diagnosis, for the reasons; without one they come from the evidence alone.

    Raises:
        ValueError: there are no files, or they belong to several targets.
    """
    targets = sorted({evidence.target for evidence in files})
    if len(targets) != 1:
        raise ValueError(f"Files to choose from have targets {targets}, expected exactly one target.")
    verdicts = {evidence.candidate: decide(policy, evidence) for evidence in files}
    passing = [evidence for evidence in files if verdicts[evidence.candidate].outcome == "accept"]
    if not passing:
        closest = best_of(list(verdicts.values()))
        return closest.model_copy(update={"reasons": (*closest.reasons, *_others(verdicts, closest.candidate))})
    shipped = _fastest(passing)
    reasons = [_why(shipped, passing)]
    for evidence in files:
        if PRECISION_ORDER[evidence.precision] > max(1, PRECISION_ORDER[shipped.precision]) and evidence in passing:
            reasons.extend(why_not_faster(evidence, shipped, (diagnoses or {}).get(evidence.candidate)))
    reasons.extend(_others(verdicts, shipped.candidate))
    return verdicts[shipped.candidate].model_copy(update={"reasons": tuple(reasons)})


def why_not_faster(int8: Evidence, faster: Evidence, diagnosis: Diagnosis | None = None) -> list[str]:
    """Sentences that explain why an int8 file did not beat the float file of the same net."""
    name = int8.candidate
    times = ""
    if int8.latency_p50_ms is not None and faster.latency_p50_ms is not None:
        times = f" ({int8.latency_p50_ms:.3f} ms against {faster.latency_p50_ms:.3f} ms at the median)"
    floor = int8.latency_noise_floor
    noise = f" by more than the noise floor of {floor:.1%}" if floor is not None else ""
    causes = _from_evidence(int8) if diagnosis is None else [finding.evidence for finding in diagnosis.findings]
    if not causes:
        causes = ["The measurements name no single cause; compare the operator histograms of both files."]
    return [f"'{name}' is not faster than '{faster.candidate}'{noise}{times}.", *causes]


def _from_evidence(int8: Evidence) -> list[str]:
    """What can be said without a diagnosis."""
    found = []
    if int8.integer_share is not None and int8.integer_share < 0.9:
        found.append(few_integer_layers(int8.candidate, int8.integer_share))
    if int8.vnni is False:
        found.append(without_vnni())
    if int8.num_nodes and int8.latency_p50_ms is not None:
        per_node = int8.latency_p50_ms * 1e3 / int8.num_nodes
        if per_node < MICROSECONDS_PER_NODE:
            found.append(tiny_net(int8.num_nodes, per_node))
    return found


def _fastest(passing: Sequence[Evidence]) -> Evidence:
    timed = [evidence for evidence in passing if evidence.latency_ratio is not None]
    if not timed:
        return min(passing, key=lambda evidence: PRECISION_ORDER[evidence.precision])
    best = min(_ratio(evidence) for evidence in timed)
    tied = [e for e in timed if _ratio(e) * (1 - (e.latency_noise_floor or 0.0)) <= best]
    return min(tied, key=lambda evidence: (PRECISION_ORDER[evidence.precision], _ratio(evidence)))


def _ratio(evidence: Evidence) -> float:
    return evidence.latency_ratio.estimate if evidence.latency_ratio else float("inf")


def _why(shipped: Evidence, passing: Sequence[Evidence]) -> str:
    ratio = f" at {shipped.latency_ratio.estimate:.0%} of {shipped.parent}'s time" if shipped.latency_ratio else ""
    if len(passing) == 1:
        return f"'{shipped.candidate}' ships{ratio}: it is the only file that passes."
    return f"'{shipped.candidate}' ships{ratio}: the fastest of the {len(passing)} files that pass."


def _others(verdicts: dict[str, Verdict], chosen: str) -> list[str]:
    lines = []
    for name, verdict in verdicts.items():
        if name == chosen or verdict.outcome == "accept":
            continue
        blocking: list[Check] = [check for check in verdict.checks if check.outcome in ("fail", "inconclusive")]
        why = blocking[0].reason if blocking else (verdict.reasons or ("",))[0]
        lines.append(f"'{name}' does not ship ({verdict.outcome}): {why}")
    return lines
