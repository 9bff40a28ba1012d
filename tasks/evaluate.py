"""Stage 9: the evidence. Accuracy and calibration of every file on the test split, the parity ladder, and latency.

This is the only stage that reads the test split.
"""

import json
import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compression.augment import normalise
from compression.checkpoint import load_checkpoint
from compression.data import Dataset, open_dataset
from compression.metrics import metrics_of, predict, reliability
from compression.quantize import load_quantized
from compression.types import Preprocessing
from export.benchmark import BenchmarkJob, run_benchmark
from export.parity import ENGINE_NOT_RUN, Rung, compare, self_perturbation_floor
from export.runtime import OnnxSession, integer_share, predict_fn
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE

logger = logging.getLogger(__name__)


@stage(
    "evaluate",
    code=(*MODEL_CODE, "compression.metrics", "compression.quantize", "export.parity", "export.runtime"),
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
    machine: str,
) -> StageOutput:
    """Run every ONNX file on the test split through ONNX Runtime and compare each hop with the one before.

    ``files`` maps names such as ``student-0.int8`` to graphs; ``students`` and ``quantized`` give the torch rungs of
    the ladder by student name; ``engines`` are listed as built, not run.
    """
    dataset = open_dataset(work.open(data))
    labels = dataset.test.labels
    logits: dict[str, Tensor] = {}
    metrics: dict[str, dict[str, float]] = {}
    diagrams: dict[str, list] = {}
    shares: dict[str, dict[str, object]] = {}
    for done, (file, result) in enumerate(files.items(), start=1):
        path = work.open(result) / "model.onnx"
        logits[file] = file_logits(predict_fn(OnnxSession(path)), dataset)
        metrics[file] = metrics_of(logits[file], labels).model_dump()
        diagrams[file] = [list(row) for row in reliability(logits[file], labels)]
        if "int8" in file:
            share = integer_share(path)
            shares[file] = {"integer": share.integer, "total": share.total, "operators": share.operators}
        work.report("evaluating files", done, len(files))
    rungs: list[Rung] = []
    for student in students:
        rungs += _ladder(work, student, dataset, logits, students, quantized, engines)
    for rung in rungs:
        if rung.parity is not None:
            work.run.log_metrics(
                {f"parity/{rung.name}.flips": rung.parity.flips, f"parity/{rung.name}.kl": rung.parity.kl}
            )
    evaluation = {
        "metrics": metrics,
        "reliability": diagrams,
        "integer_share": shares,
        "parity": [rung.model_dump(mode="json") for rung in rungs],
    }
    with work.store.put("evaluation") as draft:
        (draft.folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1, sort_keys=True))
        correct = {file: (values.argmax(dim=1) == labels).numpy() for file, values in logits.items()}
        for file, bits in correct.items():
            np.save(draft.folder / f"{file}.correct.npy", bits)
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
    students: Mapping[str, StageResult],
    quantized: Mapping[str, StageResult],
    engines: Mapping[str, StageResult],
) -> list[Rung]:
    """torch float32 -> ONNX float32, and torch fake-quant -> ONNX INT8 -> engine; each against the rung before."""
    labels = dataset.test.labels
    model, spec = load_checkpoint(work.open(students[student]))
    torch_logits = file_logits(model, dataset)
    rows = [Rung(name=f"{student}: torch float32", against=None, parity=compare(torch_logits, torch_logits, labels))]

    def step(
        name: str,
        against: str,
        reference: Tensor,
        candidate: Tensor,
        *,
        file: str | None = None,
        floor: float | None = None,
    ) -> None:
        parity = compare(reference, candidate, labels)
        full, other = f"{student}: {name}", f"{student}: {against}"
        rows.append(Rung(name=full, against=other, parity=parity, floor=floor, file=file))

    for form in ("float32", "float16"):
        file = f"{student}.{form}"
        if file in logits:
            step(f"ONNX {form}", "torch float32", torch_logits, logits[file], file=file)
    if student in quantized:
        converted = load_quantized(work.open(quantized[student])).converted
        fake_quant = file_logits(converted, dataset)
        step("torch fake-quant", "torch float32", torch_logits, fake_quant)
        floor = noise_floor(converted, dataset, spec.preprocessing)
        for form, label in (("int8-symmetric", "ONNX INT8 symmetric"), ("int8", "ONNX INT8 u8")):
            file = f"{student}.{form}"
            if file in logits:
                step(label, "torch fake-quant", fake_quant, logits[file], file=file, floor=floor)
    if f"{student}.int8-ptq" in logits:
        file = f"{student}.int8-ptq"
        step("ONNX INT8 after training", "torch float32", torch_logits, logits[file], file=file)
    for engine, result in engines.items():
        if engine.startswith(f"{student}."):
            note = f"{result.info.get('backend')} {result.info.get('backend_version')}"
            rows.append(Rung(name=f"engine {engine}", against=None, parity=None, status=ENGINE_NOT_RUN, note=note))
    return rows


def noise_floor(model: Callable[[Tensor], Tensor], dataset: Dataset, preprocessing: Preprocessing) -> float:
    """Largest change of the quantized model's logits under input noise of 1e-7: rounding flips, not defects."""
    images = normalise(torch.as_tensor(dataset.calibration.images[:64]), preprocessing)
    return self_perturbation_floor(model, images)


@stage(
    "benchmark",
    code=("export.benchmark", "export.timing"),
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
    work.report("timing files", 0, 1)
    with work.store.put("benchmark") as draft:
        result = run_benchmark(job, draft.folder)
    work.report("timing files", 1, 1)
    metrics = {}
    for row in result.rows:
        metrics[f"{row.model}/latency_p50_ms.b{row.batch}"] = row.latency_p50_ms
        metrics[f"{row.model}/latency_p95_ms.b{row.batch}"] = row.latency_p95_ms
        metrics[f"{row.model}/latency_ratio.b{row.batch}"] = row.ratio_to_reference
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"failures": result.failures})
