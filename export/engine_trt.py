"""TensorRT and TensorRT-RTX engines, built ahead of time; none is run here.

Both flavours are strongly typed: the precision is that of the graph, so an INT8 engine needs a symmetric
quantized graph and a float16 engine a float16 graph. TensorRT 10 has to be asked for that, TensorRT 11 and
TensorRT-RTX know nothing else; no builder flag ever chooses a precision. What a version can't do is found by
looking whether it has the name.
"""

import hashlib
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from compression.errors import ExportError
from export.onnx_graph import check_graph, load_graph
from export.qdq import check_symmetric
from export.targets import TensorRtRtxTarget, TensorRtTarget

LOGGER = logging.getLogger(__name__)

Status = Literal["built, not run"]
_HOW_TO_GET = {
    "tensorrt_rtx": "pip install tensorrt-rtx",
    "tensorrt": "pip install 'stillhouse[tensorrt]' --extra-index-url https://pypi.nvidia.com",
}
_INTERNAL_NAME = re.compile(rb"__mye\d+")
_BUILDING = threading.Lock()
_CURRENT: dict[str, Any] = {}


@dataclass(frozen=True)
class EngineInfo:
    """What an engine file is, as far as it can be known without its GPU."""

    path: Path
    sha256: str
    size_bytes: int
    backend: str
    """tensorrt or tensorrt_rtx."""
    backend_version: str
    compute_capability: str | None
    """GPU generation it was built for; none: the GPU of the building machine."""
    precision: str
    profile: dict[str, tuple[tuple[int, ...], ...]]
    """Input name -> smallest, tuned and largest shape."""
    status: Status
    rebuild: str
    """What a second build gave, see ``compare_builds``; ``not checked`` if there was none."""
    log: tuple[str, ...]
    """Warnings of the builder."""


def build_engine(
    onnx_path: Path,
    out_path: Path,
    target: TensorRtRtxTarget | TensorRtTarget,
    *,
    compute_capability: str | None,
    input_shape: tuple[int, int, int],
    check_rebuild: bool = False,
) -> EngineInfo:
    """Facts about the engine built from a graph; the file appears whole or not at all.

    Args:
        onnx_path: A symmetric INT8 graph, or one in the number format of the target's precision.
        out_path: Where the engine goes.
        target: Backend, precision and batch range.
        compute_capability: e.g. SM86, for ``tensorrt_rtx``; None for ``tensorrt``, which builds for the GPU
            of the machine it runs on.
        input_shape: Channels, height, width.
        check_rebuild: Build twice and say whether the bytes are the same; costs the time of a build.

    Raises:
        ExportError: the backend isn't installed, the graph doesn't fit the target, or the build failed; the
            builder's own words are in the message.
    """
    _check_precision(onnx_path, target)
    backend = import_backend(target)
    shapes = tuple((batch, *input_shape) for batch in (target.min_batch, target.opt_batch, target.max_batch))
    with _BUILDING:  # one logger per process, so one build at a time
        logger = _logger(backend)
        logger.lines.clear()
        graph = onnx_path.read_bytes()
        serialised, profile = _build(backend, logger, graph, shapes, target, compute_capability)
        log, rebuild = tuple(logger.lines), "not checked"
        if check_rebuild:
            again, _ = _build(backend, logger, graph, shapes, target, compute_capability)
            rebuild = compare_builds(serialised, again)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f".{out_path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(serialised)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out_path)
    finally:
        temporary.unlink(missing_ok=True)
    return EngineInfo(
        path=out_path,
        sha256=hashlib.sha256(serialised).hexdigest(),
        size_bytes=len(serialised),
        backend=target.kind,
        backend_version=str(backend.__version__),
        compute_capability=compute_capability,
        precision=target.precision,
        profile=profile,
        status="built, not run",
        rebuild=rebuild,
        log=log,
    )


def compare_builds(first: bytes, second: bytes) -> str:
    """What two builds of one graph have in common: ``identical``, or in how many bytes they differ.

    The compiler inside TensorRT-RTX numbers its internal tensors (``__mye3282``) by an order that follows memory
    addresses. With INT8 or FP8 quantizers and a range of batch sizes the arithmetic on shapes gets other numbers in
    each process, and some bytes differ that mean nothing; a single batch size, or no quantizers, gave the same bytes
    each time. Builds that are equal once their names are numbered alike are called so.
    """
    if first == second:
        return "identical"
    if _numbered_alike(first) == _numbered_alike(second) and len(first) == len(second):
        return f"differs in {_different(first, second)} bytes, all in the numbers of internal names"
    if len(first) != len(second):
        return f"differs in size: {len(first)} and {len(second)} bytes"
    return f"differs in {_different(first, second)} bytes"


def _different(first: bytes, second: bytes) -> int:
    return int((np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)).sum())


def _numbered_alike(engine: bytes) -> bytes:
    """The engine with its internal names numbered in the order in which they appear."""
    seen: dict[bytes, bytes] = {}
    return _INTERNAL_NAME.sub(lambda name: seen.setdefault(name[0], b"__mye%d" % len(seen)), engine)


def import_backend(target: TensorRtRtxTarget | TensorRtTarget) -> ModuleType:
    """The module that builds for ``target``.

    Raises:
        ExportError: it isn't installed; says how to get it.
    """
    try:
        if target.kind == "tensorrt_rtx":
            import tensorrt_rtx as backend
        else:
            import tensorrt as backend  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise ExportError(
            f"Target '{target.name}' has kind {target.kind}, expected its package installed:"
            f" {_HOW_TO_GET[target.kind]}. Targets of kind onnxruntime run without it."
        ) from error
    return backend


def _check_precision(onnx_path: Path, target: TensorRtRtxTarget | TensorRtTarget) -> None:
    if target.precision == "int8":
        check_symmetric(onnx_path)
        return
    check_graph(onnx_path)
    from onnx import TensorProto

    wanted = {
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
        "fp8": TensorProto.FLOAT8E4M3FN,
        "int4": TensorProto.INT4,
    }[target.precision]
    weights = [tensor for tensor in load_graph(onnx_path).graph.initializer if len(tensor.dims) > 1]
    if not any(tensor.data_type == wanted for tensor in weights):
        raise ExportError(
            f"Graph '{onnx_path.name}' has no {target.precision} weights, expected some for target '{target.name}'."
            f" Export it in the form {target.precision}."
        )


def _build(
    backend: ModuleType,
    logger: Any,
    graph: bytes,
    shapes: tuple[tuple[int, ...], ...],
    target: TensorRtRtxTarget | TensorRtTarget,
    compute_capability: str | None,
) -> tuple[bytes, dict[str, tuple[tuple[int, ...], ...]]]:
    name = target.name
    try:
        builder = backend.Builder(logger)
    except (TypeError, RuntimeError):  # what the bindings make of a builder that could not be had
        builder = None
    if builder is None:
        raise ExportError(_failed(name, "no builder", logger, "a GPU that this backend supports"))
    flags = getattr(backend, "NetworkDefinitionCreationFlag", None)
    flag = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))  # outlives its parser
    parser = backend.OnnxParser(network, logger)
    if not parser.parse(graph):
        reasons = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise ExportError(
            f"Target '{name}' has a graph its parser refuses ({reasons}), expected supported operations."
            " Export the symmetric form of a supported model."
        )
    config = builder.create_builder_config()
    _configure(backend, config, target, compute_capability)
    profile = builder.create_optimization_profile()
    described = {}
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        profile.set_shape(tensor.name, *shapes)
        described[tensor.name] = shapes
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(_failed(name, "no engine", logger, "a graph this backend can build"))
    return bytes(engine), described


def _configure(
    backend: ModuleType, config: Any, target: TensorRtRtxTarget | TensorRtTarget, compute_capability: str | None
) -> None:
    """Which GPUs and versions the engine is for; never its precision."""

    def required(holder: str, name: str, what: str) -> Any:
        found = getattr(getattr(backend, holder, None), name, None)
        if found is None:
            raise ExportError(
                f"Target '{target.name}' has {what}, expected one that {target.kind} {backend.__version__} knows."
                " Choose another, or another version."
            )
        return found

    if compute_capability is not None:
        wanted = required("ComputeCapability", compute_capability, f"compute capability {compute_capability}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(wanted, 0)
    if not isinstance(target, TensorRtTarget):
        return
    if target.version_compatible:
        config.set_flag(required("BuilderFlag", "VERSION_COMPATIBLE", "version_compatible set"))
    if target.hardware_compatible != "none":
        level = target.hardware_compatible
        found = required("HardwareCompatibilityLevel", level.upper(), f"hardware_compatible {level}")
        config.hardware_compatibility_level = found


def _failed(name: str, found: str, logger: Any, expected: str) -> str:
    words = "; ".join(logger.lines[-5:]) or "the builder gave no reason"
    return f"Target '{name}' has {found} ({words}), expected {expected}. Choose another precision or device."


def _logger(backend: ModuleType) -> Any:
    """The one logger of this process: the libraries keep the first they see and ignore later ones."""
    if backend.__name__ not in _CURRENT:

        class Collector(backend.ILogger):
            def __init__(self) -> None:
                super().__init__()
                self.lines: list[str] = []

            def log(self, severity: Any, msg: str) -> None:
                kinds = getattr(backend.ILogger, "Severity", backend.ILogger)
                if severity in (kinds.INTERNAL_ERROR, kinds.ERROR, kinds.WARNING):
                    self.lines.append(msg.strip())
                    LOGGER.debug("%s", msg)

        _CURRENT[backend.__name__] = Collector()
    return _CURRENT[backend.__name__]
