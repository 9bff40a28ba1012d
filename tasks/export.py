"""Stage 8: files. One graph per arithmetic, then one folder per target, each file checked and described."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from compression.augment import normalise
from compression.checkpoint import load_checkpoint, read_spec
from compression.data import open_dataset
from compression.errors import ExportError
from compression.models import ModelSpec
from compression.quantize import load_quantized
from export.engine_trt import build_engine
from export.onnx_graph import to_onnx
from export.ptq import quantize_static
from export.qdq import WeightForm, check_symmetric, to_u8_activations
from export.sparsity import sparsity_of
from export.targets import TensorRtRtxTarget, TensorRtTarget
from tasks.artifacts import file_digest
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE

logger = logging.getLogger(__name__)

GRAPH_CODE = (
    *MODEL_CODE,
    "compression.quantize",
    *("export.onnx_graph", "export.graph_editor", "export.qdq", "export.ptq", "export.runtime", "export.sparsity"),
)
GRAPH_LIBRARIES = ("torch", "torchao", "onnx", "onnxscript", "onnxruntime-gpu")
SPARSE_FROM = 0.1
"""Share of zeros from which on a file is called sparse: rounding to INT8 makes a few by itself."""
Form = Literal["float32", "float16", "int8", "int8-ptq", "int8-symmetric"]


def graph_metadata(spec: ModelSpec, lineage: dict[str, str]) -> dict[str, str]:
    """What every shipped graph says about itself."""
    return {
        "class_names": json.dumps(list(spec.class_names)),
        "preprocessing": spec.preprocessing.model_dump_json(),
        "input_shape": json.dumps(list(spec.input_shape)),
        "lineage": json.dumps(lineage, sort_keys=True),
        "producer": "stillhouse",
    }


def sparse_facts(path: Path) -> dict[str, float]:
    """What is worth saying about the zeros in a file's weights; nothing of a dense one."""
    found = sparsity_of(path)
    if found.share_of_zeros < SPARSE_FROM:
        return {}
    return {
        "nonzero_share": 1.0 - found.share_of_zeros,
        "tensorrt_sparse_layers": float(found.tensorrt_eligible),
        "compressed_bytes": float(found.compressed_bytes),
    }


@stage("export", code=GRAPH_CODE, libraries=GRAPH_LIBRARIES)
def export_graph(
    work: Work,
    *,
    name: str,
    model: StageResult,
    data: StageResult,
    form: Form,
    teachers: dict[str, str],
    source: StageResult | None = None,
    int8_weights: WeightForm | None = None,
) -> StageOutput:
    """Write one ONNX file: float32, float16, symmetric INT8 (TensorRT), or INT8 with u8 activations (ONNX Runtime).

    ``int8`` rewrites the symmetric graph in ``source``; ``int8-ptq`` quantizes the float32 graph in ``source`` after
    training, as the control arm. ``int8_weights`` is how these two write their weights, see ``export.qdq``.
    """
    folder = work.open(model)
    spec = read_spec(folder)
    lineage = {"model": model.artifact.sha256, "data": data.artifact.sha256, "form": form, **teachers}
    metadata = graph_metadata(spec, lineage)
    with work.store.put("graph") as draft:
        path = draft.folder / "model.onnx"
        if form in ("float32", "float16"):
            student, _ = load_checkpoint(folder)
            info = to_onnx(student, path, input_shape=spec.input_shape, metadata=metadata, precision=form)
        elif form == "int8-symmetric":
            info = to_onnx(load_quantized(folder).converted, path, input_shape=spec.input_shape, metadata=metadata)
            check_symmetric(path)
        elif source is None:
            raise ExportError(
                f"Graph '{name}' of form {form} has no source graph, expected one. This is a defect of the flow."
            )
        elif form == "int8":
            info = to_u8_activations(work.open(source) / "model.onnx", path, weights=int8_weights, metadata=metadata)
        else:
            images = calibration_images(work.open(data), spec)
            info = quantize_static(
                work.open(source) / "model.onnx",
                path,
                images,
                preset="onnxruntime_x86",
                weights=int8_weights,
                metadata=metadata,
            )
    size = draft.done().size_bytes
    return StageOutput(
        artifact=draft.done(),
        metrics={"size_bytes": float(size), **sparse_facts(work.store.place(draft.done()) / "model.onnx")},
        info={"form": form, "opset": info.opset, "nodes": info.nodes, "sha256": info.sha256},
    )


def calibration_images(data_folder: Path, spec: ModelSpec) -> np.ndarray:
    """Normalised calibration images [N,C,H,W], float32."""
    dataset = open_dataset(data_folder)
    return normalise(torch.as_tensor(dataset.calibration.images), spec.preprocessing).numpy()


@stage("engine", code=("export.engine_trt", "export.targets"), libraries=("onnx",))
def export_engine(
    work: Work,
    *,
    name: str,
    target: TensorRtRtxTarget | TensorRtTarget,
    graph: StageResult,
    input_shape: tuple[int, int, int],
    compute_capability: str | None,
    backend: str,
) -> StageOutput:
    """Build one engine ahead of time; it is described, hashed, and reported as built, not run."""
    source = work.open(graph) / "model.onnx"
    with work.store.put("engine") as draft:
        built = build_engine(
            source,
            draft.folder / "model.engine",
            target,
            compute_capability=compute_capability,
            input_shape=input_shape,
        )
        facts = {
            "backend": built.backend,
            "backend_version": built.backend_version,
            "compute_capability": built.compute_capability,
            "precision": target.precision,
            "engine_sha256": built.sha256,
            "onnx_sha256": file_digest(source),
            "status": built.status,
            "profile": built.profile,
        }
        (draft.folder / "engine.json").write_text(json.dumps(facts, indent=1, sort_keys=True, default=list))
    return StageOutput(artifact=draft.done(), metrics={"size_bytes": float(built.size_bytes)}, info=facts)


def write_target(folder: Path, target: Mapping[str, Any], files: Mapping[str, Path], facts: Mapping[str, Any]) -> None:
    """Copy a target's files into ``folder`` with a manifest that says for which runtime each one is."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, source in files.items():
        place = folder / name
        shutil.copyfile(source, place)
        rows.append({"file": name, "sha256": file_digest(place), "size_bytes": place.stat().st_size})
    runtime = {
        "onnxruntime": "ONNX Runtime, CPU",
        "tensorrt_rtx": "TensorRT-RTX, the named compute capability",
        "tensorrt": "TensorRT, exactly the version and GPU that built it",
    }[target["kind"]]
    manifest = {"target": dict(target), "runtime": runtime, "files": rows, **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, default=str))
