"""One temperature: what it must do to likelihood, and what it must leave alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compression.augment import normalise
from compression.calibration import (
    HIGHEST,
    LOWEST,
    Calibrate,
    Temperature,
    calibrated_row,
    calibrated_rows,
    fit_temperature,
)
from compression.checkpoint import save_checkpoint
from compression.data.dataset import save_dataset
from compression.errors import CompressionError, ShapeError
from compression.metrics import metrics_of, predict
from compression.models import ModelSpec
from compression.quantize import Qat, prepare_qat, save_quantized
from compression.zoo import PlainCnn
from tests.compression.tiny_data import blobs, tiny_dataset


def drawn(count: int = 3000, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from the distributions they state: calibrated by construction."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_calibrated_logits_have_temperature_one():
    assert fit_temperature(*drawn()).value == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("factor", [0.1, 0.5, 3.0, 12.0])
def test_scaling_the_logits_scales_the_temperature(factor):
    logits, labels = drawn()
    plain, scaled = fit_temperature(logits, labels), fit_temperature(logits * factor, labels)
    assert scaled.value == pytest.approx(plain.value * factor, rel=1e-5)
    assert scaled.nll_after == pytest.approx(plain.nll_after, rel=1e-9)


def test_it_is_the_minimum_of_the_likelihood():
    logits, labels = drawn(800, seed=1)
    found = fit_temperature(logits * 4, labels)
    assert found.nll_after == pytest.approx(float(F.cross_entropy(logits * 4 / found.value, labels)))
    for nudge in (0.97, 1.03):
        assert float(F.cross_entropy(logits * 4 / (found.value * nudge), labels)) > found.nll_after
    assert found.nll_after < found.nll_before
    assert found.ece_after < found.ece_before
    assert (found.num_samples, found.note) == (800, "")


@pytest.mark.parametrize("seed", range(5))
def test_the_split_it_was_fitted_on_never_gets_worse_and_no_answer_changes(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 4, generator=generator) * 10 ** (seed - 2)
    labels = torch.randint(0, 4, (60,), generator=generator)
    found = fit_temperature(logits, labels)
    assert found.nll_after <= found.nll_before
    assert LOWEST <= found.value <= HIGHEST
    assert torch.equal((logits / found.value).argmax(1), logits.argmax(1))


def test_separable_logits_end_at_the_lower_bound_with_a_note():
    labels = torch.arange(40) % 4
    found = fit_temperature(F.one_hot(labels, 4).float(), labels)
    assert found.value == LOWEST
    assert "sharper" in found.note
    assert math.isfinite(found.nll_after)


def test_logits_without_information_end_at_the_upper_bound_with_a_note():
    logits, labels = drawn(600)
    found = fit_temperature(-3 * logits, labels)
    assert found.value == HIGHEST
    assert "flatter" in found.note


@pytest.mark.parametrize("logits", [torch.full((8, 4), 3.0), 1e6 * F.one_hot(torch.arange(8) % 4, 4).float()])
def test_where_no_temperature_is_better_it_is_one(logits):
    found = fit_temperature(logits, torch.arange(8) % 4)
    assert (found.value, found.note) == (1.0, "")


def test_it_depends_on_nothing_but_its_arguments():
    logits, labels = drawn(200)
    kept, state = logits.clone(), torch.get_rng_state()
    with torch.inference_mode():
        first = fit_temperature(logits, labels)
    assert first == fit_temperature(logits, labels)
    assert torch.equal(logits, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_is_refused():
    logits, labels = drawn(20)
    with pytest.raises(ShapeError):
        fit_temperature(logits, labels[:-1])
    with pytest.raises(CompressionError, match="not finite"):
        fit_temperature(logits * float("inf"), labels)
    with pytest.raises(CompressionError, match=r"1 of 20 values outside 0\.\.5 \(first: -1\)"):
        fit_temperature(logits, torch.cat([labels[:-1], torch.tensor([-1])]))
    with pytest.raises(CompressionError, match="expected a finite number above 0"):
        calibrated_row(logits, labels, 0.0)


def test_a_row_says_the_same_whether_the_graph_divides_or_not():
    logits, labels = drawn(300)
    outside = calibrated_row(logits, labels, 2.0)
    inside = calibrated_row(logits / 2.0, labels, 2.0, applied=True)
    for key in ("before", "after"):
        assert getattr(inside, key).model_dump() == pytest.approx(getattr(outside, key).model_dump(), rel=1e-6)
    assert outside.before == metrics_of(logits, labels)
    assert outside.after == metrics_of(logits / 2.0, labels)
    assert outside.after.accuracy == outside.before.accuracy
    assert inside.per_class == outside.per_class


def test_files_without_a_temperature_have_no_numbers_after_it():
    logits, labels = drawn(50)
    rows = calibrated_rows({"a": logits, "b": logits}, labels, {"b": (1.5, False)})
    assert (rows["a"].temperature, rows["a"].after) == (None, None)
    assert rows["b"].after is not None
    assert type(rows["b"]).model_validate_json(rows["b"].model_dump_json()) == rows["b"]


def test_by_default_the_graph_is_left_as_it_is():
    assert Calibrate().apply is False


@pytest.fixture
def work(tmp_path: Path) -> Any:
    from tasks.artifacts import Store
    from tasks.stage import Work

    store = Store(tmp_path / "store")
    store.prepare()
    return Work(store=store, run=None, scratch=tmp_path, report=lambda text, done, total: None)


def kept(work: Any, kind: str, write: Any) -> Any:
    from tasks.stage import StageResult

    with work.store.put(kind) as draft:
        write(draft.folder)
    return StageResult(stage=kind, name=kind, key=kind, artifact=draft.done())


def test_the_stage_fits_each_form_on_the_calibration_split_and_never_sees_the_test_split(work):
    from tasks.calibrate import calibrate_model

    dataset = replace(tiny_dataset(), calibration=blobs(48, 2000))
    torch.manual_seed(0)
    kind = PlainCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8)
    model = kind.build(4, dataset.input_shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(25):
        optimizer.zero_grad()
        logits = model(normalise(dataset.train.images, dataset.preprocessing))
        F.cross_entropy(logits, dataset.train.labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model.get_submodule("head").weight.mul_(2)  # too sure of itself
    spec = ModelSpec(
        model=kind,
        num_classes=4,
        input_shape=dataset.input_shape,
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )
    prepared = prepare_qat(model, dataset.input_shape, normalise(dataset.calibration.images, dataset.preprocessing))

    def quantized(folder: Path) -> None:
        save_checkpoint(model, spec, folder)
        save_quantized(prepared, folder, Qat())

    data = kept(work, "data", lambda folder: save_dataset(dataset, folder))
    other = kept(work, "data", lambda folder: save_dataset(replace(dataset, test=blobs(20, 9000)), folder))
    student = kept(work, "checkpoint", lambda folder: save_checkpoint(model, spec, folder))
    int8 = kept(work, "quantized", quantized)
    assert data.artifact != other.artifact

    def stage(**inputs: Any) -> Any:
        return calibrate_model.fn(work, name="x", config=Calibrate(apply=True), **inputs)

    found = stage(model=student, which="float", data=data)
    split = dataset.calibration
    expected = fit_temperature(predict(model, split, dataset.preprocessing), split.labels)
    assert found.metrics["temperature"] == expected.value > LOWEST
    assert expected.note == ""
    assert found.metrics["nll_after"] < found.metrics["nll_before"]
    assert (found.info["apply"], found.info["which"], found.info["num_samples"]) == (True, "float", 48)
    stored = (work.open(kept_of(found)) / "temperature.json").read_text()
    assert Temperature.model_validate_json(stored) == expected
    assert stage(model=student, which="float", data=other).artifact == found.artifact
    rounded = stage(model=int8, which="int8", data=data)
    assert rounded.metrics["temperature"] == pytest.approx(expected.value, rel=0.2)
    assert rounded.artifact != found.artifact

    wrong = replace(dataset, calibration=replace(split, labels=(split.labels + 1) % 4))
    bound = stage(model=student, which="float", data=kept(work, "data", lambda folder: save_dataset(wrong, folder)))
    assert (bound.metrics["temperature"], bound.info["apply"]) == (HIGHEST, False)


def kept_of(output: Any) -> Any:
    from tasks.stage import StageResult

    return StageResult(stage="x", name="x", key="x", artifact=output.artifact)


def test_the_report_shows_each_file_before_and_after_and_the_class_that_lost_most():
    from export.report.figures_calibration import figures, section

    labels = torch.arange(30) % 3
    teacher = 4 * F.one_hot(labels, 3).float()
    student = teacher.clone()
    student[labels == 2] = torch.tensor([0.0, 3.0, 0.0])
    rows = calibrated_rows({"t": teacher, "s": student}, labels, {"s": (2.0, True)})
    content = {
        "teacher": "t",
        "class_names": ["a", "b", "c"],
        "files": {name: row.model_dump(mode="json") for name, row in rows.items()},
    }
    shown = section(content)["calibration"]
    titles = [column["title"] for column in shown["table"]["columns"]]
    cells = {
        row["cells"][0]["text"]: dict(zip(titles, (cell["text"] for cell in row["cells"]), strict=True))
        for row in shown["table"]["rows"]
    }
    assert (cells["t"]["T"], cells["t"]["largest drop"]) == ("not fitted", "reference")
    assert cells["s"]["largest drop"] == "+100.00 (c)"
    assert cells["s"]["worst class"] == "0.00 % (c)"
    before, after = cells["s"]["NLL"].split(" → ")
    assert float(before) == pytest.approx(rows["s"].before.nll, abs=5e-4)
    assert float(after) == pytest.approx(rows["s"].after.nll, abs=5e-4)
    assert shown["fitted"]
    assert figures(content)["ece"][0] is not None
    assert figures({})["ece"][0] is None
    assert section({})["calibration"]["table"]["rows"] == []
