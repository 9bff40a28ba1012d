"""From a torch module to one checked .onnx file: dynamic batch, known opset, metadata inside."""

import ast
import copy
import hashlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compression.errors import ExportError

if TYPE_CHECKING:
    import onnx

LOGGER = logging.getLogger(__name__)

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
OPSET = 20
MAX_BYTES = 2**31 - 1
"""A protobuf message ends here, and with it a one-file ONNX graph."""


@dataclass(frozen=True)
class GraphInfo:
    """What an .onnx file holds."""

    path: Path
    opset: int
    nodes: dict[str, int]
    """Node count per operator."""
    size_bytes: int
    sha256: str


class _HalfInside(nn.Module):
    """The model in float16 between float32 images and float32 logits: callers see one interface."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.half()).float()


def to_onnx(
    module: nn.Module,
    path: Path,
    *,
    input_shape: tuple[int, int, int],
    metadata: Mapping[str, str],
    opset: int = OPSET,
    precision: Literal["float32", "float16"] = "float32",
    fast: bool = False,
) -> GraphInfo:
    """Facts about the one-file ONNX graph written to ``path``, which maps images to logits.

    Input ``images`` is [batch, C, H, W] float32 and output ``logits`` [batch, classes] float32 whatever
    the precision inside; batch is dynamic. Nodes are called ``<path of the torch module>/<operator>``, so that
    graphs, profiles and tables speak of the same layers; a quantizer goes by the module whose output it rounds.
    The file holds no source paths, and the same weights give the same bytes. It appears whole or not at all.

    Args:
        module: A model in eval mode, or a converted quantized graph module (``precision`` float32 only).
        path: Where the file goes; its folder is made.
        input_shape: Channels, height, width.
        metadata: Stored in the file (class names, preprocessing, lineage), see ``metadata_of``.
        opset: Asserted after export, since the exporter silently keeps 18 for smaller requests.
        precision: Type of weights and arithmetic inside.
        fast: Use the tracing exporter, for latency probes inside a search: many times faster to write,
            same arithmetic and speed in ONNX Runtime. It can't export quantized modules; never ship it.

    Raises:
        ExportError: the exporter refused the model, gave another opset, or the graph fails the checker.
    """
    name = type(module).__name__
    if precision == "float16":
        if any(isinstance(part, GraphModule) for part in module.modules()):
            raise ExportError(
                f"Module '{name}' has quantized weights, expected a float model for float16."
                " Export it as float32, or export the model it was made from."
            )
        module = _HalfInside(module)
    was_training = module.training
    if not isinstance(module, GraphModule):
        module.eval()
    # Batch 2: with 1 the exporter may take the batch for a constant.
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if weight is None else weight.device
    example = torch.zeros(2, *input_shape, device=device)
    try:
        with _quiet():
            proto = (_traced if fast else _exported)(module, example, opset)
    except Exception as error:
        raise ExportError(
            f"Model '{name}' has something the ONNX exporter refuses: {_first_line(error)}."
            " Replace that operation, or leave this model out."
        ) from error
    finally:
        if was_training and not isinstance(module, GraphModule):
            module.train()
    _name_nodes(proto, prefix="model." if precision == "float16" else "")
    _strip_debug(proto)
    save_graph(proto, path, metadata=metadata)
    info = check_graph(path)
    if info.opset != opset:
        path.unlink()
        raise ExportError(f"Graph '{path.name}' has opset {info.opset}, expected {opset}. Ask for opset 18 or newer.")
    return info


def check_graph(path: Path) -> GraphInfo:
    """Facts about a stored graph, after the ONNX checker with shape inference accepted it.

    Raises:
        ExportError: the file is missing, is no ONNX graph, or breaks the standard.
    """
    import onnx

    proto = load_graph(path)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(
            f"Graph '{path.name}' has a defect: {_first_line(error)}, expected a valid ONNX graph. Export it again."
        ) from error
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    data = path.read_bytes()
    return GraphInfo(
        path=path,
        opset=opset,
        nodes=dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata stored in a graph by ``to_onnx``."""
    return {entry.key: entry.value for entry in load_graph(path).metadata_props}


def load_graph(path: Path) -> "onnx.ModelProto":
    """The parsed graph.

    Raises:
        ExportError: the file is missing or is no ONNX graph.
    """
    import onnx

    if not path.is_file():
        raise ExportError(f"Graph '{path}' has no file, expected an .onnx file. Export it first.")
    try:
        proto = onnx.load(str(path))
    except Exception as error:
        raise ExportError(
            f"Graph '{path.name}' has unreadable content ({_first_line(error)}), expected an ONNX graph."
            " Export it again."
        ) from error
    if not proto.graph.node:
        raise ExportError(f"Graph '{path.name}' has no nodes, expected an ONNX graph. Export it again.")
    return proto


def save_graph(proto: "onnx.ModelProto", path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a graph whole or not at all; ``metadata`` replaces what the graph held, None keeps it.

    Raises:
        ExportError: the graph is larger than one file can be.
    """
    import onnx

    if metadata is not None:
        onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise ExportError(f"Graph '{path.name}' has {size} bytes, expected at most {MAX_BYTES}. Use a smaller model.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(proto.SerializeToString(deterministic=True))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _exported(module: nn.Module, example: Tensor, opset: int) -> "onnx.ModelProto":
    shapes = ({0: torch.export.Dim("batch")},)
    source: nn.Module | torch.export.ExportedProgram = module
    if body := next((part for part in module.modules() if isinstance(part, GraphModule)), None):
        source = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        _pass_on_module_paths(body, source)
    program = torch.onnx.export(
        source,
        (example,),
        dynamo=True,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=shapes,
        opset_version=opset,
        verbose=False,
    )
    if program is None:  # pragma: no cover - only without dynamo
        raise ExportError("The exporter has no result, expected a program. Update torch.")
    return cast("onnx.ModelProto", program.model_proto)


def _traced(module: nn.Module, example: Tensor, opset: int) -> "onnx.ModelProto":
    import io

    import onnx

    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        (example,),
        buffer,  # pyright: ignore[reportArgumentType]  # the tracing exporter writes to a file object
        dynamo=False,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
        opset_version=opset,
        verbose=False,
    )
    return onnx.load_model_from_string(buffer.getvalue())


def _pass_on_module_paths(graph: GraphModule, program: "torch.export.ExportedProgram") -> None:
    """Write the module paths that ``graph`` remembers into its second capture, which has forgotten them.

    The operators of both are the same, in the same order; where they are not, nothing is written.
    """
    old = [node for node in graph.graph.nodes if _is_operator(node)]
    new = [node for node in program.graph.nodes if _is_operator(node)]
    targets, wanted = [node.target for node in new], [node.target for node in old]
    start = next((i for i in range(len(new)) if targets[i : i + len(old)] == wanted), None)
    if start is None or not old:
        return
    stacks: dict[torch.fx.Node, Any] = {}
    for node in old:
        stacks[node] = node.meta.get("nn_module_stack") or next(
            (stacks[source] for source in node.all_input_nodes if stacks.get(source)), None
        )
    for node in reversed(old):  # a weight's quantizer belongs to the layer that reads the weight
        stacks[node] = stacks[node] or next((stacks[user] for user in node.users if stacks.get(user)), None)
    for source, node in zip(old, new[start : start + len(old)], strict=True):
        if stacks[source]:
            node.meta["nn_module_stack"] = dict(stacks[source])


def _is_operator(node: torch.fx.Node) -> bool:
    """Whether a node computes tensors; sizes and guards move between captures."""
    sizes = str(node.target).startswith(("aten.sym_", "aten._assert"))
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not sizes


def _name_nodes(proto: "onnx.ModelProto", *, prefix: str = "") -> None:
    """Call every node ``<module path>/<operator>``, a second one of the same name ``..._1``, and so on.

    A convolution goes by its weight: the exporter says of one that took in a batch norm that it was the norm.
    """
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    paths: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for node in graph.node:
        path = _scope(node)
        weight, _, parameter = node.input[1].rpartition(".") if len(node.input) > 1 else ("", "", "")
        if node.op_type.startswith("Conv") and parameter == "weight" and node.input[1] in weights:
            path = weight
        if path is None:  # made by a rewrite of the exporter: it goes by its source
            path = next((paths[name] for name in node.input if name in paths), "")
        path = f"{path}.".removeprefix(prefix).removesuffix(".")
        paths.update(dict.fromkeys(node.output, path))
        name = f"{path}/{node.op_type}"
        node.name = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1


def _scope(node: "onnx.NodeProto") -> str | None:
    """Path of the module a node comes from, in the words of either exporter; None if it doesn't say."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    if not node.name.startswith("/"):
        return None
    parts: list[str] = []
    for part in node.name.split("/")[1:-1]:
        inside = bool(parts) and part.startswith(f"{parts[-1]}.")  # "blocks/blocks.1" is one step, blocks.1
        parts[-1 if inside else len(parts) :] = [part]
    return ".".join(parts)


def _strip_debug(proto: "onnx.ModelProto") -> None:
    """Drop stack traces and source paths: they are half of a small file, and differ between machines."""
    proto.doc_string = ""
    graph = proto.graph
    for item in [graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]
    del graph.value_info[:]
    del proto.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' deprecation and progress notes are not for our users; errors still rise."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, before, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
