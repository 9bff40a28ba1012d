"""What ONNX Runtime makes of a file: operators before and after its optimisation, and the time each one takes.

Node names map to layers: our exports call a node ``<module path>/<operator>``, PyTorch's tracing exporter
``/<module>/<module path>/<operator>``; a file of another tool keeps its own node names. The runtime renames what it
fuses; names of nodes and tensors are followed back to the stored graph.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compression.types import Frozen
from export.benchmark import run_child
from export.feed import Shapes
from export.onnx_graph import load_graph
from export.runtime import FLOAT_OPS, INTEGER_OPS, constants_of, is_weighted, weight_input

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Kind = Literal["integer", "float", "conversion"]
"""What an operator works with: integers, floats, or the way between number formats and memory layouts."""

CONVERSIONS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "ReorderInput", "ReorderOutput"}
    | {"Transpose"}
)
WHOLE_NUMBERS = frozenset({"int8", "uint8", "int4", "uint4"})
SUFFIXES = re.compile(r"(_token_\d+|/duplicated\w*|_nchwc)+$")
PREFIXES = re.compile(r"^(InsertedPrecisionFreeCast_|InsertedCast_)")


class NodeTime(Frozen):
    """One operator of the graph the runtime executes."""

    name: str
    operator: str
    kind: Kind
    layer: str
    """Module path of the layer it came from; empty when the runtime put it in or the file names none."""
    microseconds: float
    """In one call: the mean of the middle half of the calls, less the profiler's own time."""
    share: float
    """Of the time of all operators, 0..1."""
    macs: int | None = None
    """Multiplications in one call; for layers with weights."""


class OperatorTime(Frozen):
    """All operators of one type."""

    operator: str
    kind: Kind
    count: int
    microseconds: float
    share: float
    """Of the time of all operators, 0..1."""


class OperatorProfile(Frozen):
    """Where one call spends its time."""

    batch: int
    threads: int
    calls: int
    """Profiled calls."""
    call_us: float
    """One call without the profiler, in microseconds."""
    nodes: tuple[NodeTime, ...]
    """In order of execution."""

    def by_operator(self) -> list[OperatorTime]:
        """Time per operator type and kind, dearest first."""
        groups: dict[tuple[str, Kind], list[NodeTime]] = {}
        for node in self.nodes:
            groups.setdefault((node.operator, node.kind), []).append(node)
        rows = [
            OperatorTime(
                operator=operator,
                kind=kind,
                count=len(nodes),
                microseconds=sum(node.microseconds for node in nodes),
                share=sum(node.share for node in nodes),
            )
            for (operator, kind), nodes in groups.items()
        ]
        return sorted(rows, key=lambda row: (-row.share, row.operator))

    def share_of(self, kind: Kind) -> float:
        """Share of the operators' time that goes to one kind, 0..1."""
        return sum(node.share for node in self.nodes if node.kind == kind)

    def share_of_layers(self, layers: Iterable[str]) -> float:
        """Share of the operators' time in the layers of these names, 0..1."""
        wanted = set(layers)
        return sum(node.share for node in self.nodes if node.layer in wanted)

    @property
    def macs(self) -> int:
        """Multiplications of one call."""
        return sum(node.macs or 0 for node in self.nodes)


class Histogram(Frozen):
    """Operators of a file as it is stored, and of the graph the runtime makes of it."""

    stored: dict[str, int]
    optimised: dict[str, int]

    def rows(self) -> list[tuple[str, int, int]]:
        """(operator, stored, optimised), most frequent first."""
        names = {*self.stored, *self.optimised}
        rows = [(name, self.stored.get(name, 0), self.optimised.get(name, 0)) for name in names]
        return sorted(rows, key=lambda row: (-max(row[1:]), row[0]))


class Operators(Frozen):
    """Histogram, integer layers and profile of one file."""

    histogram: Histogram
    profile: OperatorProfile
    integer_layers: tuple[str, ...]
    """Layers with weights that run as integer kernels."""
    float_layers: tuple[str, ...]
    """Layers with weights that run in float."""

    @property
    def integer_share(self) -> float:
        """Integer layers over all layers with weights, 0..1; 0 without any."""
        total = len(self.integer_layers) + len(self.float_layers)
        return len(self.integer_layers) / total if total else 0.0


def profile_operators(
    path: Path,
    *,
    threads: int = 1,
    batch: int | None = 1,
    shapes: Shapes | None = None,
    seed: int = 0,
    seconds: float = 0.3,
) -> Operators:
    """What ONNX Runtime really runs, and for how long, measured in a process of its own with pinned threads.

    Args:
        path: Any ONNX file.
        threads: Of the session.
        batch: Images per call; None takes what the file is fixed to, or 1.
        shapes: Sizes of inputs that are open beyond the batch.
        seed: Of the inputs.
        seconds: About how long to profile.

    Raises:
        ExportError: the file is missing, cannot be loaded, or does not run at this batch size.
    """
    stored = load_graph(path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given = _with_names(stored, path, folder)
        job = {"path": str(given), "optimized": str(folder / "optimized.onnx"), "threads": threads, "batch": batch}
        job |= {"shapes": dict(shapes or {}), "seed": seed, "seconds": seconds}
        (folder / "job.json").write_text(json.dumps(job))
        run_child("profile", str(folder / "job.json"), str(folder / "out.json"), threads=threads)
        facts = json.loads((folder / "out.json").read_text())
        optimised = load_graph(folder / "optimized.onnx")
    return operators_of(stored, optimised, facts, threads=threads)


def operators_of(
    stored: "ModelProto", optimised: "ModelProto", facts: Mapping[str, Any], *, threads: int = 1
) -> Operators:
    """The answer of ``export.timing.profile`` in terms of layers; a pure function.

    Args:
        stored: The graph of the file.
        optimised: The graph the runtime executes.
        facts: What ``export.timing.profile`` says.
        threads: Of the session.
    """
    layers = LayerNames(stored.graph)
    names = layers.follow(optimised.graph)
    nodes = {node.name: node for node in optimised.graph.node}
    constants = constants_of(optimised.graph)
    times = _without_profiler([row["microseconds"] for row in facts["nodes"]], facts["call_us"])
    total = sum(times) or 1.0
    timed = tuple(
        NodeTime(
            name=row["name"],
            operator=row["operator"],
            kind=kind_of(row["operator"], row["types"]),
            layer=names.get(row["name"], ""),
            microseconds=time,
            share=time / total,
            macs=_macs(nodes.get(row["name"]), constants, layers.sizes.get(names.get(row["name"], "")), row["shape"]),
        )
        for row, time in zip(facts["nodes"], times, strict=True)
    )
    weighted = [node for node in optimised.graph.node if is_weighted(node, constants)]
    shown = [(node, names.get(node.name) or node.name or node.output[0]) for node in weighted]
    return Operators(
        histogram=Histogram(stored=count(stored.graph), optimised=count(optimised.graph)),
        profile=OperatorProfile(
            batch=facts["batch"], threads=threads, calls=facts["calls"], call_us=facts["call_us"], nodes=timed
        ),
        integer_layers=tuple(layer for node, layer in shown if node.op_type in INTEGER_OPS),
        float_layers=tuple(layer for node, layer in shown if node.op_type in FLOAT_OPS),
    )


def count(graph: "GraphProto") -> dict[str, int]:
    """Nodes per operator."""
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def kind_of(operator: str, types: Iterable[str]) -> Kind:
    """What an operator works with, from its name and the element types of its inputs."""
    if operator in CONVERSIONS:
        return "conversion"
    if operator in INTEGER_OPS or operator.startswith("QLinear"):
        return "integer"
    return "integer" if next(iter(types), "") in WHOLE_NUMBERS else "float"


def layer_of(node: "NodeProto") -> str:
    """Module path in the name of a node; the whole name where it holds none, empty for a node at the top."""
    name = node.name
    if name.startswith("/"):
        parts: list[str] = []
        for part in name.split("/")[1:-1]:
            inside = bool(parts) and part.startswith(f"{parts[-1]}.")  # "blocks/blocks.1" is one step
            parts[-1 if inside else len(parts) :] = [part]
        return ".".join(parts)
    path, slash, _ = name.rpartition("/")
    return path if slash else name


class LayerNames:
    """The layers with weights of a stored graph, and how to find them again in what the runtime made of it."""

    def __init__(self, graph: "GraphProto") -> None:
        constants = constants_of(graph)
        self.by_node: dict[str, str] = {node.name: layer_of(node) for node in graph.node if node.name}
        self.by_weight: dict[str, str] = {}
        """Stored weight -> layer, for weights of one layer only."""
        self.sizes: dict[str, tuple[int, ...]] = {}
        """Layer -> sizes of its weight, output channels first (a matrix product: as stored)."""
        self.weighted: dict[str, str] = {}
        """Output tensor of a layer with weights -> layer."""
        self._makers = {name: node for node in graph.node for name in node.output}
        stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        shared: Counter[str] = Counter()
        for node in graph.node:
            if not is_weighted(node, constants):
                continue
            layer = layer_of(node) or node.name or node.output[0]
            self.by_node[node.name] = self.weighted[node.output[0]] = layer
            weight = self.source(weight_input(node))
            shared[weight] += 1
            self.by_weight[weight] = layer
            if weight in stored:
                self.sizes[layer] = stored[weight]
        self.by_weight = {name: layer for name, layer in self.by_weight.items() if shared[name] == 1}

    def source(self, tensor: str) -> str:
        """The stored tensor behind quantizers, casts, Identity, ..."""
        while (maker := self._makers.get(tensor)) is not None and maker.input:
            tensor = maker.input[0]
        return tensor

    def follow(self, graph: "GraphProto") -> dict[str, str]:
        """Node of the optimised graph -> layer."""
        constants = constants_of(graph)
        found: dict[str, str] = {}
        unclear: list[tuple[str, str]] = []
        for node in graph.node:
            weighted = is_weighted(node, constants)
            names = [each for name in (node.name, *node.output) for each in (name, _plain(name))]
            known = next((each for each in names[:2] if each in self.by_node), None)
            made = next((each for each in names if each in self._makers), None)
            if weighted and weight_input(node) in self.by_weight:
                found[node.name] = self.by_weight[weight_input(node)]
            elif known is not None:
                found[node.name] = self.by_node[known]
            elif made is not None and weighted:
                unclear.append((node.name, made))  # fused with what follows: its name is that of the last result
            elif made is not None:
                found[node.name] = layer_of(self._makers[made])
        taken = {found[node.name] for node in graph.node if node.name in found and is_weighted(node, constants)}
        behind = {name: self._behind(made) for name, made in unclear}
        while behind:  # first those with one layer behind them; a sum has two, of which one has its own node
            behind = {name: [layer for layer in layers if layer not in taken] for name, layers in behind.items()}
            name = min(behind, key=lambda each: len(behind[each]) or len(behind) + len(self.weighted))
            layers = behind.pop(name)
            if layers:
                found[name] = layers[0]
                taken.add(layers[0])
        return found

    def _behind(self, tensor: str) -> list[str]:
        """Layers with weights whose results reach ``tensor`` without passing another one."""
        layers, seen, queue = [], set(), [tensor]
        while queue:
            name = queue.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if name in self.weighted:
                layers.append(self.weighted[name])
            elif name in self._makers:
                queue.extend(self._makers[name].input)
        return layers


def _plain(name: str) -> str:
    """A name without what the runtime added to it."""
    return SUFFIXES.sub("", PREFIXES.sub("", name))


def _with_names(proto: "ModelProto", path: Path, folder: Path) -> Path:
    """The file itself, or a copy in which every node has a name of its own: the profiler knows nodes by name only."""
    import onnx

    names = Counter(node.name for node in proto.graph.node)
    if "" not in names and max(names.values()) == 1:
        return path
    for number, node in enumerate(proto.graph.node):
        if not node.name or names[node.name] > 1:
            node.name = f"{node.name or node.op_type}#{number}"
    named = folder / "named.onnx"
    onnx.save(proto, str(named), save_as_external_data=proto.ByteSize() > 2**30)
    return named


def _without_profiler(times: list[float], call_us: float) -> list[float]:
    """Times less what the profiler took, about the same for every operator; a tenth of each is kept at least."""
    extra = (sum(times) - call_us) / max(len(times), 1)
    return [max(time - extra, 0.1 * time) for time in times] if extra > 0 else times


def _macs(
    node: "NodeProto | None", constants: set[str], weight: tuple[int, ...] | None, output: list[int]
) -> int | None:
    """Multiplications of a layer with weights, from its stored weight and the sizes of its result."""
    if node is None or weight is None or not output or not is_weighted(node, constants):
        return None
    elements = 1
    for size in weight:
        elements *= size
    if len(weight) <= 2:
        return elements * _product(output[:-1])
    last = any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute)
    positions = _product(output) // max(output[-1] if last else output[1], 1)
    if node.op_type == "ConvTranspose":  # each input position is used; with stride s there are s * s times fewer
        strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [1])
        positions //= max(_product(strides), 1)
    return elements * positions


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
