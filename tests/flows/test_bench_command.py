"""``stillhouse bench``: any ONNX files, which is faster, and why the others are not."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from compression.errors import InputError
from flows.bench_files import Bench, as_dict, bench_files, measure, shapes_of


def write_net(path: Path, *, layers: int = 1, width: int = 8, batch: int | str = "n", size: int | str = 16) -> Path:
    """Matrix products on [batch, size] inputs named 'x', as another tool may name them, and nodes without names."""
    rng = np.random.default_rng(0)
    nodes, weights, source = [], [], "x"
    for number in range(layers):
        shape = (16 if number == 0 else width, width)
        weights.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"w{number}"))
        nodes.append(helper.make_node("MatMul", [source, f"w{number}"], [f"y{number}"]))
        source = f"y{number}"
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, size])
    made = helper.make_tensor_value_info(source, TensorProto.FLOAT, [batch, width])
    graph = helper.make_graph(nodes, "net", [given], [made], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "broken.onnx").write_bytes(b"not a graph")
    return [
        write_net(folder / "big.onnx", layers=10, width=256),
        write_net(folder / "small.onnx", batch=4, size="open"),
        folder / "broken.onnx",
        folder / "absent.onnx",
    ]


@pytest.fixture(scope="module")
def measured(files) -> Bench:
    return measure(files, batches=(1,), rounds=6, shapes={"x": (1, 16)})


def row_of(found: Bench, file: str, batch: int | None = None) -> dict:
    (row,) = [row for row in found.rows if row["file"] == file and row.get("batch") == batch]
    return row


def test_every_file_is_a_row_with_numbers_or_a_reason(measured):
    assert row_of(measured, "big.onnx", 1)["faster"] == "reference"
    assert row_of(measured, "small.onnx", 4)["faster"] == "yes"
    assert "no ONNX" in row_of(measured, "broken.onnx")["failure"]
    assert "does not exist" in row_of(measured, "absent.onnx")["failure"]
    assert row_of(measured, "big.onnx", 4)["layers"] == 10


def test_a_fixed_batch_is_the_only_one_measured_and_that_is_said(measured):
    assert {row["batch"] for row in measured.rows if row["file"] == "small.onnx"} == {4}
    assert {row["batch"] for row in measured.rows if row["file"] == "big.onnx"} == {1, 4}
    assert measured.notes == ["'small.onnx' is fixed to batch 4; it is measured at that size only."]


def test_the_faster_file_gets_its_answer_at_the_batch_it_was_measured_at(measured):
    found = measured.report.files["small.onnx"].diagnosis
    assert found is not None
    assert (found.faster, found.batch) == ("yes", 4)
    assert found.speed is not None
    assert found.speed.ratio == pytest.approx(row_of(measured, "small.onnx", 4)["ratio"])


def test_json_holds_everything_and_does_not_invent_energy(measured):
    kept = json.loads(json.dumps(as_dict(measured)))
    assert kept["energy"] == "not measured"
    assert set(kept["files"]) == {"big.onnx", "small.onnx"}
    assert kept["files"]["small.onnx"]["headline"].startswith("'small.onnx' is faster")
    assert set(kept["noise_floors"]) == {"1", "4"}


def test_the_table_answers_in_words_and_the_csv_has_the_same_rows(files, tmp_path, monkeypatch, measured):
    monkeypatch.setattr("flows.bench_files.measure", lambda *args, **options: measured)
    text = io.StringIO()
    console = Console(width=160, file=text)
    bench_files(console, files, operators=True, csv_path=tmp_path / "out" / "bench.csv")
    shown = " ".join(text.getvalue().split())
    assert "small.onnx: faster? yes" in shown
    assert "Energy: not measured" in shown
    assert "'broken.onnx' failed: " in shown
    assert "Way out: " in shown
    assert "Time per operator of big.onnx" in shown
    assert "as it runs" in shown
    with (tmp_path / "out" / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [row["file"] for row in measured.rows]
    text.truncate(0)
    text.seek(0)
    bench_files(console, files, as_json=True)
    assert json.loads(text.getvalue())["reference"] == "big.onnx"


# ---------------------------------------------------------------- refused before anything is timed


def test_a_reference_that_cannot_be_used_is_an_error_and_says_why(files, tmp_path):
    big, small, broken, absent = files
    for reference, words in ((broken, "no ONNX"), (absent, "does not exist")):
        with pytest.raises(InputError, match=f"Reference '{reference.name}' cannot be timed.*{words}"):
            measure([big, broken, absent], reference=reference)
    with pytest.raises(InputError, match="is not among the files"):
        measure([big], reference=small)
    with pytest.raises(InputError, match="no files"):
        measure([])
    with pytest.raises(InputError, match=r"--shape x=4x\?"):
        measure([small])


def test_shapes_are_read_or_refused(files):
    assert shapes_of(["images=1x3x224x224", "a=b=2"]) == {"images": (1, 3, 224, 224), "a=b": (2,)}
    for wrong in ("1x3", "x=", "x=1x-3", "x=axb", "x=0x2"):
        with pytest.raises(InputError, match="expected NAME=SIZExSIZE"):
            shapes_of([wrong])
    with pytest.raises(InputError, match=r"no such input, expected one of \['x'\]"):
        measure(files[:1], shapes={"y": (1, 2)})


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    from flows.bench_files import _named

    paths = [tmp_path / folder / "model.onnx" for folder in ("a", "b")]
    assert list(_named(paths, paths[1])) == ["b/model.onnx", "a/model.onnx"]
