"""A student in INT8: made by training or by calibration alone, kept in a folder, read back."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter
from torch import nn

from compression.augment import AnyAugment, normalise
from compression.checkpoint import load_checkpoint
from compression.data import Dataset, without_labels
from compression.distill import DistillationStep, DistillConfig, check_panel
from compression.errors import CheckpointError
from compression.metrics import Metrics, evaluate
from compression.quantize.control import Reverted, revert_layers
from compression.quantize.prepared import FakeQuantized, Quantized, convert, load_prepared, save_prepared
from compression.quantize.ptq import Ptq, ptq
from compression.quantize.qat import Qat, qat
from compression.quantize.sensitivity import Sensitivity
from compression.quantize.sensitivity import sensitivity as measure
from compression.train import Hardware, History

if TYPE_CHECKING:
    from compression.teacher_outputs import StoredOutputs

STATE_FILE = "quantized.safetensors"
CONFIG_FILE = "quantizer.json"
IMAGES_FOR_ORDER = 512
"""Validation images by which layers are ordered for accuracy control, where no table is given."""

AnyQuantizer = Qat | Ptq
"""What a recipe may name under ``quantize``."""


@dataclass(frozen=True)
class QuantizedStudent:
    """What quantization gave: the trainable form, and with it everything else."""

    prepared: FakeQuantized
    config: AnyQuantizer
    """As it was given, with the ``keep_float`` that came out."""
    history: History
    """Empty without training."""
    metrics: Metrics
    """Of the INT8 model on the validation split."""
    control: Reverted | None = None
    """What accuracy control did, where it was asked for."""


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
    config: AnyQuantizer,
    *,
    distillation: DistillConfig,
    panel: "Sequence[StoredOutputs]",
    seed: int,
    augment: AnyAugment,
    checkpoint_dir: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    sensitivity: Sensitivity | None = None,
    hardware: Hardware | None = None,
) -> QuantizedStudent:
    """Quantize a student; by training, the panel and its own float form teach it.

    Training takes ``config.losses``, or those the student was distilled with as far as logits are enough for them.
    Samples are all shown, in keyed views, with their labels unless ``distillation.labels`` is none. Accuracy control
    comes last, in the order of ``sensitivity``, which is measured here where it is wanted and not given.

    Raises:
        CompressionError: see :func:`compression.quantize.qat`; or stored outputs don't fit the views and losses.
    """
    history = History()
    if isinstance(config, Ptq):
        prepared = ptq(student, dataset, config)
    else:
        prepared, history = _trained(
            student,
            dataset,
            config,
            distillation=distillation,
            panel=panel,
            seed=seed,
            augment=augment,
            checkpoint_dir=checkpoint_dir,
            on_epoch=on_epoch,
            on_step=on_step,
            hardware=hardware,
        )
    reverted = None
    if config.control is not None:
        order = (sensitivity or _measured(student, dataset, config, on_step)).worst()
        reverted = revert_layers(prepared, student, dataset, config, config.control, order=order, on_step=on_step)
        prepared, config = reverted.prepared, config.model_copy(update={"keep_float": reverted.keep_float})
    metrics = evaluate(convert(prepared), dataset.validation, dataset.preprocessing)
    return QuantizedStudent(prepared, config, history, metrics, reverted)


def _trained(
    student: nn.Module,
    dataset: Dataset,
    config: Qat,
    *,
    distillation: DistillConfig,
    panel: "Sequence[StoredOutputs]",
    seed: int,
    augment: AnyAugment,
    checkpoint_dir: Path | None,
    on_epoch: Callable[[dict[str, float]], None] | None,
    on_step: Callable[[int, int], None] | None,
    hardware: Hardware | None,
) -> tuple[FakeQuantized, History]:
    losses = config.losses_for(distillation)
    check_panel(panel, dataset, distillation.model_copy(update={"losses": losses}), augment)
    live = [copy.deepcopy(student).eval()]
    step = DistillationStep(losses, distillation.teachers, panel, live, epochs=config.train.epochs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        step.prepare(student, dataset)
    if distillation.labels == "none":
        dataset = without_labels(dataset)
    return qat(
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
        hardware=hardware,
    )


def _measured(
    student: nn.Module, dataset: Dataset, config: AnyQuantizer, on_step: Callable[[int, int], None] | None
) -> Sensitivity:
    images, calibration = (
        normalise(torch.as_tensor(split.images[:count]), dataset.preprocessing)
        for split, count in (
            (dataset.validation, IMAGES_FOR_ORDER),
            (dataset.calibration, config.calibration_images),
        )
    )
    labels = torch.as_tensor(dataset.validation.labels[:IMAGES_FOR_ORDER])
    return measure(
        student,
        dataset.input_shape,
        images,
        labels,
        config,
        calibration=calibration,
        formats=("int8",),
        on_step=on_step,
    )


def save_quantized(prepared: FakeQuantized, folder: Path, config: AnyQuantizer | None = None) -> None:
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
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        config: AnyQuantizer = TypeAdapter(AnyQuantizer).validate_json(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Quantized checkpoint '{folder}' has no readable {CONFIG_FILE}, expected the quantizer's"
            " settings. Run the quantize stage again."
        ) from error
    return StoredStudent(load_prepared(folder / STATE_FILE, model, spec.input_shape, config))
