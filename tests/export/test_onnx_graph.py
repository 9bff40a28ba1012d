"""What a written graph promises: one file, one interface, the module's own answers."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compression.errors import ExportError
from export.onnx_graph import check_graph, load_graph, metadata_of, save_graph, to_onnx
from export.ptq import quantize_static
from export.qdq import to_u8_activations
from export.runtime import OnnxSession


@pytest.fixture(scope="module")
def fast(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("fast") / "fast.onnx"
    return to_onnx(exported.model, path, input_shape=exported.shape, metadata={}, fast=True)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_graph_answers_as_the_module_at_any_batch(exported, batch):
    images = exported.images(batch)
    with torch.no_grad():
        expected = exported.model(images).numpy()
    found = OnnxSession(exported.float32.path).run(images.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_fast_export_answers_as_the_full_one(exported, fast):
    images = exported.images(9).numpy()
    full = OnnxSession(exported.float32.path).run(images)
    np.testing.assert_allclose(OnnxSession(fast.path).run(images), full, rtol=1e-5, atol=1e-5)


def test_facts_are_those_of_the_file(exported):
    info = exported.float32
    data = info.path.read_bytes()
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert info.size_bytes == len(data)
    assert info.opset == 20
    assert info.nodes["Conv"] == 6
    assert "BatchNormalization" not in info.nodes


def test_interface_has_the_agreed_names_and_a_dynamic_batch(exported):
    for info in (exported.float32, exported.symmetric):
        graph = load_graph(info.path).graph
        assert [value.name for value in graph.input] == ["images"]
        assert [value.name for value in graph.output] == ["logits"]
        sizes = graph.input[0].type.tensor_type.shape.dim
        assert sizes[0].dim_param
        assert [size.dim_value for size in sizes[1:]] == [1, 12, 12]


def test_metadata_comes_back(exported):
    assert metadata_of(exported.float32.path)["lineage"] == "abc"


LAYERS = (
    *("stem.0", "blocks.0.first.0", "blocks.0.second.0", "blocks.1.first.0", "blocks.1.second.0"),
    *("blocks.1.shortcut.0", "head"),
)


def paths_of_layers(path: Path) -> list[str]:
    nodes = load_graph(path).graph.node
    return [node.name.rpartition("/")[0] for node in nodes if node.op_type in ("Conv", "Gemm")]


def test_nodes_are_called_by_module_path_and_operator(exported, fast, tmp_path: Path):
    half = to_onnx(
        exported.model, tmp_path / "h.onnx", input_shape=exported.shape, metadata={}, precision="float16", fast=True
    )
    u8 = to_u8_activations(exported.symmetric.path, tmp_path / "u8.onnx")
    for info in (exported.float32, exported.symmetric, u8, fast, half):
        assert paths_of_layers(info.path) == list(LAYERS), info.path.name
        names = [node.name for node in load_graph(info.path).graph.node]
        assert len(set(names)) == len(names)
        assert {"blocks.0/Add", "blocks.1/Relu", "stem.2/Relu"} <= set(names)


def test_quantizers_go_by_what_they_round(exported):
    names = {node.name for node in load_graph(exported.symmetric.path).graph.node}
    assert {"stem.2/QuantizeLinear", "blocks.0/QuantizeLinear", "blocks.0.second.0/QuantizeLinear"} <= names
    assert {f"{layer}/DequantizeLinear" for layer in LAYERS} <= names  # of their weights


def test_a_file_quantized_after_training_keeps_the_layers(exported, tmp_path: Path):
    images = exported.images(32).numpy()
    info = quantize_static(exported.float32.path, tmp_path / "ptq.onnx", images, preset="onnxruntime_x86")
    assert sorted(paths_of_layers(info.path)) == sorted(LAYERS)


def test_names_do_not_depend_on_what_was_exported_before(tmp_path: Path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x.flatten(1)).relu()).relu()

    torch.manual_seed(0)
    module = Twice().eval()
    digests = {to_onnx(module, tmp_path / f"{i}.onnx", input_shape=(1, 2, 2), metadata={}).sha256 for i in range(2)}
    assert len(digests) == 1
    names = [node.name for node in load_graph(tmp_path / "0.onnx").graph.node]
    assert [name for name in names if "inner" in name] == ["inner/Gemm", "inner/Gemm_1"]
    assert [name for name in names if "Relu" in name] == ["/Relu", "/Relu_1"]


def test_nothing_of_the_building_machine_is_inside(exported):
    for info in (exported.float32, exported.symmetric):
        data = info.path.read_bytes()
        assert b"stack_trace" not in data
        assert b".py" not in data


def test_same_weights_give_the_same_bytes(exported, tmp_path: Path, fast):
    again = to_onnx(exported.model, tmp_path / "again.onnx", input_shape=exported.shape, metadata={}, fast=True)
    assert again.sha256 == fast.sha256


def test_float16_keeps_the_interface_and_halves_the_weights(exported, tmp_path: Path):
    info = to_onnx(
        exported.model,
        tmp_path / "half.onnx",
        input_shape=exported.shape,
        metadata={},
        precision="float16",
        fast=True,
    )
    graph = load_graph(info.path).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT}
    images = exported.images(8)
    with torch.no_grad():
        expected = exported.model(images).numpy()
    np.testing.assert_allclose(OnnxSession(info.path).run(images.numpy()), expected, atol=0.05)
    assert next(exported.model.parameters()).dtype == torch.float32


def test_quantized_modules_are_not_halved(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="float16"):
        to_onnx(
            exported.quantized,
            tmp_path / "half.onnx",
            input_shape=exported.shape,
            metadata={},
            precision="float16",
        )


def test_training_mode_is_given_back(exported, tmp_path: Path):
    exported.model.train()
    try:
        to_onnx(exported.model, tmp_path / "m.onnx", input_shape=exported.shape, metadata={}, fast=True)
        assert exported.model.training
    finally:
        exported.model.eval()


def test_what_cannot_be_exported_is_named_and_leaves_no_file(tmp_path: Path):
    class Sorter(nn.Module):
        def forward(self, x):
            return torch.linalg.svd(x.flatten(1))[1]

    with pytest.raises(ExportError, match="Sorter"):
        to_onnx(Sorter(), tmp_path / "m.onnx", input_shape=(1, 4, 4), metadata={}, fast=True)
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_graphs_are_refused(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="no file"):
        check_graph(tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(exported.float32.path.read_bytes()[:200])
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        check_graph(broken)
    broken.write_bytes(b"")
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        check_graph(broken)
    proto = load_graph(exported.float32.path)
    proto.graph.node[0].op_type = "NoSuchOperator"
    save_graph(proto, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=r"odd\.onnx"):
        check_graph(tmp_path / "odd.onnx")
