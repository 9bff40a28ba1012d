"""Export profiles: which files each target gets from one trained model, and the manifest that goes with them.

A manifest says for which device its files are. ``Manifest.check`` tells a device which of its facts differ, so that a
file is refused with a reason instead of running slowly, answering wrongly or failing to load.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, ValidationError

from compression.errors import ExportError
from compression.types import Frozen, Preprocessing, TensorSpec
from export.graph_editor import GraphEditor
from export.onnx_graph import load_graph, metadata_of
from export.runtime import CpuFeatures, OnnxSession, cpu_features
from export.targets import AnyTarget, Isa, OnnxRuntimeTarget, OpenVinoTarget, TensorRtRtxTarget

Form = Literal["float32", "float16", "bfloat16", "int8", "int8-arm", "int8-ptq", "int8-symmetric", "int4", "fp8"]
"""How a graph computes: ``int8`` has uint8 activations (x86), ``int8-arm`` int8 ones, ``int8-symmetric`` is TensorRT's,
``int8-ptq`` is ONNX Runtime's own static quantization, the control arm."""

Status = Literal["measured here", "built, not run"]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

RUNTIMES = {
    "onnxruntime": "ONNX Runtime, CPU",
    "openvino": "OpenVINO",
    "tensorrt_rtx": "TensorRT-RTX, this release and the named GPU generations only",
    "tensorrt": "TensorRT, the version and GPU that built it",
}
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt",),
}
"""Kind of target -> the packages that hold its runtime; the first installed one counts."""
EXACT_ON_X86 = 64
"""Largest weight whose products with two uint8 values still fit 16 bits, pair by pair: 2 * 255 * 64 < 2^15."""


def machine_isa(cpu: CpuFeatures | None = None) -> Isa:
    """The instruction set of a CPU; None asks about this one. What isn't ARM counts as x86."""
    machine = (cpu or cpu_features()).machine.lower()
    return "arm" if machine.startswith(("aarch64", "arm")) else "x86"


def target_isa(target: OnnxRuntimeTarget, here: Isa | None = None) -> Isa:
    """The instruction set a target's files are written for; ``here`` is this machine's, which None looks up."""
    return (here or machine_isa()) if target.isa == "native" else target.isa


def runs_here(target: AnyTarget, here: Isa | None = None) -> bool:
    """Whether this machine is what the target's files are for, so that their speed can be measured."""
    return isinstance(target, OnnxRuntimeTarget) and target_isa(target, here) == (here or machine_isa())


def forms_of(target: AnyTarget, here: Isa | None = None) -> tuple[Form, ...]:
    """The forms of the graphs a target needs, simplest first; the last one is what its precision asks for."""
    if isinstance(target, OnnxRuntimeTarget):
        int8: Form = "int8" if target_isa(target, here) == "x86" else "int8-arm"
        lowest: Form = int8 if target.precision == "int8" else target.precision
        return ("float32",) if lowest == "float32" else ("float32", lowest)
    return ("int8-symmetric" if target.precision == "int8" else target.precision,)


def session_options(form: str) -> dict[str, Any]:
    """Arguments of ``OnnxSession`` (and ``integer_share``) with which this machine runs a form as it is meant.

    On ARM the runtime fuses int8 activations into integer kernels, on x86 only if told to. FP8 quantizers it fuses
    into kernels that don't take them, and merely forbidding that fusion gave wrong logits: such files run unoptimised.
    """
    if form == "int8-arm":
        return {"config": {"session.qdqisint8allowed": "1"}}
    return {"optimise": False} if form == "fp8" else {}


def open_as_meant(path: Path) -> OnnxSession:
    """A session of a graph with the options of the form that its metadata names."""
    return OnnxSession(path, **session_options(metadata_of(path).get("form", "")))


class DeviceFacts(Frozen):
    """What a device says of itself."""

    versions: dict[str, str]
    """Kind of runtime (``onnxruntime``, ``tensorrt_rtx``, ...) -> its version, for those that are there."""
    isa: Isa | None = None
    """Instruction set of its CPU."""
    cpu_features: tuple[str, ...] = ()
    """Of avx2, avx512, vnni, dot_product."""
    compute_capability: str | None = None
    """GPU generation, e.g. SM86; none: no GPU."""
    system: str = ""
    """Operating system and architecture, e.g. ``linux-x86_64``."""


def this_device() -> DeviceFacts:
    """The facts of this machine, as far as they can be known without its GPU."""
    versions = {kind: version for kind in PACKAGES if (version := runtime_version(kind)) is not None}
    features = cpu_features()
    names = ("avx2", "avx512", "vnni", "dot_product")
    return DeviceFacts(
        versions=versions,
        isa=machine_isa(features),
        cpu_features=tuple(name for name in names if getattr(features, name)),
        system=this_system(),
    )


def this_system() -> str:
    """Operating system and architecture."""
    return f"{platform.system()}-{platform.machine()}".lower()


def runtime_version(kind: str) -> str | None:
    """Version of the installed runtime of a kind, None if there is none."""
    for package in PACKAGES[kind]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


class ManifestFile(Frozen):
    """One file of a target."""

    file: str
    sha256: Digest
    size_bytes: PositiveInt
    status: Status
    """Whether this machine ran it; what it can't run is never called measured."""
    source_sha256: Digest | None = None
    """The ONNX file it was made from; none: it was exported from the model, or describes another file."""
    compute_capability: str | None = None
    """GPU generation of an engine."""
    rebuild: str | None = None
    """What a second build of an engine gave: ``identical``, ``differs in ...``, ``not checked``."""


class Manifest(Frozen):
    """For which device a target's files are, and how to feed them."""

    version: Literal[1] = 1
    """Of this description."""
    target: str
    """Name of the target in its recipe."""
    kind: Literal["onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"]
    runtime: str
    """The runtime in words."""
    runtime_versions: str
    """Which of its versions run the files, as Python packages write it: ``>=1.18,<2``, ``==1.7.1.116``."""
    built_with: str
    """The version that built or measured them."""
    isa: Isa | None = None
    """CPUs the integers are written for; none: any."""
    cpu_features: tuple[str, ...] = ()
    """What the CPU must have, since sums of products could overflow without it."""
    compute_capabilities: tuple[str, ...] = ()
    """GPU generations with an engine; empty: no engine, or one for the GPU of the building machine."""
    system: str | None = None
    """Operating system and architecture an engine is bound to; none: any."""
    precision: str
    opset: PositiveInt
    input: TensorSpec
    """Name, shape [batch, C, H, W] with -1 for any, and type."""
    output: TensorSpec
    """Name, shape [batch, classes] with -1 for any, and type."""
    batches: tuple[PositiveInt, PositiveInt] | None = None
    """Smallest and largest batch an engine takes; none: any."""
    preprocessing: Preprocessing | None = None
    """From a raw image to the input."""
    class_names: tuple[str, ...] = ()
    temperature: PositiveFloat | None = None
    """Divide logits by it before softmax; none: probabilities were not calibrated."""
    accepted: bool | None = None
    """Whether the gate let the file pass; none: it could not be judged here."""
    recipe: str = ""
    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1)]
    facts: dict[str, Any] = {}
    """What else the run says: lineage, data, the candidate's name."""

    def check(self, device: DeviceFacts) -> list[str]:
        """The facts of a device that differ from what the files need, each in a sentence; empty: it may run them."""
        found = [self._runtime(device)]
        if self.isa is not None and device.isa != self.isa:
            found.append(
                f"Instruction set: {device.isa or 'unknown'}, expected {self.isa}. Its integers are written for"
                f" {self.isa} CPUs; elsewhere they run in float or slowly."
            )
        elif missing := [name for name in self.cpu_features if name not in device.cpu_features]:
            found.append(
                f"CPU features: no {', '.join(missing)}, expected {', '.join(self.cpu_features)}. Sums of products can"
                " overflow without it. Export again for this CPU."
            )
        if self.compute_capabilities and device.compute_capability not in self.compute_capabilities:
            found.append(
                f"Compute capability: {device.compute_capability or 'no GPU'}, expected"
                f" {' or '.join(self.compute_capabilities)}. Build the engine for this GPU."
            )
        if self.system is not None and device.system != self.system:
            found.append(
                f"System: {device.system or 'unknown'}, expected {self.system}. Build the engine on this system."
            )
        return [sentence for sentence in found if sentence]

    def _runtime(self, device: DeviceFacts) -> str:
        from packaging.specifiers import SpecifierSet

        name, version = RUNTIMES[self.kind].partition(",")[0], device.versions.get(self.kind)
        if version is None:
            return f"Runtime: no {name}, expected version {self.runtime_versions}. Install it."
        if not SpecifierSet(self.runtime_versions).contains(version, prereleases=True):
            return (
                f"Runtime version: {name} {version}, expected {self.runtime_versions}. Install that version, or"
                " build the files again with this one."
            )
        return ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a target's folder, after the digest of every file was checked.

    Raises:
        ExportError: there is none, it isn't one, or a file is absent or changed.
    """
    path = folder / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ExportError(
            f"Folder '{folder}' has no usable manifest.json ({type(error).__name__}), expected one written by a run."
            " Export the target again."
        ) from error
    for each in manifest.files:
        place = folder / each.file
        if not place.is_file() or _digest(place) != each.sha256:
            found = "other bytes than its manifest says" if place.is_file() else "no file"
            raise ExportError(f"File '{each.file}' has {found}, expected its sha256. Copy the folder again.")
    return manifest


def build_manifest(
    target: AnyTarget, files: Mapping[str, Path], facts: Mapping[str, Any], *, status: Status | None = None
) -> Manifest:
    """The manifest of a target's files.

    Args:
        target: The target.
        files: Name in the target's folder -> where the file is. An engine has its description beside it, as written by
            ``tasks.export``: ``a.engine`` and ``a.json``; OpenVINO's graph is a pair ``a.xml``, ``a.bin``.
        facts: ``recipe``, ``accepted``, ``temperature`` and whatever else is worth keeping.
        status: Of all files; None: measured here if this machine is what the target is for.

    Raises:
        ExportError: there is no graph or engine among the files.
    """
    status = status or ("measured here" if runs_here(target) else "built, not run")
    described = {name: json.loads(path.read_text()) for name, path in files.items() if name.endswith(".json")}
    graph = _graph_facts(files, described)
    built = str(graph.pop("built_with", None) or runtime_version(target.kind) or "0")
    kept = dict(facts)
    own = {key: kept.pop(key, None) for key in ("recipe", "accepted", "temperature")}
    return Manifest(
        target=target.name,
        kind=target.kind,
        runtime=RUNTIMES[target.kind],
        runtime_versions=_versions(target, graph["precision"], built),
        built_with=built,
        files=tuple(_row(name, path, described, status) for name, path in sorted(files.items())),
        compute_capabilities=tuple(
            sorted({each["compute_capability"] for each in described.values() if each.get("compute_capability")})
        ),
        system=this_system() if target.kind == "tensorrt" else None,
        recipe=str(own["recipe"] or ""),
        accepted=own["accepted"],
        temperature=own["temperature"],
        facts=json.loads(json.dumps(kept, default=str)),
        **_cpu_facts(target, files),
        **graph,
    )


def _row(name: str, path: Path, described: Mapping[str, Any], status: Status) -> ManifestFile:
    about = described.get(f"{name.rpartition('.')[0]}.json", {})
    engine = name.endswith((".engine", ".bin", ".xml"))
    source = about.get("onnx_sha256") if engine else None
    if name.endswith(".onnx"):
        source = metadata_of(path).get("source_sha256")
    return ManifestFile(
        file=name,
        sha256=_digest(path),
        size_bytes=path.stat().st_size,
        status=status,
        source_sha256=source,
        compute_capability=about.get("compute_capability") if engine else None,
        rebuild=about.get("rebuild") if name.endswith(".engine") else None,
    )


def _graph_facts(files: Mapping[str, Path], described: Mapping[str, Any]) -> dict[str, Any]:
    """Input, output, opset, preprocessing and classes, from an ONNX file or from an engine's description."""
    for name, path in files.items():
        if name.endswith(".onnx"):
            return {**describe_graph(path), "precision": metadata_of(path).get("form", "float32")}
    for about in described.values():
        if "graph" in about:
            facts = {**about["graph"], "precision": about["precision"], "built_with": about["backend_version"]}
            profile = next(iter((about.get("profile") or {}).values()), None)
            return facts if profile is None else {**facts, "batches": (profile[0][0], profile[-1][0])}
    raise ExportError(
        f"Files {sorted(files)} have no graph and no described engine, expected one to write a manifest about."
        " Give a .onnx file, or an .engine with its .json."
    )


def describe_graph(path: Path) -> dict[str, Any]:
    """What a manifest says of an ONNX file: opset, input, output, preprocessing, class names (JSON)."""
    proto = load_graph(path)
    stored = {tensor.name for tensor in proto.graph.initializer}
    metadata = metadata_of(path)
    preprocessing = metadata.get("preprocessing")
    return {
        "opset": next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        "input": _tensor(next(entry for entry in proto.graph.input if entry.name not in stored)),
        "output": _tensor(proto.graph.output[0]),
        "preprocessing": None if preprocessing is None else json.loads(preprocessing),
        "class_names": json.loads(metadata.get("class_names", "[]")),
    }


def _tensor(entry: Any) -> dict[str, Any]:
    from onnx import helper

    kind = entry.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim]
    return {"name": entry.name, "shape": shape, "dtype": str(helper.tensor_dtype_to_np_dtype(kind.elem_type))}


def _cpu_facts(target: AnyTarget, files: Mapping[str, Path]) -> dict[str, Any]:
    """Instruction set and features an INT8 file for CPUs needs; nothing of a float one."""
    graphs = [path for name, path in files.items() if name.endswith(".onnx")]
    if not isinstance(target, OnnxRuntimeTarget) or not graphs:
        return {}
    activations = metadata_of(graphs[0]).get("activations")
    if activations is None:
        return {}
    isa: Isa = "x86" if activations == "uint8" else "arm"
    return {"isa": isa, "cpu_features": ("vnni",) if isa == "x86" and may_overflow(graphs[0]) else ()}


def may_overflow(path: Path) -> bool:
    """Whether sums of products of a graph's int8 weights with uint8 values can leave 16 bits (x86 without VNNI).

    uint8 weights run on kernels that can't overflow; so do int8 weights up to 64, as training with 7 bits makes them.
    """
    editor = GraphEditor(load_graph(path))
    weights = [
        value
        for node in editor.graph.node
        if node.op_type == "DequantizeLinear" and (value := editor.value(node.input[0])) is not None
    ]
    return any(
        value.dtype == np.int8 and np.abs(value.astype(np.int16)).max(initial=0) > EXACT_ON_X86 for value in weights
    )


def _versions(target: AnyTarget, precision: str, built: str) -> str:
    """Which versions of the runtime run files built or measured with version ``built``."""
    if isinstance(target, OnnxRuntimeTarget):
        # 1.18 is the first to read opset 21 and IR version 10; 4-bit products came with 1.20.
        return ">=1.20,<2" if precision == "int4" else ">=1.18,<2"
    if isinstance(target, OpenVinoTarget):
        return f">={built}"
    if isinstance(target, TensorRtRtxTarget) or not target.version_compatible:
        return f"=={built}"
    major = int(built.partition(".")[0])
    return f">={built},<{12 if major == 10 else major + 1}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
