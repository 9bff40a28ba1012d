"""What times a network: ONNX Runtime on the CPU, or TensorRT on the GPU of this machine."""

import json
import math
import os
import platform
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from compression.errors import ExportError
from compression.search.space import Operator
from compression.zoo import PlainCnn, ResidualCnn
from export.engine_trt import build_engine, import_backend
from export.latency_model.operators import InputShape
from export.latency_model.table import Row, row_of
from export.onnx_graph import to_onnx
from export.runtime import cpu_features
from export.targets import TensorRtTarget
from export.timing import feed_of, open_session


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
            Row(source="kernel", operators=tuple(map(row_of, bag)), ms=ms) for ms, bag in nodes if bag and ms > 0
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
