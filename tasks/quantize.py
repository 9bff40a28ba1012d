"""Stage 7: quantization-aware fine-tuning, with the full-precision student and the panel as teachers."""

import json
import shutil
from collections.abc import Mapping

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint
from compression.data import open_dataset
from compression.distill import DistillConfig
from compression.quantize import AnyQuantizer, quantize, save_quantized
from compression.teacher_outputs import StoredOutputs
from tasks.progress import step_reporter
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import TRAINING_CODE


@stage(
    "quantize",
    code=(*TRAINING_CODE, "compression.distill", "compression.quantize", "compression.sparsify.nm"),
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
) -> StageOutput:
    """Fine-tune the student with simulated INT8 arithmetic."""
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
        on_step=step_reporter(work.report, f"quantizing {name}"),
    )
    with work.store.put("quantized") as draft:
        for file in ("spec.json", "weights.safetensors"):
            shutil.copyfile(folder / file, draft.folder / file)
        save_quantized(quantized.prepared, draft.folder)
        (draft.folder / "quantizer.json").write_text(json.dumps(config.model_dump(mode="json"), sort_keys=True))
    work.run.log_series(quantized.history.rows, prefix="train/")
    metrics = quantized.metrics.model_dump(exclude={"num_samples"})
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"history": quantized.history.rows})
