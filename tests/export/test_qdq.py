"""The two INT8 forms: what TensorRT may rely on, and that the CPU form means the same."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compression.errors import ExportError
from compression.quantize import NumberFormat, convert, prepare_qat
from export.onnx_graph import load_graph, metadata_of, save_graph, to_onnx
from export.profiles import session_options
from export.qdq import check_symmetric, summarise, to_s8_activations, to_u8_activations, weight_form
from export.runtime import CpuFeatures, OnnxSession, cpu_features, integer_share


@pytest.fixture(scope="module", params=["int8", "uint8"])
def rewritten(exported, request, tmp_path_factory):
    path = tmp_path_factory.mktemp("u8") / f"{request.param}.onnx"
    return to_u8_activations(exported.symmetric.path, path, weights=request.param)


def unoptimised(path: Path, images: np.ndarray) -> np.ndarray:
    """The graph as the standard defines it, node by node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def test_exported_graph_is_in_the_form_tensorrt_accepts(exported):
    summary = check_symmetric(exported.symmetric.path)
    assert summary.weights == 7  # six convolutions and the head
    assert set(summary.activation_dtypes) == {"int8"}
    assert "BatchNormalization" not in exported.symmetric.nodes


def test_first_and_last_layer_are_int8_too(exported):
    graph = load_graph(exported.symmetric.path).graph
    makers = {name: node for node in graph.node for name in node.output}
    for layer in (node for node in graph.node if node.op_type in ("Conv", "Gemm")):
        assert [makers[name].op_type for name in layer.input[:2]] == ["DequantizeLinear"] * 2
        assert layer.input[2] not in makers  # a stored float bias


def test_int8_file_is_smaller(exported):
    assert exported.symmetric.size_bytes < exported.float32.size_bytes


def test_every_layer_runs_as_an_integer_kernel(rewritten):
    share = integer_share(rewritten.path)
    assert share.share == 1.0
    assert share.total == 7
    assert share.operators["QLinearConv"] == 6
    assert share.operators["QLinearAdd"] == 2
    assert not share.float_layers


def test_symmetric_form_would_not(exported):
    assert integer_share(exported.symmetric.path).share < 0.8


def test_the_rewrite_means_the_same(exported, rewritten):
    """Exact where nothing is clipped; non-negative values above the range are no longer clipped."""
    images = exported.images(64, 1).numpy()
    before, after = (unoptimised(path, images) for path in (exported.symmetric.path, rewritten.path))
    step = np.abs(before).max() / 127
    assert np.abs(before - after).mean() < 0.2 * step
    assert (before.argmax(1) == after.argmax(1)).mean() >= 0.98


def test_weight_forms_mean_exactly_the_same(exported, tmp_path: Path):
    images = exported.images(32, 3).numpy()
    outputs = []
    for form in ("int8", "uint8"):
        to_u8_activations(exported.symmetric.path, tmp_path / f"{form}.onnx", weights=form)
        outputs.append(unoptimised(tmp_path / f"{form}.onnx", images))
    assert np.array_equal(*outputs)


def test_on_this_cpu_the_default_form_answers_as_torch(exported, tmp_path: Path):
    """The kernels of this machine, whatever it has, against simulated rounding."""
    graph = to_u8_activations(exported.symmetric.path, tmp_path / "default.onnx")
    assert graph.weights == weight_form(cpu_features())
    images = exported.images(256, 4)
    expected = exported.quantized(images).detach().numpy()
    found = OnnxSession(graph.path).run(images.numpy())
    step = np.abs(expected).max() / 127
    assert np.abs(found - expected).mean() < 1.0 * step
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.98


def test_metadata_says_how_integers_are_written(exported, rewritten):
    found = metadata_of(rewritten.path)
    assert found["activations"] == "uint8"
    assert found["weights"] == rewritten.weights
    assert found["lineage"] == metadata_of(exported.symmetric.path)["lineage"]


# --- the form for ARM ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signed(exported, tmp_path_factory):
    return to_s8_activations(exported.symmetric.path, tmp_path_factory.mktemp("s8") / "s8.onnx")


def test_signed_form_gives_the_bits_of_the_unsigned_one(exported, signed, tmp_path: Path):
    images = exported.images(64, 6).numpy()
    unsigned = to_u8_activations(exported.symmetric.path, tmp_path / "u8.onnx", weights="int8")
    assert np.array_equal(unoptimised(signed.path, images), unoptimised(unsigned.path, images))
    assert (signed.non_negative, signed.signed) == (unsigned.non_negative, unsigned.signed)
    assert metadata_of(signed.path)["activations"] == "int8"
    assert set(summarise(signed.path).activation_dtypes) == {"int8"}


def test_on_arm_every_layer_would_run_as_an_integer_kernel(exported, signed):
    """With the fusions ONNX Runtime makes on ARM; the symmetric form of TensorRT would leave layers in float there."""
    arm = session_options("int8-arm")
    assert integer_share(signed.path, **arm).share == 1.0
    assert integer_share(exported.symmetric.path, **arm).share < 0.8


def test_signed_form_answers_as_torch(exported, signed):
    images = exported.images(256, 4)
    expected = exported.quantized(images).detach().numpy()
    step = np.abs(expected).max() / 127
    for options in ({}, session_options("int8-arm")):
        found = OnnxSession(signed.path, **options).run(images.numpy())
        assert np.abs(found - expected).mean() < 1.0 * step
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.98


def test_fine_halves_the_step_of_non_negative_tensors(exported, tmp_path: Path):
    images = exported.images(256, 5)
    expected = exported.model(images).detach().numpy()
    errors = {}
    for fine in (False, True):
        path = tmp_path / f"{fine}.onnx"
        to_u8_activations(exported.symmetric.path, path, fine=fine)
        errors[fine] = np.abs(unoptimised(path, images.numpy()) - expected).mean()
    assert errors[True] < errors[False]


def capped_network() -> nn.Module:
    """Depthwise-like layers with ReLU6, whose outputs reach the cap."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for layer in (model[0], model[2], model[4]):
        layer.weight.data *= 8
    return model.eval()


def test_a_cap_on_the_activations_leaves_no_layer_in_float(exported, tmp_path: Path):
    images = exported.images(64)
    quantized = convert(prepare_qat(capped_network(), exported.shape, images))
    symmetric = to_onnx(quantized, tmp_path / "symmetric.onnx", input_shape=exported.shape, metadata={})
    plain = to_u8_activations(symmetric.path, tmp_path / "plain.onnx", fine=False)
    default = to_u8_activations(symmetric.path, tmp_path / "default.onnx")
    assert integer_share(plain.path).share < 1
    assert integer_share(default.path).share == 1
    logits = [OnnxSession(path).run(images.numpy()) for path in (symmetric.path, default.path)]
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[0]).max()


@pytest.mark.parametrize("rewrite", [to_u8_activations, to_s8_activations], ids=["x86", "arm"])
def test_a_layer_that_was_kept_in_float_stays_in_float(exported, tmp_path: Path, rewrite):
    """The runtime would otherwise round its weights itself, with one scale for the whole tensor."""
    kept = NumberFormat(keep_float=("blocks.0.first.0",))
    quantized = convert(prepare_qat(exported.model, exported.shape, exported.images(64), kept))
    symmetric = to_onnx(quantized, tmp_path / "symmetric.onnx", input_shape=exported.shape, metadata={})
    written = rewrite(symmetric.path, tmp_path / "cpu.onnx")
    options = session_options("int8-arm") if rewrite is to_s8_activations else {}
    share = integer_share(written.path, config=options.get("config"))
    assert (share.integer, share.total) == (6, 7)


def test_weight_form_follows_the_cpu():
    plain = CpuFeatures(model="x", machine="x86_64", avx2=True)
    assert weight_form(plain) == "uint8"
    assert weight_form(plain.model_copy(update={"vnni": True})) == "int8"
    assert weight_form(CpuFeatures(model="x", machine="aarch64", dot_product=True)) == "int8"


# --- one convolution, to see the arithmetic -----------------------------------------------------------


def one_convolution(path: Path, *, weight: np.ndarray, scale: float, out_scale: float) -> Path:
    """A symmetric graph: images -> Relu -> Q/DQ -> Conv with int8 weights -> Q/DQ -> logits."""
    tensors = {
        "s": np.float32(scale),
        "z": np.int8(0),
        "w": weight,
        "ws": np.ones(len(weight), np.float32),
        "wz": np.zeros(len(weight), np.int8),
        "b": np.zeros(len(weight), np.float32),
        "os": np.float32(out_scale),
    }
    nodes = [
        helper.make_node("Relu", ["images"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["rq"], name="q"),
        helper.make_node("DequantizeLinear", ["rq", "s", "z"], ["rd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="wdq", axis=0),
        helper.make_node("Conv", ["rd", "wd", "b"], ["y"], kernel_shape=[1, 1]),
        helper.make_node("QuantizeLinear", ["y", "os", "z"], ["yq"], name="oq"),
        helper.make_node("DequantizeLinear", ["yq", "os", "z"], ["logits"], name="odq"),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", weight.shape[1], 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(weight), 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def test_large_products_do_not_overflow_in_the_form_chosen_for_this_cpu(tmp_path: Path):
    """Activations and weights near their maximum: where uint8 x int8 sums saturate, results are far off."""
    weight = np.full((16, 32, 1, 1), 127, np.int8)
    weight[8:] = -127
    source = one_convolution(tmp_path / "s.onnx", weight=weight, scale=1.0, out_scale=32 * 127 * 255 / 120)
    graph = to_u8_activations(source, tmp_path / "u8.onnx")
    images = np.full((4, 32, 4, 4), 255, np.float32)
    expected = unoptimised(graph.path, images)
    assert np.abs(expected).max() > 1e6
    np.testing.assert_allclose(OnnxSession(graph.path).run(images), expected, rtol=0.02)


def test_values_above_the_symmetric_range_are_no_longer_clipped(tmp_path: Path):
    weight = np.ones((1, 1, 1, 1), np.int8)
    source = one_convolution(tmp_path / "s.onnx", weight=weight, scale=1.0, out_scale=2.0)
    graph = to_u8_activations(source, tmp_path / "u8.onnx", weights="int8")
    assert (graph.non_negative, graph.signed) == (1, 1)
    images = np.array([10, 100, 127, 200, 255, 300], np.float32).repeat(16).reshape(6, 1, 4, 4)
    assert unoptimised(source, images)[:, 0, 0, 0].tolist() == [10, 100, 128, 128, 128, 128]
    assert unoptimised(graph.path, images)[:, 0, 0, 0].tolist() == [10, 100, 128, 200, 254, 254]


def break_zero_point(proto):
    next(t for t in proto.graph.initializer if t.name == "z").CopyFrom(numpy_helper.from_array(np.int8(3), "z"))


def break_bias(proto):
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int32), "ib"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "ibs"))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int32), "ibz"))
    position = next(i for i, node in enumerate(proto.graph.node) if node.op_type == "Conv")
    proto.graph.node.insert(position, helper.make_node("DequantizeLinear", ["ib", "ibs", "ibz"], ["ibd"], axis=0))
    next(node for node in proto.graph.node if node.op_type == "Conv").input[2] = "ibd"


def break_scale(proto):
    for name, value in (("ws", np.float32(1)), ("wz", np.int8(0))):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def break_norm(proto):
    proto.graph.node.append(helper.make_node("BatchNormalization", ["images"] * 5, ["n"], name="norm"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_zero_point, "zero point"),
        (break_bias, "int32"),
        (break_scale, "one weight scale"),
        (break_norm, "BatchNormalization"),
    ],
)
def test_what_tensorrt_would_refuse_is_found(tmp_path: Path, damage, words):
    weight = np.ones((4, 2, 1, 1), np.int8)
    source = one_convolution(tmp_path / "s.onnx", weight=weight, scale=1.0, out_scale=1.0)
    assert not summarise(source).violations
    proto = load_graph(source)
    damage(proto)
    save_graph(proto, tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=words):
        check_symmetric(tmp_path / "bad.onnx")


def test_a_float_graph_is_not_rewritten(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="no integer weights"):
        to_u8_activations(exported.float32.path, tmp_path / "u8.onnx")
    assert not (tmp_path / "u8.onnx").exists()
