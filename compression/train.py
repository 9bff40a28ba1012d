"""The one training loop: teachers, trials, students and quantization-aware fine-tuning all pass it a step.

Built on Lightning Fabric, so that accelerator, devices and precision are a setting. Data lie in memory as tensors, and a
batch is an index into them: no loader processes, and the order of samples is a pure function of (seed, epoch).
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from compression.augment import AnyAugment, augment as augmented, normalise
from compression.data import Dataset, Split
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.types import Batch, Frozen

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger(__name__)

StepFn = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""(model in train mode, batch) -> named, weighted loss terms; the loop minimises their sum."""

KEPT_CHECKPOINTS = 2


class TrainConfig(Frozen):
    """Schedule of one training: AdamW with a one-cycle learning rate."""

    epochs: PositiveInt
    """Passes over the training split."""
    batch_size: PositiveInt = 128
    """Samples per step."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 3e-3
    """Peak of the one-cycle schedule (Smith and Topin 2017, arXiv:1708.07120)."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.02
    """Decoupled decay (Loshchilov and Hutter 2017, arXiv:1711.05101) of matrices and kernels; not of biases and norms."""
    warmup_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of all steps in which the learning rate rises."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability moved from the label to all classes."""
    checkpoint_every_steps: PositiveInt = 200
    """A killed training loses at most this many steps."""
    max_steps_per_epoch: PositiveInt | None = None
    """End an epoch early, for quick trials; None: the whole split."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of forward and backward, in Fabric's terms."""


@dataclass
class History:
    """What happened, one row per epoch: epoch, loss, every loss term, validation accuracy and nll, seconds."""

    rows: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Progress:
    """Where a training stands; with the state dicts it is all that a resumed one needs."""

    epoch: int = 0
    step_in_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def cpu_fabric(precision: str = "32-true", *, accelerator: str = "auto", devices: int = 1) -> "Fabric":
    """A launched Fabric; ``accelerator`` auto takes a GPU if there is one."""
    from lightning_fabric import Fabric

    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def fit(
    model: nn.Module,
    step: StepFn,
    dataset: Dataset,
    config: TrainConfig,
    *,
    seed: int,
    augment: AnyAugment,
    views: int | None = None,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    set_training: Callable[[nn.Module, bool], Any] = nn.Module.train,
    extra_parameters: Iterable[nn.Parameter] = (),
    fabric: "Fabric | None" = None,
) -> History:
    """Train ``model`` in place and return its learning curve.

    Args:
        model: The module to train; left in eval mode.
        step: Gives the loss terms of a batch.
        dataset: Train and validation splits are used.
        config: The schedule.
        seed: Of permutations, augmented views and dropout.
        augment: Training-time augmentation.
        views: How many augmented views exist, when teacher outputs were stored for them: epoch ``e`` then uses
            view ``e % views``. None: every epoch has a view of its own.
        checkpoint_dir: Where step checkpoints go; if it holds some, training continues from the newest good one.
        on_epoch: Called with each finished row.
        on_step: Called with (steps done, steps in all).
        set_training: Switches between train (True) and eval mode.
        extra_parameters: Of losses that learn something themselves.
        fabric: Device, precision and strategy; default is one device.

    Raises:
        CompressionError: a loss term is not finite; names the epoch, step, term and samples.
    """
    fabric = fabric or cpu_fabric(config.precision)
    split = dataset.train
    steps_per_epoch = max(1, len(split.labels) // config.batch_size)
    if config.max_steps_per_epoch is not None:
        steps_per_epoch = min(steps_per_epoch, config.max_steps_per_epoch)
    total_steps = steps_per_epoch * config.epochs

    torch.manual_seed(seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, extra_parameters, config)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total_steps + 1, pct_start=config.warmup_share
    )
    wrapped, fast_optimizer = fabric.setup(model, optimizer)
    progress = Progress()
    checkpoints = Checkpoints(checkpoint_dir) if checkpoint_dir is not None else None
    if checkpoints is not None:
        progress = checkpoints.restore(model, optimizer, scheduler) or progress
        if progress.epoch or progress.step_in_epoch:
            logger.info("Resuming at epoch %d, step %d.", progress.epoch, progress.step_in_epoch)

    started = time.monotonic() - progress.seconds
    for epoch in range(progress.epoch, config.epochs):
        set_training(model, True)
        view = epoch if views is None else epoch % views
        order = permutation(len(split.labels), seed=seed, epoch=epoch)
        for number in range(progress.step_in_epoch, steps_per_epoch):
            places = order[number * config.batch_size : (number + 1) * config.batch_size]
            places = places[fabric.global_rank :: fabric.world_size]
            done = epoch * steps_per_epoch + number
            batch = make_batch(
                split,
                places,
                dataset,
                augment,
                view=view,
                seed=seed,
                epoch=epoch,
                step=done,
                device=fabric.device,
            )
            terms = step(wrapped, batch)
            loss = _total(terms, batch)
            fast_optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            fast_optimizer.step()
            scheduler.step()
            for term, value in terms.items():
                progress.sums[term] = progress.sums.get(term, 0.0) + float(value.detach())
            progress.epoch, progress.step_in_epoch = epoch, number + 1
            done += 1
            if on_step is not None:
                on_step(done, total_steps)
            if (
                checkpoints is not None
                and done % config.checkpoint_every_steps == 0
                and fabric.is_global_zero
            ):
                progress.seconds = time.monotonic() - started
                checkpoints.save(done, model, optimizer, scheduler, progress)
        set_training(model, False)
        row = _row(progress, epoch, steps_per_epoch, started, float(scheduler.get_last_lr()[0]))
        measured = evaluate(model, dataset.validation, dataset.preprocessing)
        row |= {"validation_accuracy": measured.accuracy, "validation_nll": measured.nll}
        progress.rows.append(row)
        progress.sums, progress.epoch, progress.step_in_epoch = {}, epoch + 1, 0
        if on_epoch is not None:
            on_epoch(row)
    set_training(model, False)
    return History(rows=progress.rows)


def permutation(size: int, *, seed: int, epoch: int) -> Tensor:
    """Order of the samples in an epoch, int64 [size]: a pure function of (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randperm(size, generator=generator)


def make_batch(
    split: Split,
    places: Tensor,
    dataset: Dataset,
    augment: AnyAugment,
    *,
    view: int,
    seed: int,
    epoch: int,
    step: int,
    device: torch.device,
) -> Batch:
    """The samples at ``places`` [B] of a split, augmented and normalised, on ``device``."""
    ids = split.ids[places]
    raw = augmented(split.images[places], ids, view=view, seed=seed, config=augment)
    images = normalise(raw.to(device), dataset.preprocessing).contiguous(memory_format=torch.channels_last)
    return Batch(
        images=images, labels=split.labels[places].to(device), ids=ids, view=view, epoch=epoch, step=step
    )


def _optimizer(model: nn.Module, extra: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [each for each in (*model.parameters(), *extra) if each.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


def _total(terms: dict[str, Tensor], batch: Batch) -> Tensor:
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        broken = [name for name, value in terms.items() if not torch.isfinite(value)] or list(terms)
        ids = ", ".join(str(each) for each in batch.ids[:8].tolist())
        raise CompressionError(
            f"Loss term '{broken[0]}' has a non-finite value in epoch {batch.epoch}, step {batch.step} "
            f"(samples {ids}, ...), expected a finite one. Lower the learning rate, or look at these samples."
        )
    return loss


def _row(
    progress: Progress, epoch: int, steps: int, started: float, learning_rate: float
) -> dict[str, float]:
    terms = {name: total / steps for name, total in progress.sums.items()}
    seconds = time.monotonic() - started
    before = sum(row["seconds"] for row in progress.rows)
    return {
        "epoch": epoch,
        "loss": sum(terms.values()),
        **terms,
        "learning_rate": learning_rate,
        "seconds": seconds - before,
    }


class Checkpoints:
    """Step checkpoints in a folder: written whole, the newest two kept, damaged ones passed over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def found(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def save(
        self,
        done: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        progress: Progress,
    ) -> None:
        """Write the state after ``done`` steps."""
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "progress": {**vars(progress), "sums": dict(progress.sums), "rows": list(progress.rows)},
        }
        target = self.folder / f"step-{done:09d}.pt"
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".writing-", delete=False) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(target)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for old in self.found()[KEPT_CHECKPOINTS:]:
            old.unlink(missing_ok=True)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> Progress | None:
        """Load the newest checkpoint that reads, or None; a damaged one is named and removed."""
        for litter in self.folder.glob(".writing-*"):
            litter.unlink(missing_ok=True)
        for path in self.found():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                logger.warning(
                    "Step checkpoint '%s' cannot be read (%s); trying the one before.",
                    path.name,
                    type(error).__name__,
                )
                with suppress(OSError):
                    path.unlink()
                continue
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            return Progress(**state["progress"])
        return None
