"""Training steps with and without teachers.

Legend: K teachers, B batch, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.data.dataset import Dataset
from compression.distill.alignment import AlignedBackward
from compression.distill.losses import AnyLoss
from compression.distill.online import OnlineAugment
from compression.distill.teachers import AnyCombination
from compression.distill.types import Helper, LossFn, Needs, Progress, Shapes, TeacherLogits, helpers_of
from compression.errors import CompressionError
from compression.features import frozen, looked_at, penultimate, stage_names
from compression.train import Backward, StepFn
from compression.types import Batch, Outputs, TeacherOutputs


def plain_step(label_smoothing: float = 0.0) -> StepFn:
    """Return a step that learns the labels alone; its one term is ``cross_entropy``, in nats."""

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        return {"cross_entropy": F.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)}

    return step


class DistillationStep:
    """A step that learns from stored teacher outputs, and from ``live`` teachers run on each batch.

    Stored ones come first among the K teachers. Live ones are put into inference mode, lose their gradients,
    and move to the device of the batch. Terms are named by the kind of loss; the second ``kd`` is ``kd_2``.

    Samples whose label is -1 are left out of the losses that need labels: such a loss is the mean over the others,
    times their share of the batch.
    """

    def __init__(
        self,
        losses: Sequence[AnyLoss],
        combination: AnyCombination,
        stored: Sequence[TeacherLogits],
        live: Sequence[nn.Module] = (),
        *,
        epochs: int = 1,
        online: OnlineAugment | None = None,
    ) -> None:
        """Build losses and combination; ``epochs`` is the length of the training, for losses that change with it.

        Raises:
            CompressionError: there are no losses or no teachers, or stored teachers where live ones are needed.
        """
        if not losses or not (stored or live):
            raise CompressionError(
                f"Distillation has {len(losses)} losses and {len(stored) + len(live)} teachers, expected at "
                "least one of each. Use plain_step to learn from labels alone."
            )
        for teacher in live:
            teacher.eval().requires_grad_(False)
        self.stored, self.live, self.epochs, self.online = stored, live, epochs, online
        self.combine = combination.build()
        self.terms = [
            _Term(name, loss.weight, loss.build(), loss.needs)
            for name, loss in zip(_names(losses), losses, strict=True)
        ]
        parts = [self.combine, *(term.loss for term in self.terms), *([online] if online is not None else [])]
        self._helpers = helpers_of(parts)
        self.helpers = nn.ModuleList(self._helpers)
        """Parts of losses, combination and online augmentation that are trained, or kept, beside the student."""
        self.student_features = any(loss.needs.student_features for loss in losses)
        self.teacher_features = any(loss.needs.teacher_features for loss in losses)
        self.student_maps = any(loss.needs.student_maps for loss in losses)
        self.teacher_maps = any(loss.needs.teacher_maps for loss in losses)
        if stored and (self.teacher_maps or online is not None):
            raise CompressionError(
                f"Distillation has {len(stored)} stored teachers, expected live ones alone, because what a loss or the "
                "online augmentation asks of them is not stored. Give the models."
            )
        self._student_stages: tuple[str, ...] = ()
        self._teacher_stages: tuple[tuple[str, ...], ...] = ()
        self._aligned = [
            name for name, loss in zip(_names(losses), losses, strict=True) if getattr(loss, "align_gradients", False)
        ]
        self._student: nn.Module | None = None

    def prepare(self, student: nn.Module, dataset: Dataset, panel: Sequence[TeacherLogits] | None = None) -> None:
        """Let the helpers make their parts and look at the data; call once, before training.

        The random state decides the parts' initial weights. The student's mode is given back. ``panel`` are stored
        outputs to look at where the teachers themselves are live; the stored ones of the step when None.
        """
        self._student = student
        sample = sample_of(student, dataset)
        if self.student_maps:
            self._student_stages = stage_names(student, sample)
        if self.teacher_maps:
            self._teacher_stages = tuple(stage_names(_ready(teacher, sample), sample) for teacher in self.live)
        if not self._helpers:
            return
        shapes = Shapes(
            num_classes=dataset.num_classes,
            student_width=_width(student, dataset),
            teacher_widths=tuple(self._teacher_widths(dataset)),
            student_maps=_map_shapes(student, sample, self._student_stages),
            teacher_maps=tuple(
                _map_shapes(teacher, sample, stages)
                for teacher, stages in zip(self.live, self._teacher_stages, strict=False)
            ),
            num_teachers=len(self.stored) + len(self.live),
        )
        for helper in self._helpers:
            helper.prepare(shapes)
            helper.observe(self.stored if panel is None else panel, dataset)

    @property
    def self_trained(self) -> list[nn.Parameter]:
        """Parameters that helpers train themselves."""
        return [parameter for helper in self._helpers for parameter in helper.self_trained()]

    @property
    def backward(self) -> Backward | None:
        """The backward pass that aligns gradients, where a loss asks for it; call after ``prepare``."""
        if not self._aligned:
            return None
        student = self._student

        def parameters() -> list[nn.Parameter]:
            every = [*(student.parameters() if student is not None else ()), *self.helpers.parameters()]
            return [parameter for parameter in every if parameter.requires_grad]

        return AlignedBackward(parameters, self._aligned)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms of a batch, by name."""
        for helper in self._helpers:
            helper.progress = Progress(epoch=batch.epoch, epochs=self.epochs)
            helper.before_step(model, batch)
        soft_labels: Tensor | None = None
        if self.online is not None:
            for teacher in self.live:
                _ready(teacher, batch.images)
            changed = self.online(batch, model, self.live)
            batch, soft_labels = replace(batch, images=changed.images, labels=changed.labels), changed.soft_labels
        student = looked_at(model, batch.images, features=self.student_features, stages=self._student_stages)
        teachers = self._ask(student, batch)
        terms = {term.name: term.value(student, teachers, batch.labels, soft_labels) for term in self.terms}
        if isinstance(self.combine, Helper):
            detached = Outputs(student.logits.detach())
            terms |= self.combine.terms(detached, teachers, batch.labels)
        return terms

    def _ask(self, student: Outputs, batch: Batch) -> TeacherOutputs:
        device = batch.images.device
        logits = [each.logits(batch.ids, batch.view).to(device) for each in self.stored]
        features: list[Tensor] = []
        maps: list[tuple[Tensor, ...]] = []
        if self.teacher_features:
            features = [each.features(batch.ids, batch.view).to(device) for each in self.stored]
        with torch.no_grad():
            for number, teacher in enumerate(self.live):
                stages = self._teacher_stages[number] if self.teacher_maps else ()
                outputs = looked_at(
                    _ready(teacher, batch.images), batch.images, features=self.teacher_features, stages=stages
                )
                logits.append(outputs.logits.float())
                features += outputs.features.values()
                maps += [outputs.maps] if stages else []
        panel = torch.stack(logits)
        weights = self.combine(panel, batch.labels, student.logits.detach())
        return TeacherOutputs(panel, weights, tuple(features), tuple(maps), batch.ids)

    def _teacher_widths(self, dataset: Dataset) -> list[int]:
        if not self.teacher_features:
            return []
        first = dataset.train.ids[:1]
        stored = [each.features(first, 0).shape[1] for each in self.stored]
        return stored + [_width(teacher, dataset) for teacher in self.live]


class _Term:
    """One loss with its weight."""

    def __init__(self, name: str, weight: float, loss: LossFn, needs: Needs) -> None:
        self.name, self.weight, self.loss, self.needs = name, weight, loss, needs

    def value(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor, soft_labels: Tensor | None) -> Tensor:
        """The weighted loss, of the samples it can learn from."""
        if not self.needs.labels:
            return self.weight * self.loss(student, teachers, labels)
        if soft_labels is not None and self.needs.soft_labels:
            return self.weight * self.loss(student, teachers, soft_labels)
        labelled = labels >= 0
        count = int(labelled.sum())
        if count == len(labels):
            return self.weight * self.loss(student, teachers, labels)
        if count == 0:
            return student.logits.float().sum() * 0.0
        value = self.loss(student.rows(labelled), teachers.rows(labelled), labels[labelled])
        return self.weight * count / len(labels) * value


def distillation_step(
    losses: Sequence[AnyLoss],
    combination: AnyCombination,
    stored: Sequence[TeacherLogits],
    live: Sequence[nn.Module] = (),
    *,
    epochs: int = 1,
) -> DistillationStep:
    """Return :class:`DistillationStep`; call its ``prepare`` before training with losses that have helpers."""
    return DistillationStep(losses, combination, stored, live, epochs=epochs)


def live_distillation_step(
    losses: Sequence[AnyLoss], combination: AnyCombination, teachers: Sequence[nn.Module]
) -> DistillationStep:
    """Return :func:`distillation_step` with live teachers alone."""
    return DistillationStep(losses, combination, (), teachers)


def sample_of(model: nn.Module, dataset: Dataset) -> Tensor:
    """One image of zeros [1,C,H,W] where the model is."""
    sample = torch.zeros(1, *dataset.input_shape)
    return sample.to(next(model.parameters(), sample).device)


def _width(model: nn.Module, dataset: Dataset) -> int:
    """Number of penultimate features; mode and gradients of the model are given back."""
    with frozen(model), torch.no_grad():
        return penultimate(model, sample_of(model, dataset))[1].shape[1]


def _map_shapes(model: nn.Module, sample: Tensor, stages: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    if not stages:
        return ()
    with frozen(model), torch.no_grad():
        return tuple(tuple(each.shape[1:]) for each in looked_at(model, sample, stages=stages).maps)


def _names(losses: Sequence[AnyLoss]) -> list[str]:
    """Return kinds, numbered from the second of a kind on: ``kd``, ``kd_2``."""
    names: list[str] = []
    for number, loss in enumerate(losses):
        before = sum(other.kind == loss.kind for other in losses[:number])
        names.append(loss.kind if before == 0 else f"{loss.kind}_{before + 1}")
    return names


def _ready(teacher: nn.Module, images: Tensor) -> nn.Module:
    parameter = next(teacher.parameters(), None)
    if parameter is not None and parameter.device != images.device:
        teacher.to(images.device)
    return teacher.eval() if teacher.training else teacher
