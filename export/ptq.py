"""INT8 without training: ONNX Runtime's static quantization, as a control arm and for graphs of others."""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError
from export.onnx_graph import GraphInfo, check_graph, load_graph, metadata_of, save_graph
from export.qdq import WeightForm, check_symmetric, store_weights_as_uint8, weight_form
from export.runtime import cpu_features

LOGGER = logging.getLogger(__name__)

Preset = Literal["onnxruntime_x86", "tensorrt"]
Calibration = Literal["min_max", "entropy", "percentile"]
CALIBRATION_BATCH = 32
ENTROPY_BINS = 512
"""Of the histograms the entropy method searches; the runtime's own 128 leave it one range to choose, the extremes."""


def quantize_static(
    source: Path,
    target: Path,
    images: NDArray[np.float32],
    *,
    preset: Preset,
    calibration: Calibration = "min_max",
    percentile: float = 99.99,
    metadata: Mapping[str, str] | None = None,
    weights: WeightForm | None = None,
) -> GraphInfo:
    """Facts about the INT8 graph made from a float32 graph by calibration alone.

    The graph is cleaned up first (batch norm folded, shared biases copied): without that step convolutions
    behind an Identity stay in float, and the file gets slower, not faster.

    Args:
        source: A float32 graph.
        target: Where the INT8 graph goes.
        images: Normalised calibration images [N, C, H, W] float32.
        preset: ``onnxruntime_x86``: uint8 activations, integer biases. ``tensorrt``: symmetric int8, float
            biases. Weights have a scale per channel in both.
        calibration: How the images set the range of an activation: their extremes; the range whose rounded
            histogram is nearest in divergence; or the one that holds a share of the values. The latter two keep
            every activation of every image in memory.
        percentile: Of the values in range, for ``percentile``, above 50 and at most 100.
        metadata: Stored in the file; None keeps the source's.
        weights: How ``onnxruntime_x86`` writes them, see ``export.qdq.weight_form``; None: as this CPU needs.

    Raises:
        ExportError: there are no images, the percentile is out of bounds, the graph can't be quantized, or the
            result isn't what TensorRT accepts.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if len(images) == 0:
        raise ExportError("Calibration has 0 images, expected at least 1. Give the calibration split a share.")
    if not 50 < percentile <= 100:
        raise ExportError(
            f"Calibration has percentile {percentile}, expected more than 50 and at most 100. Choose 99.99 or 100."
        )
    method = {
        "min_max": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }[calibration]
    input_name = load_graph(source).graph.input[0].name
    activations, extra = QuantType.QUInt8, {}
    if preset == "tensorrt":
        activations = QuantType.QInt8
        extra = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "Add"],
        }
    if calibration == "percentile":
        extra = {**extra, "CalibPercentile": percentile}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        clean, made = Path(folder) / "clean.onnx", Path(folder) / "int8.onnx"
        try:
            quant_pre_process(str(source), str(clean), skip_symbolic_shape=True)
            cache = _entropy_ranges(clean, images, input_name) if calibration == "entropy" else None
            quantize(
                str(clean),
                str(made),
                _reader(images, input_name),
                quant_format=QuantFormat.QDQ,
                calibrate_method=method,
                calibration_cache_path=cache,
                per_channel=True,
                activation_type=activations,
                weight_type=QuantType.QInt8,
                extra_options=extra,
            )
        except Exception as error:
            raise ExportError(
                f"Graph '{source.name}' has something static quantization refuses: {error}."
                " Ship the float32 file, or train with quantization."
            ) from error
        proto = load_graph(made)
    if preset == "onnxruntime_x86" and (weights or weight_form(cpu_features())) == "uint8":
        store_weights_as_uint8(proto)
    save_graph(proto, target, metadata=metadata_of(source) if metadata is None else metadata)
    if preset == "tensorrt":
        check_symmetric(target)
    return check_graph(target)


def _entropy_ranges(graph: Path, images: NDArray[np.float32], input_name: str) -> Path:
    """Where the ranges with the nearest rounded histograms are kept, beside the graph (Migacz 2017)."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.quantize import save_tensors_data

    calibrator: Any = create_calibrator(
        str(graph),
        augmented_model_path=str(graph.with_name("augmented.onnx")),
        calibrate_method=CalibrationMethod.Entropy,
        extra_options={"num_bins": ENTROPY_BINS},
    )
    calibrator.collect_data(_reader(images, input_name))
    ranges = graph.with_name("ranges.json")
    save_tensors_data(calibrator.compute_data(), ranges)
    return ranges


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer warns through the root logger about every tensor it rightly leaves alone, and prints."""

    def serious(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root = logging.getLogger()
    root.addFilter(serious)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.removeFilter(serious)


def _reader(images: NDArray[np.float32], input_name: str) -> Any:
    """The images in batches, in the form the quantizer asks for."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Any:
            return next(self.batches, None)

        def rewind(self) -> None:
            starts = range(0, len(images), CALIBRATION_BATCH)
            self.batches = iter(
                {input_name: np.ascontiguousarray(images[start : start + CALIBRATION_BATCH], np.float32)}
                for start in starts
            )

    return Reader()
