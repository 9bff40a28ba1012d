"""Engines are built without their GPU: bytes, facts and the reasons for a refusal can be checked."""

import hashlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from onnx import helper

from compression.errors import ExportError
from export import engine_trt
from export.engine_trt import build_engine, compare_builds, import_backend
from export.onnx_graph import load_graph, save_graph, to_onnx
from export.targets import TensorRtRtxTarget, TensorRtTarget

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed", exc_type=ImportError)
TARGET = TensorRtRtxTarget(min_batch=1, opt_batch=4, max_batch=16)


@pytest.fixture(scope="module")
def int8_engines(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return {
        capability: build_engine(
            exported.symmetric.path,
            folder / f"{capability}.engine",
            TARGET,
            compute_capability=capability,
            input_shape=exported.shape,
        )
        for capability in ("SM86", "SM89")
    }


@pytest.mark.parametrize("capability", ["SM86", "SM89"])
def test_int8_engine_is_described(int8_engines, capability):
    info = int8_engines[capability]
    data = info.path.read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert info.size_bytes == len(data) > 0
    assert info.compute_capability == capability
    assert info.backend == "tensorrt_rtx"
    assert info.backend_version == rtx.__version__
    assert info.status == "built, not run"
    assert info.profile == {"images": ((1, 1, 12, 12), (4, 1, 12, 12), (16, 1, 12, 12))}


def test_generations_differ(int8_engines):
    assert int8_engines["SM86"].sha256 != int8_engines["SM89"].sha256


def test_a_rebuild_with_a_range_of_batches_differs_in_names_at_most(exported, tmp_path: Path):
    info = build_engine(
        exported.symmetric.path,
        tmp_path / "e.engine",
        TARGET,
        compute_capability="SM86",
        input_shape=exported.shape,
        check_rebuild=True,
    )
    assert info.rebuild == "identical" or info.rebuild.endswith("all in the numbers of internal names")


def test_a_rebuild_with_one_batch_size_is_identical(exported, tmp_path: Path):
    info = build_engine(
        exported.symmetric.path,
        tmp_path / "e.engine",
        TensorRtRtxTarget(min_batch=4, opt_batch=4, max_batch=4),
        compute_capability="SM86",
        input_shape=exported.shape,
        check_rebuild=True,
    )
    assert info.rebuild == "identical"


ONE_BATCH = """
import sys
from pathlib import Path
from export.engine_trt import build_engine
from export.targets import TensorRtRtxTarget
target = TensorRtRtxTarget(min_batch=4, opt_batch=4, max_batch=4)
out = Path(sys.argv[2])
build_engine(Path(sys.argv[1]), out, target, compute_capability="SM86", input_shape=(1, 12, 12))
"""


@pytest.mark.slow
def test_with_one_batch_size_another_process_builds_the_same_bytes(exported, tmp_path: Path):
    info = build_engine(
        exported.symmetric.path,
        tmp_path / "here.engine",
        TensorRtRtxTarget(min_batch=4, opt_batch=4, max_batch=4),
        compute_capability="SM86",
        input_shape=exported.shape,
    )
    there = tmp_path / "there.engine"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", ONE_BATCH, str(exported.symmetric.path), str(there)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    assert hashlib.sha256(there.read_bytes()).hexdigest() == info.sha256


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (b"abc", b"abc", "identical"),
        (b"x __mye12 y __mye34 z __mye12", b"x __mye56 y __mye34 z __mye56", "differs in 4 bytes, all in the numbers"),
        (b"x __mye12 y __mye34 z __mye12", b"x __mye12 y __mye34 z __mye34", "differs in 2 bytes"),
        (b"x __mye12 y", b"x __mye34 z", "differs in 3 bytes"),
        (b"abc", b"abcd", "differs in size: 3 and 4 bytes"),
    ],
)
def test_builds_are_compared_by_their_bytes(first, second, words):
    found = compare_builds(first, second)
    assert found.startswith(words)
    assert found.endswith("names") == ("numbers" in words)


def test_float16_engine_builds_from_a_float16_graph(exported, tmp_path: Path):
    graph = to_onnx(
        exported.model,
        tmp_path / "half.onnx",
        input_shape=exported.shape,
        metadata={},
        precision="float16",
        fast=True,
    )
    info = build_engine(
        graph.path,
        tmp_path / "half.engine",
        TARGET.model_copy(update={"precision": "float16"}),
        compute_capability="SM89",
        input_shape=exported.shape,
    )
    assert info.size_bytes > 0


@pytest.mark.parametrize(("precision", "words"), [("int8", "integer weights"), ("float16", "float16 weights")])
def test_a_float32_graph_fits_no_engine(exported, tmp_path: Path, precision, words):
    with pytest.raises(ExportError, match=words):
        build_engine(
            exported.float32.path,
            tmp_path / "e.engine",
            TARGET.model_copy(update={"precision": precision}),
            compute_capability="SM86",
            input_shape=exported.shape,
        )
    assert not list(tmp_path.iterdir())


def test_the_parsers_reason_is_passed_on(exported, tmp_path: Path):
    proto = load_graph(exported.symmetric.path)
    proto.opset_import.append(helper.make_opsetid("custom", 1))
    last = proto.graph.node[-1]
    last.output[0] = "before"
    proto.graph.node.append(helper.make_node("Mystery", ["before"], ["logits"], domain="custom"))
    save_graph(proto, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match="Mystery"):
        build_engine(
            tmp_path / "odd.onnx",
            tmp_path / "e.engine",
            TARGET,
            compute_capability="SM86",
            input_shape=exported.shape,
        )


def test_the_builders_reason_is_passed_on(exported, tmp_path: Path):
    with pytest.raises(ExportError, match=r"no engine \(.*(profile|dimension|shape)"):
        build_engine(
            exported.symmetric.path,
            tmp_path / "e.engine",
            TARGET,
            compute_capability="SM86",
            input_shape=(1, 99, 99),
        )
    assert not list(tmp_path.iterdir())


def test_an_unknown_generation_is_refused(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="SM87"):
        build_engine(
            exported.symmetric.path,
            tmp_path / "e.engine",
            TARGET,
            compute_capability="SM87",
            input_shape=exported.shape,
        )


def test_a_missing_backend_says_how_to_get_it():
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(ExportError, match="pip install"):
            import_backend(TensorRtTarget())
    else:
        pytest.skip("tensorrt is installed here")


# --- both generations of the classic interface, imitated: the library needs a GPU --------------------------


class Holder:
    """A namespace that answers only to the names it was given."""

    def __init__(self, **names) -> None:
        vars(self).update(names)


def imitation(version: str, *, flags: dict, builder_flags: dict, levels: dict | None) -> tuple[ModuleType, dict]:
    """A module with the surface of one TensorRT release, and what was asked of it."""
    asked: dict = {"flags": []}

    class Config:
        def __init__(self) -> None:
            if levels is not None:
                self.hardware_compatibility_level = None
            asked["config"] = self

        def set_flag(self, flag) -> None:
            asked["flags"].append(flag)

        def add_optimization_profile(self, profile) -> None:
            asked["profile"] = profile

    class Profile(dict):
        def set_shape(self, name, *shapes) -> None:
            self[name] = shapes

    class Builder:
        def __init__(self, logger) -> None:
            pass

        def create_network(self, bits):
            asked["network"] = bits
            return Holder(num_inputs=1, get_input=lambda number: Holder(name="images"))

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            return b"engine"

    class Parser:
        num_errors = 0

        def __init__(self, network, logger) -> None:
            pass

        def parse(self, graph) -> bool:
            asked["graph"] = graph
            return True

    module = ModuleType("tensorrt")
    module.__version__ = version
    module.Builder, module.OnnxParser = Builder, Parser
    module.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})
    module.NetworkDefinitionCreationFlag = Holder(**flags)
    module.BuilderFlag = Holder(**builder_flags)
    if levels is not None:
        module.HardwareCompatibilityLevel = Holder(**levels)
    return module, asked


TEN = {
    "version": "10.8.0.43",
    "flags": {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
    "builder_flags": {"FP16": 0, "BF16": 1, "INT8": 2, "FP8": 3, "VERSION_COMPATIBLE": 4},
    "levels": {"NONE": 0, "AMPERE_PLUS": 1},
}
ELEVEN = {
    "version": "11.4.0.106",
    "flags": {},
    "builder_flags": {"VERSION_COMPATIBLE": 4},
    "levels": {"NONE": 0, "AMPERE_PLUS": 1, "SAME_COMPUTE_CAPABILITY": 2},
}


@pytest.fixture(params=[TEN, ELEVEN], ids=["10.x", "11.x"])
def classic(request, monkeypatch):
    module, asked = imitation(**request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(engine_trt._CURRENT, "tensorrt", None)
    monkeypatch.delitem(engine_trt._CURRENT, "tensorrt")
    return module, asked


def classic_engine(exported, folder: Path, **fields):
    return build_engine(
        exported.symmetric.path,
        folder / "e.engine",
        TensorRtTarget(**fields),
        compute_capability=None,
        input_shape=exported.shape,
    )


def test_the_graph_alone_sets_the_precision_in_both_generations(exported, classic, tmp_path: Path):
    module, asked = classic
    info = classic_engine(exported, tmp_path)
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    assert asked["network"] == (0 if typed is None else 1 << typed)
    assert asked["flags"] == []
    assert asked["graph"] == exported.symmetric.path.read_bytes()
    assert info.backend_version == module.__version__
    assert info.compute_capability is None
    assert (info.status, info.rebuild) == ("built, not run", "not checked")
    assert asked["profile"] == {"images": ((1, 1, 12, 12), (8, 1, 12, 12), (32, 1, 12, 12))}


def test_compatibility_is_asked_for_where_the_release_knows_it(exported, classic, tmp_path: Path):
    module, asked = classic
    classic_engine(exported, tmp_path, version_compatible=True, hardware_compatible="ampere_plus")
    assert asked["flags"] == [module.BuilderFlag.VERSION_COMPATIBLE]
    assert asked["config"].hardware_compatibility_level == module.HardwareCompatibilityLevel.AMPERE_PLUS


def test_compatibility_the_release_lacks_is_refused(exported, classic, tmp_path: Path):
    module, _ = classic
    if hasattr(module.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
        assert classic_engine(exported, tmp_path, hardware_compatible="same_compute_capability").size_bytes
        return
    with pytest.raises(ExportError, match=r"same_compute_capability.*tensorrt 10\.8"):
        classic_engine(exported, tmp_path, hardware_compatible="same_compute_capability")
    assert not list(tmp_path.iterdir())
