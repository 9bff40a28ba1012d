"""Zeros of an ONNX file: counted and placed through quantizers, transposes and matrices either way round."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compression.quantize import convert, prepare_qat
from compression.sparsify.nm import apply_masks, layers_of, magnitude_mask
from compression.zoo import ResidualCnn
from export.onnx_graph import to_onnx
from export.qdq import to_u8_activations
from export.runtime import OnnxSession, predict_fn
from export.sparsity import SparsityInfo, sparsity_of

SHAPE = (1, 12, 12)


def two_of_four(outputs: int, inputs: int, *window: int) -> np.ndarray:
    """Random weights [out,in,...] with zeros at inputs 0 and 3 of each group."""
    values = np.random.default_rng(0).uniform(0.5, 1, (outputs, inputs, *window)).astype(np.float32)
    values[:, 0::4] = 0
    values[:, 3::4] = 0
    return values


def graph(path: Path, nodes: list, tensors: dict[str, np.ndarray]) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, stored)), path)
    return path


def one_product(path: Path, weight: np.ndarray, operator: str, **attributes) -> SparsityInfo:
    return sparsity_of(graph(path, [helper.make_node(operator, ["x", "w"], ["y"], **attributes)], {"w": weight}))


@pytest.mark.parametrize(
    ("operator", "attributes", "rows_are_inputs"),
    [("Gemm", {"transB": 1}, False), ("Gemm", {}, True), ("MatMul", {}, True)],
    ids=["gemm-turned", "gemm", "matmul"],
)
def test_the_pattern_is_looked_for_along_the_inputs(tmp_path, operator, attributes, rows_are_inputs):
    weight = two_of_four(8, 16)
    right, wrong = (weight.T, weight) if rows_are_inputs else (weight, weight.T)
    found = one_product(tmp_path / "a.onnx", right.copy(), operator, **attributes)
    assert (found.tensorrt_eligible, found.share_of_zeros) == (1, 0.5)
    found = one_product(tmp_path / "b.onnx", wrong.copy(), operator, **attributes)
    assert (found.tensorrt_eligible, found.share_of_zeros) == (0, 0.5)


def test_a_matrix_on_the_left_has_its_inputs_in_the_columns(tmp_path):
    node = helper.make_node("MatMul", ["w", "x"], ["y"])
    assert sparsity_of(graph(tmp_path / "a.onnx", [node], {"w": two_of_four(8, 16)})).tensorrt_eligible == 1
    node = helper.make_node("Gemm", ["w", "x"], ["y"], transA=1)
    assert sparsity_of(graph(tmp_path / "b.onnx", [node], {"w": two_of_four(8, 16).T.copy()})).tensorrt_eligible == 1


@pytest.mark.parametrize(("inputs", "eligible"), [(8, 1), (6, 0), (1, 0)])
def test_convolutions_sum_over_dimension_one(tmp_path, inputs, eligible):
    assert one_product(tmp_path / "a.onnx", two_of_four(4, inputs, 3, 3), "Conv").tensorrt_eligible == eligible


def test_bytes_of_packed_weights_are_values_and_two_bits_each(tmp_path):
    sparse = one_product(tmp_path / "a.onnx", two_of_four(8, 16, 3, 3), "Conv")
    count = 8 * 16 * 9
    assert sparse.dense_bytes == 4 * count
    assert sparse.compressed_bytes == 4 * count // 2 + count // 2 * 2 // 8
    dense = one_product(tmp_path / "b.onnx", np.ones((8, 16, 3, 3), np.float32), "Conv")
    assert dense.compressed_bytes == dense.dense_bytes == 4 * count
    half = one_product(tmp_path / "c.onnx", two_of_four(8, 16, 3, 3).astype(np.float16), "Conv")
    assert half.dense_bytes == 2 * count


@pytest.mark.parametrize("zero_point", [0, 128])
def test_zero_is_what_the_zero_point_says(tmp_path, zero_point):
    weight = two_of_four(8, 16)
    dtype = np.uint8 if zero_point else np.int8
    integers = (np.rint(weight * 100) + zero_point).astype(dtype)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["f"], axis=0),
        helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    scale = np.full(8, 0.01, np.float32)
    tensors = {"w": integers, "scale": scale, "zero": np.full(8, zero_point, dtype)}
    found = sparsity_of(graph(tmp_path / "a.onnx", nodes, tensors))
    assert (found.tensorrt_eligible, found.share_of_zeros) == (1, 0.5)
    assert found.weights[0].bytes_per_value == 1


def test_a_weight_that_is_rounded_in_the_graph_counts_as_rounded(tmp_path):
    weight = two_of_four(8, 16)
    weight[:, 1::4] = 1e-6  # rounds to 0
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["f"], axis=0),
        helper.make_node("Gemm", ["x", "f"], ["y"], transB=1),
    ]
    tensors = {"w": weight, "scale": np.full(8, 0.01, np.float32), "zero": np.zeros(8, np.int8)}
    assert sparsity_of(graph(tmp_path / "a.onnx", nodes, tensors)).share_of_zeros == 0.75


def test_computed_factors_and_biases_are_no_weights(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["p"]),
        helper.make_node("Gemm", ["p", "w", "b"], ["y"]),
    ]
    tensors = {"w": np.ones((4, 4), np.float32), "b": np.zeros(4, np.float32)}
    found = sparsity_of(graph(tmp_path / "a.onnx", nodes, tensors))
    assert [(each.name, each.zeros) for each in found.weights] == [("w", 0)]
    empty = sparsity_of(graph(tmp_path / "b.onnx", nodes[:1], {}))
    assert (empty.weights, empty.share_of_zeros, empty.compressed_bytes) == ((), 0.0, 0)


def test_a_weight_read_twice_counts_once_and_must_be_sparse_for_both(tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["p"], transB=1),
        helper.make_node("MatMul", ["p", "w"], ["y"]),
    ]
    found = sparsity_of(graph(tmp_path / "a.onnx", nodes, {"w": two_of_four(16, 16)}))
    assert [(each.operators, each.two_of_four) for each in found.weights] == [(("Gemm", "MatMul"), False)]


def test_masks_survive_export_in_float_and_integers(tmp_path):
    """The stem (one channel) stays dense in all forms; batch norm is folded on the way."""
    torch.manual_seed(0)
    model = ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8).build(4, SHAPE).eval()
    layers = layers_of(model, multiple_of=4)
    apply_masks(model, {name: magnitude_mask(layer.weight, 2, 4) for name, layer in layers.items()})
    images = torch.randn(16, *SHAPE)
    forms = {name: tmp_path / f"{name}.onnx" for name in ("float32", "int8", "uint8")}
    to_onnx(model, forms["float32"], input_shape=SHAPE, metadata={})
    to_onnx(convert(prepare_qat(model, SHAPE, images)), forms["int8"], input_shape=SHAPE, metadata={})
    to_u8_activations(forms["int8"], forms["uint8"], weights="uint8")
    with torch.no_grad():
        found = predict_fn(OnnxSession(forms["float32"]))(images)
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=0)
    sizes = []
    for path in forms.values():
        info = sparsity_of(path)
        assert len(info.weights) == len(layers) + 1
        assert info.tensorrt_eligible == len(layers)
        assert not info.weights[0].two_of_four
        assert 0.48 < info.share_of_zeros < 0.52
        sizes.append((info.dense_bytes, info.compressed_bytes))
    assert sizes[0][0] == 4 * sizes[1][0]
    assert sizes[1] == sizes[2]
    assert sizes[0][1] < 0.54 * sizes[0][0]
    assert sizes[1][1] < 0.65 * sizes[1][0]
