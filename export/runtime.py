"""Running .onnx files on this machine, and what ONNX Runtime really makes of them."""

import logging
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compression.errors import ExportError
from compression.types import Frozen
from export.onnx_graph import INPUT_NAME, load_graph

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

LOGGER = logging.getLogger(__name__)

INTEGER_OPS = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
    | {"DynamicQuantizeMatMul"}
)
FLOAT_OPS = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
    | {"MatMulNBits"}
)
"""Operators with weights that compute in float; ``MatMulNBits`` stores its weights in few bits and does so too."""


class OnnxSession:
    """An .onnx file loaded by ONNX Runtime on exactly one provider, with a fixed number of threads."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        provider: str = "CPUExecutionProvider",
        optimized_path: Path | None = None,
        config: Mapping[str, str] | None = None,
        optimise: bool = True,
    ) -> None:
        """Load ``path``.

        Args:
            path: The graph; one input named ``images``.
            threads: Intra-op threads; the runtime's default would take every core.
            provider: Asserted after loading, since the runtime falls back to the CPU in silence.
            optimized_path: Where the runtime writes the graph it really runs.
            config: Entries of the session's configuration, see ``export.profiles.session_options``.
            optimise: Let the runtime rewrite the graph; off, it runs as the standard defines it, node by node.

        Raises:
            ExportError: the runtime can't load the graph, or loads it on another provider.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        if not path.is_file():
            raise ExportError(f"Graph '{path}' has no file, expected an .onnx file. Export it first.")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:
            raise ExportError(
                f"Graph '{path.name}' has content ONNX Runtime refuses: {error}. Export it again."
            ) from error
        found = self._session.get_providers()[0]
        if found != provider:
            raise ExportError(
                f"Graph '{path.name}' has provider {found}, expected {provider}."
                f" Install the driver that {provider} needs, or ask for {found}."
            )
        self.path = path
        self.provider = provider
        self.threads = threads
        self._input = self._session.get_inputs()[0].name

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [N, classes] of normalised images [N, C, H, W] float32, in one call."""
        (logits,) = self._session.run(None, {self._input: np.ascontiguousarray(images, dtype=np.float32)})
        return np.asarray(logits, dtype=np.float32)


def predict_fn(session: OnnxSession) -> Callable[[Tensor], Tensor]:
    """A function from normalised images [N,C,H,W] to logits [N, classes], like a model's forward."""

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(images.detach().cpu().numpy()))

    return predict


@dataclass(frozen=True)
class IntegerShare:
    """How much of a graph ONNX Runtime runs with integer kernels after its own optimisation."""

    integer: int
    """Layers with weights (convolutions, linear layers) that run as integer kernels."""
    total: int
    """All layers with weights."""
    operators: dict[str, int] = field(default_factory=dict)
    """Node count per operator of the optimised graph."""
    float_layers: tuple[str, ...] = ()
    """Names of the layers left in float."""

    @property
    def share(self) -> float:
        """Integer layers over all, 0..1; 0 for a graph without layers."""
        return self.integer / self.total if self.total else 0.0


def integer_share(path: Path, *, threads: int = 1, config: Mapping[str, str] | None = None) -> IntegerShare:
    """Count the weight layers that run as integer kernels in the graph ONNX Runtime builds from ``path``.

    A quantized file whose convolutions stay in float is slower than its float parent; file size and node
    names don't show it, the runtime's own optimised graph does. Products of two activations (attention)
    are not counted. ``config`` is that of ``OnnxSession``.

    Raises:
        ExportError: the runtime can't load the graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OnnxSession(path, threads=threads, optimized_path=optimized, config=config)
        graph = load_graph(optimized).graph
    constants = constants_of(graph)
    integer, left = 0, []
    for node in graph.node:
        if not is_weighted(node, constants):
            continue
        if node.op_type in INTEGER_OPS:
            integer += 1
        else:
            left.append(node.name or node.output[0])
    return IntegerShare(
        integer=integer,
        total=integer + len(left),
        operators=dict(sorted(Counter(node.op_type for node in graph.node).items())),
        float_layers=tuple(left),
    )


def constants_of(graph: "GraphProto") -> set[str]:
    """Names of the tensors that do not depend on the inputs."""
    constants = {tensor.name for tensor in graph.initializer} | {
        tensor.values.name for tensor in graph.sparse_initializer
    }
    for node in graph.node:  # in topological order
        if node.op_type == "Constant" or (node.input and all(name in constants for name in node.input if name)):
            constants.update(node.output)
    return constants


def weight_input(node: "NodeProto") -> str:
    """Name of the tensor that holds the weights of a convolution or matrix product, empty if there is none."""
    place = 3 if node.op_type in ("QLinearConv", "QGemm", "QLinearMatMul") else 1
    return node.input[place] if len(node.input) > place else ""


def is_weighted(node: "NodeProto", constants: set[str]) -> bool:
    """Whether a node is a convolution or matrix product with constant weights, in float or in integers."""
    return node.op_type in (INTEGER_OPS | FLOAT_OPS) and weight_input(node) in constants


class CpuFeatures(Frozen):
    """The instruction sets that decide how fast and how exact INT8 is on a CPU."""

    model: str
    """Name of the processor, as the system gives it."""
    machine: str
    """Architecture: x86_64, aarch64, ..."""
    avx2: bool = False
    """256-bit integer vectors (x86)."""
    avx512: bool = False
    """512-bit vectors (x86)."""
    vnni: bool = False
    """8-bit dot products with 32-bit sums, AVX512-VNNI or AVX-VNNI (x86)."""
    amx_int8: bool = False
    """8-bit matrix tiles (x86)."""
    dot_product: bool = False
    """8-bit dot products (ARM)."""

    @property
    def saturates(self) -> bool:
        """Whether uint8 x int8 products are summed in pairs in 16 bits, which can overflow (x86, no VNNI)."""
        return self.machine.lower() in ("x86_64", "amd64") and not self.vnni


@lru_cache(maxsize=1)
def cpu_features() -> CpuFeatures:
    """What this CPU offers; from /proc/cpuinfo, so on other systems only ``machine`` and AVX are known."""
    machine = platform.machine()
    source = Path("/proc/cpuinfo")
    if not source.is_file():
        capability = torch.backends.cpu.get_cpu_capability()
        return CpuFeatures(
            model=platform.processor() or "unknown",
            machine=machine,
            avx2=capability in ("AVX2", "AVX512"),
            avx512=capability == "AVX512",
        )
    text = source.read_text(errors="replace")
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return CpuFeatures(
        model=name.group(1).strip() if name else "unknown",
        machine=machine,
        avx2="avx2" in flags,
        avx512="avx512f" in flags,
        vnni=bool(flags & {"avx512_vnni", "avx_vnni"}),
        amx_int8="amx_int8" in flags,
        dot_product="asimddp" in flags,
    )


__all__ = [
    "INPUT_NAME",
    "CpuFeatures",
    "IntegerShare",
    "OnnxSession",
    "constants_of",
    "cpu_features",
    "integer_share",
    "is_weighted",
    "predict_fn",
    "weight_input",
]
