"""Stage 6: the students learn from the panel's stored outputs; control arms learn from labels alone."""

from collections.abc import Mapping

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data import open_dataset
from compression.distill import DistillConfig, distill
from compression.metrics import evaluate
from compression.teacher_outputs import StoredOutputs
from tasks.devices import hardware, on_devices
from tasks.progress import step_reporter
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import TRAINING_CODE, model_metrics


@stage("distill", code=(*TRAINING_CODE, "compression.distill", "compression.teacher_outputs"), tags=("training",))
@on_devices
def distill_student(
    work: Work,
    *,
    name: str,
    config: DistillConfig,
    search: StageResult,
    finalist: int,
    panel: Mapping[str, StageResult],
    teachers: Mapping[str, StageResult],
    data: StageResult,
    augment: AnyAugment,
    seed: int,
    files: Mapping[str, str],
) -> StageOutput:
    """Train one finalist; with an empty panel it is the control arm without teachers.

    ``teachers`` are the models behind the panel where the configuration runs them, else empty;
    ``files`` the digests of those that its parts read.
    """
    dataset = open_dataset(work.open(data))
    student, spec = load_checkpoint(work.open(search) / "finalists" / str(finalist))
    history = distill(
        student,
        [StoredOutputs.open(work.open(result)) for result in panel.values()],
        dataset,
        config,
        seed=seed,
        augment=augment,
        teachers=[load_checkpoint(work.open(result))[0] for result in teachers.values()],
        hardware=hardware(),
        checkpoint_dir=work.scratch,
        on_step=step_reporter(work.report, f"training {name}"),
    )
    with work.store.put("checkpoint") as draft:
        save_checkpoint(student, spec, draft.folder)
    metrics = model_metrics(student, spec.input_shape)
    metrics |= evaluate(student, dataset.validation, spec.preprocessing).model_dump(exclude={"num_samples"})
    work.run.log_series(history.rows, prefix="train/")
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"history": history.rows, "panel": list(panel)})
