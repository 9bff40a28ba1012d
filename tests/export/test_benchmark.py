import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from compression.errors import ExportError
from export.benchmark import BenchmarkJob, run_benchmark, summarize
from export.evidence import latency_facts
from export.feed import feed_of, fixed_batch, input_shapes
from export.latency import AGAIN, BenchmarkResult, median_interval, read_raw, round_ratios
from export.timing import RAW_COLUMNS, latency_p50_ms, open_session, probe


def write_net(path: Path, *, layers: int = 1, width: int = 16, batch: int | str = "batch") -> Path:
    """A stack of square matrix products on [batch, 1, 4, 4] images."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Flatten", ["images"], ["x0"])]
    weights = []
    for i in range(layers):
        shape = (16 if i == 0 else width, width)
        weights.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"w{i}"))
        last = "logits" if i == layers - 1 else f"x{i + 1}"
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [last]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[BenchmarkJob, Path, BenchmarkResult]:
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "broken.onnx").write_bytes(b"not a graph")
    job = BenchmarkJob(
        models={
            "big": write_net(folder / "big.onnx", layers=12, width=384),
            "small": write_net(folder / "small.onnx"),
            "fixed": write_net(folder / "fixed.onnx", batch=1),
            "broken": folder / "broken.onnx",
        },
        reference="big",
        batches=(1, 4),
        rounds=8,
        warmup=3,
        inner_ms=2.0,
    )
    return job, folder / "out", run_benchmark(job, folder / "out")


def test_a_smaller_net_is_measured_as_faster_and_the_reference_as_itself(measured):
    _, _, result = measured
    for batch in (1, 4):
        assert result.row("big", batch).ratio_to_reference == 1.0
        small = result.row("small", batch)
        assert small.ratio_low <= small.ratio_to_reference <= small.ratio_high < 0.5
        assert small.ratio_iqr[0] <= small.ratio_to_reference <= small.ratio_iqr[1]


def test_percentiles_ascend_and_rates_follow_from_them(measured):
    job, _, result = measured
    for row in result.rows:
        p = (row.latency_p50_ms, row.latency_p90_ms, row.latency_p95_ms, row.latency_p99_ms)
        assert 0 < p[0] <= p[1] <= p[2] <= p[3]
        assert row.latency_p95_low_ms <= row.latency_p95_ms <= row.latency_p95_high_ms
        assert row.throughput_per_s == pytest.approx(row.batch / row.latency_p50_ms * 1e3)
        assert row.samples >= 120
        assert row.size_bytes == job.models[row.model].stat().st_size


def test_memory_load_and_first_inference_come_from_a_fresh_process(measured):
    _, _, result = measured
    for row in result.rows:
        assert row.load_ms is not None
        assert row.load_ms > 0
        assert row.first_inference_ms is not None
        assert row.first_inference_ms > 0
        assert row.peak_rss_bytes is not None
        assert 10 * 2**20 < row.peak_rss_bytes < 300 * 2**20, "a training framework would weigh more than this"
    big, small = result.row("big", 1), result.row("small", 1)
    assert big.model_rss_bytes is not None
    assert small.model_rss_bytes is not None
    assert big.model_rss_bytes > small.model_rss_bytes


def test_the_memory_of_the_caller_is_not_counted(tmp_path):
    ballast = np.ones(60_000_000)  # 480 MB that a forked child would inherit in ru_maxrss
    path = write_net(tmp_path / "net.onnx")
    out = subprocess.run(
        [sys.executable, "-m", "export.timing", "probe", str(path), "1"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert json.loads(out.stdout)["peak_rss_bytes"] < ballast.nbytes


def test_a_model_that_cannot_run_is_named_and_stops_nobody(measured):
    _, _, result = measured
    assert "broken" in result.failures
    assert "fixed batch size 1, expected 4" in result.failures["fixed"]
    assert {row.model for row in result.rows if row.batch == 4} == {"big", "small"}
    with pytest.raises(ExportError, match="no timing of 'fixed' at batch 4: at batch 4: ValueError"):
        result.row("fixed", 4)


def test_raw_samples_are_kept_and_tell_the_same_story(measured):
    job, folder, result = measured
    with (folder / "latency_raw.csv").open() as file:
        assert tuple(next(csv.reader(file))) == RAW_COLUMNS
    again = summarize(job, read_raw(folder / "latency_raw.csv"))
    for row in again.rows:
        assert row.latency_p99_ms == result.row(row.model, row.batch).latency_p99_ms
        assert row.ratio_to_reference == result.row(row.model, row.batch).ratio_to_reference
    assert again.noise_floors == result.noise_floors


def test_models_are_interleaved_in_an_order_drawn_anew(measured):
    _, folder, _ = measured
    with (folder / "latency_raw.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["batch"] == "1"]
    orders = {}
    for row in rows:
        orders.setdefault(row["round"], {})[row["order"]] = row["model"]
    assert len(orders) == 8
    assert all(set(order.values()) == {"big", "small", "fixed", "big" + AGAIN} for order in orders.values())
    assert len({tuple(order[place] for place in sorted(order)) for order in orders.values()}) > 2


def test_the_result_reads_back_from_latency_json(measured):
    _, folder, result = measured
    assert BenchmarkResult.model_validate_json((folder / "latency.json").read_text()) == result
    assert result.environment["threads"] == 1
    assert result.environment["onnxruntime"] != "unknown"


def test_the_noise_floor_is_there_for_every_batch_and_finite(measured):
    _, _, result = measured
    for batch in (1, 4):
        assert 0 <= result.noise_floor(batch) < 10
    with pytest.raises(ExportError, match="no noise floor at batch 7"):
        result.noise_floor(7)


def test_the_gate_gets_its_latency_from_the_result(measured):
    _, _, result = measured
    facts = latency_facts(result, "small", batch=1)
    assert facts["size_bytes"] == result.row("small", 1).size_bytes
    assert facts["latency_noise_floor"] == result.noise_floor(1)


def test_the_command_line_writes_what_the_function_returns(tmp_path):
    job = BenchmarkJob(
        models={"a": write_net(tmp_path / "a.onnx")},
        reference="a",
        batches=(1,),
        rounds=3,
        warmup=1,
        inner_ms=0.5,
        memory=False,
    )
    (tmp_path / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "export.benchmark", str(tmp_path / "job.json"), str(tmp_path / "out.json")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    result = BenchmarkResult.model_validate_json((tmp_path / "out.json").read_text())
    assert result.row("a", 1).peak_rss_bytes is None
    assert (tmp_path / "latency_raw.csv").is_file()


def test_a_missing_file_and_a_dead_reference_are_refused_with_a_way_out(tmp_path):
    lost = BenchmarkJob(models={"a": tmp_path / "a.onnx"}, reference="a")
    with pytest.raises(ExportError, match="Export it first"):
        run_benchmark(lost, tmp_path / "out")
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(ExportError, match="Reference 'a' cannot be timed"):
        run_benchmark(lost.model_copy(update={"rounds": 3}), tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"reference": "c"},
        {"batches": (0,)},
        {"rounds": 1},
        {"threads": 0},
        {"models": {"a": Path("a"), "a" + AGAIN: Path("b")}},
        {"round": 5},
    ],
)
def test_a_job_that_makes_no_sense_is_refused(change):
    with pytest.raises(ValidationError):
        BenchmarkJob(**({"models": {"a": Path("a.onnx")}, "reference": "a"} | change))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median(values):
    low, high = median_interval(np.array(values))
    assert min(values) <= low <= np.median(values) <= high <= max(values)


def test_the_interval_covers_as_often_as_it_says_and_narrows_with_rounds():
    rng = np.random.default_rng(0)
    for rounds in (12, 30):
        hits = [low <= 0 <= high for low, high in (median_interval(rng.normal(size=rounds)) for _ in range(1000))]
        assert np.mean(hits) > 0.935
    wide, narrow = (np.ptp(median_interval(rng.normal(size=n))) for n in (10, 1000))
    assert narrow < wide


def test_a_slow_spell_of_the_machine_cancels_out_of_the_ratio(tmp_path):
    path = write_net(tmp_path / "a.onnx")
    job = BenchmarkJob(models={"ref": path, "half": path}, reference="ref", batches=(1,))
    mood = [1.0, 5.0, 1.0, 30.0, 1.0, 2.0, 7.0, 1.0]
    samples = {
        ("ref", 1): [np.full(9, 2.0 * m) for m in mood],
        ("half", 1): [np.full(9, 1.0 * m) for m in mood],
        ("ref" + AGAIN, 1): [np.full(9, 2.0 * m) for m in mood],
    }
    result = summarize(job, samples)
    half = result.row("half", 1)
    assert (half.ratio_to_reference, half.ratio_low, half.ratio_high) == (0.5, 0.5, 0.5)
    assert result.noise_floor(1) == 0.0
    assert list(round_ratios(samples["half", 1], samples["ref", 1])) == [0.5] * 8


def test_probe_and_the_quick_look_give_plausible_numbers(tmp_path):
    path = write_net(tmp_path / "a.onnx")
    facts = probe(path, threads=1)
    assert set(facts) == {"load_ms", "first_inference_ms", "peak_rss_bytes", "model_rss_bytes"}
    assert 0 < latency_p50_ms(path, batch=2, seconds=0.02) < 50


def test_the_clock_loads_no_training_framework():
    code = "import sys, export.timing; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.split() == ["False", "False"]


# ---------------------------------------------------------------- inputs of any file


def write_inputs(path: Path, **inputs: tuple[int, list[int | str | None]]) -> Path:
    """A graph that hands each of its inputs (element type, sizes) through."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    given = [helper.make_tensor_value_info(name, kind, sizes) for name, (kind, sizes) in inputs.items()]
    made = [helper.make_tensor_value_info(f"{name}_out", kind, sizes) for name, (kind, sizes) in inputs.items()]
    graph = helper.make_graph(nodes, "net", given, made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_every_input_gets_numbers_of_its_type(tmp_path):
    kinds = {
        "image": TensorProto.FLOAT16,
        "bytes": TensorProto.UINT8,
        "ids": TensorProto.INT64,
        "mask": TensorProto.BOOL,
        "double": TensorProto.DOUBLE,
    }
    path = write_inputs(
        tmp_path / "a.onnx", scale=(TensorProto.FLOAT, []), **{n: (k, ["n", 40]) for n, k in kinds.items()}
    )
    session = open_session(path, threads=1)
    feed = feed_of(session, 3, seed=0)
    assert feed["scale"].shape == ()
    assert {name: (feed[name].shape, feed[name].dtype) for name in kinds} == {
        name: ((3, 40), helper.tensor_dtype_to_np_dtype(kind)) for name, kind in kinds.items()
    }
    assert set(np.unique(feed["ids"])) == {0, 1}, "other token numbers may be none of the vocabulary"
    assert feed["bytes"].max() > 200
    assert len(session.run(None, feed)) == 6
    again = feed_of(session, 3, seed=0)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    text = open_session(write_inputs(tmp_path / "b.onnx", text=(TensorProto.STRING, ["n"])), threads=1)
    with pytest.raises(ValueError, match="Input 'text' has type"):
        feed_of(text, 1, seed=0)


@pytest.mark.parametrize(
    ("inputs", "fixed"),
    [
        ([("x", ["n", 3])], None),
        ([("x", [None, 3])], None),
        ([("x", [4, 3])], 4),
        ([("scalar", []), ("x", [4, 3])], 4),
        ([("anchors", [7]), ("x", ["n", 3])], None),
        ([("scalar", [])], None),
    ],
)
def test_the_batch_is_open_when_a_first_axis_is(inputs, fixed):
    assert fixed_batch(inputs) == fixed


def test_open_sizes_are_given_once_and_hold_for_their_name():
    inputs = [("ids", ["n", "words"]), ("mask", ["n", "words"]), ("anchors", [7])]
    found = input_shapes(inputs, 5, {"ids": (1, 12)})
    assert found == {"ids": (5, 12), "mask": (5, 12), "anchors": (7,)}


@pytest.mark.parametrize(
    ("inputs", "batch", "shapes", "words"),
    [
        ([("x", ["n", 3, "h", "w"])], 1, {}, "Give them: --shape x=1x3x?x?"),
        ([("x", ["n", 3, "h"])], 1, {"x": (1, 4, 9)}, "sizes nx3xh, expected 1x4x9"),
        ([("x", ["n", 3])], 1, {"x": (1, 3, 9)}, "expected 1x3x9"),
        ([("x", [2, 3])], 1, {}, "fixed batch size 2, expected 1"),
    ],
)
def test_sizes_that_are_missing_or_do_not_fit_are_refused(inputs, batch, shapes, words):
    with pytest.raises(ValueError) as error:
        input_shapes(inputs, batch, shapes)
    assert words in str(error.value)


def test_progress_is_told_round_by_round_and_shapes_reach_every_process(tmp_path):
    path = write_inputs(tmp_path / "a.onnx", x=(TensorProto.FLOAT, ["n", "size"]))
    job = BenchmarkJob(models={"a": path}, reference="a", rounds=3, warmup=1, inner_ms=0.1, shapes={"x": (1, 6)})
    told = []
    result = run_benchmark(job, tmp_path / "out", on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    assert {row.batch for row in result.rows} == {1, 32}
    assert all(row.peak_rss_bytes for row in result.rows)
