"""Training steps with and without teachers, and the distillation of one student.

Legend: K teachers, B batch, C classes.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import AnyAugment
from compression.data.dataset import Dataset
from compression.distill.config import DistillConfig
from compression.distill.losses import AnyLoss
from compression.distill.teachers import AnyCombination
from compression.distill.types import Progress, Shapes, TeacherLogits, helpers_of
from compression.errors import CompressionError, ShapeError
from compression.features import frozen, penultimate
from compression.train import Hardware, History, Row, SetTraining, StepFn, fit
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
    """

    def __init__(
        self,
        losses: Sequence[AnyLoss],
        combination: AnyCombination,
        stored: Sequence[TeacherLogits],
        live: Sequence[nn.Module] = (),
        *,
        epochs: int = 1,
    ) -> None:
        """Build losses and combination; ``epochs`` is the length of the training, for losses that change with it.

        Raises:
            CompressionError: there are no losses or no teachers.
        """
        if not losses or not (stored or live):
            raise CompressionError(
                f"Distillation has {len(losses)} losses and {len(stored) + len(live)} teachers, expected at "
                "least one of each. Use plain_step to learn from labels alone."
            )
        for teacher in live:
            teacher.eval().requires_grad_(False)
        self.stored, self.live, self.epochs = stored, live, epochs
        self.combine = combination.build()
        self.terms = [(name, loss.weight, loss.build()) for name, loss in zip(_names(losses), losses, strict=True)]
        self._helpers = helpers_of([self.combine, *(loss for _, _, loss in self.terms)])
        self.helpers = nn.ModuleList(self._helpers)
        """Parts of losses and combination that are trained, or kept, beside the student."""
        self.student_features = any(loss.needs.student_features for loss in losses)
        self.teacher_features = any(loss.needs.teacher_features for loss in losses)

    def prepare(self, student: nn.Module, dataset: Dataset) -> None:
        """Let the helpers make their parts and look at the data; call once, before training.

        The random state decides the parts' initial weights. The student's mode is given back.
        """
        if not self._helpers:
            return
        shapes = Shapes(dataset.num_classes, _width(student, dataset), tuple(self._teacher_widths(dataset)))
        for helper in self._helpers:
            helper.prepare(shapes)
            helper.observe(self.stored, dataset)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms of a batch, by name."""
        for helper in self._helpers:
            helper.progress = Progress(epoch=batch.epoch, epochs=self.epochs)
        device = batch.images.device
        logits = [each.logits(batch.ids, batch.view).to(device) for each in self.stored]
        features: list[Tensor] = []
        if self.teacher_features:
            features = [each.features(batch.ids, batch.view).to(device) for each in self.stored]
        with torch.no_grad():
            for teacher in self.live:
                outputs = _outputs(_ready(teacher, batch.images), batch.images, features=self.teacher_features)
                logits.append(outputs.logits.float())
                features += outputs.features.values()
        panel = torch.stack(logits)
        teachers = TeacherOutputs(panel, self.combine(panel, batch.labels), tuple(features))
        student = _outputs(model, batch.images, features=self.student_features)
        return {name: weight * loss(student, teachers, batch.labels) for name, weight, loss in self.terms}

    def _teacher_widths(self, dataset: Dataset) -> list[int]:
        if not self.teacher_features:
            return []
        first = dataset.train.ids[:1]
        stored = [each.features(first, 0).shape[1] for each in self.stored]
        return stored + [_width(teacher, dataset) for teacher in self.live]


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


def distill(
    student: nn.Module,
    panel: Sequence[TeacherLogits],
    dataset: Dataset,
    config: DistillConfig,
    *,
    seed: int,
    augment: AnyAugment,
    hardware: Hardware | None = None,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    set_training: SetTraining = nn.Module.train,
) -> History:
    """Return the learning curve of ``student``, trained in place on what the panel said.

    With an empty panel it is the control arm: same student, schedule, samples and views, cross entropy alone. Views
    come from the panel's own seed, so that students of several seeds share one set of stored outputs. With a panel
    each row also has ``teacher_kl`` and the alarms of ``config.monitor``, which may end the training. If
    the combination asks for it, a frozen copy of the student as it comes in is the last of the teachers. The other
    arguments are those of :func:`compression.train.fit`.

    Raises:
        ShapeError: a teacher has other classes than the data, or the student another number of them.
        CompressionError: outputs were stored under another augmentation or for fewer views, or training
            diverged.
    """
    check_panel(panel, dataset, config, augment)
    _check_student(student, dataset)
    helpers = None
    watch = config.monitor.watch(panel, dataset)
    if panel:
        live = [copy.deepcopy(student).eval()] if config.teachers.adds_snapshot else []
        step = DistillationStep(config.weighted_losses, config.teachers, panel, live, epochs=config.train.epochs)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            step.prepare(student, dataset)
        helpers = step.helpers
    else:
        step = plain_step(config.train.label_smoothing)
    return fit(
        student,
        step,
        dataset,
        config.train,
        helpers=helpers,
        seed=seed,
        augment=augment,
        views=config.views,
        augment_seed=panel[0].spec.seed if panel else seed,
        hardware=hardware,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=on_step,
        set_training=set_training,
        sampler=config.sampler.build(),
        on_validation=watch,
        should_stop=None if watch is None else watch.should_stop,
    )


def check_panel(panel: Sequence[TeacherLogits], dataset: Dataset, config: DistillConfig, augment: AnyAugment) -> None:
    """Refuse stored outputs that do not belong to the views and classes the student will see.

    Raises:
        ShapeError: other classes, or the same in another order.
        CompressionError: other augmentation, other seeds, or too few views.
    """
    wants_features = any(loss.needs.teacher_features for loss in config.losses)
    for number, teacher in enumerate(panel):
        if wants_features and not teacher.spec.features:
            raise CompressionError(
                f"Outputs of teacher {number} of the panel have no features, but a loss needs them. "
                "Store them again with features: true."
            )
        if teacher.class_names != dataset.class_names:
            raise ShapeError(
                f"Teacher {number} of the panel has {len(teacher.class_names)} classes "
                f"({', '.join(teacher.class_names[:5])}, ...), expected the {len(dataset.class_names)} of "
                f"data set '{dataset.name}' ({', '.join(dataset.class_names[:5])}, ...). "
                "Use a teacher of the same classes."
            )
        if teacher.spec.augment != augment or teacher.spec.seed != panel[0].spec.seed:
            raise CompressionError(
                f"Outputs of teacher {number} of the panel have views of {teacher.spec.augment!r} with seed "
                f"{teacher.spec.seed}, expected {augment!r} with seed {panel[0].spec.seed}. Store them again."
            )
        if teacher.spec.views < config.views:
            raise CompressionError(
                f"Outputs of teacher {number} of the panel have {teacher.spec.views} views, expected "
                f"{config.views}. Store more, or lower distill.views."
            )


def _check_student(student: nn.Module, dataset: Dataset) -> None:
    """Run one sample through the student, without touching its state."""
    with frozen(student), torch.no_grad():
        found = list(student(_sample(student, dataset)).shape)
    if found != [1, dataset.num_classes]:
        raise ShapeError(
            f"Student '{type(student).__name__}' has logits of shape {found} for one image, expected "
            f"[1, {dataset.num_classes}], the classes of data set '{dataset.name}'. "
            "Build it with that many classes."
        )


def _sample(model: nn.Module, dataset: Dataset) -> Tensor:
    """One image of zeros [1,C,H,W] where the model is."""
    sample = torch.zeros(1, *dataset.input_shape)
    return sample.to(next(model.parameters(), sample).device)


def _width(model: nn.Module, dataset: Dataset) -> int:
    """Number of penultimate features; mode and gradients of the model are given back."""
    with frozen(model), torch.no_grad():
        return penultimate(model, _sample(model, dataset))[1].shape[1]


def _outputs(model: nn.Module, images: Tensor, *, features: bool) -> Outputs:
    if not features:
        return Outputs(logits=model(images))
    logits, found = penultimate(model, images)
    return Outputs(logits=logits, features={"penultimate": found})


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
