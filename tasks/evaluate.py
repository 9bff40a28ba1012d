"""Stage 9: the evidence. Accuracy and calibration of every file on the test split, the parity ladder, and latency.

Only this stage and ``robustness`` read the test split.
"""

import csv
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from compression.calibration import calibrated_rows
from compression.checkpoint import load_checkpoint
from compression.data import Dataset, open_dataset
from compression.metrics import metrics_of, predict, reliability
from compression.quantize import load_quantized
from export.benchmark import BenchmarkJob, run_benchmark
from export.formats import NOT_RUN_HERE, bfloat16_predict
from export.ladder import LAYER_COLUMNS, Forms, Ladder, climb, layer_rows
from export.parity import ENGINE_NOT_RUN, Rung, compare
from export.profiles import open_as_meant, session_options
from export.runtime import integer_share, predict_fn
from export.temperature import divides_by, temperature_of
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE

logger = logging.getLogger(__name__)


@stage(
    "evaluate",
    code=(
        *(*MODEL_CODE, "compression.metrics", "compression.quantize", "export.parity", "export.ladder"),
        *("export.attribution", "export.intermediates", "export.onnx_form", "export.temperature", "export.runtime"),
        *("compression.calibration", "export.profiles", "export.formats"),
    ),
    libraries=("torch", "onnxruntime-gpu"),
)
def evaluate_files(
    work: Work,
    *,
    name: str,
    data: StageResult,
    files: Mapping[str, StageResult],
    students: Mapping[str, StageResult],
    quantized: Mapping[str, StageResult],
    engines: Mapping[str, StageResult],
    unrun: Mapping[str, StageResult],
    machine: str,
) -> StageOutput:
    """Run every ONNX file on the test split through ONNX Runtime, and climb the parity ladder of every student.

    ``files`` maps names such as ``student-0.int8`` to graphs; ``students`` and ``quantized`` give the torch rungs of
    the ladder by student name; ``engines`` and ``unrun`` are listed as built, not run. ``ladder.json`` holds the
    ladders with every layer, ``layer_diff.csv`` the same layers as a table.
    """
    dataset = open_dataset(work.open(data))
    labels = dataset.test.labels
    logits: dict[str, Tensor] = {}
    metrics: dict[str, dict[str, float]] = {}
    diagrams: dict[str, list] = {}
    shares: dict[str, dict[str, object]] = {}
    temperatures: dict[str, tuple[float, bool]] = {}
    for done, (file, result) in enumerate(files.items(), start=1):
        path = work.open(result) / "model.onnx"
        logits[file] = file_logits(predict_fn(open_as_meant(path)), dataset)
        metrics[file] = metrics_of(logits[file], labels).model_dump()
        diagrams[file] = [list(row) for row in reliability(logits[file], labels)]
        if (temperature := temperature_of(path)) is not None:
            temperatures[file] = (temperature, divides_by(path) != 1.0)
        if "int8" in file:
            options = session_options(str(result.info.get("form", "")))
            share = integer_share(path, config=options.get("config"))
            shares[file] = {"integer": share.integer, "total": share.total, "operators": share.operators}
        work.report("evaluating files", done, len(files))
    ladders: list[Ladder] = []
    for done, student in enumerate(students, start=1):
        ladders.append(_ladder(work, student, dataset, logits, files, students, quantized, engines, unrun))
        work.report("climbing the parity ladders", done, len(students))
    rungs = [rung for ladder in ladders for rung in ladder.rungs]
    for rung in rungs:
        if rung.parity is not None:
            work.run.log_metrics(
                {f"parity/{rung.name}.flips": rung.parity.flips, f"parity/{rung.name}.kl": rung.parity.kl}
            )
    evaluation = {
        "metrics": metrics,
        "reliability": diagrams,
        "calibration": {
            file: row.model_dump(mode="json") for file, row in calibrated_rows(logits, labels, temperatures).items()
        },
        "integer_share": shares,
        "parity": [rung.model_dump(mode="json", exclude={"attribution", "limits"}) for rung in rungs],
    }
    with work.store.put("evaluation") as draft:
        (draft.folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1, sort_keys=True))
        (draft.folder / "ladder.json").write_text(json.dumps([each.model_dump(mode="json") for each in ladders]))
        _write_layers(draft.folder / "layer_diff.csv", ladders)
        correct = {file: (values.argmax(dim=1) == labels).numpy() for file, values in logits.items()}
        for file, bits in correct.items():
            np.save(draft.folder / f"{file}.correct.npy", bits)
            np.save(draft.folder / f"{file}.answers.npy", logits[file].argmax(dim=1).numpy())
        for file in ("evaluation.json", "ladder.json", "layer_diff.csv"):
            work.run.log_file(draft.folder / file)
    flat = {
        f"{file}/{key}": value for file, row in metrics.items() for key, value in row.items() if key != "num_samples"
    }
    return StageOutput(artifact=draft.done(), metrics=flat)


def file_logits(run: Callable[[Tensor], Tensor] | nn.Module, dataset: Dataset) -> Tensor:
    """Logits [N, classes] of the test split."""
    return predict(run, dataset.test, dataset.preprocessing)


def _ladder(
    work: Work,
    student: str,
    dataset: Dataset,
    logits: Mapping[str, Tensor],
    files: Mapping[str, StageResult],
    students: Mapping[str, StageResult],
    quantized: Mapping[str, StageResult],
    engines: Mapping[str, StageResult],
    unrun: Mapping[str, StageResult],
) -> Ladder:
    model, spec = load_checkpoint(work.open(students[student]))
    own = {name.removeprefix(f"{student}."): name for name in files if name.startswith(f"{student}.")}
    forms = Forms(
        model=model,
        files={form: work.open(files[name]) / "model.onnx" for form, name in own.items()},
        split=dataset.test,
        preprocessing=spec.preprocessing,
        converted=load_quantized(work.open(quantized[student])).converted if student in quantized else None,
        logits={form: logits[name] for form, name in own.items()},
    )
    built = [
        Rung(
            name=f"engine {engine}",
            against=None,
            parity=None,
            status=ENGINE_NOT_RUN,
            note=f"{result.info.get('backend')} {result.info.get('backend_version')}",
        )
        for engine, result in engines.items()
        if engine.startswith(f"{student}.")
    ]
    for file in unrun:
        if file.startswith(f"{student}."):
            form = file.removeprefix(f"{student}.")
            if form == "bfloat16":
                built.append(_torch_bfloat16(student, model, dataset))
            note = NOT_RUN_HERE[form]
            built.append(
                Rung(name=f"{student}: ONNX {form}", against=None, parity=None, status=ENGINE_NOT_RUN, note=note)
            )
    return climb(student, forms, not_run=built)


def _torch_bfloat16(student: str, model: nn.Module, dataset: Dataset) -> Rung:
    """What bfloat16 changes, as far as torch can say it on a CPU."""
    reference, rounded = file_logits(model, dataset), file_logits(bfloat16_predict(model), dataset)
    return Rung(
        name=f"{student}: torch bfloat16",
        against=f"{student}: torch float32",
        parity=compare(reference, rounded, dataset.test.labels),
    )


def _write_layers(path: Path, ladders: Sequence[Ladder]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LAYER_COLUMNS)
        writer.writeheader()
        writer.writerows(layer_rows(ladders))


@stage(
    "benchmark",
    code=("export.benchmark", "export.timing", "export.feed"),
    libraries=("onnxruntime-gpu",),
    tags=("training",),
)
def benchmark_files(
    work: Work,
    *,
    name: str,
    files: Mapping[str, StageResult],
    reference: str,
    batches: tuple[int, ...],
    threads: int,
    rounds: int,
    machine: str,
    seed: int,
) -> StageOutput:
    """Time all files interleaved in a process of their own; raw samples are kept."""
    models = {file: work.open(result) / "model.onnx" for file, result in files.items()}
    job = BenchmarkJob(models=models, reference=reference, batches=batches, threads=threads, rounds=rounds, seed=seed)
    with work.store.put("benchmark") as draft:
        result = run_benchmark(
            job, draft.folder, on_progress=lambda done, total: work.report("timing files", done, total)
        )
    metrics = {}
    for row in result.rows:
        metrics[f"{row.model}/latency_p50_ms.b{row.batch}"] = row.latency_p50_ms
        metrics[f"{row.model}/latency_p95_ms.b{row.batch}"] = row.latency_p95_ms
        metrics[f"{row.model}/latency_ratio.b{row.batch}"] = row.ratio_to_reference
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"failures": result.failures})
