"""The distillation step, with stored or live teachers, and the control arm without."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import AnyAugment
from compression.data import Dataset
from compression.distill.config import DistillConfig
from compression.distill.losses import AnyLoss, CrossEntropy
from compression.distill.teachers import AnyCombination
from compression.features import frozen
from compression.train import History, StepFn, fit
from compression.types import Batch, Outputs, TeacherOutputs

if TYPE_CHECKING:
    from compression.teacher_outputs import StoredOutputs


def plain_step(label_smoothing: float = 0.0) -> StepFn:
    """A step that learns from labels alone."""

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {
            "cross_entropy": F.cross_entropy(
                model(batch.images), batch.labels, label_smoothing=label_smoothing
            )
        }

    return step


def distillation_step(
    losses: Sequence[AnyLoss],
    combination: AnyCombination,
    stored: Sequence["StoredOutputs"],
    live: Sequence[nn.Module] = (),
) -> StepFn:
    """A step that learns from the stored outputs of a panel, and from the ``live`` teachers that it runs itself."""

    def logits_of(batch: Batch) -> Tensor:
        kept = [each.logits(batch.ids, batch.view).to(batch.images.device) for each in stored]
        return torch.stack([*kept, *(_live_logits(teacher, batch) for teacher in live)])

    return _step(losses, combination, logits_of)


def live_distillation_step(
    losses: Sequence[AnyLoss], combination: AnyCombination, teachers: Sequence[nn.Module]
) -> StepFn:
    """A step that runs every teacher on the batch: for augmentation that cannot be stored, and to compare costs."""
    return distillation_step(losses, combination, (), teachers)


def _live_logits(teacher: nn.Module, batch: Batch) -> Tensor:
    with frozen(teacher), torch.no_grad():
        return teacher(batch.images).float()


def _step(
    losses: Sequence[AnyLoss], combination: AnyCombination, logits_of: Callable[[Batch], Tensor]
) -> StepFn:
    built = [(name, loss.weight, loss.build()) for name, loss in zip(term_names(losses), losses, strict=True)]
    combine = combination.build()

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = logits_of(batch)
        teachers = TeacherOutputs(logits=logits, weights=combine(logits, batch.labels))
        student = Outputs(logits=model(batch.images))
        return {name: weight * loss(student, teachers, batch.labels) for name, weight, loss in built}

    return step


def term_names(losses: Sequence[AnyLoss]) -> list[str]:
    """A name per loss: its kind, numbered where one kind is used twice."""
    names: list[str] = []
    for loss in losses:
        repeats = sum(name == loss.kind or name.startswith(f"{loss.kind}_") for name in names)
        names.append(f"{loss.kind}_{repeats + 1}" if repeats else loss.kind)
    return names


def distill(
    student: nn.Module,
    panel: Sequence["StoredOutputs"],
    dataset: Dataset,
    config: DistillConfig,
    *,
    seed: int,
    augment: AnyAugment,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> History:
    """Train ``student`` in place on the panel's stored outputs; an empty panel is the control arm, labels alone.

    Both arms see the same views in the same order and have the same schedule.
    """
    if panel:
        step = distillation_step(config.losses, config.teachers, panel)
    else:
        smoothing = next(
            (loss.label_smoothing for loss in config.losses if isinstance(loss, CrossEntropy)), 0.0
        )
        step = plain_step(smoothing)
    return fit(
        student,
        step,
        dataset,
        config.train,
        seed=seed,
        augment=augment,
        views=config.views,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=on_step,
    )
