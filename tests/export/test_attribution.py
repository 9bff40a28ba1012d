"""Layer by layer: known errors are found where they were put, and layers are matched whatever they are called."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compression.errors import ExportError, ShapeError
from compression.quantize import prepare_qat
from export.attribution import LARGEST, Attribution, attribute
from export.intermediates import TorchForm, share_at_limits
from export.onnx_form import OnnxForm
from export.onnx_graph import to_onnx
from export.qdq import to_u8_activations

INPUTS = [np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)]


def chain(
    path: Path,
    factors: tuple[float, ...] = (1.0, 1.0, 1.0),
    *,
    names: str = "layer{}/Gemm",
    tensors: str = "t{}",
    relu: bool = False,
    seed: int = 5,
) -> Path:
    """Matrices without bias, one after the other, each times its factor."""
    generator = np.random.default_rng(seed)
    sizes = [6, 5, 4, 3, 7][: len(factors) + 1]
    nodes, weights, tensor = [], [], "x"
    for place, factor in enumerate(factors):
        weight = generator.standard_normal((sizes[place], sizes[place + 1])).astype(np.float32) * np.float32(factor)
        weights.append(numpy_helper.from_array(weight, f"w{place}"))
        out = "y" if place == len(factors) - 1 else tensors.format(place)
        nodes.append(helper.make_node("Gemm", [tensor, f"w{place}"], [out], name=names.format(place)))
        tensor = out
        if relu and out != "y":
            nodes.append(helper.make_node("Relu", [out], [f"{out}r"], name=f"r{place}"))
            tensor = f"{out}r"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 6), ("y", sizes[-1]))]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def compared(a: Path, b: Path, limit: float = 1e-3) -> Attribution:
    return attribute(OnnxForm(a), OnnxForm(b), INPUTS, limit=limit)


def test_a_file_does_not_differ_from_itself(tmp_path: Path):
    path = chain(tmp_path / "a.onnx", relu=True)
    found = compared(path, path)
    assert (found.first, found.worst, found.words()) == (None, None, "")
    assert [row.relative_error for row in found.layers] == [0.0] * 4
    assert [row.sqnr_db for row in found.layers] == [None] * 4
    assert [row.cosine for row in found.layers] == pytest.approx([1.0] * 4)
    assert (found.matched, found.reference_layers, found.candidate_layers) == (3, 3, 3)


@settings(max_examples=10, deadline=None)
@given(place=st.integers(0, 2), factor=st.floats(1.05, 3.0))
def test_an_error_is_the_layers_own_where_it_starts_and_inherited_after(tmp_path_factory, place: int, factor: float):
    folder = tmp_path_factory.mktemp("chain")
    factors = tuple(factor if each == place else 1.0 for each in range(3))
    found = compared(chain(folder / "a.onnx"), chain(folder / "b.onnx", factors))
    expected = factor - 1.0
    assert found.first == found.worst == f"layer{place}"
    for order, row in enumerate(found.layers[1:]):
        wrong = order >= place
        assert row.relative_error == pytest.approx(expected if wrong else 0.0, rel=1e-4, abs=1e-6)
        assert row.own_share == pytest.approx(1.0 if order == place else 0.0, abs=1e-3)
        assert row.input_error == pytest.approx(expected if order > place else 0.0, rel=1e-4, abs=1e-6)
        assert row.cosine == pytest.approx(1.0)
        if wrong:
            assert row.sqnr_db == pytest.approx(-20 * np.log10(expected), abs=1e-2)


def test_what_is_kept_in_memory_at_once_changes_nothing(tmp_path: Path):
    a, b = OnnxForm(chain(tmp_path / "a.onnx")), OnnxForm(chain(tmp_path / "b.onnx", (1.0, 1.2, 1.0), relu=True))
    whole, pieces = (attribute(a, b, INPUTS, limit=0.1, chunk=size) for size in (50, 7))
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5, abs=1e-7)
        assert one.max_abs == pytest.approx(other.max_abs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "layer name"),
        ({"names": "Gemm_{}"}, "tensor name"),
        ({"names": ""}, "tensor name"),
        ({"names": "", "tensors": "other_{}"}, "order of the layers"),
    ],
)
def test_layers_are_matched_by_name_then_tensor_then_order(tmp_path: Path, changes: dict, way: str):
    a = chain(tmp_path / "a.onnx")
    b = chain(tmp_path / "b.onnx", (1.0, 1.5, 1.0), **changes)
    found = compared(a, b)
    assert found.matched_by == way
    assert found.matched == 3
    assert found.first == "layer1"
    row = found.layer("layer1")
    assert row is not None
    assert row.relative_error == pytest.approx(0.5, rel=1e-4)


def test_files_of_other_tools_have_node_names_too(tmp_path: Path):
    a = chain(tmp_path / "a.onnx", names="Gemm_{}")
    b = chain(tmp_path / "b.onnx", (1.0, 1.0, 1.5), names="Gemm_{}", tensors="q{}")
    found = compared(a, b)
    assert (found.matched_by, found.first) == ("node name", "Gemm_2")


def test_a_layer_more_in_one_file_does_not_shift_the_others(tmp_path: Path):
    a = chain(tmp_path / "a.onnx")
    b = chain(tmp_path / "b.onnx", (1.0, 1.0, 1.0, 1.0), names="m{}", tensors="u{}")
    found = compared(a, b)
    assert found.matched_by == "order of the layers"
    assert (found.matched, found.reference_layers, found.candidate_layers) == (3, 3, 4)
    assert found.first is None
    assert [row.candidate_layer for row in found.layers] == [None, "m0", "m1", "m2"]


def test_files_without_a_common_layer_are_refused(tmp_path: Path):
    a = chain(tmp_path / "a.onnx")
    constant = numpy_helper.from_array(np.ones((6, 2), np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 6), ("z", 2))]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"], name="m")], "g", ends[:1], ends[1:], [constant]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "b.onnx")
    with pytest.raises(ShapeError, match="no layer in common"):
        compared(a, tmp_path / "b.onnx")
    with pytest.raises(ShapeError, match="0 inputs"):
        attribute(OnnxForm(a), OnnxForm(a), [INPUTS[0][:0]], limit=0.1)


def test_values_that_are_not_finite_are_the_largest_error_and_still_json(tmp_path: Path):
    found = compared(chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", (1.0, float("inf"), 1.0)))
    assert found.first == "layer1"
    row = found.layer("layer1")
    assert row is not None
    assert row.relative_error == LARGEST
    assert Attribution.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("values", "limits", "share"),
    [
        ([127, 0, -128, 5], (-128, 127, 0), 0.5),
        ([255, 0, 0, 9], (0, 255, 0), 0.25),
        ([255, 0, 1, 9], (0, 255, 128), 0.5),
    ],
)
def test_clipped_integers_are_those_at_an_end_that_is_not_zero(values, limits, share):
    assert share_at_limits(np.array(values), *limits) == share


def test_every_layer_of_torch_is_found_in_its_files(exported, tmp_path: Path):
    u8 = to_u8_activations(exported.symmetric.path, tmp_path / "u8.onnx", weights="uint8").path
    torch_form = TorchForm(exported.model, exported.shape)
    quantized = TorchForm(exported.quantized, exported.shape)
    inputs = [exported.images(32, 9).numpy()]
    layers = [
        name for name, module in exported.model.named_modules() if hasattr(module, "weight") and module.weight.dim() > 1
    ]
    for reference, candidate, limit in (
        (torch_form, OnnxForm(exported.float32.path), 1e-5),
        (torch_form, quantized, 0.2),
        (quantized, OnnxForm(exported.symmetric.path), 0.02),
        (quantized, OnnxForm(u8), 0.05),
        (OnnxForm(exported.symmetric.path), OnnxForm(u8), 0.05),
    ):
        found = attribute(reference, candidate, inputs, limit=limit)
        assert found.matched_by == "layer name"
        assert [row.layer for row in found.layers if row.layer in layers] == [
            *("stem.0", "blocks.0.first.0", "blocks.0.second.0", "blocks.1.first.0", "blocks.1.second.0"),
            *("blocks.1.shortcut.0", "head"),
        ]
        assert {row.layer for row in found.layers} >= {"input", "blocks.0/Add", "blocks.1/Add", "/Pool"}
        assert found.first is None, found.words()


def test_the_trainable_form_has_the_same_layers(exported):
    prepared = prepare_qat(exported.model, exported.shape, exported.images(64, 1))
    form = TorchForm(prepared, exported.shape)
    found = attribute(TorchForm(exported.model, exported.shape), form, [exported.images(16).numpy()], limit=0.2)
    assert (found.matched, found.first) == (7, None)
    assert max(row.relative_error for row in found.layers) > 1e-3  # it does round


def test_looking_changes_neither_the_model_nor_the_random_state(exported):
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in exported.model.state_dict().items()}
    exported.model.train()
    try:
        TorchForm(exported.model, exported.shape).run([exported.images(4).numpy()])
        assert exported.model.training
    finally:
        exported.model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in exported.model.state_dict().items())


def test_the_outputs_of_a_form_are_the_models_own(exported):
    images = exported.images(8)
    with torch.no_grad():
        expected = exported.model(images).numpy()
    found = TorchForm(exported.model, exported.shape).run([images.numpy()])
    np.testing.assert_allclose(found.outputs[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.at["head"], expected, rtol=1e-5, atol=1e-6)


def test_operations_that_work_in_place_do_not_blur_what_was_before_them(tmp_path: Path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Hardswish(inplace=True), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    ).eval()
    path = tmp_path / "m.onnx"
    to_onnx(model, path, input_shape=(1, 4, 4), metadata={})
    found = attribute(TorchForm(model, (1, 4, 4)), OnnxForm(path), [torch.randn(8, 1, 4, 4).numpy()], limit=1e-5)
    assert [row.layer for row in found.layers] == ["input", "0", "1/HardSwish", "3"]
    assert found.first is None, found.words()


def test_what_torch_cannot_capture_is_named():
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match="Odd"):
        TorchForm(Odd(), (1, 4, 4))
