"""Quantization-aware training: fine-tune a student while its forward pass is rounded to INT8."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from compression.augment import AnyAugment, normalise
from compression.card import MethodCard
from compression.data import Dataset
from compression.distill import AnyLoss, DistillConfig, Kd, Ofa
from compression.errors import CompressionError
from compression.quantize.control import AccuracyControl
from compression.quantize.number_format import NumberFormat
from compression.quantize.prepared import FakeQuantized, prepare_qat
from compression.sparsify.nm import apply_masks, masks_of_zeros
from compression.train import Hardware, History, StepFn, TrainConfig, fit


class Qat(NumberFormat):
    """INT8 by fine-tuning with simulated rounding; one trained model serves every INT8 target."""

    kind: Literal["qat"] = "qat"
    train: TrainConfig = TrainConfig(epochs=2, learning_rate=3e-4)
    """Schedule; a tenth of the student's steps at a tenth of its learning rate is usual."""
    calibration_images: PositiveInt = 512
    """At most this many images of the calibration split set the first ranges."""
    freeze_share: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Share of the steps, at the end, in which ranges and batch norm statistics no longer move."""
    losses: Annotated[tuple[AnyLoss, ...], Field(min_length=1)] | None = None
    """What fine-tuning learns, from the panel and the float student; null takes the losses of the distillation, as far
    as logits are enough for them. Kd at temperature 1 and top_kld fit best: the student has been taught already."""
    control: AccuracyControl | None = None
    """After training, put layers back to float until accuracy is kept; null leaves all in INT8 but ``keep_float``."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Quantization-aware training (QAT)",
        paper="Jacob et al. 2018, arXiv:1712.05877; gradients as in Bengio et al. 2013, arXiv:1308.3432; learned "
        "steps: Esser et al. 2020, arXiv:1902.08153",
        summary="Weights (per channel) and activations (per tensor) are rounded to a symmetric INT8 grid in "
        "the forward pass; gradients pass straight through, so weights settle where rounding hurts least.",
        needs="A trained student, calibration images, and labels or stored logits.",
        cost="1.1 to 1.4 times a plain training step on a CPU (measured), 1.5 to 1.7 times with learned steps, and a "
        "forward of the float student.",
        evidence="Fashion-MNIST, four students, 2 seeds: 0.1 to 0.2 points above the float student, which two more "
        "epochs in float give as well; INT8 itself costs nothing there. Learned steps gain at 2 to 3 bits, not at 8.",
    )

    @model_validator(mode="after")
    def _logits_can_teach(self) -> "Qat":
        active = [_on_logits(loss) for loss in self.losses or () if loss.weight > 0]
        for loss in active:
            if looks_inside(loss):
                raise ValueError(
                    f"losses have '{loss.kind}', which looks at features or maps, expected losses on logits: the "
                    "captured graph shows nothing else, and teachers run no more. Take kd, dist or top_kld."
                )
        if self.losses and all(loss.needs.another_term for loss in active):
            raise ValueError(
                "losses have no term with weight that can teach alone, expected one. Add kd, or leave losses out."
            )
        return self

    def losses_for(self, distillation: DistillConfig) -> tuple[AnyLoss, ...]:
        """The losses to train with.

        Of the distillation's, those that look at features or maps are left out; if nothing is left, kd at temperature
        1 takes their place.

        Raises:
            CompressionError: own losses learn from labels that the distillation hides.
        """
        if self.losses is not None:
            for loss in self.losses:
                if loss.weight > 0 and loss.needs.labels and distillation.labels == "none":
                    raise CompressionError(
                        f"Qat's losses have '{loss.kind}', which learns from labels, but distill.labels is none, "
                        "expected losses without labels. Take kd or top_kld."
                    )
            return tuple(_on_logits(loss) for loss in self.losses)
        kept = [_on_logits(loss) for loss in distillation.losses]
        kept = [loss for loss in kept if not looks_inside(loss)]
        if not any(loss.weight > 0 and not loss.needs.another_term for loss in kept):
            return (Kd(weight=1.0, temperature=1.0),)
        return tuple(kept)


def looks_inside(loss: AnyLoss) -> bool:
    """Whether a loss wants more of a student than its logits, which is all that a captured graph gives."""
    return loss.needs.student_features or loss.needs.student_maps


def _on_logits(loss: AnyLoss) -> AnyLoss:
    return loss.logits_only() if isinstance(loss, Ofa) else loss


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
    hardware: Hardware | None = None,
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
        hardware: As for ``fit``.

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
        hardware=hardware,
        set_training=lambda module, mode: module.train(mode),
    )
    prepared.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    return prepared.eval(), history
