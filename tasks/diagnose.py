"""Stage 10, its last part: did each file get faster than its parent, and if not, why not."""

import logging
from collections.abc import Iterable, Mapping

from export.diagnosis import DiagnosisReport, diagnose_all, speed_of
from export.latency import BenchmarkResult, read_raw
from tasks.stage import StageOutput, StageResult, Work, stage

logger = logging.getLogger(__name__)


@stage(
    "diagnose",
    code=(
        *("export.diagnosis", "export.finding", "export.findings", "export.findings_int8", "export.file_facts"),
        *("export.operator_profile", "export.runtime", "export.timing", "export.feed", "export.latency"),
    ),
    libraries=("onnxruntime-gpu", "onnx"),
    tags=("training",),
)
def diagnose_files(
    work: Work,
    *,
    name: str,
    files: Mapping[str, StageResult],
    benchmark: StageResult,
    reference: str,
    threads: int,
    batch: int,
    machine: str,
) -> StageOutput:
    """Profile every file per operator, in a process of its own each, and say what keeps it from being faster.

    A quantized or float16 file is compared with the float32 file of its student, a float32 file with ``reference``,
    the best teacher. Speed comes from ``benchmark`` (its raw samples); a file that it did not time is "not measured".
    """
    folder = work.open(benchmark)
    timing = BenchmarkResult.model_validate_json((folder / "latency.json").read_text())
    samples = read_raw(folder / "latency_raw.csv")
    parents = parents_of(files, reference)
    report = diagnose_all(
        {file: work.open(result) / "model.onnx" for file, result in files.items()},
        parents,
        {file: speed_of(samples, timing, file, parent, batch=batch) for file, parent in parents.items()},
        reference=reference,
        batches=dict.fromkeys(files, batch),
        threads=threads,
        on_progress=lambda done, total: work.report("profiling files", done, total),
    )
    for file, row in report.files.items():
        if row.failure is not None:
            logger.warning("diagnose: file '%s' could not be profiled: %s", file, row.failure)
    with work.store.put("diagnosis") as draft:
        path = draft.folder / "diagnosis.json"
        path.write_text(report.model_dump_json(indent=1))
        work.run.log_file(path, "diagnosis")
    return StageOutput(artifact=draft.done(), metrics=metrics_of(report), info=answers_of(report))


def parents_of(files: Iterable[str], reference: str) -> dict[str, str]:
    """File -> the file it is compared with, from names like ``student-0.int8``; the reference has none."""
    known = set(files)
    parents = {}
    for file in files:
        student, _, form = file.rpartition(".")
        float32 = f"{student}.float32"
        if form != "float32" and float32 in known:
            parents[file] = float32
        elif file != reference:
            parents[file] = reference
    return parents


def metrics_of(report: DiagnosisReport) -> dict[str, float]:
    """Numbers of every profiled file."""
    metrics = {}
    for file, row in report.files.items():
        if row.facts is None:
            continue
        operators = row.facts.operators
        metrics[f"{file}/integer_share"] = operators.integer_share
        metrics[f"{file}/operators"] = float(len(operators.profile.nodes))
        metrics |= {f"{file}/time_{kind}": operators.profile.share_of(kind) for kind in ("integer", "conversion")}
        if row.diagnosis is not None:
            metrics[f"{file}/findings"] = float(len(row.diagnosis.findings))
    return metrics


def answers_of(report: DiagnosisReport) -> dict[str, dict[str, object]]:
    """What later stages need: per file the answer, and the codes of the findings."""
    return {
        file: {"faster": row.diagnosis.faster, "findings": [finding.code for finding in row.diagnosis.findings]}
        for file, row in report.files.items()
        if row.diagnosis is not None
    }
