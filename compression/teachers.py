"""Teachers: an architecture, and where its weights come from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, StringConstraints, model_validator
from torch import nn

from compression.augment import AnyAugment
from compression.card import MethodCard
from compression.checkpoint import load_into, load_weights
from compression.data import Dataset, Split
from compression.distill import plain_step
from compression.errors import CheckpointError, CompressionError
from compression.models import AnyModel, ModelSpec
from compression.train import Hardware, History, TrainConfig, fit
from compression.types import Frozen, Slug


class TrainFromScratch(Frozen):
    """The recipe trains this teacher itself."""

    kind: Literal["train"] = "train"
    train: TrainConfig
    """Schedule of the training."""
    augment: AnyAugment | None = None
    """Augmentation of this teacher's own training, say robust views for one of several; the recipe's when None."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Teacher trained by the recipe",
        paper="None to cite.",
        summary="Trains the architecture on the recipe's labels, on those of some classes alone for a specialist.",
        needs="Labels.",
        cost="A training; kept until its recipe, its data or the training code change.",
        evidence="All teachers measured on our data were trained like this.",
    )


class FromCheckpoint(Frozen):
    """Weights that exist already: safetensors, or a ``.pt`` file that holds tensors only."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Path
    """File with the weights; relative paths start at the working folder."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Refuse the file unless its SHA-256 is this."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Teacher from a checkpoint",
        paper="None to cite.",
        summary="Loads weights that fit the architecture; nothing is ever unpickled.",
        needs="A safetensors file, or a .pt file of tensors alone.",
        cost="Reading it.",
        evidence="Runs on a timm checkpoint in the tests; what the teacher is worth the run itself measures.",
    )


class Untrained(Frozen):
    """Random weights, as a negative control: a gain that such a teacher gives as well is no transfer of knowledge."""

    kind: Literal["untrained"] = "untrained"

    card: ClassVar[MethodCard] = MethodCard(
        name="Random teacher (negative control)",
        paper="Sarnthein et al. 2023, Random Teachers are Good Teachers, arXiv:2302.12091",
        summary="Research: leaves the weights random. What a student gains from it is regularisation, not knowledge, "
        "so a real teacher must be worth more.",
        needs="Nothing.",
        cost="As any teacher.",
        evidence="The paper reports a linear probe on CIFAR-10 of 46.0 % after distillation from a random ResNet-18, "
        "35.5 % before. Measured on our data: see `measured`.",
    )


class FromOutputs(Frozen):
    """A black box: nothing but the probabilities it gave. Such a teacher has no ``model``."""

    kind: Literal["outputs"] = "outputs"
    path: Path
    """A .npz file with ``ids`` int [M] and ``probabilities`` float [M,C] for every train, validation and unlabelled
    sample; ``stillhouse samples`` writes the images with their ids."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Black box",
        paper="None to cite.",
        summary="A teacher of which nothing exists but the probabilities it gave to plain images; they serve all "
        "views.",
        needs="Its answer for every train, validation and unlabelled image, beside another teacher that has a model.",
        cost="Reading the file.",
        evidence="Measured on our data: see `measured`.",
    )


AnySource = TrainFromScratch | FromCheckpoint | Untrained | FromOutputs
"""Where a teacher comes from: what a recipe may name under ``teachers.source``."""


class Teacher(Frozen):
    """One teacher: an architecture, and where its weights come from."""

    name: Slug
    model: AnyModel | None = None
    """Architecture; none for a black box."""
    source: AnySource
    """Trained by the recipe, loaded, left random, or a black box."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Names of the classes that a specialist knows: it is trained on their samples alone, and says nothing about
    others. All of them when empty. Its logits are of all classes in any case."""

    @model_validator(mode="after")
    def _model_where_there_is_one(self) -> Self:
        black_box = isinstance(self.source, FromOutputs)
        if black_box != (self.model is None):
            found = "a model" if black_box else "no model"
            raise ValueError(
                f"source of teacher '{self.name}' is '{self.source.kind}' with {found}, expected "
                f"{'none: a black box has outputs alone' if black_box else 'one'}. "
                f"{'Remove' if black_box else 'Add'} model."
            )
        return self


def check_teacher(teacher: Teacher) -> None:
    """Refuse a teacher whose weights cannot be read, before any compute.

    Raises:
        CheckpointError: missing, corrupt, unsafe or changed file.
    """
    if isinstance(teacher.source, FromCheckpoint):
        load_weights(teacher.source.path, sha256=teacher.source.sha256)
    if isinstance(teacher.source, FromOutputs) and not teacher.source.path.is_file():
        raise CheckpointError(
            f"Teacher '{teacher.name}' has no outputs file '{teacher.source.path}', expected a .npz file. "
            "Correct the path."
        )


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
    hardware: Hardware | None = None,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, ModelSpec, History | None]:
    """The teacher in eval mode, its specification, and its learning curve when it was trained here.

    Raises:
        CheckpointError: the weights do not fit the architecture or the number of classes, or there is no model.
        CompressionError: a specialist's class does not exist, or has no samples.
    """
    if teacher.model is None:
        raise CheckpointError(f"Teacher '{teacher.name}' has no model, expected one. A black box has outputs alone.")
    spec = new_spec(teacher.model, dataset)
    torch.manual_seed(seed)
    model = teacher.model.build(spec.num_classes, spec.input_shape)
    if isinstance(teacher.source, FromCheckpoint):
        weights = load_weights(teacher.source.path, sha256=teacher.source.sha256)
        load_into(model, weights, name=teacher.name)
        _refuse_non_finite(model, teacher.name)
        return model.eval(), spec, None
    if isinstance(teacher.source, Untrained):
        return model.eval(), spec, None
    if not isinstance(teacher.source, TrainFromScratch):
        raise CheckpointError(f"Teacher '{teacher.name}' has source '{teacher.source.kind}', expected weights.")
    if teacher.classes is not None:
        dataset = of_classes(dataset, teacher.classes)
    history = fit(
        model,
        plain_step(teacher.source.train.label_smoothing),
        dataset,
        teacher.source.train,
        seed=seed,
        augment=augment if teacher.source.augment is None else teacher.source.augment,
        views=None,
        hardware=hardware,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=on_step,
    )
    return model.eval(), spec, history


def of_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The dataset with the train and validation samples of some classes alone; labels stay as they are.

    Raises:
        CompressionError: there is no such class.
    """
    unknown = [name for name in names if name not in dataset.class_names]
    if unknown:
        raise CompressionError(
            f"Classes of a teacher have '{unknown[0]}', expected names of data set '{dataset.name}': "
            f"{', '.join(dataset.class_names[:30])}. Correct teachers.classes."
        )
    wanted = torch.tensor([name in names for name in dataset.class_names])

    def some(split: Split) -> Split:
        rows = wanted[split.labels]
        return Split(images=split.images[rows], labels=split.labels[rows], ids=split.ids[rows])

    return replace(dataset, train=some(dataset.train), validation=some(dataset.validation))


def _refuse_non_finite(model: nn.Module, name: str) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"Teacher '{name}' has non-finite numbers in '{key}', expected finite weights. "
                "Save the checkpoint again."
            )
