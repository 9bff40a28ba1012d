"""``stillhouse parity`` on files of any tool: any inputs and outputs, and clear words when it can't."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from compression.errors import InputError
from flows.parity import show_parity

FLOAT, BYTES, INT64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64
Value = tuple[str, int, Sequence[Any]]


def written(path: Path, inputs: Sequence[Value], nodes: Sequence[Any], outputs: Sequence[Value], **stored: Any) -> Path:
    """A graph of the given nodes."""
    ends = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(list(nodes), "g", ends[0], ends[1], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def classifier(path: Path, factor: float = 1.0, *, name: str = "x", batch: Any = "n", seed: int = 0) -> Path:
    """Scores [n, 4] of vectors [n, 6]."""
    generator = np.random.default_rng(seed)
    first, second = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (8, 4)))
    nodes = [
        helper.make_node("Gemm", [name, "w"], ["h"], name="fc1"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("Gemm", ["r", "v"], ["scores"], name="fc2"),
    ]
    ends = ([(name, FLOAT, [batch, 6])], [("scores", FLOAT, [batch, 4])])
    return written(path, ends[0], nodes, ends[1], w=first, v=second * np.float32(factor))


def run(a: Path, b: Path, **options: Any) -> tuple[int, str]:
    console = Console(width=120, record=True, file=io.StringIO())
    code = show_parity(console, a, b, **options)
    return code, console.export_text()


def as_json(a: Path, b: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    code, text = run(a, b, as_json=True, **options)
    return code, json.loads(text)


def test_equal_files_are_within_the_limits(tmp_path: Path):
    code, text = run(classifier(tmp_path / "a.onnx"), classifier(tmp_path / "b.onnx"))
    assert code == 0
    assert "Within the limits" in text
    assert "2 of 2 and 2 layers matched by node name" in text
    assert "The inputs are random" in text


def test_a_difference_is_named_by_output_and_layer(tmp_path: Path):
    a, b = classifier(tmp_path / "a.onnx"), classifier(tmp_path / "b.onnx", factor=1.1)
    code, text = run(a, b)
    assert code == 1
    assert "Over a limit" in text
    assert "First to diverge: 'fc2'" in text
    code, found = as_json(a, b)
    assert (code, found["within"], found["attribution"]["first"]) == (1, False, "fc2")
    assert found["outputs"][0]["relative_error"] == pytest.approx(0.1, rel=1e-3)
    assert found["outputs"][0]["flips"] == 0  # a common factor changes no answer
    assert any("fc2" in words for words in found["exceeded"])


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path):
    a, b = classifier(tmp_path / "a.onnx"), classifier(tmp_path / "b.onnx", seed=1)
    assert as_json(a, b, seed=4) == as_json(a, b, seed=4)
    assert as_json(a, b, seed=4) != as_json(a, b, seed=5)


def test_real_inputs_and_labels_give_accuracies(tmp_path: Path):
    a = classifier(tmp_path / "a.onnx")
    x = np.random.default_rng(2).standard_normal((40, 6)).astype(np.float32)
    import onnxruntime

    right = np.asarray(onnxruntime.InferenceSession(str(a)).run(None, {"x": x})[0]).argmax(1)
    np.savez(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", right)
    for inputs in ("x.npz", "x.npy"):
        options = {"inputs": tmp_path / inputs, "labels": tmp_path / "y.npy"}
        code, found = as_json(a, classifier(tmp_path / "b.onnx", seed=1), **options)
        assert code == 1
        row = found["outputs"][0]
        assert row["accuracy"] == 1.0
        assert row["other_accuracy"] == pytest.approx(1 - row["flips"])
        assert found["num_samples"] == 40
        assert not found["random_inputs"]
        assert not found["notes"]


def test_other_input_names_and_fixed_batches_are_taken_in_order(tmp_path: Path):
    a = classifier(tmp_path / "a.onnx", batch=4)
    b = classifier(tmp_path / "b.onnx", name="data")
    code, found = as_json(a, b, samples=10)
    assert (code, found["num_samples"]) == (0, 12)  # whole batches
    np.save(tmp_path / "x.npy", np.zeros((3, 6), np.float32))
    with pytest.raises(InputError, match="batch size"):
        run(a, b, inputs=tmp_path / "x.npy")


def several(path: Path, shift: float = 0.0) -> Path:
    """Bytes, a table of numbers picked by int64, and a fixed factor; two outputs."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["f"], name="cast", to=FLOAT),
        helper.make_node("Gather", ["table", "ids"], ["picked"], name="pick"),
        helper.make_node("Add", ["f", "picked"], ["sum"], name="sum"),
        helper.make_node("Mul", ["sum", "factor"], ["scaled"], name="scale"),
        helper.make_node("Add", ["scaled", "shift"], ["out"], name="shift"),
        helper.make_node("ReduceMean", ["out", "axis"], ["mean"], name="mean", keepdims=0),
    ]
    inputs = [("pixels", BYTES, ["n", 3]), ("ids", INT64, ["n"]), ("factor", FLOAT, [1])]
    outputs = [("out", FLOAT, ["n", 3]), ("mean", FLOAT, ["n"])]
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    stored = {"table": table, "axis": np.array([1]), "shift": np.full(3, shift, np.float32)}
    return written(path, inputs, nodes, outputs, **stored)


def test_several_inputs_and_outputs_of_any_type(tmp_path: Path):
    a = several(tmp_path / "a.onnx")
    assert run(a, several(tmp_path / "b.onnx"))[0] == 0
    code, found = as_json(a, several(tmp_path / "b.onnx", shift=90.0))
    assert code == 1
    assert [row["output"] for row in found["outputs"]] == ["out", "mean"]
    assert found["outputs"][1]["flips"] is None
    assert found["outputs"][1]["mean_abs"] == pytest.approx(90.0, rel=1e-4)


def test_a_graph_without_layers_is_compared_by_its_outputs(tmp_path: Path):
    for name, operator in (("a", "Exp"), ("b", "Tanh")):
        ends = ([("x", FLOAT, ["n", 3, 2])], [("y", FLOAT, ["n", 3, 2])])
        written(tmp_path / f"{name}.onnx", ends[0], [helper.make_node(operator, ["x"], ["y"], name=name)], ends[1])
    code, text = run(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert code == 1
    assert "relative error" in text


def test_what_cannot_be_compared_is_said(tmp_path: Path):
    a = classifier(tmp_path / "a.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match=r"text\.onnx"):
        run(a, tmp_path / "text.onnx")
    with pytest.raises(InputError, match="no file"):
        run(a, tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="inputs, expected the same number"):
        run(a, several(tmp_path / "s.onnx"))
    plain = [helper.make_node("Identity", ["x"], ["y"], name="i")]
    wide = written(tmp_path / "w.onnx", [("x", FLOAT, ["n", 7])], plain, [("y", FLOAT, ["n", 7])])
    with pytest.raises(InputError, match="expected one shape"):
        run(a, wide)
    images = written(tmp_path / "i.onnx", [("x", FLOAT, ["n", 3, "h", "w"])], plain, [("y", FLOAT, ["n", 3, "h", "w"])])
    with pytest.raises(InputError, match="--inputs"):
        run(images, images)
    integers = written(tmp_path / "b.onnx", [("x", BYTES, ["n", 6])], plain, [("y", BYTES, ["n", 6])])
    with pytest.raises(InputError, match="expected one type"):
        run(a, integers)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((5, 7), np.float32), "shape"),
        (np.zeros((5, 6), np.int64), "type"),
        (np.zeros((0, 6), np.float32), "shape"),
        (np.array([{"a": 1}], dtype=object), "no readable arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, content: np.ndarray, words: str):
    a = classifier(tmp_path / "a.onnx")
    np.save(tmp_path / "x.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=words):
        run(a, a, inputs=tmp_path / "x.npy")


def test_labels_of_another_length_are_refused(tmp_path: Path):
    a = classifier(tmp_path / "a.onnx")
    np.save(tmp_path / "y.npy", np.zeros(3, np.int64))
    with pytest.raises(InputError, match="Labels"):
        run(a, a, labels=tmp_path / "y.npy")
