"""The shapes of a loss, of a combination of teachers, and of teacher outputs looked up by sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compression.data.dataset import Dataset
from compression.teacher_outputs import OutputsSpec
from compression.types import Batch, Frozen, Outputs, TeacherOutputs

LossFn = Callable[[Outputs, TeacherOutputs, Tensor], Tensor]
"""(student outputs, teacher outputs, labels int64 [B]) -> batch mean, a float32 scalar, in nats where it is one."""

CombineFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(teacher logits [K,B,C], labels int64 [B], student logits [B,C] without gradient) -> weights [K,B]: not negative,
summing to 1 over K, without gradient."""


class Needs(Frozen):
    """What a loss must be given beside logits; declared by its config."""

    student_features: bool = False
    """Penultimate features of the student, in ``Outputs.features["penultimate"]`` [B,D]."""
    teacher_features: bool = False
    """Penultimate features of every teacher, in ``TeacherOutputs.features``."""
    student_maps: bool = False
    """Outputs of the student's stages, in ``Outputs.maps``."""
    teacher_maps: bool = False
    """Outputs of the teachers' stages, in ``TeacherOutputs.maps``; they are not stored, so the teachers run live."""
    labels: bool = False
    """Labels; samples without one are taken out of the batch first."""
    soft_labels: bool = False
    """Takes distributions [B,C] for labels as well, as mixed images have them."""
    another_term: str = ""
    """Why the loss cannot teach alone, so that the recipe must list another one beside it; empty when it can."""


@dataclass(frozen=True)
class Shapes:
    """Sizes a helper needs before its parts can be made."""

    num_classes: int
    student_width: int
    """Penultimate features of the student."""
    teacher_widths: tuple[int, ...] = ()
    """Penultimate features of each teacher; empty unless a loss needs them."""
    student_maps: tuple[tuple[int, ...], ...] = ()
    """Outputs of the student's stages, without the batch; empty unless a loss needs them."""
    teacher_maps: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """The same of each teacher."""
    num_teachers: int = 0
    """Stored and live ones."""


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    epoch: int = 0
    """Of the step at hand, from 0."""
    epochs: int = 1
    """In all."""


class TeacherLogits(Protocol):
    """One teacher's outputs on named views of named samples; ``StoredOutputs`` is one."""

    spec: OutputsSpec
    class_names: tuple[str, ...]
    validation_logits: Tensor
    """Float32 [N,C], on the plain validation split."""

    def logits(self, ids: Tensor, view: int) -> Tensor:
        """Return float32 logits [B,C] of samples ``ids`` int64 [B] in view ``view``."""
        ...

    def features(self, ids: Tensor, view: int) -> Tensor:
        """Return float32 penultimate features [B,D], if ``spec.features``."""
        ...


class Helper(nn.Module):
    """A loss or a combination of teachers with a state of its own: heads, projectors, class means.

    Its parameters are trained beside the student's, its state is part of every step checkpoint, and it is left behind
    at export: it is never a part of the student. ``progress`` is set before every step.
    """

    progress = Progress()

    def prepare(self, shapes: Shapes) -> None:
        """Make heads and projectors; called once, before training."""

    def observe(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> None:
        """Look at what the panel says about the data; called once, after ``prepare``, with stored outputs alone."""

    def before_step(self, model: nn.Module, batch: Batch) -> None:
        """Learn something outside the step, say by an optimiser of its own; called before every step."""

    def terms(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Loss terms with which a combination trains itself, by name; labels may be -1. No gradient to the student."""
        del student, teachers, labels
        return {}

    def self_trained(self) -> list[nn.Parameter]:
        """Parameters that the helper trains itself; the trainer leaves them alone."""
        return []


def helpers_of(parts: Sequence[object]) -> list[Helper]:
    """The helpers among losses and combinations."""
    return [part for part in parts if isinstance(part, Helper)]


def widened(values: Tensor) -> Tensor:
    """``values`` in float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
