"""What is rounded to integers, and how its range is found; shared by every quantizer."""

from typing import Annotated, Literal

from pydantic import Field

from compression.types import Frozen

Calibration = Literal["min_max", "percentile", "entropy", "mse"]


class NumberFormat(Frozen):
    """Symmetric integers: bits, ranges, and the layers that stay in float."""

    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    """8 uses -127..127. 7 is exact on the fastest kernels of x86 CPUs without VNNI too, at half the resolution. Fewer
    bits show what they would cost; files store them as INT8 all the same."""
    calibration: Calibration = "min_max"
    """How the calibration images set the range of an activation: their extremes; the magnitude below which a share of
    the values lies; the range whose rounded histogram is nearest in divergence; or the one with the least squared
    error. Ranges other than ``min_max`` no longer move while training."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Of the magnitudes, for ``percentile``."""
    averaging: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of the newest batch in the moving ranges of activations."""
    learned_steps: bool = False
    """Train the step of every quantizer by gradient descent (LSQ, Esser et al. 2020, arXiv:1902.08153)."""
    keep_float: tuple[str, ...] = ()
    """Names of layers that stay in float, as ``sensitivity-<model>.csv`` of a run lists them; ``*`` is any text."""


INT8 = NumberFormat()
"""Eight bits everywhere, ranges from extremes."""
