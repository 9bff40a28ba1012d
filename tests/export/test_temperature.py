"""A graph that knows its temperature, and one that divides by it: same answers, same integers, same nodes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compression.errors import ExportError
from export.graph_editor import GraphEditor
from export.onnx_graph import check_graph, load_graph, metadata_of, save_graph, to_onnx
from export.ptq import quantize_static
from export.qdq import check_symmetric, to_u8_activations
from export.runtime import OnnxSession, integer_share
from export.temperature import divides_by, store_temperature, temperature_entries, temperature_of

VALUE = 1.7


@pytest.fixture(scope="module")
def forms(exported, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    paths = {"float32": exported.float32.path, "symmetric": exported.symmetric.path}
    for weights in ("int8", "uint8"):
        paths[f"u8-{weights}"] = folder / f"{weights}.onnx"
        to_u8_activations(exported.symmetric.path, paths[f"u8-{weights}"], weights=weights)
    paths["float16"] = folder / "float16.onnx"
    to_onnx(exported.model, paths["float16"], input_shape=exported.shape, metadata={}, precision="float16")
    paths["ptq"] = folder / "ptq.onnx"
    quantize_static(paths["float32"], paths["ptq"], exported.images(32).numpy(), preset="onnxruntime_x86")
    return paths


def integers(path: Path) -> list[bytes]:
    """The bytes of every stored integer tensor of more than one number, zero points aside."""
    tensors = [numpy_helper.to_array(each) for each in load_graph(path).graph.initializer]
    return sorted(each.tobytes() for each in tensors if each.dtype.kind in "iu" and len(np.unique(each)) > 1)


@pytest.mark.parametrize("form", ["float32", "symmetric", "u8-int8", "u8-uint8", "float16", "ptq"])
def test_the_graph_gives_divided_logits_with_the_nodes_it_had(form, forms, exported, tmp_path: Path):
    before = check_graph(forms[form])
    after = store_temperature(forms[form], tmp_path / "divided.onnx", VALUE, apply=True)
    assert after.nodes == before.nodes
    assert integers(after.path) == integers(before.path)
    images = exported.images(64, 5).numpy()
    plain, divided = (OnnxSession(path).run(images) for path in (before.path, after.path))
    size = np.abs(plain).max()
    assert np.abs(divided * VALUE - plain).max() < (5e-3 if form == "float16" else 1e-5) * size
    first, second = np.sort(plain, axis=1)[:, :-3:-1].T
    clear = first - second > (1e-2 if form == "float16" else 1e-5) * size  # a tie may fall either way
    assert clear.mean() > 0.8
    assert np.array_equal(divided.argmax(1)[clear], plain.argmax(1)[clear])
    assert (temperature_of(after.path), divides_by(after.path)) == (VALUE, VALUE)


def test_what_tensorrt_and_integer_kernels_need_still_holds(forms, tmp_path: Path):
    assert check_symmetric(store_temperature(forms["symmetric"], tmp_path / "s.onnx", VALUE, apply=True).path)
    divided = store_temperature(forms["u8-uint8"], tmp_path / "u.onnx", VALUE, apply=True)
    assert integer_share(divided.path).share == 1.0


def test_a_form_made_from_a_divided_graph_is_divided_and_says_so(forms, exported, tmp_path: Path):
    source = store_temperature(forms["symmetric"], tmp_path / "s.onnx", VALUE, apply=True)
    made = to_u8_activations(
        source.path, tmp_path / "u.onnx", weights="int8", metadata={"form": "int8", **temperature_entries(source.path)}
    )
    images = exported.images(32, 5).numpy()
    plain, divided = (OnnxSession(path).run(images) for path in (forms["u8-int8"], made.path))
    np.testing.assert_allclose(divided * divides_by(made.path), plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    assert metadata_of(made.path)["form"] == "int8"


def test_stored_but_not_applied_changes_metadata_alone(forms, tmp_path: Path):
    path = store_temperature(forms["float32"], tmp_path / "stored.onnx", VALUE, apply=False).path
    assert (temperature_of(path), divides_by(path)) == (VALUE, 1.0)
    assert metadata_of(path).items() >= metadata_of(forms["float32"]).items()
    before, after = load_graph(forms["float32"]).graph, load_graph(path).graph
    assert before.SerializeToString() == after.SerializeToString()
    assert temperature_of(forms["float32"]) is None
    assert temperature_entries(forms["float32"]) == {}


def test_it_is_divided_in_place_and_only_once(forms, tmp_path: Path):
    path = tmp_path / "model.onnx"
    store_temperature(forms["float32"], path, VALUE, apply=False)
    store_temperature(path, path, 2.0, apply=True)
    assert temperature_of(path) == 2.0
    with pytest.raises(ExportError, match="divided by 2 already"):
        store_temperature(path, path, 2.0, apply=True)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_unusable_temperature_is_refused(value, forms, tmp_path: Path):
    with pytest.raises(ExportError, match="expected a finite number above 0"):
        store_temperature(forms["float32"], tmp_path / "x.onnx", value, apply=True)
    assert not list(tmp_path.iterdir())


def small(path: Path, nodes: list, *, weight_type: type = np.float32, outputs: tuple = ("logits",)) -> Path:
    """A graph of ``nodes`` that may read w [3, 4], b [4] and the images."""
    rng = np.random.default_rng(0)
    kind = TensorProto.FLOAT16 if weight_type is np.float16 else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", kind, ["batch", 3])],
        [helper.make_tensor_value_info(name, kind, ["batch", 4]) for name in outputs],
        [
            numpy_helper.from_array(rng.normal(size=(3, 4)).astype(weight_type), "w"),
            numpy_helper.from_array(rng.normal(size=4).astype(weight_type), "b"),
        ],
    )
    save_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path, metadata={})
    return path


def node(kind: str, names: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, names.split(), [output], name=f"{output}/{kind}", **attributes)


LINEAR = node("Gemm", "images w b", "logits")
CASES = {
    "linear layer": ([LINEAR], 0),
    "product and sum": ([node("MatMul", "images w", "product"), node("Add", "b product", "logits")], 0),
    "behind a relu": (
        [node("Gemm", "images w b", "h"), node("Relu", "h", "r"), node("Add", "r b", "logits")],
        1,
    ),
    "activation behind": ([node("Gemm", "images w b", "h"), node("Tanh", "h", "logits")], 1),
    "another reader": (
        [node("Gemm", "images w b", "h"), node("Tanh", "h", "t"), node("Add", "h t", "logits")],
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_where_no_layer_takes_it_a_product_follows(case, tmp_path: Path):
    nodes, added = CASES[case]
    source = small(tmp_path / "plain.onnx", nodes)
    target = store_temperature(source, tmp_path / "divided.onnx", VALUE, apply=True).path
    images = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    plain, divided = (OnnxSession(path).run(images) for path in (source, target))
    np.testing.assert_allclose(divided * VALUE, plain, rtol=1e-5, atol=1e-6)
    assert len(load_graph(target).graph.node) == len(load_graph(source).graph.node) + added


def test_a_weight_that_others_read_keeps_its_value_for_them(tmp_path: Path):
    """One stored tensor, two readers: only the last layer's copy is divided."""
    nodes = [node("MatMul", "images w", "h"), node("Tanh", "h", "t"), node("ReduceSum", "t", "s", keepdims=1)]
    nodes += [node("Expand", "s shape", "wide"), node("Gemm", "wide w b", "logits")]
    source = small(tmp_path / "plain.onnx", nodes)
    proto = load_graph(source)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 3], np.int64), "shape"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    proto.graph.node[2].input.append("axes")
    save_graph(proto, source)
    target = store_temperature(source, tmp_path / "divided.onnx", VALUE, apply=True).path
    images = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    plain, divided = (OnnxSession(path).run(images) for path in (source, target))
    np.testing.assert_allclose(divided * VALUE, plain, rtol=1e-5, atol=1e-6)
    assert len(load_graph(target).graph.node) == len(load_graph(source).graph.node)


def test_a_weight_that_would_overflow_is_left_alone(tmp_path: Path):
    source = small(tmp_path / "plain.onnx", [LINEAR], weight_type=np.float16)
    proto = load_graph(source)
    large = numpy_helper.from_array(np.full((3, 4), 6e4, np.float16), "w")
    proto.graph.initializer[0].CopyFrom(large)
    save_graph(proto, source)
    target = store_temperature(source, tmp_path / "divided.onnx", 0.5, apply=True).path
    editor = GraphEditor(load_graph(target))
    assert [each.op_type for each in editor.graph.node] == ["Gemm", "Mul"]
    assert np.isfinite(editor.required("w")).all()


def test_more_outputs_than_the_logits_are_refused(tmp_path: Path):
    source = small(tmp_path / "two.onnx", [LINEAR, node("Relu", "logits", "more")], outputs=("logits", "more"))
    with pytest.raises(ExportError, match="has 2 outputs"):
        store_temperature(source, tmp_path / "x.onnx", VALUE, apply=True)
