"""Stages 10 and 11: evidence and policy to a verdict; an accepted file to the model registry."""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compression.data import open_dataset
from compression.statistics import accuracy_drop, mcnemar
from export.diagnosis import DiagnosisReport
from export.evidence import Evidence, latency_facts, worst_class_drop
from export.gate import TOO_GOOD, Policy, decide
from export.latency import BenchmarkResult
from export.profiles import Form, forms_of, runs_here
from export.runtime import cpu_features
from export.shipping import choose_shipped
from export.targets import AnyTarget, OnnxRuntimeTarget
from export.verdict import RunVerdict, Verdict, combine
from tasks import tracking
from tasks.stage import StageOutput, StageResult, Work, stage


@stage(
    "gate",
    code=(
        *("export.gate", "export.shipping", "export.evidence", "compression.statistics"),
        *("export.diagnosis", "export.finding", "export.findings", "export.findings_int8"),
        "export.profiles",
    ),
)
def judge(
    work: Work,
    *,
    name: str,
    policy: Policy,
    targets: Sequence[AnyTarget],
    best_teacher: str,
    students: Sequence[str],
    files: Mapping[str, StageResult],
    engines: Mapping[str, StageResult],
    data: StageResult,
    evaluation: StageResult,
    benchmark: StageResult,
    diagnosis: StageResult,
    robustness: StageResult | None,
    seed: int,
) -> StageOutput:
    """Decide, for every target, which file ships and why; decided on interval bounds."""
    folder = work.open(evaluation)
    facts = json.loads((folder / "evaluation.json").read_text())
    timing = BenchmarkResult.model_validate_json((work.open(benchmark) / "latency.json").read_text())
    labels = open_dataset(work.open(data)).test.labels
    correct = {file: torch.from_numpy(np.load(folder / f"{file}.correct.npy")) for file in facts["metrics"]}
    reference = f"teacher-{best_teacher}.float32"
    report = DiagnosisReport.model_validate_json((work.open(diagnosis) / "diagnosis.json").read_text())
    diagnoses = {file: row.diagnosis for file, row in report.files.items() if row.diagnosis}
    gaps: dict[str, Any] = {}
    if robustness is not None:
        content = json.loads((work.open(robustness) / "robustness.json").read_text())
        gaps = {file: row.get("gap_increase") for file, row in content["files"].items()}
    verdicts: dict[str, Verdict] = {}
    for target in targets:
        limits = policy.model_copy(update=_budgets(policy, target))
        if isinstance(target, OnnxRuntimeTarget) and runs_here(target):
            forms = forms_of(target)
            candidates = [f"{student}.{form}" for student in students for form in forms if f"{student}.{form}" in files]
            evidence = [
                _evidence(target, file, reference, facts, timing, correct, labels, files, gaps, seed)
                for file in candidates
            ]
            verdicts[target.name] = choose_shipped(limits, evidence, diagnoses)
        else:
            for candidate, precision, result in _unrun(target, students, files, engines):
                built = Evidence(
                    target=target.name,
                    candidate=candidate,
                    precision=precision,
                    ran=False,
                    size_bytes=result.artifact.size_bytes,
                )
                verdicts[candidate] = decide(limits, built)
    verdict = combine(verdicts)
    with work.store.put("verdict") as draft:
        (draft.folder / "verdict.json").write_text(verdict.model_dump_json(indent=1))
    work.run.tag({"verdict": verdict.outcome})
    return StageOutput(artifact=draft.done(), info=verdict.model_dump(mode="json"))


def _unrun(
    target: AnyTarget, students: Sequence[str], files: Mapping[str, StageResult], engines: Mapping[str, StageResult]
) -> Iterator[tuple[str, Form, StageResult]]:
    """What was built for a target that this machine is not: engines, and files for other processors."""
    if isinstance(target, OnnxRuntimeTarget):
        form = forms_of(target)[-1]
        for student in students:
            if f"{student}.{form}" in files:
                yield f"{student}.{form}", form, files[f"{student}.{form}"]
        return
    for engine, result in engines.items():
        if engine.partition(".")[2] == target.name or engine.partition(".")[2].startswith(f"{target.name}-sm"):
            yield engine, target.precision, result


def _budgets(policy: Policy, target: AnyTarget) -> dict[str, Any]:
    """The tighter of the policy's and the target's budgets."""
    tighter = {}
    for field in ("max_latency_p95_ms", "max_size_kib"):
        limits = [value for value in (getattr(policy, field), getattr(target, field, None)) if value is not None]
        tighter[field] = min(limits) if limits else None
    return tighter


def _evidence(
    target: OnnxRuntimeTarget,
    file: str,
    reference: str,
    facts: Mapping[str, Any],
    timing: BenchmarkResult,
    correct: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    files: Mapping[str, StageResult],
    gaps: Mapping[str, Any],
    seed: int,
) -> Evidence:
    metrics, teacher = facts["metrics"][file], facts["metrics"][reference]
    share = facts["integer_share"].get(file)
    rung = next((row for row in facts["parity"] if row["file"] == file and row["parity"]), None)
    features = cpu_features()
    return Evidence(
        target=target.name,
        candidate=file,
        precision=files[file].info["form"],
        num_samples=len(labels),
        num_classes=int(labels.max()) + 1,
        accuracy=metrics["accuracy"],
        teacher_accuracy=teacher["accuracy"],
        accuracy_drop=accuracy_drop(correct[reference], correct[file], seed=seed),
        mcnemar_p=mcnemar(correct[reference], correct[file]),
        worst_class_drop=worst_class_drop(correct[reference], correct[file], labels, seed=seed),
        robust_gap_increase=gaps.get(file),
        ece=metrics["ece"],
        teacher_ece=teacher["ece"],
        flips=rung["parity"]["flips"] if rung else None,
        parent=reference,
        integer_share=share["integer"] / max(share["total"], 1) if share else None,
        vnni=features.vnni or features.dot_product,
        num_nodes=sum(share["operators"].values()) if share else None,
        **latency_facts(timing, file, batch=target.batch_sizes[0]),  # type: ignore[arg-type]
    )


def can_register(verdict: Mapping[str, Any]) -> bool:
    """Whether a file goes to the registry: it was accepted, or it is merely too good, which a person may settle."""
    return (
        verdict.get("outcome") in ("accept", "anomalous") and _shipped(RunVerdict.model_validate(verdict)) is not None
    )


def _shipped(decided: RunVerdict) -> Verdict | None:
    """The verdict on the file that is registered."""
    if decided.outcome == "accept":
        return next((item for item in decided.targets.values() if item.ships), None)
    for item in decided.targets.values():
        broken = {check.name for check in item.checks if check.outcome in ("fail", "inconclusive")}
        if item.ran and broken == {TOO_GOOD}:
            return item
    return None


@stage("register", code=("export.latency", "export.verdict"), libraries=("mlflow",))
def register(
    work: Work,
    *,
    name: str,
    verdict: StageResult,
    targets: Sequence[AnyTarget],
    files: Mapping[str, StageResult],
    data: StageResult,
    evaluation: StageResult,
    benchmark: StageResult,
    lineage: str,
) -> StageOutput:
    """Make the file that ships a version of the registered model; an accepted one gets the alias ``candidate``.

    Its tags say what was measured, so that it can be compared with the champion, whatever became of this run.
    """
    decided = RunVerdict.model_validate(verdict.info)
    judged = _shipped(decided)
    if judged is None:
        raise ValueError(f"Verdict '{decided.outcome}' has no file to register.")
    file = judged.ships or judged.candidate
    alias = "candidate" if decided.outcome == "accept" else None
    target = next(target for target in targets if target.name == judged.target)
    requirements = [f"{package}=={importlib.metadata.version(package)}" for package in ("onnx", "onnxruntime-gpu")]
    evidence = {
        "target": judged.target,
        "verdict": decided.outcome,
        "verdict_because": "" if decided.outcome == "accept" else judged.reasons[0],
        **_facts(work, file, target, files, data, evaluation, benchmark),
    }
    version = tracking.register_model(
        name=name,
        onnx_path=work.open(files[file]) / "model.onnx",
        run=work.run,
        alias=alias,
        tags={
            "file": file,
            "sha256": files[file].info["sha256"],
            "lineage": lineage,
            "mlflow_run": tracking.parent_of(work.run.id) or work.run.id,
            **{key: value if isinstance(value, str) else json.dumps(value) for key, value in evidence.items()},
        },
        requirements=requirements,
    )
    facts = {"model": name, "version": version, "alias": alias or "none", "file": file}
    with work.store.put("registration") as draft:
        (draft.folder / "registration.json").write_text(json.dumps(facts, sort_keys=True))
    return StageOutput(artifact=draft.done(), info=facts)


def _facts(
    work: Work,
    file: str,
    target: AnyTarget,
    files: Mapping[str, StageResult],
    data: StageResult,
    evaluation: StageResult,
    benchmark: StageResult,
) -> dict[str, Any]:
    """What is measured of a file, by the names of ``export.promotion.VersionFacts``."""
    metrics = json.loads((work.open(evaluation) / "evaluation.json").read_text())["metrics"]
    timing = BenchmarkResult.model_validate_json((work.open(benchmark) / "latency.json").read_text())
    batch = target.batch_sizes[0] if isinstance(target, OnnxRuntimeTarget) else 1
    row, reference = timing.row(file, batch), timing.row(timing.reference, batch)
    machine = timing.environment
    return {
        "precision": files[file].info["form"],
        "accuracy": metrics[file]["accuracy"],
        "float_accuracy": metrics.get(f"{file.partition('.')[0]}.float32", {}).get("accuracy"),
        "ece": metrics[file]["ece"],
        "num_samples": metrics[file]["num_samples"],
        "size_bytes": row.size_bytes,
        "latency_p50_ms": row.latency_p50_ms,
        "latency_ratio": [row.ratio_to_reference, row.ratio_low, row.ratio_high],
        "latency_noise_floor": timing.noise_floor(batch),
        "yardstick": f"{timing.reference} of {round(reference.size_bytes / 1024)} KiB, batch {batch}, "
        f"{machine.get('threads')} threads, onnxruntime {machine.get('onnxruntime')}, {machine.get('cpu')}",
        "data": data.artifact.sha256,
        "evaluation": evaluation.artifact.sha256,
    }
