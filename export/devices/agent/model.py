"""A model of a slot, ready to answer, whatever its runtime."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from .package import STATEMENT

CHOICE = "choice.json"


def chosen(slot: Path) -> tuple[dict[str, Any], Path]:
    """The variant that was chosen when a slot was filled, and its file."""
    statement = json.loads((slot / STATEMENT).read_bytes())
    choice = json.loads((slot / CHOICE).read_bytes())
    return next(each for each in statement["variants"] if each["id"] == choice["variant"]), slot / choice["file"]


class Model:
    """The chosen variant of a slot. ``run`` takes float32 inputs [N, C, H, W] and gives logits [N, classes]."""

    def __init__(self, slot: Path, threads: int = 0) -> None:
        self.slot = slot.resolve()
        self.statement: dict[str, Any] = json.loads((self.slot / STATEMENT).read_bytes())
        self.variant, file = chosen(self.slot)
        self.run = OPENERS[self.variant["runtime"]](file, self.variant, threads)

    def prepare(self, images: Any) -> Any:
        """Raw images [N, C, H, W] as the model wants them."""
        import numpy as np

        spec = self.statement["preprocessing"]
        images = np.asarray(images, dtype=np.float32)
        if spec is None:
            return images
        mean, std = (np.asarray(spec[name], dtype=np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
        return ((images / np.float32(spec["scale"]) - mean) / std).astype(np.float32)

    def probabilities(self, logits: Any) -> Any:
        """Softmax of the logits, after the temperature if there is one."""
        import numpy as np

        scaled = logits / (self.variant["temperature"] or 1.0)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def _onnxruntime(file: Path, variant: dict[str, Any], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if variant["precision"] == "int8" and variant["isa"] == "arm":
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]


def _openvino(file: Path, variant: dict[str, Any], threads: int) -> Any:
    openvino: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda inputs: compiled(inputs)[0]


def _tensorrt(file: Path, variant: dict[str, Any], threads: int) -> Any:
    """TensorRT 10 and 11, and TensorRT-RTX, with buffers from cuda-python; written by their documentation."""
    import numpy as np

    trt: Any = importlib.import_module(variant["runtime"])
    cuda: Any = importlib.import_module("cuda.bindings.runtime")

    def must(answer: Any) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise RuntimeError(f"CUDA has answered {status}")
        return values[0] if values else None

    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise RuntimeError("the engine does not fit this GPU or this version")
    context, stream = engine.create_execution_context(), must(cuda.cudaStreamCreate())
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    source = next(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
    sink = next(name for name in names if name != source)
    host_to_device, device_to_host = (
        cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
        cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost,
    )

    def run(inputs: Any) -> Any:
        inputs = np.ascontiguousarray(inputs, dtype=trt.nptype(engine.get_tensor_dtype(source)))
        context.set_input_shape(source, inputs.shape)
        outputs = np.empty(tuple(context.get_tensor_shape(sink)), dtype=trt.nptype(engine.get_tensor_dtype(sink)))
        places = [must(cuda.cudaMalloc(array.nbytes)) for array in (inputs, outputs)]
        try:
            for name, place in zip((source, sink), places):
                context.set_tensor_address(name, int(place))
            must(cuda.cudaMemcpy(places[0], inputs.ctypes.data, inputs.nbytes, host_to_device))
            if not context.execute_async_v3(int(stream)):
                raise RuntimeError("the engine did not run")
            must(cuda.cudaStreamSynchronize(stream))
            must(cuda.cudaMemcpy(outputs.ctypes.data, places[1], outputs.nbytes, device_to_host))
        finally:
            for place in places:
                cuda.cudaFree(place)
        return outputs.astype(np.float32)

    return run


OPENERS = {"onnxruntime": _onnxruntime, "openvino": _openvino, "tensorrt_rtx": _tensorrt, "tensorrt": _tensorrt}


def build_engine(onnx: Path, engine: Path, runtime: str) -> None:
    """Build an engine for the GPU of this device from an ONNX file, durably; written by the documentation.

    Raises:
        RuntimeError: the runtime refused the file; its words are in the message.
    """
    trt: Any = importlib.import_module(runtime)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse_from_file(str(onnx)):
        raise RuntimeError("; ".join(str(parser.get_error(place)) for place in range(parser.num_errors)))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        tensor = network.get_input(place)
        least, most = ([batch if size < 0 else size for size in tensor.shape] for batch in (1, 32))
        profile.set_shape(tensor.name, least, least, most)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("no engine came of it")
    with open(engine, "wb") as file:
        file.write(bytes(plan))
        file.flush()
        os.fsync(file.fileno())
