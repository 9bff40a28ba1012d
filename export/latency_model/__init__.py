"""Predicted latency: what one call of a network costs on this machine, without exporting or timing it.

Built once per machine, batch and image size (about a minute of CPU time) and kept as JSON. A seeded sample of the
zoo is written to ONNX and timed whole, and ONNX Runtime's profiler says what each of its kernels took. Both are rows of
one table: a bag of operators and its milliseconds. The predictor is a sum over operators of physical terms
(multiply-accumulates, elements read and written, weights, a constant for each operator and each call) whose
coefficients are not negative: least squares of the relative error over all rows. So it grows with the channels, is
fitted again in a fraction of a second, and its error on networks the fit has not seen is part of the table.

What ONNX Runtime makes of a graph counts, not what torch runs: batch norm and ReLU vanish into convolutions, as does
the add of a residual; convolutions run on blocks of channels, so counts are filled up to whole blocks; and where 4 does
not divide the channels (of a depthwise convolution, or of an input of a block and more) a slower kernel takes over.
"""

from export.latency_model.build import NETS, build_latency_model
from export.latency_model.clocks import OnnxRuntimeClock, TensorRtClock, Timing
from export.latency_model.fit import FittedLatency, held_out
from export.latency_model.on_device import (
    DeviceFactor,
    DeviceLatency,
    DevicePoint,
    add_points,
    factor_of,
    kept_latency_model,
    operators_in_blocks,
    points_of,
)
from export.latency_model.operators import in_blocks, macs_of, operators_of
from export.latency_model.sample import max_macs_of, sample_nets
from export.latency_model.table import HeldOut, LatencyTable, Row

__all__ = [
    "NETS",
    "DeviceFactor",
    "DeviceLatency",
    "DevicePoint",
    "FittedLatency",
    "HeldOut",
    "LatencyTable",
    "OnnxRuntimeClock",
    "Row",
    "TensorRtClock",
    "Timing",
    "add_points",
    "build_latency_model",
    "factor_of",
    "held_out",
    "in_blocks",
    "kept_latency_model",
    "macs_of",
    "max_macs_of",
    "operators_in_blocks",
    "operators_of",
    "points_of",
    "sample_nets",
]
