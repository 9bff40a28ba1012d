"""What ONNX Runtime makes of a file is read in terms of the file's layers."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compression.errors import ExportError
from export.operator_profile import Operators, kind_of, layer_of, operators_of, profile_operators
from export.qdq import to_u8_activations
from export.runtime import integer_share
from export.timing import midmean, node_times, profile

LAYERS = {"stem.0", "blocks.0.first.0", "blocks.0.second.0", "blocks.1.first.0", "blocks.1.second.0"}
LAYERS |= {"blocks.1.shortcut.0", "head"}
MACS = 144 * 72 + 2 * 144 * 576 + 36 * (1152 + 2304 + 128) + 64
"""Of the fixture: stem, two convolutions at 12x12; three at 6x6; the linear layer."""


def here(path: Path, folder: Path, batch: int = 1) -> Operators:
    """The profile, taken in this process."""
    job = {"path": str(path), "optimized": str(folder / "run.onnx"), "threads": 1, "batch": batch}
    found = profile(job | {"shapes": {}, "seed": 0, "seconds": 0.0})
    return operators_of(onnx.load(str(path)), onnx.load(str(folder / "run.onnx")), found)


@pytest.fixture(scope="module")
def forms(exported, tmp_path_factory) -> dict[str, Operators]:
    folder = tmp_path_factory.mktemp("profiles")
    u8 = to_u8_activations(exported.symmetric.path, folder / "u8.onnx")
    paths = {"float32": exported.float32.path, "symmetric": exported.symmetric.path, "u8": u8.path}
    return {name: here(path, folder) for name, path in paths.items()}


@pytest.mark.parametrize("form", ["float32", "symmetric", "u8"])
def test_layers_keep_their_names_through_fusion(forms, form):
    found = forms[form]
    assert {*found.integer_layers, *found.float_layers} == LAYERS
    assert {node.layer for node in found.profile.nodes if node.macs is not None} == LAYERS
    assert found.profile.macs == MACS, "the arithmetic is the same however numbers are written"


@pytest.mark.parametrize("form", ["float32", "symmetric", "u8"])
def test_shares_add_up_and_agree_with_groups(forms, form):
    profiled = forms[form].profile
    assert sum(node.share for node in profiled.nodes) == pytest.approx(1)
    assert sum(row.share for row in profiled.by_operator()) == pytest.approx(1)
    assert sum(row.count for row in profiled.by_operator()) == len(profiled.nodes)
    assert sum(profiled.share_of(kind) for kind in ("integer", "float", "conversion")) == pytest.approx(1)
    assert profiled.share_of_layers(LAYERS) <= 1 + 1e-9
    assert all(node.microseconds >= 0 for node in profiled.nodes)
    assert Operators.model_validate_json(forms[form].model_dump_json()) == forms[form]


@pytest.mark.parametrize("form", ["float32", "symmetric", "u8"])
def test_every_operator_that_runs_is_timed(forms, form):
    found = forms[form]
    assert len(found.profile.nodes) == sum(found.histogram.optimised.values())


def test_the_kinds_tell_integer_from_float(forms):
    assert {node.kind for node in forms["float32"].profile.nodes if node.layer in LAYERS and node.macs} == {"float"}
    u8 = {node.operator: node.kind for node in forms["u8"].profile.nodes}
    assert (u8["QLinearConv"], u8["QGemm"], u8["QLinearAdd"]) == ("integer", "integer", "integer")
    assert (u8["QuantizeLinear"], u8["ReduceMean"]) == ("conversion", "float")
    assert kind_of("MaxPool", ["uint8"]) == "integer"
    assert kind_of("MaxPool", ["float"]) == "float"


def test_the_histogram_has_both_sides(forms):
    rows = {row[0]: row[1:] for row in forms["u8"].histogram.rows()}
    assert rows["Conv"] == (6, 0)
    assert rows["QLinearConv"] == (0, 6)
    assert rows["Relu"][1] == 0, "an integer convolution takes its ReLU in"


@pytest.mark.parametrize("form", ["float32", "symmetric", "u8"])
def test_integer_layers_are_those_of_the_gate(forms, form, exported, tmp_path):
    path = exported.float32.path if form == "float32" else exported.symmetric.path
    if form == "u8":
        path = to_u8_activations(path, tmp_path / "u8.onnx").path
    share = integer_share(path)
    assert (share.integer, share.total) == (len(forms[form].integer_layers), len(LAYERS))
    assert share.share == forms[form].integer_share


def test_a_process_of_its_own_says_the_same(exported, forms):
    found = profile_operators(exported.float32.path, threads=1, batch=3, seconds=0.01)
    assert found.profile.batch == 3
    assert found.profile.macs == 3 * MACS
    assert found.profile.calls >= 5
    assert found.histogram == forms["float32"].histogram
    assert [node.layer for node in found.profile.nodes] == [node.layer for node in forms["float32"].profile.nodes]


def test_nothing_is_left_behind(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here(exported.float32.path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.onnx"], "the profiler's file is gone"


def test_nodes_without_names_get_one(tmp_path):
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Sin", ["a"], ["b"])]
    nodes.append(helper.make_node("Sin", ["b"], ["y"]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], [weight])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    before = path.read_bytes()
    found = profile_operators(path, seconds=0.01)
    assert len(found.profile.nodes) == 3
    assert found.profile.macs == 16
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("stages.0.first/Conv", "stages.0.first"),
        ("stages.0.first/Conv_1", "stages.0.first"),
        ("/ReduceMean", ""),
        ("/blocks/blocks.1/first/first.0/Conv", "blocks.1.first.0"),
        ("/head/Gemm", "head"),
        ("Conv_17", "Conv_17"),
    ],
)
def test_module_paths_are_read_from_node_names(name, layer):
    assert layer_of(helper.make_node("Conv", [], [], name=name)) == layer


def event(name: str, ts: int, dur: int, op: str | None = None) -> dict:
    args = (
        {}
        if op is None
        else {"op_name": op, "input_type_shape": [{"float": [1]}], "output_type_shape": [{"float": [1]}]}
    )
    return {"cat": "Session" if op is None else "Node", "name": name, "ts": ts, "dur": dur, "args": args}


def test_times_are_per_call_without_the_warm_up_and_blocks_count_once():
    events = []
    for call, slow in enumerate((100, 1, 1, 1, 1)):  # the first call is the warm-up
        start = 1000 * call
        events += [
            event("a_kernel_time", start + 1, 10 * slow, "Conv"),
            event("inside_kernel_time", start + 320, 7, "Relu"),
            event("loop_kernel_time", start + 310, 30, "Loop"),
            event("model_run", start, 900),
        ]
    nodes, call_us = node_times(json.loads(json.dumps(events)))
    assert {node["name"]: node["microseconds"] for node in nodes} == {"a": 10.0, "loop": 30.0}
    assert call_us == 900


def test_the_middle_half_ignores_outliers():
    assert midmean([1, 2, 3, 1000]) == 2.5
    assert midmean([5]) == 5


def test_a_file_that_does_not_run_is_named(tmp_path, exported):
    with pytest.raises(ExportError, match=r"absent\.onnx"):
        profile_operators(tmp_path / "absent.onnx")
    proto = onnx.load(str(exported.float32.path))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, str(tmp_path / "one.onnx"))
    with pytest.raises(ExportError, match="fixed batch size 1, expected 4"):
        profile_operators(tmp_path / "one.onnx", batch=4)
