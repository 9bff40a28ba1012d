"""Manifests: what they say of a file, and what they tell a device that the file isn't for."""

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from compression.errors import ExportError
from compression.types import Preprocessing, TensorSpec
from export.onnx_graph import load_graph, save_graph
from export.profiles import (
    DeviceFacts,
    Manifest,
    ManifestFile,
    build_manifest,
    describe_graph,
    machine_isa,
    may_overflow,
    read_manifest,
    runtime_version,
    this_device,
)
from export.qdq import to_s8_activations, to_u8_activations
from export.runtime import CpuFeatures
from export.targets import OnnxRuntimeTarget, OpenVinoTarget, TensorRtRtxTarget, TensorRtTarget
from tasks.export import graph_metadata, write_target

PREPROCESSING = Preprocessing(scale=16, mean=(0.3,), std=(0.4,))


class Spec:
    """What ``graph_metadata`` reads of a model's specification."""

    class_names = ("a", "b", "c", "d")
    preprocessing = PREPROCESSING
    input_shape = (1, 12, 12)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def graphs(exported, tmp_path_factory) -> dict[str, Path]:
    """Graphs with the metadata a run gives them."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {"float32": exported.float32.path, "int8-symmetric": exported.symmetric.path}
    paths = {}
    for form, source in made.items():
        paths[form] = folder / f"{form}.onnx"
        save_graph(load_graph(source), paths[form], metadata=graph_metadata(Spec, {"form": form}))
    symmetric = paths["int8-symmetric"]
    for weights in ("int8", "uint8"):
        paths[weights] = folder / f"{weights}.onnx"
        metadata = graph_metadata(Spec, {"form": "int8"}) | {"source_sha256": digest(symmetric)}
        to_u8_activations(symmetric, paths[weights], weights=weights, metadata=metadata)
    paths["arm"] = folder / "arm.onnx"
    to_s8_activations(symmetric, paths["arm"], metadata=graph_metadata(Spec, {"form": "int8-arm"}))
    return paths


@pytest.fixture(scope="module")
def engine_files(graphs, tmp_path_factory) -> dict[str, Path]:
    """Two engines with their descriptions, as the engine stage writes them; what is inside does not matter here."""
    folder = tmp_path_factory.mktemp("engines")
    files = {}
    for capability in ("SM86", "SM89"):
        about = {
            "backend": "tensorrt_rtx",
            "backend_version": "1.7.1.116",
            "compute_capability": capability,
            "precision": "int8",
            "onnx_sha256": digest(graphs["int8-symmetric"]),
            "rebuild": "differs in 36 bytes, all in the numbers of internal names",
            "profile": {"images": [[1, 1, 12, 12], [8, 1, 12, 12], [32, 1, 12, 12]]},
            "graph": describe_graph(graphs["int8-symmetric"]),
        }
        for suffix, content in (("engine", f"engine for {capability}"), ("json", json.dumps(about))):
            name = f"student-0.rtx-{capability.lower()}.{suffix}"
            files[name] = folder / name
            files[name].write_text(content)
    return files


def manifest_of(graphs, form: str, **fields) -> Manifest:
    return build_manifest(OnnxRuntimeTarget(**fields), {"model.onnx": graphs[form]}, {"recipe": "digits"})


X86 = DeviceFacts(versions={"onnxruntime": "1.31.1"}, isa="x86", cpu_features=("avx2", "vnni"), system="linux-x86_64")
ARM = DeviceFacts(versions={"onnxruntime": "1.31.1"}, isa="arm", cpu_features=("dot_product",), system="linux-aarch64")


def test_a_written_target_reads_back(graphs, tmp_path: Path):
    target = OnnxRuntimeTarget(isa="x86", name="edge")
    facts = {"recipe": "digits", "accepted": True, "temperature": 1.25, "data": "abc", "file": "student-0.int8"}
    written = write_target(tmp_path / "edge", target, {"model.onnx": graphs["int8"]}, facts)
    manifest = read_manifest(tmp_path / "edge")
    assert manifest == written
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert (manifest.target, manifest.kind, manifest.precision, manifest.isa) == ("edge", "onnxruntime", "int8", "x86")
    assert manifest.input == TensorSpec(name="images", shape=(-1, 1, 12, 12), dtype="float32")
    assert manifest.output == TensorSpec(name="logits", shape=(-1, 4), dtype="float32")
    assert manifest.preprocessing == PREPROCESSING
    assert manifest.class_names == Spec.class_names
    assert (manifest.temperature, manifest.accepted, manifest.recipe) == (1.25, True, "digits")
    assert manifest.facts == {"data": "abc", "file": "student-0.int8"}
    assert manifest.opset == 20
    assert manifest.built_with == runtime_version("onnxruntime")
    assert manifest.files[0].source_sha256 == digest(graphs["int8-symmetric"])
    assert manifest.files[0].sha256 == digest(graphs["int8"]) == digest(tmp_path / "edge" / "model.onnx")


def test_a_target_may_come_from_a_recipes_json(graphs, tmp_path: Path):
    target = OnnxRuntimeTarget(precision="float32")
    files = {"model.onnx": graphs["float32"]}
    assert write_target(tmp_path, target.model_dump(mode="json"), files, {}) == build_manifest(target, files, {})


@pytest.mark.parametrize("harm", ["changed", "gone", "no manifest", "no json"])
def test_a_damaged_folder_is_refused(graphs, tmp_path: Path, harm):
    write_target(tmp_path, OnnxRuntimeTarget(), {"model.onnx": graphs["float32"]}, {})
    if harm == "changed":
        data = bytearray((tmp_path / "model.onnx").read_bytes())
        data[-1] ^= 1
        (tmp_path / "model.onnx").write_bytes(bytes(data))
    elif harm == "gone":
        (tmp_path / "model.onnx").unlink()
    elif harm == "no manifest":
        (tmp_path / "manifest.json").unlink()
    else:
        (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match="expected"):
        read_manifest(tmp_path)


def test_the_device_it_is_for_hears_nothing(graphs):
    assert manifest_of(graphs, "int8").check(X86) == []
    assert manifest_of(graphs, "arm", isa="arm").check(ARM) == []
    for device in (X86, ARM):
        assert manifest_of(graphs, "float32").check(device) == []


def test_this_machine_may_run_what_was_measured_on_it(graphs):
    device = this_device()
    assert manifest_of(graphs, "float32").check(device) == []
    assert device.isa == machine_isa()
    assert set(device.versions) >= {"onnxruntime"}


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("int8", {"isa": "arm"}, ["Instruction set: arm, expected x86"]),
        ("int8", {"isa": None}, ["Instruction set: unknown, expected x86"]),
        ("int8", {"cpu_features": ("avx2",)}, ["CPU features: no vnni"]),
        ("int8", {"versions": {"onnxruntime": "1.16.3"}}, ["Runtime version: ONNX Runtime 1.16.3, expected >=1.18"]),
        ("int8", {"versions": {"onnxruntime": "2.0.0"}}, ["Runtime version: ONNX Runtime 2.0.0"]),
        ("int8", {"versions": {}}, ["Runtime: no ONNX Runtime"]),
        ("uint8", {"cpu_features": ()}, []),
        ("float32", {"isa": "arm", "cpu_features": ()}, []),
        ("arm", {}, ["Instruction set: x86, expected arm"]),
        ("int8", {"versions": {}, "isa": "arm"}, ["Runtime: no ONNX Runtime", "Instruction set"]),
    ],
)
def test_every_other_device_hears_which_fact_differs(graphs, form, change, words):
    manifest = manifest_of(graphs, form, isa="arm" if form == "arm" else "x86")
    found = manifest.check(X86.model_copy(update=change))
    assert len(found) == len(words)
    for sentence, start in zip(found, words, strict=True):
        assert sentence.startswith(start)


RTX = DeviceFacts(versions={"tensorrt_rtx": "1.7.1.116"}, isa="x86", compute_capability="SM89", system="windows-amd64")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"compute_capability": "SM86"}, None),
        ({"compute_capability": "SM87"}, "Compute capability: SM87, expected SM86 or SM89"),
        ({"compute_capability": None}, "Compute capability: no GPU"),
        ({"versions": {"tensorrt_rtx": "1.8.0.1"}}, "Runtime version: TensorRT-RTX 1.8.0.1, expected ==1.7.1.116"),
        ({"versions": {"tensorrt": "1.7.1.116"}}, "Runtime: no TensorRT-RTX"),
    ],
)
def test_engines_name_their_release_and_generations(engine_files, change, words):
    manifest = build_manifest(TensorRtRtxTarget(), engine_files, {})
    found = manifest.check(RTX.model_copy(update=change))
    assert len(found) == (words is not None)
    assert words is None or found[0].startswith(words)


def test_engines_are_described_without_their_gpu(engine_files, graphs):
    manifest = build_manifest(TensorRtRtxTarget(), engine_files, {})
    engines = [each for each in manifest.files if each.file.endswith(".engine")]
    assert [each.compute_capability for each in engines] == ["SM86", "SM89"]
    assert {each.status for each in manifest.files} == {"built, not run"}
    assert {each.source_sha256 for each in engines} == {digest(graphs["int8-symmetric"])}
    assert all(str(each.rebuild).startswith("differs in 36 bytes") for each in engines)
    assert manifest.batches == (1, 32)
    assert manifest.input.shape == (-1, 1, 12, 12)
    assert manifest.preprocessing == PREPROCESSING
    assert manifest.built_with == "1.7.1.116"


@pytest.mark.parametrize(
    ("built", "compatible", "runs", "refused"),
    [
        ("10.8.0.43", False, ["10.8.0.43"], ["10.9.0.1", "11.4.0.106"]),
        ("10.8.0.43", True, ["10.8.0.43", "10.9.0.1", "11.4.0.106"], ["10.7.0.1", "12.0.0.1"]),
        ("11.4.0.106", True, ["11.5.0.1"], ["11.3.0.1", "12.0.0.1", "10.8.0.43"]),
    ],
)
def test_versions_of_classic_tensorrt(engine_files, tmp_path: Path, built, compatible, runs, refused):
    name = "student-0.rtx-sm86"
    about = json.loads(engine_files[f"{name}.json"].read_text()) | {
        "backend_version": built,
        "compute_capability": None,
    }
    (tmp_path / "a.json").write_text(json.dumps(about))
    files = {"a.engine": engine_files[f"{name}.engine"], "a.json": tmp_path / "a.json"}
    manifest = build_manifest(TensorRtTarget(version_compatible=compatible), files, {})
    assert manifest.system is not None
    device = DeviceFacts(versions={}, compute_capability="SM87", system=manifest.system)
    for version, wanted in [*((each, 0) for each in runs), *((each, 1) for each in refused)]:
        assert len(manifest.check(device.model_copy(update={"versions": {"tensorrt": version}}))) == wanted
    other = device.model_copy(update={"versions": {"tensorrt": built}, "system": "windows-amd64"})
    assert manifest.check(other)[0].startswith("System: windows-amd64")


def test_openvino_names_its_source(graphs, tmp_path: Path):
    about = {
        "backend_version": "2026.4.1",
        "precision": "int8",
        "onnx_sha256": digest(graphs["int8-symmetric"]),
        "graph": describe_graph(graphs["int8-symmetric"]),
    }
    for name, content in (("model.xml", "<net/>"), ("model.bin", "x"), ("model.json", json.dumps(about))):
        (tmp_path / name).write_text(content)
    manifest = build_manifest(OpenVinoTarget(), {place.name: place for place in tmp_path.iterdir()}, {})
    assert manifest.runtime_versions == ">=2026.4.1"
    assert {each.file: each.source_sha256 is not None for each in manifest.files} == {
        "model.bin": True,
        "model.json": False,
        "model.xml": True,
    }


def test_only_weights_that_can_overflow_ask_for_vnni(graphs, tmp_path: Path):
    assert may_overflow(graphs["int8"])
    assert not may_overflow(graphs["uint8"])
    assert not may_overflow(graphs["float32"])


def test_files_for_another_cpu_were_not_measured_here(graphs):
    other = "arm" if machine_isa() == "x86" else "x86"
    form = "arm" if other == "arm" else "int8"
    assert manifest_of(graphs, form, isa=other).files[0].status == "built, not run"
    assert manifest_of(graphs, "float32", isa="native").files[0].status == "measured here"


@pytest.mark.parametrize(
    ("machine", "isa"), [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm"), ("arm64", "arm")]
)
def test_machines_have_an_instruction_set(machine, isa):
    assert machine_isa(CpuFeatures(model="x", machine=machine)) == isa


def test_a_manifest_needs_files_and_digests(graphs):
    manifest = manifest_of(graphs, "float32")
    with pytest.raises(ValidationError):
        Manifest.model_validate({**manifest.model_dump(), "files": ()})
    with pytest.raises(ValidationError):
        ManifestFile(file="a", sha256="xyz", size_bytes=1, status="measured here")
    with pytest.raises(ValidationError):
        ManifestFile(file="a", sha256="0" * 64, size_bytes=1, status="passed")  # type: ignore[arg-type]


def test_files_without_a_graph_are_refused(tmp_path: Path):
    (tmp_path / "a.engine").write_text("x")
    with pytest.raises(ExportError, match="no described engine"):
        build_manifest(TensorRtRtxTarget(), {"a.engine": tmp_path / "a.engine"}, {})
