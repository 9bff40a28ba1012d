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

import hashlib
import itertools
import json
import logging
import math
import os
import platform
import random
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compression.errors import CompressionError, ExportError, ShapeError
from compression.features import frozen
from compression.search.space import Operator
from compression.types import Frozen
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, VisionTransformer
from export.engine_trt import build_engine, import_backend
from export.onnx_graph import to_onnx
from export.runtime import cpu_features
from export.targets import TensorRtTarget
from export.timing import feed_of, open_session

LOGGER = logging.getLogger(__name__)

NETS = 96
"""Networks that are timed for the fit; a quarter as many again are timed for the report."""
BLOCK = 16
"""Channels ONNX Runtime's convolutions take at once where the CPU has AVX-512; 8 with AVX2, 1: no blocks."""
FORMAT = 1
"""Version of the table and of what its operators mean; another one is measured anew."""

InputShape = tuple[int, int, int]
OperatorRow = tuple[str, int, int, int, int, int, int, int]
"""The fields of an ``Operator``, in order."""


# --- operators of a network

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "BatchMatMul"})
_ROW_BY_ROW = frozenset({"Softmax", "LayerNormalization"})
_FOLDED = frozenset({"relu", "sigmoid", "tanh", "hardtanh", "clamp", "clamp_min", "leaky_relu"})
_VIEWS = frozenset(
    "view _unsafe_view reshape _reshape_alias expand alias detach unsqueeze squeeze select slice t clone contiguous "
    "_to_copy as_strided native_dropout dropout".split()
)
_NAMES = {
    "relu": "Relu",
    "hardtanh": "Clip",
    "clamp": "Clip",
    "clamp_min": "Clip",
    "_softmax": "Softmax",
    "native_layer_norm": "LayerNormalization",
    "native_group_norm": "GroupNormalization",
    "native_batch_norm": "BatchNormalization",
    "_native_batch_norm_legit_no_training": "BatchNormalization",
    "cat": "Concat",
    "transpose": "Transpose",
    "permute": "Transpose",
    "unbind": "Split",
    "split": "Split",
    "split_with_sizes": "Split",
    "max_pool2d_with_indices": "MaxPool",
    "avg_pool2d": "AveragePool",
    "_adaptive_avg_pool2d": "AveragePool",
    "mean": "ReduceMean",
}


def operators_of(model: nn.Module, input_shape: InputShape, *, block: int = BLOCK) -> list[Operator]:
    """The operators ONNX Runtime will run for one image, in order; one forward pass, milliseconds for a small net.

    Kinds are ONNX names, and beside them ``FusedAdd`` (a residual added inside a convolution), ``BatchMatMul`` (a
    product of two activations, channels summed over its ``groups``), ``Reorder`` (into channel blocks or out of them)
    and ``Attention`` (the small operators around one attention). Tokens are ``height``, with ``width`` 1. A mean over
    an image has the ``kernel`` of that area. Views, constants and what is folded away are left out. ``model`` is
    unchanged.
    """
    like = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    recorder = _Recorder(image, block)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator would hide the products inside
    try:
        with frozen(model), torch.no_grad(), recorder:
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return [operator for operator in recorder.operators if operator is not None]


def macs_of(operators: Sequence[Operator]) -> int:
    """Multiply-accumulates for one image."""
    return sum(
        each.height * each.width * each.kernel**2 * each.in_channels * each.out_channels // each.groups
        for each in operators
        if each.kind in _PRODUCTS
    )


def in_blocks(operator: Operator, block: int) -> bool:
    """Whether ONNX Runtime runs this convolution on channels in blocks of ``block``, its fast way."""
    if operator.kind != "Conv" or block == 1:
        return False
    inputs, outputs = operator.in_channels // operator.groups, operator.out_channels // operator.groups
    if operator.groups == 1:
        return inputs < block or inputs % 4 == 0
    if inputs == outputs == 1:
        return operator.in_channels % 4 == 0
    return inputs % block == 0 and outputs % block == 0


@dataclass
class _Trace:
    """What is known of an activation while a network is looked at."""

    blocked: bool = False
    """Its channels lie in blocks."""
    takes_add: bool = False
    """The convolution behind it can still add a residual."""
    takes_activation: bool = False
    """The convolution behind it can still apply an activation."""
    bias: int | None = None
    """Place of the bias it was given as an operator of its own."""


class _Recorder(TorchDispatchMode):
    """Watches one forward pass and notes what ONNX Runtime will run in its place."""

    def __init__(self, image: Tensor, block: int) -> None:
        super().__init__()
        self.block = block
        self.operators: list[Operator | None] = []
        self._traces = {id(image): _Trace()}
        self._alive: list[Tensor] = [image]  # an id is free again as soon as its tensor is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, Tensor)]
        if args and isinstance(args[0], list | tuple):
            given += [each for each in args[0] if isinstance(each, Tensor)]
        results = [found] if isinstance(found, Tensor) else [each for each in found or () if isinstance(each, Tensor)]
        if results and any(id(each) in self._traces for each in given):
            trace = self._seen(func.overloadpacket.__name__.removesuffix("_"), args, given, results[0])
            for each in results:
                self._alive.append(each)
                self._traces[id(each)] = trace
        return found

    def _trace(self, tensor: Tensor) -> _Trace:
        return self._traces.get(id(tensor), _Trace())

    def _note(self, kind: str, tensor: Tensor, kernel: int = 1) -> int:
        """Notes an operator as large as ``tensor``; its place."""
        if tensor.dim() == 4 and kind not in _ROW_BY_ROW:
            channels, height, width = tensor.shape[1:]
        else:
            channels, width = (tensor.shape[-1] if tensor.dim() else 1), 1
            height = tensor.numel() // max(channels, 1)
        self.operators.append(Operator(kind, channels, channels, height, width, kernel))
        return len(self.operators) - 1

    def _unblocked(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if (trace := self._trace(tensor)).blocked:
                self._note("Reorder", tensor)
                trace.blocked = False

    def _seen(self, name: str, args: tuple[Any, ...], given: list[Tensor], result: Tensor) -> _Trace:
        first = self._trace(given[0])
        if name == "convolution":
            return self._convolution(args, result)
        if name.startswith("_scaled_dot_product"):
            return self._attention(*given[:3])
        if name in ("addmm", "mm", "bmm", "baddbmm"):
            return self._product(name, given, result)
        if _NAMES.get(name) == "BatchNormalization" and first.takes_activation:
            return first
        if name in _FOLDED and first.takes_activation:
            return _Trace(first.blocked)
        if name in _VIEWS:
            if result.shape != given[0].shape:
                self._unblocked(given)
            return first
        if name == "add" and len(given) == 2 and given[0].shape == given[1].shape:
            pair = [self._trace(each) for each in given]
            if all(each.blocked for each in pair):
                fused = any(each.takes_add for each in pair)
                self._note("FusedAdd" if fused else "Add", result)
                return _Trace(blocked=True, takes_activation=fused)
        return self._other(name, args, given, result)

    def _convolution(self, args: tuple[Any, ...], result: Tensor) -> _Trace:
        images, weight, stride, groups = args[0], args[1], args[3][0], args[8]
        height, width = result.shape[2:]
        operator = Operator(
            "Conv", images.shape[1], result.shape[1], height, width, max(weight.shape[2:]), stride, groups
        )
        blocked = in_blocks(operator, self.block)
        if blocked and (groups > 1 or operator.in_channels >= self.block):
            if not self._trace(images).blocked:
                self._note("Reorder", images)
        else:
            self._unblocked([images])
        self.operators.append(operator)
        return _Trace(blocked, takes_add=blocked, takes_activation=True)

    def _product(self, name: str, given: list[Tensor], result: Tensor) -> _Trace:
        self._unblocked(given)
        left, right = given[-2:]
        if name in ("bmm", "baddbmm"):
            self._batched(left.shape[0], left.shape[1], left.shape[2], right.shape[2])
            return _Trace()
        kind = "MatMul" if left.shape[0] > 1 else "Gemm"
        self.operators.append(Operator(kind, left.shape[1], right.shape[1], left.shape[0], 1))
        return _Trace(bias=self._note("Add", result)) if name == "addmm" and kind == "MatMul" else _Trace()

    def _batched(self, groups: int, rows: int, inner: int, columns: int) -> None:
        self.operators.append(Operator("BatchMatMul", groups * inner, groups * columns, rows, 1, groups=groups))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> _Trace:
        heads, tokens, inner = query.shape[1:]
        others, width = key.shape[2], heads * inner
        self.operators += [
            Operator("Attention", width, width, tokens, 1, groups=heads),
            Operator("Mul", width, width, tokens, 1),
            Operator("Mul", width, width, others, 1),
        ]
        self._batched(heads, tokens, inner, others)
        self.operators.append(Operator("Softmax", others, others, heads * tokens, 1))
        self._batched(heads, tokens, others, value.shape[3])
        return _Trace()

    def _other(self, name: str, args: tuple[Any, ...], given: list[Tensor], result: Tensor) -> _Trace:
        first = self._trace(given[0])
        kind = _NAMES.get(name, name.strip("_").title().replace("_", ""))
        stays = first.blocked and (kind in ("MaxPool", "AveragePool") or name in _FOLDED)
        if not stays:
            self._unblocked(given)
        if kind == "ReduceMean":
            area = given[0].numel() // max(result.numel(), 1)
            self._note(kind, result.reshape(1, -1, 1, 1), kernel=max(1, round(math.sqrt(area))))
        elif kind in ("MaxPool", "AveragePool"):
            size = args[1][0] if isinstance(args[1], list | tuple) else args[1]
            self._note(kind, result, kernel=given[0].shape[2] // result.shape[2] if name[0] == "_" else size)
        elif kind == "Gelu" and first.bias is not None:
            self.operators[first.bias] = None  # runs inside the activation
            self._note(kind, result)
        else:
            place = self._note(kind, given[0] if kind == "Split" else result)
            if kind == "Add" and len(given) == 2 and given[1].dim() == 1:
                return _Trace(bias=place)
        return _Trace(blocked=stays)


# --- networks to learn from

_FAMILIES = ("residual", "plain", "depthwise", "transformer", "residual", "plain", "depthwise", "mixer")
_LARGE = 64  # sides from here on are halved early
_TRIES = 30


def sample_nets(
    count: int, input_shape: InputShape, *, seed: int | str, max_macs: float
) -> Iterator[tuple[str, nn.Module]]:
    """``count`` networks of the zoo, family by family: (name of the family, model in eval mode), by seed alone.

    Widths spread evenly over orders of magnitude; a third are arbitrary numbers, as pruning leaves them.
    """
    rng = random.Random(f"latency-{seed}")
    for family in itertools.islice(itertools.cycle(_FAMILIES), count):
        smallest: tuple[float, nn.Module] | None = None
        for _ in range(_TRIES):
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = _drawn(family, rng, input_shape).build(10, input_shape).eval()
            except ShapeError:  # a patch that doesn't divide the image
                continue
            macs = macs_of(operators_of(model, input_shape))
            if smallest is None or macs < smallest[0]:
                smallest = macs, model
            if macs <= max_macs:
                break
        if smallest is None:
            raise CompressionError(
                f"Image '{input_shape}' has no network of family {family} that takes it, expected one. "
                "Use images of at least 4 x 4."
            )
        yield family, smallest[1]


def _width(rng: random.Random, low: int, high: int) -> int:
    drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    multiple = rng.choice((1, 1, 1, 4, 4, 8, 8, 8, 8, 8))
    return max(multiple, 4, round(drawn / multiple) * multiple)


def _drawn(family: str, rng: random.Random, input_shape: InputShape) -> Any:
    large = max(input_shape[1:]) >= _LARGE
    if family in ("transformer", "mixer"):
        heads = rng.choice((1, 2, 3, 4, 6, 8))
        stem = rng.choice(("conv", "patch"))
        patches = (8, 16, 16, 32) if large else (2, 4, 4, 8)
        common = {
            "width": max(1, round(_width(rng, 24, 192) / heads)) * heads,
            "depth": rng.choice((1, 2, 3, 4, 6)),
            "mlp_ratio": rng.choice((1.0, 1.5, 2.0, 3.0, 4.0)),
            "stem": stem,
            "patch_size": rng.choice(patches if stem == "conv" else (*patches, 7)),
            "stem_width": _width(rng, 8, 48),
        }
        if family == "transformer":
            return VisionTransformer(**common, num_heads=heads)
        return Mixer(**common, token_hidden=_width(rng, 16, 160))
    stages = rng.choice((2, 3, 3, 4))
    widths = [_width(rng, 8, 160) for _ in range(stages)]
    common = {
        "widths": sorted(widths) if rng.random() < 0.7 else widths,
        "depths": [rng.choice((1, 1, 2, 3)) for _ in widths],
        "strides": [2 if large else rng.choice((1, 2)) for _ in widths],
        "stem_width": _width(rng, 8, 64),
        "stem_kernel": rng.choice((3, 3, 5, 7)),
        "stem_stride": 2 if large else rng.choice((1, 2)),
    }
    if family == "depthwise":
        return DepthwiseCnn(**common, kernel=rng.choice((3, 5, 7)), expansion=rng.choice((1.0, 1.5, 2.0, 3.0, 4.0)))
    return (ResidualCnn if family == "residual" else PlainCnn)(**common, kernel=rng.choice((3, 3, 3, 5, 1)))


# --- clocks


class Row(Frozen):
    """What was measured once: some operators and the time they took together."""

    source: Literal["net", "kernel"]
    """A whole call, or what the profiler says of one kernel."""
    operators: Annotated[tuple[OperatorRow, ...], Field(min_length=1)]
    ms: PositiveFloat


@dataclass(frozen=True)
class Timing:
    """What a clock says of one network."""

    ratio: float
    """p50 of one call as a share of the reference's, timed in turn with it."""
    reference_ms: float
    """p50 of the reference meanwhile."""
    kernels: tuple[Row, ...] = ()
    """What the profiler says, if there is one."""


class Clock(Protocol):
    """Times networks on one target, beside a reference that stays the same."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """All a time depends on besides the network: machine, versions, threads."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Channels that are computed at once, see ``BLOCK``."""

    @abstractmethod
    def measure(self, model: nn.Module, *, kernels: bool) -> Timing:
        """The time of one call of a model in eval mode, and of its kernels."""


def reference_net(input_shape: InputShape) -> nn.Module:
    """The network everything is timed beside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResidualCnn(widths=(16, 32, 64), depths=(1, 1, 1), stem_stride=2).build(10, input_shape).eval()


class OnnxRuntimeClock:
    """Times float32 ONNX files in ONNX Runtime on the CPU, one thread.

    It counts CPU time of the calling thread, in which everything runs: on a quiet machine that is the latency, and on a
    busy one it leaves out the time spent waiting for a core, which can be many times the rest. What is left of the
    neighbours, shared caches and clock rates, hits the reference alike.
    """

    ROUNDS = 7
    ROUND_MS = 12.0
    MOST_CALLS = 60  # of one network in one round
    PROFILE_MS = 100.0
    PROFILED = (8, 100)  # fewest and most calls under the profiler

    def __init__(self, input_shape: InputShape, *, batch: int) -> None:
        self.input_shape, self.batch = input_shape, batch
        self._folder = tempfile.TemporaryDirectory(prefix="latency-")
        self._path = Path(self._folder.name) / "net.onnx"

    @property
    def facts(self) -> Mapping[str, str]:
        import onnxruntime

        features = cpu_features()
        flags = [name for name, has in features.model_dump(exclude={"model", "machine"}).items() if has]
        return {
            "runtime": f"onnxruntime {onnxruntime.__version__} CPU float32",
            "processor": features.model,
            "instructions": f"{features.machine} {' '.join(flags)}",
            "cores": str(os.cpu_count()),
            "system": platform.system(),
            "threads": "1",
        }

    @property
    def block(self) -> int:
        return self._block

    @cached_property
    def _block(self) -> int:
        """Read off the weights of a convolution with 20 outputs, which the runtime fills up to whole blocks."""
        with torch.random.fork_rng(devices=[]):
            net = PlainCnn(widths=(20,), depths=(1,), strides=(1,), stem_width=20).build(2, self.input_shape)
        self._write(net.eval())
        for node in self._profiled(calls=1):
            if node.name == "Conv":
                return {32: 16, 24: 8}.get(node.inputs[1][0], 1)
        return 1

    @cached_property
    def _reference(self) -> Callable[[], object]:
        self._write(reference_net(self.input_shape))
        return self._call()

    def measure(self, model: nn.Module, *, kernels: bool = False) -> Timing:
        pair = self._reference, self._call_of(model)
        counts = [self._count(call) for call in pair]
        medians = np.array(
            [
                [np.median(_cpu_ms(call, count)) for call, count in zip(pair, counts, strict=True)]
                for _ in range(self.ROUNDS)
            ]
        )
        reference_ms = float(np.median(medians[:, 0]))
        ratio = float(np.median(medians[:, 1] / medians[:, 0]))
        rows = self._rows(ratio * reference_ms) if kernels else ()
        return Timing(ratio, reference_ms, rows)

    def _write(self, model: nn.Module) -> None:
        to_onnx(model, self._path, input_shape=self.input_shape, metadata={}, fast=True)

    def _call_of(self, model: nn.Module) -> Callable[[], object]:
        self._write(model)
        return self._call()

    def _call(self) -> Callable[[], object]:
        session = open_session(self._path, threads=1)
        feed = feed_of(session, self.batch, seed=0)
        return lambda: session.run(None, feed)

    def _count(self, call: Callable[[], object]) -> int:
        """How many calls fill a round, after a short warm-up."""
        _cpu_ms(call, 2)
        return max(1, min(self.MOST_CALLS, int(self.ROUND_MS / max(min(_cpu_ms(call, 3)), 1e-3))))

    def _rows(self, call_ms: float) -> tuple[Row, ...]:
        fewest, most = self.PROFILED
        calls = max(fewest, min(most, int(self.PROFILE_MS / max(call_ms, 1e-3))))
        nodes = [(node.ms, node.operators(self.batch)) for node in self._profiled(calls=calls)]
        return tuple(
            Row(source="kernel", operators=tuple(map(_row_of, bag)), ms=ms) for ms, bag in nodes if bag and ms > 0
        )

    def _profiled(self, *, calls: int) -> list["_Node"]:
        """The kernels of the file written last, by ONNX Runtime's own profiler."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        session = onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        feed = feed_of(session, self.batch, seed=0)
        for _ in range(calls):
            session.run(None, feed)
        trace = Path(session.end_profiling())
        events = json.loads(trace.read_text())
        trace.unlink()
        found: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found.setdefault(event["name"], []).append(event)
        return [_Node.read(each) for each in found.values()]


def _cpu_ms(call: Callable[[], object], count: int) -> list[float]:
    """CPU time of this thread in each of ``count`` calls, in ms."""
    clock, durations = time.thread_time_ns, []
    for _ in range(count):
        started = clock()
        call()
        durations.append((clock() - started) / 1e6)
    return durations


@dataclass(frozen=True)
class _Node:
    """One kernel in the profiler's words; weights that were packed before have no shape there."""

    name: str
    inputs: list[list[int]]
    output: list[int]
    is_float: bool
    ms: float

    @classmethod
    def read(cls, events: Sequence[Mapping[str, Any]]) -> "_Node":
        facts = events[0]["args"]
        inputs = [(kind, shape) for each in facts.get("input_type_shape", []) for kind, shape in each.items()]
        outputs = [shape for each in facts.get("output_type_shape", []) for shape in each.values()]
        # Whole microseconds, so a mean; without the calls in which the core was taken away, on a busy machine most.
        durations = np.array([each["dur"] for each in events[min(2, len(events) - 1) :]], dtype=float)
        usual = durations[durations <= 1.25 * np.quantile(durations, 0.2) + 1]
        return cls(
            name=str(facts["op_name"]).removeprefix("Fused"),
            inputs=[shape for _, shape in inputs],
            output=outputs[0] if outputs else [],
            is_float=bool(inputs) and inputs[0][0] == "float",
            ms=float(usual.mean()) / 1e3,
        )

    def operators(self, batch: int) -> list[Operator]:
        """In our terms; none for what handles shapes, or is unknown."""
        if not self.is_float or not self.inputs[0] or math.prod(self.output) < 2 * batch:
            return []
        given, out = self.inputs[0], self.output
        if self.name == "Conv":
            weight = self.inputs[1]
            stride, groups = max(1, round(given[2] / out[2])), given[1] // weight[1]
            found = [Operator("Conv", given[1], weight[0], out[2], out[3], max(weight[2:]), stride, groups)]
            if any(shape == out for shape in self.inputs[2:]):
                found.append(Operator("FusedAdd", out[1], out[1], out[2], out[3]))
            return found
        if self.name == "Gemm":
            return [Operator("Gemm", given[1], out[1], 1, 1)]
        if self.name == "MatMul" and len(self.inputs) > 1:
            heads = math.prod(given[1:-2])
            return [Operator("BatchMatMul", heads * given[-1], heads * out[-1], out[-2], 1, groups=heads)]
        if self.name == "MatMul" and len(out) == 3:
            return [Operator("MatMul", math.prod(given[1:]) // out[1], out[2], out[1], 1)]
        if self.name == "ReduceMean":
            area = math.prod(given) // math.prod(out)
            channels = math.prod(out) // batch
            return [Operator("ReduceMean", channels, channels, 1, 1, max(1, round(math.sqrt(area))))]
        kinds = {"ReorderInput": "Reorder", "ReorderOutput": "Reorder", "BiasGelu": "Gelu"}
        whole = given if self.name == "Split" else out
        if len(whole) == 4 and self.name.startswith("Reorder"):
            return [Operator("Reorder", whole[1], whole[1], whole[2], whole[3])]
        if self.name in (
            "Add",
            "Mul",
            "Relu",
            "Gelu",
            "BiasGelu",
            "Split",
            "Transpose",
            "LayerNormalization",
            "Softmax",
        ):
            elements = math.prod(whole) // batch
            channels = min(whole[-1], elements)
            return [Operator(kinds.get(self.name, self.name), channels, channels, elements // channels, 1)]
        return []


class TensorRtClock:
    """Times float16 TensorRT engines on the GPU of this machine; written against TensorRT's Python API, not run yet.

    Engines are built for ``batch`` images, and CUDA events time them, which leaves out the copies of images and logits.
    """

    ROUNDS = 7
    CALLS = 30
    block = 8

    def __init__(self, input_shape: InputShape, *, batch: int) -> None:
        """Raises ExportError where TensorRT or a GPU is missing."""
        self.input_shape, self.batch = input_shape, batch
        self._target = TensorRtTarget(precision="float16", min_batch=batch, opt_batch=batch, max_batch=batch)
        self._backend = import_backend(self._target)
        if not torch.cuda.is_available():
            raise ExportError(
                f"Target '{self._target.name}' has no GPU on this machine, expected one to time engines on. "
                "Build the latency model on the GPU host, or use the clock of ONNX Runtime."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="latency-")

    @property
    def facts(self) -> Mapping[str, str]:
        return {
            "runtime": f"tensorrt {self._backend.__version__} float16",
            "processor": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
        }

    @cached_property
    def _reference(self) -> "_Engine":
        return self._call_of(reference_net(self.input_shape))

    def measure(self, model: nn.Module, *, kernels: bool = False) -> Timing:
        del kernels  # engines fuse across operators, so only whole ones are timed
        pair = self._reference, self._call_of(model)
        for call in pair:
            call()
        rounds = np.array(
            [[np.median([call() for _ in range(self.CALLS)]) for call in pair] for _ in range(self.ROUNDS)]
        )
        return Timing(float(np.median(rounds[:, 1] / rounds[:, 0])), float(np.median(rounds[:, 0])))

    def _call_of(self, model: nn.Module) -> "_Engine":
        graph, place = Path(self._folder.name) / "net.onnx", Path(self._folder.name) / "net.engine"
        to_onnx(model, graph, input_shape=self.input_shape, metadata={}, precision="float16")
        build_engine(graph, place, self._target, compute_capability=None, input_shape=self.input_shape)
        return _Engine(self._backend, place.read_bytes(), (self.batch, *self.input_shape))


class _Engine:
    """A loaded TensorRT engine with its buffers; a call runs it once and returns milliseconds."""

    def __init__(self, trt: Any, content: bytes, shape: tuple[int, ...]) -> None:
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(content)
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        given = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in given:
            self._context.set_input_shape(name, shape)
        self._buffers = {
            name: torch.zeros(tuple(self._context.get_tensor_shape(name)), device="cuda") for name in names
        }
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        self._context.execute_async_v3(self._stream.cuda_stream)
        end.record(self._stream)
        end.synchronize()
        return start.elapsed_time(end)


# --- the table


class HeldOut(Frozen):
    """How well networks were predicted that the fit has not seen."""

    nets: int
    median_error: float
    """Median of |predicted / measured - 1|."""
    p90_error: float
    """90th percentile of the same."""
    kendall_tau: float
    """Rank correlation of predicted and measured, -1..1."""
    kendall_tau_macs: float
    """The same of multiply-accumulates and measured, for comparison."""


class LatencyTable(Frozen):
    """All that was measured on one machine for one image size and batch; what the predictor is fitted to."""

    format: int = FORMAT
    facts: dict[str, str]
    """Machine, versions, threads."""
    input_shape: InputShape
    batch: int
    block: int
    """Channels that are computed at once."""
    nets: int
    seed: int
    reference_ms: float
    """p50 of the reference net over the whole session; network rows are shares of it."""
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    held_out: HeldOut | None = None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for machine, versions and threads."""
        return _fingerprint(self.facts)


def _fingerprint(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, sorted(facts.items())]).encode()).hexdigest()[:16]


# --- the predictor

_LIKE = {  # kinds that cost what another one costs, which the sample has
    **dict.fromkeys(("MaxPool", "AveragePool"), "ReduceMean"),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization"), "LayerNormalization"),
    **dict.fromkeys(("Concat", "Split", "Pad"), "Transpose"),
    **dict.fromkeys(("Sigmoid", "Tanh", "Silu", "Hardswish", "Elu", "Erf", "Exp", "Mish"), "Gelu"),
}
_OWN_KIND = frozenset({"Add", "Mul", "Gelu", "LayerNormalization", "Softmax", "Transpose", "ReduceMean", "Reorder"})
_OWN_KIND |= {"Relu", "FusedAdd", "Attention"}
_VECTOR = 16  # columns a matrix product takes at once
_TOLERATED = 0.08  # relative errors above this count linearly, not squared
_KERNEL_WEIGHT = 0.25
_KERNEL_FLOOR_MS = 0.003  # kernels below this are mostly overhead of the profiler

Term = tuple[str, str]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def terms_of(operator: Operator, block: int) -> dict[Term, float]:
    """What the cost of an operator is a sum of: (group, term) -> amount for one image; each grows with the channels."""
    positions, kernel, groups = operator.height * operator.width, operator.kernel, operator.groups
    area, inputs, outputs = kernel**2, operator.in_channels, operator.out_channels
    terms: dict[str, float]
    if operator.kind == "Conv":
        depthwise = groups > 1 and groups == inputs == outputs
        if depthwise and in_blocks(operator, block):
            group, filled = "depthwise", _up(outputs, block)
            terms = {
                "mac": area * positions * filled,
                "row": kernel * positions * filled,
                "out": positions * filled,
                "in": positions * filled * operator.stride**2,
            }
        elif depthwise:
            group = "depthwise one by one"
            terms = {"groups": groups, "mac": area * _up(positions, _VECTOR) * groups, "out": positions * groups}
        elif in_blocks(operator, block):
            direct = groups == 1 and inputs < block
            group = "conv of few channels" if direct else "conv 1x1" if kernel == 1 else "conv"
            taken, filled = inputs if direct else _up(inputs, block), _up(outputs, block)
            work = area * positions * taken * filled / groups
            terms = {
                "mac": work,
                "out": positions * filled,
                "in": positions * operator.stride**2 * taken,
                "row": work / operator.width,
                "w": area * taken * filled / groups,
                "pass": area * positions * taken * _up(filled, 4 * block) / groups,
                "strided": work if operator.stride > 1 else 0,
                "sums": positions * filled * taken / block,
            }
        else:
            group = "conv as product"
            work = area * _up(positions, _VECTOR) * inputs * outputs / groups
            terms = {
                "groups": groups,
                "mac": work,
                "out": positions * outputs,
                "in": positions * operator.stride**2 * inputs,
                "columns": area * positions * inputs if kernel > 1 or operator.stride > 1 else 0,
                "gathered": work if kernel > 1 else 0,
            }
    elif operator.kind in _PRODUCTS:
        group, filled = operator.kind, groups * _up(outputs // groups, _VECTOR)
        terms = {
            "groups": groups if groups > 1 else 0,
            "mac": positions * inputs * filled / groups,
            "out": positions * filled,
            "in": positions * inputs,
            "w": inputs * filled / groups,
        }
    else:
        group = _LIKE.get(operator.kind, operator.kind)
        group = group if group in _OWN_KIND else "Mul"
        terms = {"elements": positions * inputs * area}
        if group in ("LayerNormalization", "Softmax"):
            terms["rows"] = positions
        if group == "ReduceMean":
            terms["channels"] = inputs
    return {(group, "1"): 1.0} | {(group, name): float(amount) for name, amount in terms.items() if amount}


def _sum_of(bag: Sequence[OperatorRow], block: int, extra: Term) -> dict[Term, float]:
    total: dict[Term, float] = {extra: 1.0}
    for row in bag:
        for term, amount in terms_of(Operator(*row), block).items():
            total[term] = total.get(term, 0.0) + amount
    return total


_CALL: Term = ("call", "1")
_PROFILER: Term = ("profiler", "1")


def _fit(table: LatencyTable) -> dict[Term, float]:
    """Milliseconds for each term: least squares of the relative error, no coefficient below zero."""
    from scipy.optimize import nnls

    amounts = [_sum_of(row.operators, table.block, _CALL if row.source == "net" else _PROFILER) for row in table.rows]
    terms = sorted(set().union(*amounts))
    places = {term: place for place, term in enumerate(terms)}
    design = np.zeros((len(amounts), len(terms)))
    for number, row in enumerate(amounts):
        for term, amount in row.items():
            design[number, places[term]] = amount
    scale = design.max(axis=0)
    design /= scale
    target = np.array([row.ms for row in table.rows])
    is_net = np.array([row.source == "net" for row in table.rows])
    weight = np.where(is_net, 1.0 / target, _KERNEL_WEIGHT / (target + _KERNEL_FLOOR_MS))
    trust = np.ones(len(target))
    solution = np.zeros(len(terms))
    for _ in range(5):
        rows = weight * np.sqrt(trust)
        solution, _ = nnls(design * rows[:, None], target * rows, maxiter=100 * len(terms))
        error = np.abs(design @ solution / target - 1.0)
        trust = 1.0 / np.maximum(1.0, error / _TOLERATED)
    return dict(zip(terms, (solution / scale).tolist(), strict=True))


@dataclass(frozen=True)
class FittedLatency:
    """A ``LatencyModel``: the predictor fitted to a table. Equal tables predict equally."""

    table: LatencyTable
    _coefficients: dict[Term, float] = field(init=False, repr=False, compare=False)
    _usual: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = _fit(self.table)
        named: dict[str, list[float]] = {}
        for (group, term), value in found.items():
            if value > 0 and (group, term) not in (_CALL, _PROFILER):
                named.setdefault(term, []).append(value)
        object.__setattr__(self, "_coefficients", found)
        object.__setattr__(self, "_usual", {term: float(np.median(values)) for term, values in named.items()})

    @property
    def batch(self) -> int:
        """Images per call."""
        return self.table.batch

    @property
    def call_ms(self) -> float:
        """What a call costs besides its operators."""
        return self._coefficients.get(_CALL, 0.0)

    def predict_ms(self, model: nn.Module, input_shape: InputShape) -> float:
        """Milliseconds of one call: ``call_ms`` and the sum of its operators."""
        return self.total_ms(operators_of(model, input_shape, block=self.table.block))

    def total_ms(self, operators: Sequence[Operator]) -> float:
        """Milliseconds of one call of a network of these operators."""
        return self.call_ms + sum(self.operators_ms(operators))

    def operators_ms(self, operators: Sequence[Operator]) -> list[float]:
        """Milliseconds of each operator at ``batch`` images, 0 or more; some 10 us of compute each.

        Grows with both channel counts as long as the same kernel runs (see ``in_blocks``).
        """
        return [
            sum(amount * self._per(term) for term, amount in terms_of(operator, self.table.block).items())
            for operator in operators
        ]

    def _per(self, term: Term) -> float:
        """The coefficient of a term; of one that no network of the sample had, the usual one by that name."""
        found = self._coefficients.get(term)
        return self._usual.get(term[1], 0.0) if found is None else found


# --- building and keeping


def build_latency_model(
    input_shape: InputShape,
    *,
    batch: int,
    folder: Path,
    nets: int = NETS,
    seed: int = 0,
    clock: Clock | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FittedLatency:
    """The latency model of this machine: read from ``folder`` if it was measured before, else measured now and kept.

    The file is ``<fingerprint>-b<batch>-<C>x<H>x<W>.json``. One of another machine, version, seed or of fewer networks,
    and a damaged one, is replaced, which the log says.

    Args:
        input_shape: Channels, height, width.
        batch: Images per call.
        folder: Where tables are kept; made if missing.
        nets: Networks to fit to; a quarter as many are timed besides, to report the error.
        seed: Of the sample.
        clock: What times them; ONNX Runtime on one thread of this CPU by default.
        on_progress: Gets the number of networks that are done, and of all.

    Raises:
        CompressionError: ``nets`` or ``batch`` is too small.
    """
    if nets < len(set(_FAMILIES)) or batch < 1:
        raise CompressionError(
            f"Latency model '{'x'.join(map(str, input_shape))}' has nets {nets} and batch {batch}, expected at least "
            f"{len(set(_FAMILIES))} networks (one of each family) and one image. Leave nets at {NETS}."
        )
    chosen: Clock = clock if clock is not None else OnnxRuntimeClock(input_shape, batch=batch)
    facts = dict(chosen.facts)
    path = folder / f"{_fingerprint(facts)}-b{batch}-{'x'.join(map(str, input_shape))}.json"
    wanted = {"format": FORMAT, "facts": facts, "input_shape": input_shape, "batch": batch, "seed": seed}
    table = _kept(path, wanted, nets)
    if table is None:
        table = _measured(chosen, input_shape, batch=batch, nets=nets, seed=seed, on_progress=on_progress)
        _keep(table, path)
    return FittedLatency(table)


def _kept(path: Path, wanted: Mapping[str, object], nets: int) -> LatencyTable | None:
    """The table in a file, if it is whole and what is wanted."""
    if not path.exists():
        return None
    try:
        table = LatencyTable.model_validate_json(path.read_bytes())
    except (ValidationError, ValueError, OSError) as error:
        LOGGER.warning("latency table '%s' is damaged (%s), measuring again", path.name, str(error).splitlines()[0])
        return None
    for name, value in wanted.items():
        if (found := getattr(table, name)) != value:
            LOGGER.info("latency table '%s' has %s %s, expected %s, measuring again", path.name, name, found, value)
            return None
    if table.nets < nets:
        LOGGER.info("latency table '%s' has %d nets, expected %d, measuring again", path.name, table.nets, nets)
        return None
    return table


def _keep(table: LatencyTable, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(table.model_dump_json(), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def max_macs_of(batch: int) -> float:
    """Largest network of the sample, in multiply-accumulates for an image: a call takes tens of milliseconds."""
    return min(1.5e8, 1.5e9 / batch)


def _measured(
    clock: Clock,
    input_shape: InputShape,
    *,
    batch: int,
    nets: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> LatencyTable:
    parts = {"fit": nets, "held-out": max(4, nets // 4)}
    timed: dict[str, list[tuple[list[Operator], Timing]]] = {part: [] for part in parts}
    done = itertools.count(1)
    for part, count in parts.items():
        for _, model in sample_nets(count, input_shape, seed=f"{seed}-{part}", max_macs=max_macs_of(batch)):
            timing = clock.measure(model, kernels=part == "fit")
            timed[part].append((operators_of(model, input_shape, block=clock.block), timing))
            if on_progress is not None:
                on_progress(next(done), sum(parts.values()))
    reference_ms = float(np.median([timing.reference_ms for pairs in timed.values() for _, timing in pairs]))
    rows = [
        Row(source="net", operators=tuple(map(_row_of, bag)), ms=timing.ratio * reference_ms)
        for bag, timing in timed["fit"]
    ]
    table = LatencyTable(
        facts=dict(clock.facts),
        input_shape=input_shape,
        batch=batch,
        block=clock.block,
        nets=nets,
        seed=seed,
        reference_ms=reference_ms,
        rows=(*rows, *_kernel_rows([timing for _, timing in timed["fit"]], reference_ms)),
    )
    bags = [bag for bag, _ in timed["held-out"]]
    found = held_out(FittedLatency(table), bags, [timing.ratio * reference_ms for _, timing in timed["held-out"]])
    LOGGER.info("latency model at batch %d, on networks not seen: %s", batch, found)
    return table.model_copy(update={"held_out": found})


def _row_of(operator: Operator) -> OperatorRow:
    return cast("OperatorRow", astuple(operator))


def _kernel_rows(timings: Sequence[Timing], reference_ms: float) -> list[Row]:
    """One row for each kernel that was seen, the median where it was seen often, at the speed of the session."""
    seen: dict[tuple[OperatorRow, ...], list[float]] = {}
    for timing in timings:
        for row in timing.kernels:
            seen.setdefault(row.operators, []).append(row.ms * reference_ms / timing.reference_ms)
    return [Row(source="kernel", operators=bag, ms=float(np.median(found))) for bag, found in seen.items()]


def held_out(model: FittedLatency, bags: Sequence[Sequence[Operator]], measured_ms: Sequence[float]) -> HeldOut:
    """How well ``model`` predicts networks, given as their operators, that took ``measured_ms``."""
    from scipy import stats

    measured = np.array(measured_ms)
    predicted = np.array([model.total_ms(bag) for bag in bags])
    error = np.abs(predicted / measured - 1.0)

    def tau(values: Sequence[float] | NDArray[np.float64]) -> float:
        found: Any = stats.kendalltau(values, measured)
        return float(found.statistic) if math.isfinite(found.statistic) else 0.0

    return HeldOut(
        nets=len(bags),
        median_error=float(np.median(error)),
        p90_error=float(np.quantile(error, 0.9)),
        kendall_tau=tau(predicted),
        kendall_tau_macs=tau([float(macs_of(bag)) for bag in bags]),
    )
