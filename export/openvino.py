"""OpenVINO files from our ONNX files, for Intel CPUs, GPUs and NPUs; needs the extra ``openvino``.

INT8 goes over in the symmetric form: there OpenVINO runs convolutions and most linear layers in 8 bits, while uint8
weights, which ONNX Runtime likes on older CPUs, keep its convolutions in float.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError
from export.onnx_graph import check_graph

PACKAGE = "openvino"
GRAPH, WEIGHTS = "model.xml", "model.bin"


@dataclass(frozen=True)
class OpenVinoInfo:
    """An OpenVINO graph and its weights."""

    graph: Path
    weights: Path
    size_bytes: int
    """Of both files."""
    version: str
    """Of the OpenVINO that converted it; newer ones read it too."""


def import_openvino() -> ModuleType:
    """The module.

    Raises:
        ExportError: it isn't installed; says how to get it.
    """
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise ExportError(
            "A target has kind openvino, expected its package installed: pip install 'stillhouse[openvino]'."
            " Targets of kind onnxruntime run without it."
        ) from error
    return openvino


def to_openvino(source: Path, folder: Path) -> OpenVinoInfo:
    """Facts about ``model.xml`` and ``model.bin``, converted from an ONNX file; both appear or neither.

    Weights keep their type: nothing is rounded to float16 on the way.

    Args:
        source: A float32 graph, or one in symmetric INT8 form.
        folder: Where the two files go.

    Raises:
        ExportError: OpenVINO isn't installed, or refuses the graph.
    """
    openvino = import_openvino()
    check_graph(source)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / GRAPH
        try:
            openvino.save_model(openvino.convert_model(str(source)), str(made), compress_to_fp16=False)
        except Exception as error:
            raise ExportError(
                f"Graph '{source.name}' has something OpenVINO refuses: {error}. Serve the ONNX file instead."
            ) from error
        for name in (WEIGHTS, GRAPH):
            made.with_name(name).replace(folder / name)
    places = (folder / GRAPH, folder / WEIGHTS)
    return OpenVinoInfo(
        graph=places[0],
        weights=places[1],
        size_bytes=sum(place.stat().st_size for place in places),
        version=str(openvino.__version__).partition("-")[0],
    )


class OpenVinoSession:
    """A converted graph on this CPU, in the arithmetic of its file: float layers stay float32."""

    def __init__(self, graph: Path, *, threads: int = 1) -> None:
        """Load ``graph``, an .xml with its .bin beside it.

        Raises:
            ExportError: OpenVINO isn't installed, or can't load the graph.
        """
        openvino = import_openvino()
        # Without the hint, CPUs with bfloat16 instructions compute float layers in bfloat16.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        try:
            self._model: Any = openvino.Core().compile_model(str(graph), "CPU", options)
        except Exception as error:
            raise ExportError(
                f"Graph '{graph.name}' has content OpenVINO refuses: {error}. Convert it again."
            ) from error

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [N, classes] of normalised images [N, C, H, W] float32, in one call."""
        result = self._model([np.ascontiguousarray(images, np.float32)])
        return np.array(result[0], dtype=np.float32)

    def layer_types(self) -> dict[str, int]:
        """How many layers with weights run in which type: ``u8`` and ``i8`` are integers."""
        counts: dict[str, int] = {}
        for layer in self._model.get_runtime_model().get_ops():
            about = layer.get_rt_info()
            if "layerType" in about and about["layerType"].astype(str) in ("Convolution", "FullyConnected"):
                kind = about["runtimePrecision"].astype(str)
                counts[kind] = counts.get(kind, 0) + 1
        return counts
