"""The training loop: one cycle of AdamW on any step function, resumable at every step.

With one device (and on the CPU one thread), a training that was killed and started again ends with the same bits as
one that was not.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import AnyAugment
from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.metrics import predict
from compression.train.batches import Batches, Sampler
from compression.train.config import Hardware, TrainConfig
from compression.train.determinism import deterministic
from compression.train.divergence import divergence
from compression.train.interruption import Interruption
from compression.train.ranks import (
    agree_on_buffers,
    average_gradients,
    first_decides,
    mean_of,
    refuse_for_ranks,
    synchronised,
)
from compression.train.saving import Saving
from compression.train.step_checkpoint import load_state, save_state
from compression.types import Batch

logger = logging.getLogger(__name__)

StepFn = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""(model, batch) -> weighted loss terms by name, each a scalar; the loop adds them up."""

SetTraining = Callable[[nn.Module, bool], object]
"""``(model, mode)`` switches between training (True) and inference."""

Row = dict[str, Any]
"""One epoch of a learning curve."""

OnValidation = Callable[[Tensor, Sequence[Row]], dict[str, float]]
"""(validation logits float32 [N,C], rows so far, the epoch at hand last) -> entries that its row gets besides."""

OnEpochStart = Callable[[int, nn.Module], None]
"""(epoch from 0, model) before the first batch of an epoch is chosen; what it decides must be part of ``helpers``."""

Backward = Callable[[dict[str, Tensor], Callable[..., None]], None]
"""(loss terms, ``backward(loss, **options)``) -> None; leaves gradients in the parameters, which have none before."""

ShouldStop = Callable[[Sequence[Row]], bool]
"""(rows so far, never none) -> whether the training ends here; asked after each epoch and when one goes on."""


@dataclass
class History:
    """The learning curve of one training."""

    rows: list[Row] = field(default_factory=list)
    """One per epoch: epoch, loss, each loss term, validation_accuracy, validation_nll, seconds,
    learning_rate, and what ``on_validation`` added."""


def fit(
    model: nn.Module,
    step: StepFn,
    dataset: Dataset,
    config: TrainConfig,
    *,
    seed: int,
    augment: AnyAugment,
    views: int | None = None,
    augment_seed: int | None = None,
    hardware: Hardware | None = None,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    set_training: SetTraining = nn.Module.train,
    helpers: nn.Module | None = None,
    self_trained: Sequence[nn.Parameter] = (),
    sampler: Sampler | None = None,
    on_epoch_start: OnEpochStart | None = None,
    backward: Backward | None = None,
    on_validation: OnValidation | None = None,
    should_stop: ShouldStop | None = None,
) -> History:
    """Return the learning curve of ``model``, which is trained in place and left in inference mode.

    AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) under a one-cycle schedule (Smith and Topin 2017,
    arXiv:1708.07120); momentum runs against the learning rate. The random state of the process is given back.

    Args:
        model: gets normalised images [B,C,H,W] in channels_last layout.
        step: returns the weighted loss terms of a batch; image ids are on the CPU, the rest on the device.
        dataset: its train split is learnt from, its validation split measured once an epoch.
        config: the schedule.
        seed: of the order of samples and of dropout.
        augment: changes the raw images; view ``epoch % views``, or ``epoch`` when ``views`` is None.
        views: number of views that epochs take in turn.
        augment_seed: of the views; ``seed`` when None.
        hardware: device; a GPU when there is one, by default. The model ends on the device it came from.
        checkpoint_dir: the newest two training states are kept here and a later call goes on from them; the
            caller removes the folder. One is written every ``config.checkpoint_every_steps`` steps, every few seconds,
            and when the process is asked to end (SIGTERM, Ctrl-C).
        on_epoch: gets each new row of the history.
        on_step: gets (steps done, steps in all) after each step, and before that step's state is saved.
        set_training: ``(model, mode)`` switches between training and inference.
        helpers: trained beside the model and part of the training state, say the projector of a loss.
        self_trained: parameters of helpers that have an optimiser of their own; this one leaves them alone.
        sampler: which samples each epoch shows; all of them when None.
        on_epoch_start: may look at the model before an epoch's samples are chosen.
        backward: takes the place of the backward pass through the sum of the terms.
        on_validation: measures more on the validation logits of each epoch.
        should_stop: ends the training early, at whatever point its schedule is; must depend on the rows alone, so
            that a training that goes on from a checkpoint ends where an unbroken one does.

    Raises:
        CompressionError: a loss term is not finite, or the checkpoints belong to another run.
        ArtifactError: the checkpoint folder cannot be written.
    """
    home = _device_of(model)
    fabric = (hardware or Hardware()).fabric(config.precision)
    batches = Batches(
        split=dataset.train,
        preprocessing=dataset.preprocessing,
        augment=augment,
        seed=seed,
        augment_seed=seed if augment_seed is None else augment_seed,
        views=views,
        batch_size=config.batch_size,
        max_steps=config.max_steps_per_epoch,
        device=fabric.device,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        sampler=sampler,
    )
    refuse_for_ranks(fabric.world_size, self_trained=self_trained, has_backward=backward is not None)
    cuda = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), deterministic(fabric.device):
        torch.manual_seed(seed + fabric.global_rank)
        try:
            with synchronised(fabric.to_device(model), fabric):
                training = _Training(
                    model,
                    step,
                    dataset,
                    config,
                    batches,
                    fabric,
                    helpers=helpers or nn.Module(),
                    self_trained=self_trained,
                    backward=backward or _backward_of_sum,
                    set_training=set_training,
                )
                history = training.run(
                    checkpoint_dir,
                    on_epoch_start=on_epoch_start,
                    on_epoch=on_epoch,
                    on_step=on_step,
                    on_validation=on_validation,
                    should_stop=should_stop,
                )
        finally:
            model.zero_grad(set_to_none=True)
            model.to(home)
    set_training(model, False)
    return history


class _Training:
    """The moving parts of one training, and how they are saved and restored."""

    def __init__(
        self,
        model: nn.Module,
        step: StepFn,
        dataset: Dataset,
        config: TrainConfig,
        batches: Batches,
        fabric: Any,
        *,
        helpers: nn.Module,
        self_trained: Sequence[nn.Parameter],
        backward: Backward,
        set_training: SetTraining,
    ) -> None:
        self.model = fabric.to_device(model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.step, self.dataset, self.config, self.batches, self.fabric = (
            step,
            dataset,
            config,
            batches,
            fabric,
        )
        self.helpers, self.set_training = helpers.to(fabric.device), set_training
        self.backward = backward
        self.total_steps = config.epochs * batches.steps_per_epoch
        left_alone = {id(parameter) for parameter in self_trained}
        every = (*model.parameters(), *helpers.parameters())
        parameters = [p for p in every if p.requires_grad and id(p) not in left_alone]
        if not parameters:
            raise CompressionError(
                f"Model '{type(model).__name__}' has 0 trainable parameters, expected at least 1. "
                "Call model.requires_grad_(True) before training."
            )
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            fused=fabric.device.type in ("cpu", "cuda"),
        )
        self.helpers_own = [p for p in self.helpers.parameters() if p.requires_grad and id(p) not in left_alone]
        self.scheduler = one_cycle(self.optimizer, config, self.total_steps)
        self.wrapped, self.stepper = fabric.setup(model, self.optimizer)
        self.epoch = self.step_in_epoch = 0
        self.sums: dict[str, float] = {}
        self.elapsed = 0.0
        self.history = History()

    def run(
        self,
        checkpoint_dir: Path | None,
        *,
        on_epoch_start: OnEpochStart | None,
        on_epoch: Callable[[Row], None] | None,
        on_step: Callable[[int, int], None] | None,
        on_validation: OnValidation | None,
        should_stop: ShouldStop | None,
    ) -> History:
        """Train to the end, from the newest checkpoint when there is one."""
        if checkpoint_dir is not None:
            self.restore(checkpoint_dir)
        saving = Saving(self, checkpoint_dir)
        with Interruption() as interruption:
            try:
                while self.epoch < self.config.epochs and not self.stopped(should_stop):
                    self.train_epoch(interruption, saving, on_epoch_start, on_epoch, on_step, on_validation)
            except BaseException as error:
                if not isinstance(error, Exception) and interruption.is_whole:
                    saving.at_the_end()
                raise
        return self.history

    def train_epoch(
        self,
        interruption: Interruption,
        saving: Saving,
        on_epoch_start: OnEpochStart | None,
        on_epoch: Callable[[Row], None] | None,
        on_step: Callable[[int, int], None] | None,
        on_validation: OnValidation | None,
    ) -> None:
        """The rest of an epoch, from its first step or the one that was restored."""
        started = time.perf_counter() - self.elapsed
        if on_epoch_start is not None and self.step_in_epoch == 0:
            interruption.begin()  # and whole again after the first step: it must not be called twice
            on_epoch_start(self.epoch, self.model)
        self.set_training(self.model, True)
        for batch in self.batches.epoch(self.epoch, self.step_in_epoch):
            interruption.begin()
            self.learn(batch)
            self.step_in_epoch = batch.step + 1
            self.elapsed = time.perf_counter() - started
            if on_step is not None:
                on_step(self.steps_done, self.total_steps)
            interruption.end()
            saving.after_step()
        agree_on_buffers(self.model, self.helpers, self.fabric)
        logits, accuracy, nll = self.validate()
        interruption.begin()
        row = self.finish_epoch(started, logits, accuracy, nll, on_validation)
        if on_epoch is not None:
            on_epoch(row)
        interruption.end()

    @property
    def steps_done(self) -> int:
        """Optimiser steps so far."""
        return self.epoch * self.batches.steps_per_epoch + self.step_in_epoch

    def learn(self, batch: Batch) -> None:
        """One optimiser step."""
        terms = self.step(self.wrapped, batch)
        if not terms:
            raise CompressionError(
                f"Training step of '{type(self.model).__name__}' has 0 loss terms, expected at least 1. "
                "Return a dict of named scalars."
            )
        scalars = list(terms.values())
        values = torch.stack([term.detach().float() for term in scalars]).tolist()
        if not all(map(math.isfinite, values)):
            raise divergence(self.model, batch, dict(zip(terms, values, strict=True)), set_training=self.set_training)
        values = mean_of(torch.tensor(values, dtype=torch.float64), self.fabric).tolist()
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(terms, self.fabric.backward)
        average_gradients(self.helpers_own, self.fabric)
        self.stepper.step()
        self.scheduler.step()
        for name, value in zip(terms, values, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def stopped(self, should_stop: ShouldStop | None) -> bool:
        """Whether the rows so far end the training; the first rank decides for all."""
        if should_stop is None or not self.history.rows:
            return False
        return first_decides(should_stop(self.history.rows), self.fabric)

    def finish_epoch(
        self, started: float, logits: Tensor, accuracy: float, nll: float, on_validation: OnValidation | None
    ) -> Row:
        """Add the epoch's row, and move to the next epoch."""
        steps = self.batches.steps_per_epoch
        means = torch.tensor([total / steps for total in self.sums.values()], dtype=torch.float64)
        row: Row = {
            "epoch": self.epoch,
            "loss": float(means.sum()),
            **dict(zip(self.sums, means.tolist(), strict=True)),
            "validation_accuracy": accuracy,
            "validation_nll": nll,
            "seconds": time.perf_counter() - started,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }
        if on_validation is not None:
            row |= on_validation(logits, [*self.history.rows, row])
        self.history.rows.append(row)
        logger.debug("Epoch %d: %s", self.epoch, row)
        self.epoch, self.step_in_epoch, self.sums, self.elapsed = self.epoch + 1, 0, {}, 0.0
        return row

    def validate(self) -> tuple[Tensor, float, float]:
        """Return logits [N,C], accuracy (0..1) and nll (nats) of the un-augmented validation split."""
        device = self.fabric.device

        def logits_of(images: Tensor) -> Tensor:
            with self.fabric.autocast():
                return self.model(images.to(device).contiguous(memory_format=torch.channels_last))

        self.set_training(self.model, False)
        labels = self.dataset.validation.labels
        logits = predict(logits_of, self.dataset.validation, self.dataset.preprocessing)
        nll = float(F.cross_entropy(logits.double(), labels))
        if not math.isfinite(nll):
            raise CompressionError(
                f"Validation nll after epoch {self.epoch} has value {nll}, expected a finite number. "
                "The last step made weights or batch-norm statistics non-finite: lower train.learning_rate."
            )
        return logits, float((logits.argmax(dim=1) == labels).double().mean()), nll

    @cached_property
    def fingerprint(self) -> str:
        """Changes with everything that decides the outcome, so that no run takes another one's state."""
        shapes = {name: list(value.shape) for name, value in self.model.named_parameters()}
        facts = {
            "config": self.config.model_dump(mode="json", exclude={"checkpoint_every_steps"}),
            "seed": self.batches.seed,
            "augment": [
                self.batches.augment.model_dump(mode="json"),
                self.batches.augment_seed,
                self.batches.views,
            ],
            "data": self.dataset.hashes,
            "parameters": shapes,
            "helpers": {
                name: list(value.shape) for name, value in self.helpers.state_dict().items() if torch.is_tensor(value)
            },
            "world_size": self.batches.world_size,
            "sampler": None if self.batches.sampler is None else self.batches.sampler.name,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write everything that :meth:`restore` needs."""
        if not self.fabric.is_global_zero:
            return
        state = {
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "helpers": self.helpers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.fabric.device) if self._on_cuda else None,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "sums": self.sums,
            "elapsed": self.elapsed,
            "rows": self.history.rows,
        }
        save_state(state, folder, step=self.steps_done)

    def restore(self, folder: Path) -> None:
        """Go back to the newest whole state in ``folder``; nothing happens when there is none."""
        state = load_state(folder)
        if state is None:
            return
        if state["fingerprint"] != self.fingerprint:
            raise CompressionError(
                f"Checkpoint folder '{folder}' has the state of another run (other model, data, seed or "
                "schedule), expected this run's. Remove the folder to start afresh."
            )
        self.model.load_state_dict(state["model"])
        self.helpers.load_state_dict(state["helpers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        if self.fabric.is_global_zero:
            torch.set_rng_state(state["cpu_rng"])
            if self._on_cuda and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.fabric.device)
        else:  # the state holds the first rank's
            done = self.epoch * self.batches.steps_per_epoch + self.step_in_epoch
            torch.manual_seed(self.batches.seed + self.fabric.global_rank + self.fabric.world_size * done)
        self.sums, self.elapsed = dict(state["sums"]), state["elapsed"]
        self.history.rows = list(state["rows"])
        logger.info("Training goes on at epoch %d, step %d.", self.epoch, self.step_in_epoch)

    @property
    def _on_cuda(self) -> bool:
        return self.fabric.device.type == "cuda"


def _backward_of_sum(terms: dict[str, Tensor], backward: Callable[..., None]) -> None:
    first, *others = terms.values()
    backward(sum(others, first))


def one_cycle(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return the schedule, stretched where torch's own divides by zero: warm-up of one step or less."""
    total = max(3, total_steps)
    warmup = min(max(config.warmup_share, 2.0 / total), 1.0)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total, pct_start=float(warmup)
    )


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
