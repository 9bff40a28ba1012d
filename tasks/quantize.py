"""Stage 8: INT8, by fine-tuning with the full-precision student and the panel as teachers, or by calibration alone."""

import shutil
from collections.abc import Mapping
from typing import Any

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint
from compression.data import open_dataset
from compression.distill import DistillConfig
from compression.quantize import AnyQuantizer, QuantizedStudent, quantize, save_quantized
from compression.teacher_outputs import StoredOutputs
from tasks.devices import hardware
from tasks.progress import step_reporter
from tasks.sensitivity import open_table
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import TRAINING_CODE


@stage(
    "quantize",
    code=(
        *TRAINING_CODE,
        *("compression.distill", "compression.quantize", "compression.sparsify.nm", "compression.metrics"),
    ),
    libraries=("torch", "torchao"),
    tags=("training",),
)
def quantize_student(
    work: Work,
    *,
    name: str,
    config: AnyQuantizer,
    distillation: DistillConfig,
    student: StageResult,
    panel: Mapping[str, StageResult],
    data: StageResult,
    augment: AnyAugment,
    seed: int,
    sensitivity: StageResult | None = None,
) -> StageOutput:
    """Quantize the student; accuracy control reads the layers' order from ``sensitivity``, or measures it."""
    dataset = open_dataset(work.open(data))
    folder = work.open(student)
    model, _ = load_checkpoint(folder)
    quantized = quantize(
        model,
        dataset,
        config,
        distillation=distillation,
        panel=[StoredOutputs.open(work.open(result)) for result in panel.values()],
        seed=seed,
        augment=augment,
        checkpoint_dir=work.scratch,
        sensitivity=None if sensitivity is None else open_table(work.open(sensitivity)),
        on_step=step_reporter(work.report, f"quantizing {name}"),
        hardware=hardware(),
    )
    with work.store.put("quantized") as draft:
        for file in ("spec.json", "weights.safetensors"):
            shutil.copyfile(folder / file, draft.folder / file)
        save_quantized(quantized.prepared, draft.folder, quantized.config)
    work.run.log_series(quantized.history.rows, prefix="train/")
    metrics = quantized.metrics.model_dump(exclude={"num_samples"})
    return StageOutput(artifact=draft.done(), metrics=metrics, info=_facts(quantized))


def _facts(quantized: QuantizedStudent) -> dict[str, Any]:
    """The learning curve, the layers in float, and what accuracy control did."""
    facts: dict[str, Any] = {
        "history": quantized.history.rows,
        "kind": quantized.config.kind,
        "keep_float": list(quantized.config.keep_float),
    }
    if quantized.control is not None and quantized.config.control is not None:
        facts["control"] = quantized.control.record(quantized.config.control)
    return facts
