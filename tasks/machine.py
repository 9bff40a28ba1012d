"""What of this machine a measured result depends on."""

import hashlib
import importlib.metadata
import json
import os

import torch

from compression.errors import ExportError
from export.qdq import WeightForm, weight_form
from export.runtime import cpu_features


def machine_digest() -> str:
    """Changes with the processor, its instruction sets and the number of cores."""
    facts = {"cpu": cpu_features().model_dump(mode="json"), "cores": os.cpu_count()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def int8_weights() -> WeightForm:
    """How this CPU's INT8 files write their weights, so that sums of products cannot overflow."""
    return weight_form(cpu_features())


def set_threads(threads: int) -> None:
    """Threads of training in this process; 0 takes every core."""
    torch.set_num_threads(threads or os.cpu_count() or 1)


def engine_backend(kind: str) -> str:
    """Name and version of the library that builds files for targets of this kind.

    Raises:
        ExportError: it is not installed; the message says how to get it.
    """
    package = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt", "openvino": "openvino"}[kind]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError as error:
        way = "pip install 'stillhouse[tensorrt]' (on a Linux host with NVIDIA's package index)"
        if kind == "tensorrt_rtx":
            way = "pip install tensorrt-rtx (Linux x86-64)"
        elif kind == "openvino":
            way = "pip install 'stillhouse[openvino]'"
        raise ExportError(
            f"A target has kind {kind}, but {package} is not installed. Get it with {way}, or remove the target; "
            "targets of kind onnxruntime run without it."
        ) from error
