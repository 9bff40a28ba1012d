"""Teachers: an architecture, and where its weights come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import StringConstraints
from torch import nn

from compression.augment import AnyAugment
from compression.checkpoint import load_into, load_weights
from compression.data import Dataset
from compression.distill import plain_step
from compression.errors import CheckpointError
from compression.models import AnyModel, ModelSpec
from compression.train import History, TrainConfig, fit
from compression.types import Frozen, Slug


class TrainFromScratch(Frozen):
    """The recipe trains this teacher itself."""

    kind: Literal["train"] = "train"
    train: TrainConfig
    """Schedule of the training."""


class FromCheckpoint(Frozen):
    """Weights that exist already: safetensors, or a ``.pt`` file that holds tensors only."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Path
    """File with the weights; relative paths start at the working folder."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Refuse the file unless its SHA-256 is this."""


class Teacher(Frozen):
    """One teacher: an architecture, and where its weights come from."""

    name: Slug
    model: AnyModel
    """Architecture."""
    source: TrainFromScratch | FromCheckpoint
    """Trained by the recipe, or loaded."""


def check_teacher(teacher: Teacher) -> None:
    """Refuse a teacher whose weights cannot be read, before any compute.

    Raises:
        CheckpointError: missing, corrupt, unsafe or changed file.
    """
    if isinstance(teacher.source, FromCheckpoint):
        load_weights(teacher.source.path, sha256=teacher.source.sha256)


def new_spec(model: AnyModel, dataset: Dataset) -> ModelSpec:
    """The specification of an unedited ``model`` for the classes and images of ``dataset``."""
    return ModelSpec(
        model=model,
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )


def obtain_teacher(
    teacher: Teacher,
    dataset: Dataset,
    *,
    seed: int,
    augment: AnyAugment,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, ModelSpec, History | None]:
    """The teacher in eval mode, its specification, and its learning curve when it was trained here.

    Raises:
        CheckpointError: the weights do not fit the architecture or the number of classes.
    """
    spec = new_spec(teacher.model, dataset)
    torch.manual_seed(seed)
    model = teacher.model.build(spec.num_classes, spec.input_shape)
    if isinstance(teacher.source, FromCheckpoint):
        weights = load_weights(teacher.source.path, sha256=teacher.source.sha256)
        load_into(model, weights, name=teacher.name)
        _refuse_non_finite(model, teacher.name)
        return model.eval(), spec, None
    history = fit(
        model,
        plain_step(teacher.source.train.label_smoothing),
        dataset,
        teacher.source.train,
        seed=seed,
        augment=augment,
        views=None,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=on_step,
    )
    return model.eval(), spec, history


def _refuse_non_finite(model: nn.Module, name: str) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"Teacher '{name}' has non-finite numbers in '{key}', expected finite weights. "
                "Save the checkpoint again."
            )
