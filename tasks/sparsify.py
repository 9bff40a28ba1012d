"""Stage between distilling and quantizing: the student's weights become sparse, taught as it was distilled."""

from collections.abc import Mapping

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data import open_dataset
from compression.distill import DistillConfig
from compression.metrics import evaluate
from compression.sparsify import AnySparsifier, share_of_zeros, sparsify
from compression.teacher_outputs import StoredOutputs
from tasks.devices import hardware
from tasks.progress import step_reporter
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import TRAINING_CODE, model_metrics


@stage(
    "sparsify",
    code=(*TRAINING_CODE, "compression.distill", "compression.teacher_outputs", "compression.sparsify"),
    tags=("training",),
)
def sparsify_student(
    work: Work,
    *,
    name: str,
    config: AnySparsifier,
    distillation: DistillConfig,
    student: StageResult,
    panel: Mapping[str, StageResult],
    data: StageResult,
    augment: AnyAugment,
    seed: int,
) -> StageOutput:
    """A student of the same structure with zeros in its weights; with an empty panel it learns from labels alone."""
    dataset = open_dataset(work.open(data))
    model, spec = load_checkpoint(work.open(student))
    before = evaluate(model, dataset.validation, spec.preprocessing)
    history = sparsify(
        model,
        spec,
        config,
        [StoredOutputs.open(work.open(result)) for result in panel.values()],
        dataset,
        distillation,
        seed=seed,
        augment=augment,
        checkpoint_dir=work.scratch,
        on_step=step_reporter(work.report, f"sparsifying {name}"),
        hardware=hardware(),
    )
    with work.store.put("checkpoint") as draft:
        save_checkpoint(model, spec, draft.folder)
    metrics = model_metrics(model, spec.input_shape)
    metrics |= evaluate(model, dataset.validation, spec.preprocessing).model_dump(exclude={"num_samples"})
    metrics |= {"dense_accuracy": before.accuracy, "sparsity": share_of_zeros(model)}
    work.run.log_series(history.rows, prefix="train/")
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"history": history.rows, "panel": list(panel)})
