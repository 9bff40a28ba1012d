"""Engines are built without their GPU: bytes, facts and the reasons for a refusal can be checked."""

import hashlib
from pathlib import Path

import pytest
from onnx import helper

from compression.errors import ExportError
from export.engine_trt import build_engine, import_backend
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


def test_generations_differ_and_a_rebuild_has_the_same_size(exported, int8_engines, tmp_path: Path):
    """Not the same bytes: the builder leaves some hundred that vary from build to build."""
    assert int8_engines["SM86"].sha256 != int8_engines["SM89"].sha256
    again = build_engine(
        exported.symmetric.path,
        tmp_path / "again.engine",
        TARGET,
        compute_capability="SM86",
        input_shape=exported.shape,
    )
    assert again.size_bytes == int8_engines["SM86"].size_bytes


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
