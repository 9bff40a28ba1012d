"""Quantization-aware training: fine-tune a student while its forward pass is rounded to INT8."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from compression.augment import AnyAugment, normalise
from compression.card import MethodCard
from compression.checkpoint import load_checkpoint
from compression.data import Dataset, without_labels
from compression.distill import DistillationStep, DistillConfig, Kd, Ofa, check_panel
from compression.errors import CheckpointError
from compression.metrics import Metrics, evaluate
from compression.quantize.number_format import NumberFormat
from compression.quantize.prepared import (
    FakeQuantized,
    Quantized,
    convert,
    load_prepared,
    prepare_qat,
    save_prepared,
)
from compression.sparsify.nm import apply_masks, masks_of_zeros
from compression.train import History, StepFn, TrainConfig, fit

if TYPE_CHECKING:
    from compression.teacher_outputs import StoredOutputs

STATE_FILE = "quantized.safetensors"
CONFIG_FILE = "quantizer.json"


class Qat(NumberFormat):
    """INT8 by fine-tuning with simulated rounding; one trained model serves every INT8 target."""

    kind: Literal["qat"] = "qat"
    train: TrainConfig = TrainConfig(epochs=2, learning_rate=3e-4)
    """Schedule; a tenth of the student's steps at a tenth of its learning rate is usual."""
    calibration_images: PositiveInt = 512
    """At most this many images of the calibration split set the first ranges."""
    freeze_share: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Share of the steps, at the end, in which ranges and batch norm statistics no longer move."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Quantization-aware training (QAT)",
        paper="Jacob et al. 2018, arXiv:1712.05877; gradients as in Bengio et al. 2013, arXiv:1308.3432",
        summary="Weights (per channel) and activations (per tensor) are rounded to a symmetric INT8 grid in "
        "the forward pass; gradients pass straight through, so weights settle where rounding hurts least.",
        needs="A trained student, calibration images, and labels or stored logits.",
        cost="1.1 to 1.4 times a plain training step on a CPU (measured), and a forward of the float student.",
        evidence="Measured on our data: rounding in torch and in the exported graph agree to a step. "
        "The papers report accuracy within one point of float for such networks.",
    )


def qat(
    student: nn.Module,
    dataset: Dataset,
    config: Qat,
    *,
    step: StepFn,
    seed: int,
    augment: AnyAugment,
    helpers: nn.Module | None = None,
    self_trained: Sequence[nn.Parameter] = (),
    views: int | None = None,
    augment_seed: int | None = None,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[FakeQuantized, History]:
    """The fine-tuned fake-quantized model, in eval mode, and its learning curve; the student stays as it is.

    Sparse weights keep their zeros, which rounding keeps too; see :func:`compression.sparsify.nm.masks_of_zeros`.
    Resumes from ``checkpoint_dir`` like any training: ranges and the freeze are part of the state.

    Args:
        student: The trained float model.
        dataset: Train, validation and calibration splits are used.
        config: Schedule and number format.
        step: What to learn from, as for ``fit``.
        seed: Of permutations, views and dropout.
        augment: Training-time augmentation.
        helpers: As for ``fit``.
        self_trained: As for ``fit``.
        views: As for ``fit``.
        augment_seed: As for ``fit``.
        checkpoint_dir: As for ``fit``.
        on_epoch: As for ``fit``.
        on_step: As for ``fit``.

    Raises:
        CompressionError: the model can't be captured, has nothing to quantize, or its loss is not finite.
    """
    images = torch.as_tensor(dataset.calibration.images[: config.calibration_images])
    prepared = prepare_qat(
        student,
        dataset.input_shape,
        normalise(images, dataset.preprocessing),
        config,
    )
    zeros = masks_of_zeros(student)  # the captured graph has the student's names

    def freeze_then_report(done: int, total: int) -> None:
        # Before the step's checkpoint is written, so that a resumed training is sparse and frozen too.
        apply_masks(prepared.body, zeros)
        if done < total and done >= round(total * (1 - config.freeze_share)) and not prepared.frozen:
            prepared.freeze()
        if on_step is not None:
            on_step(done, total)

    history = fit(
        prepared,
        step,
        dataset,
        config.train,
        seed=seed,
        augment=augment,
        helpers=helpers,
        self_trained=self_trained,
        views=views,
        augment_seed=augment_seed,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=freeze_then_report,
        set_training=lambda module, mode: module.train(mode),
    )
    prepared.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    return prepared.eval(), history


@dataclass(frozen=True)
class QuantizedStudent:
    """What quantization gave: the trainable form, and with it everything else."""

    prepared: FakeQuantized
    history: History
    metrics: Metrics
    """Of the INT8 model on the validation split."""


@dataclass(frozen=True)
class StoredStudent:
    """A quantized student read from a folder."""

    prepared: FakeQuantized

    @cached_property
    def converted(self) -> Quantized:
        """The INT8 model, ready for export and evaluation."""
        return convert(self.prepared)


def quantize(
    student: nn.Module,
    dataset: Dataset,
    config: Qat,
    *,
    distillation: DistillConfig,
    panel: "Sequence[StoredOutputs]",
    seed: int,
    augment: AnyAugment,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> QuantizedStudent:
    """Quantize a student with the losses it was distilled with; the panel and its own float form teach it.

    Losses that look at the student's features or maps are left out, since the captured graph has none to show; if
    nothing is left, kd at temperature 1 takes their place. Samples are all shown, in keyed views, with their labels
    unless ``distillation.labels`` is none.

    Raises:
        CompressionError: see ``qat``.
    """
    losses = [loss.logits_only() if isinstance(loss, Ofa) else loss for loss in distillation.losses]
    losses = [loss for loss in losses if not (loss.needs.student_features or loss.needs.student_maps)]
    if not any(loss.weight > 0 and not loss.needs.another_term for loss in losses):
        losses = [Kd(weight=1.0, temperature=1.0)]
    check_panel(panel, dataset, distillation, augment)
    live = [copy.deepcopy(student).eval()]
    step = DistillationStep(losses, distillation.teachers, panel, live, epochs=config.train.epochs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        step.prepare(student, dataset)
    if distillation.labels == "none":
        dataset = without_labels(dataset)
    prepared, history = qat(
        student,
        dataset,
        config,
        step=step,
        seed=seed,
        augment=augment,
        helpers=step.helpers,
        self_trained=step.self_trained,
        views=distillation.views,
        augment_seed=panel[0].spec.seed if panel else seed,
        checkpoint_dir=checkpoint_dir,
        on_epoch=on_epoch,
        on_step=on_step,
    )
    metrics = evaluate(convert(prepared), dataset.validation, dataset.preprocessing)
    return QuantizedStudent(prepared=prepared, history=history, metrics=metrics)


def save_quantized(prepared: FakeQuantized, folder: Path, config: Qat | None = None) -> None:
    """Write the quantized state beside the float checkpoint in ``folder``, and the config if given."""
    save_prepared(prepared, folder / STATE_FILE)
    if config is not None:
        (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=1), encoding="utf-8")


def load_quantized(folder: Path) -> StoredStudent:
    """The quantized student of a folder with a float checkpoint, its quantized state and ``quantizer.json``.

    Raises:
        CheckpointError: a file is missing, unreadable or belongs to another model.
    """
    model, spec = load_checkpoint(folder)
    try:
        config = Qat.model_validate_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Quantized checkpoint '{folder}' has no readable {CONFIG_FILE}, expected the quantizer's"
            " settings. Run the quantize stage again."
        ) from error
    prepared = load_prepared(
        folder / STATE_FILE,
        model,
        spec.input_shape,
        config,
    )
    return StoredStudent(prepared)
