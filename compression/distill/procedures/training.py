"""One distillation as a procedure sees it: what there is to train with, and how to run a part of it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compression.augment import AnyAugment
from compression.data.dataset import Dataset
from compression.distill.losses import AnyLoss
from compression.distill.step import DistillationStep
from compression.distill.types import Helper, Progress, TeacherLogits
from compression.train import Backward, Hardware, History, Row, SetTraining, StepFn, TrainConfig, fit
from compression.train.batches import Sampler

if TYPE_CHECKING:
    from compression.distill.config import DistillConfig


@dataclass(frozen=True)
class Training:
    """A student, its teachers, the data, and everything ``fit`` wants to know."""

    student: nn.Module
    """Trained in place."""
    panel: Sequence[TeacherLogits]
    """Stored outputs of the teachers, at least one."""
    teachers: Sequence[nn.Module]
    """The teachers themselves, in the order of the panel; empty where stored outputs are enough."""
    dataset: Dataset
    config: "DistillConfig"
    seed: int
    augment: AnyAugment
    hardware: Hardware | None = None
    checkpoint_dir: Path | None = None
    on_epoch: Callable[[Row], None] | None = None
    on_step: Callable[[int, int], None] | None = None
    set_training: SetTraining = nn.Module.train

    def step(
        self,
        student: nn.Module,
        *,
        epochs: int,
        losses: Sequence[AnyLoss] | None = None,
        dataset: Dataset | None = None,
    ) -> DistillationStep:
        """Return the configured step, ready for ``student``; ``losses`` take the place of the configured ones.

        Where a loss or the online augmentation needs live teachers all teachers are live. If the combination asks
        for it, a frozen copy of the student as it is now is the last of the teachers.
        """
        config = self.config
        losses = config.weighted_losses if losses is None else losses
        online = config.online.build()
        live = online is not None or any(loss.needs.teacher_maps for loss in losses)
        snapshot = [copy.deepcopy(student).eval()] if config.teachers.adds_snapshot else []
        step = DistillationStep(
            losses,
            config.teachers,
            () if live else self.panel,
            [*(self.teachers if live else ()), *snapshot],
            epochs=epochs,
            online=online,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            step.prepare(student, self.dataset if dataset is None else dataset, self.panel)
        return step

    def run(
        self,
        student: nn.Module | None = None,
        *,
        name: str = "",
        train: TrainConfig | None = None,
        losses: Sequence[AnyLoss] | None = None,
        dataset: Dataset | None = None,
        sampler: Sampler | None = None,
        seed: int | None = None,
        step: StepFn | None = None,
        helpers: nn.Module | None = None,
        self_trained: Sequence[nn.Parameter] = (),
        backward: Backward | None = None,
        monitored: bool = True,
    ) -> History:
        """Return the learning curve of one part of the procedure; what is None is that of the configuration.

        Args:
            student: trained in place.
            name: of the part; its checkpoints are in a folder of this name, and a part that was finished is read
                from there when the procedure is started again.
            train: the schedule.
            losses: of the step.
            dataset: may have other labels, say -1 for those that must not be known.
            sampler: which samples each epoch shows.
            seed: of the order of samples and of dropout.
            step: another step than the configured one; then ``helpers`` are what it trains beside the student.
            helpers: see ``step``.
            self_trained: parameters of ``helpers`` with an optimiser of their own.
            backward: of the step, if it has one.
            monitored: watch for a student that learns its teachers' faults; off where the model is no student yet.
        """
        student = self.student if student is None else student
        train = self.config.train if train is None else train
        dataset = self.dataset if dataset is None else dataset
        sampler = self.config.sampler.build() if sampler is None else sampler
        if step is None:
            step = self.step(student, epochs=train.epochs, losses=losses, dataset=dataset)
            helpers, self_trained, backward = step.helpers, step.self_trained, step.backward
        if isinstance(sampler, Helper):
            sampler.progress = Progress(epochs=train.epochs)
            look = getattr(sampler, "look", None)
            if look is not None:
                look(self.panel, self.teachers, dataset)
            helpers = nn.ModuleList([helpers or nn.Module(), sampler])
        watch = self.config.monitor.watch(self.panel, dataset) if monitored else None
        return fit(
            student,
            step,
            dataset,
            train,
            helpers=helpers,
            self_trained=self_trained,
            seed=self.seed if seed is None else seed,
            augment=self.augment,
            views=self.config.views,
            augment_seed=self.panel[0].spec.seed,
            hardware=self.hardware,
            checkpoint_dir=self.checkpoint_dir / name if self.checkpoint_dir is not None else None,
            on_epoch=self.on_epoch,
            on_step=self.on_step,
            set_training=self.set_training,
            sampler=sampler,
            on_epoch_start=getattr(sampler, "choose", None),
            backward=backward,
            on_validation=watch,
            should_stop=None if watch is None else watch.should_stop,
        )


def joined(*parts: History) -> History:
    """One learning curve of several parts, with the epochs counted through."""
    rows: list[Row] = []
    for part in parts:
        rows += [row | {"epoch": len(rows) + number} for number, row in enumerate(part.rows)]
    return History(rows=rows)


ProcedureFn = Callable[[Training], History]
"""Trains the student of a ``Training`` in place and returns its learning curve."""
