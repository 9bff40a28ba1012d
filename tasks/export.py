"""Stage 8: files. One graph per arithmetic, then one folder per target, each file checked and described."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from compression.augment import normalise
from compression.checkpoint import load_checkpoint, read_spec
from compression.data import open_dataset
from compression.errors import ExportError
from compression.models import ModelSpec
from compression.quantize import load_quantized
from export.engine_trt import build_engine
from export.formats import activation_ranges, to_bfloat16, to_fp8, to_int4
from export.onnx_graph import GraphInfo, to_onnx
from export.openvino import OpenVinoSession, to_openvino
from export.profiles import Form, Manifest, Status, build_manifest, describe_graph, this_system
from export.ptq import Calibration, quantize_static
from export.qdq import WeightForm, check_symmetric, to_s8_activations, to_u8_activations
from export.runtime import OnnxSession
from export.sparsity import sparsity_of
from export.targets import AnyTarget, OpenVinoTarget, TensorRtRtxTarget, TensorRtTarget
from export.temperature import store_temperature, temperature_entries
from tasks.artifacts import file_digest
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE

logger = logging.getLogger(__name__)

GRAPH_CODE = (
    *MODEL_CODE,
    "compression.quantize",
    *("export.onnx_graph", "export.graph_editor", "export.qdq", "export.ptq", "export.runtime", "export.sparsity"),
    "export.formats",
    "export.temperature",
)
GRAPH_LIBRARIES = ("torch", "torchao", "onnx", "onnxscript", "onnxruntime-gpu")
SPARSE_FROM = 0.1
"""Share of zeros from which on a file is called sparse: rounding to INT8 makes a few by itself."""
COMPARED = 64
"""Calibration images a converted file and its source both answer."""


def graph_metadata(spec: ModelSpec, lineage: dict[str, str]) -> dict[str, str]:
    """What every shipped graph says about itself."""
    return {
        "form": lineage.get("form", "float32"),
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
    calibration: Calibration = "min_max",
    temperature: StageResult | None = None,
) -> StageOutput:
    """Write one ONNX file in one of the forms that ``export.profiles.Form`` names.

    ``source`` is the graph a form is an edit of: the symmetric one for ``int8`` and ``int8-arm``, the float32 one for
    ``int8-ptq`` (the control arm), ``bfloat16``, ``int4`` and ``fp8``; the others are exported from the model.
    ``int8_weights`` is how ``int8`` and ``int8-ptq`` write their weights, see ``export.qdq``; ``calibration`` how
    ``int8-ptq`` finds ranges. A ``temperature`` is stored in the file, and divides the logits in it if the recipe says
    so; edits inherit both from their source.
    """
    folder = work.open(model)
    spec = read_spec(folder)
    lineage = {"model": model.artifact.sha256, "data": data.artifact.sha256, "form": form, **teachers}
    metadata = graph_metadata(spec, lineage)
    if source is not None:
        metadata["source_sha256"] = file_digest(work.open(source) / "model.onnx")
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
        else:
            images = calibration_images(work.open(data), spec) if form in ("int8-ptq", "fp8") else None
            edited = work.open(source) / "model.onnx"
            entries = metadata | temperature_entries(edited)
            info = _edit(edited, path, form, images, int8_weights, calibration, entries)
        if temperature is not None:
            info = store_temperature(
                path, path, temperature.metrics["temperature"], apply=bool(temperature.info["apply"])
            )
    size = draft.done().size_bytes
    return StageOutput(
        artifact=draft.done(),
        metrics={"size_bytes": float(size), **sparse_facts(work.store.place(draft.done()) / "model.onnx")},
        info={"form": form, "opset": info.opset, "nodes": info.nodes, "sha256": info.sha256},
    )


def _edit(
    source: Path,
    path: Path,
    form: Form,
    images: np.ndarray | None,
    weights: WeightForm | None,
    calibration: Calibration,
    metadata: Mapping[str, str],
) -> GraphInfo:
    """Write a form that is an edit of another graph; ``images`` are there for those that calibrate."""
    if form == "int8":
        return to_u8_activations(source, path, weights=weights, metadata=metadata)
    if form == "int8-arm":
        return to_s8_activations(source, path, metadata=metadata)
    if form == "bfloat16":
        return to_bfloat16(source, path, metadata=metadata)
    if form == "int4":
        return to_int4(source, path, metadata=metadata)
    if images is None:
        raise ExportError(f"Form {form} has no calibration images, expected some. This is a defect of the flow.")
    if form == "fp8":
        return to_fp8(source, path, activation_ranges(source, images), metadata=metadata)
    return quantize_static(
        source,
        path,
        images,
        preset="onnxruntime_x86",
        calibration=calibration,
        weights=weights,
        metadata=metadata,
    )


def calibration_images(data_folder: Path, spec: ModelSpec) -> np.ndarray:
    """Normalised calibration images [N,C,H,W], float32."""
    dataset = open_dataset(data_folder)
    return normalise(torch.as_tensor(dataset.calibration.images), spec.preprocessing).numpy()


@stage("engine", code=("export.engine_trt", "export.targets", "export.profiles"), libraries=("onnx",))
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
    """Build one engine ahead of time, twice; it is described, hashed, and reported as built, not run."""
    source = work.open(graph) / "model.onnx"
    with work.store.put("engine") as draft:
        built = build_engine(
            source,
            draft.folder / "model.engine",
            target,
            compute_capability=compute_capability,
            input_shape=input_shape,
            check_rebuild=True,
        )
        facts = {
            "backend": built.backend,
            "backend_version": built.backend_version,
            "compute_capability": built.compute_capability,
            "precision": target.precision,
            "engine_sha256": built.sha256,
            "onnx_sha256": file_digest(source),
            "status": built.status,
            "rebuild": built.rebuild,
            "profile": built.profile,
            "system": this_system(),
            "graph": describe_graph(source),
        }
        (draft.folder / "engine.json").write_text(json.dumps(facts, indent=1, sort_keys=True, default=list))
    return StageOutput(artifact=draft.done(), metrics={"size_bytes": float(built.size_bytes)}, info=facts)


@stage("openvino", code=("export.openvino", "export.targets", "export.profiles"), libraries=("onnx", "onnxruntime-gpu"))
def export_openvino(
    work: Work, *, name: str, target: OpenVinoTarget, graph: StageResult, data: StageResult, backend: str
) -> StageOutput:
    """Convert a graph for OpenVINO and compare the answers of both files on calibration images, on this CPU."""
    source = work.open(graph) / "model.onnx"
    dataset = open_dataset(work.open(data))
    raw = torch.as_tensor(dataset.calibration.images[:COMPARED])
    images = normalise(raw, dataset.preprocessing).numpy()
    with work.store.put("openvino") as draft:
        made = to_openvino(source, draft.folder)
        session = OpenVinoSession(made.graph)
        found, wanted = session.run(images), OnnxSession(source).run(images)
        facts = {
            "backend": "openvino",
            "backend_version": made.version,
            "precision": target.precision,
            "onnx_sha256": file_digest(source),
            "status": "built, not run",
            "layer_types": session.layer_types(),
            "max_abs": float(np.abs(found - wanted).max()),
            "flips": float((found.argmax(1) != wanted.argmax(1)).mean()),
            "compared": len(images),
            "graph": describe_graph(source),
        }
        (draft.folder / "openvino.json").write_text(json.dumps(facts, indent=1, sort_keys=True, default=list))
    sizes = {"size_bytes": float(made.size_bytes), "flips": facts["flips"], "max_abs": facts["max_abs"]}
    return StageOutput(artifact=draft.done(), metrics=sizes, info=facts)


def write_target(
    folder: Path,
    target: AnyTarget | Mapping[str, Any],
    files: Mapping[str, Path],
    facts: Mapping[str, Any],
    *,
    status: Status | None = None,
) -> Manifest:
    """Copy a target's files into ``folder`` with a manifest that says for which device they are.

    ``files`` and ``facts`` as in ``export.profiles.build_manifest``; ``export.profiles.read_manifest`` reads it back.
    """
    known: AnyTarget = TypeAdapter(AnyTarget).validate_python(dict(target) if isinstance(target, Mapping) else target)
    manifest = build_manifest(known, files, facts, status=status)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        shutil.copyfile(source, folder / name)
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest
