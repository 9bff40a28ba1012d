"""Post-training quantization: INT8 from calibration alone, in the graph that training would have used."""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import nn

from compression.augment import normalise
from compression.card import MethodCard
from compression.data import Dataset
from compression.quantize.control import AccuracyControl
from compression.quantize.number_format import NumberFormat
from compression.quantize.prepared import FakeQuantized, prepare_qat


class Ptq(NumberFormat):
    """INT8 without training: ranges from calibration images, everything else as the student has it."""

    kind: Literal["ptq"] = "ptq"
    calibration_images: PositiveInt = 512
    """At most this many images of the calibration split set the ranges."""
    control: AccuracyControl | None = None
    """Put layers back to float until accuracy is kept; null leaves all in INT8 but ``keep_float``."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Post-training quantization (PTQ)",
        paper="Wu et al. 2020, arXiv:2004.09602; entropy calibration: Migacz 2017, GTC, 8-bit inference with TensorRT",
        summary="Batch norm goes into the weights, weights get a range per channel from their extremes, activations "
        "one per tensor from calibration images. Same placement and same files as QAT, so that the two compare.",
        needs="A trained student and calibration images; no labels, no teachers.",
        cost="One forward pass of the calibration images; percentile, entropy and mse count a histogram besides.",
        evidence="Fashion-MNIST, four students, 2 seeds: no loss outside the interval but for entropy on a MobileNetV2 "
        "(0.5 points); mse lost least there (0.1). See docs/benchmarks.md.",
    )

    @model_validator(mode="after")
    def _nothing_learns(self) -> "Ptq":
        if self.learned_steps:
            raise ValueError("learned_steps is true, but ptq trains nothing. Take kind qat, or remove it.")
        return self


def ptq(student: nn.Module, dataset: Dataset, config: Ptq) -> FakeQuantized:
    """The calibrated fake-quantized model, in eval mode; the student stays as it is.

    Args:
        student: The trained float model.
        dataset: Its calibration split is used.
        config: Number format, and how many images.

    Raises:
        CompressionError: see :func:`compression.quantize.prepare_qat`.
    """
    images = torch.as_tensor(dataset.calibration.images[: config.calibration_images])
    return prepare_qat(student, dataset.input_shape, normalise(images, dataset.preprocessing), config)
