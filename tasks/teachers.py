"""Stages 2 to 4: teachers, their stored outputs, and the panel."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from compression.augment import AnyAugment, NoAugment
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data import Dataset, open_dataset
from compression.metrics import evaluate
from compression.profile import macs, params, state_bytes
from compression.select import SelectConfig, rank_teachers
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_given_outputs, write_teacher_outputs
from compression.teachers import FromOutputs, Teacher, obtain_teacher
from tasks.devices import hardware, on_devices
from tasks.progress import step_reporter
from tasks.stage import StageOutput, StageResult, Work, stage

BLACK_BOX = "black box"
"""In place of the kind of model, where there are outputs alone."""
GIVEN = "given.npz"
MODEL_CODE = ("compression.zoo", "compression.models", "compression.checkpoint")
TRAINING_CODE = (*MODEL_CODE, "compression.train", "compression.augment", "compression.robustness.chains")


@stage("teacher", code=(*TRAINING_CODE, "compression.teachers"), libraries=("torch", "timm"), tags=("training",))
@on_devices
def make_teacher(
    work: Work,
    *,
    name: str,
    teacher: Teacher,
    weights: str,
    data: StageResult,
    augment: AnyAugment,
    seed: int,
) -> StageOutput:
    """Load or train one teacher and measure it on the validation split; of a black box, keep its file."""
    dataset = open_dataset(work.open(data))
    if isinstance(teacher.source, FromOutputs):
        return _keep_outputs(work, teacher.source.path, dataset)
    model, spec, history = obtain_teacher(
        teacher,
        dataset,
        seed=seed,
        augment=augment,
        hardware=hardware(),
        checkpoint_dir=work.scratch,
        on_step=step_reporter(work.report, f"training teacher {name}"),
    )
    with work.store.put("checkpoint") as draft:
        save_checkpoint(model, spec, draft.folder)
    metrics = model_metrics(model, spec.input_shape)
    metrics |= evaluate(model, dataset.validation, spec.preprocessing).model_dump(exclude={"num_samples"})
    rows = history.rows if history is not None else []
    work.run.log_series(rows, prefix="train/")
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"history": rows, "kind": spec.model.kind})


def _keep_outputs(work: Work, path: Path, dataset: Dataset) -> StageOutput:
    with work.store.put("given_outputs") as draft:
        spec = OutputsSpec(views=0, seed=0, augment=NoAugment())
        write_given_outputs(path, dataset, spec, draft.folder / "look")
        stored = StoredOutputs.open(draft.folder / "look")
        shutil.copyfile(path, draft.folder / GIVEN)
    predicted, labels = stored.validation_logits, dataset.validation.labels
    metrics = {
        "accuracy": float((predicted.argmax(1) == labels).double().mean()),
        "nll": float(torch.nn.functional.cross_entropy(predicted.double(), labels)),
    }
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"history": [], "kind": BLACK_BOX})


def model_metrics(model: torch.nn.Module, input_shape: tuple[int, int, int]) -> dict[str, float]:
    """params, macs (of one sample) and size_bytes (of the weights)."""
    return {
        "params": float(params(model)),
        "macs": float(macs(model, input_shape)),
        "size_bytes": float(state_bytes(model)),
    }


@stage(
    "teacher_outputs",
    code=(*MODEL_CODE, "compression.teacher_outputs", "compression.augment"),
    tags=("training",),
)
def store_outputs(work: Work, *, name: str, teacher: StageResult, data: StageResult, spec: OutputsSpec) -> StageOutput:
    """Keep a teacher's logits on every augmented view, so that distillation never runs the teacher again."""
    dataset = open_dataset(work.open(data))
    given = work.open(teacher) / GIVEN
    if given.exists():
        with work.store.put("teacher_outputs") as draft:
            write_given_outputs(given, dataset, spec, draft.folder)
        return StageOutput(artifact=draft.done(), metrics={"views": float(spec.views)})
    model, _ = load_checkpoint(work.open(teacher))
    with work.store.put("teacher_outputs") as draft:
        write_teacher_outputs(
            model,
            dataset,
            spec,
            draft.folder,
            on_progress=step_reporter(work.report, f"storing outputs of {name}"),
        )
    artifact = draft.done()
    return StageOutput(
        artifact=artifact, metrics={"views": float(spec.views), "size_bytes": float(artifact.size_bytes)}
    )


@stage("select", code=("compression.select",), libraries=("torch", "scipy"))
def select_teachers(
    work: Work, *, name: str, config: SelectConfig, outputs: Mapping[str, StageResult], data: StageResult
) -> StageOutput:
    """Score every teacher and take the best panel; all scores are kept."""
    dataset = open_dataset(work.open(data))
    stored = {teacher: StoredOutputs.open(work.open(result)) for teacher, result in outputs.items()}
    report = rank_teachers(stored, dataset.validation.labels, config)
    content = report.model_dump(mode="json")
    with work.store.put("selection") as draft:
        (draft.folder / "selection.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    return StageOutput(artifact=draft.done(), info=content)
