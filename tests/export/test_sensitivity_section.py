"""The stage that measures layers, and the section that shows them and what accuracy control tried."""

import csv
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compression.checkpoint import save_checkpoint
from compression.data import Dataset, save_dataset
from compression.models import ModelSpec
from compression.quantize.control import AccuracyControl, Attempt, Reverted
from compression.quantize.sensitivity import SensitivityConfig, sensitivity
from compression.zoo import PlainCnn
from export.report import figures_sensitivity as figures
from export.report.figures_sensitivity import MARK, drawn_layers, heat_map, section, short_number
from tasks.artifacts import Artifact, Store
from tasks.sensitivity import drawn_images, measure_sensitivity, open_table
from tasks.stage import StageResult, Work
from tests.compression.tiny_data import tiny_dataset

REPORT = Path(__file__).resolve().parents[2] / "export" / "report"
MODEL = PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8)
CONFIG = SensitivityConfig(images=16, formats=("int8", "half the channels"))


class Logged:
    """In place of an MLflow run: keeps what it is given."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def log_file(self, path: Path, folder: str = "") -> None:
        self.files[f"{folder}/{path.name}"] = path.read_text()


class Measured:
    """The stage, run once."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.data = tiny_dataset()
        self.store = Store(folder / "store")
        self.store.prepare()
        spec = ModelSpec(
            model=MODEL,
            num_classes=self.data.num_classes,
            input_shape=self.data.input_shape,
            class_names=self.data.class_names,
            preprocessing=self.data.preprocessing,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = MODEL.build(self.data.num_classes, self.data.input_shape).eval()
        with self.store.put("checkpoint") as draft:
            save_checkpoint(self.model, spec, draft.folder)
        self.inputs = {"config": CONFIG, "model": result("model", draft.done()), "seed": 3}
        with self.store.put("dataset") as draft:
            save_dataset(self.data, draft.folder)
        self.inputs["data"] = result("data", draft.done())
        self.run, self.steps = Logged(), list[tuple[str, int, int]]()
        work = Work(self.store, self.run, folder, lambda *step: self.steps.append(step))  # pyright: ignore[reportArgumentType]
        self.output = measure_sensitivity.fn(work, name="student-0", **self.inputs)
        self.folder = self.store.open(self.output.artifact)
        self.table = open_table(self.folder)


def result(name: str, artifact: Artifact) -> StageResult:
    return StageResult(stage="made here", name=name, key=name, artifact=artifact)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measured:
    return Measured(tmp_path_factory.mktemp("stage"))


def record(**changes: Any) -> dict[str, Any]:
    rows = (
        Attempt(layer="head", to="float", drop_before=0.03, drop_after=0.02, kept=True),
        Attempt(layer="stem.0", to="float", drop_before=0.02, drop_after=0.002, kept=True),
        Attempt(layer="head", to="int8", drop_before=0.002, drop_after=0.003, kept=True),
    )
    facts = {"prepared": None, "keep_float": ("stem.0",), "drop": 0.003, "met": True, "rows": rows} | changes
    return Reverted(**facts).record(AccuracyControl(max_drop=0.005, max_layers=None))


def rendered(content: dict[str, Any] | None, kind: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(REPORT),
        undefined=StrictUndefined,
        autoescape=kind == "html",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = (REPORT / f"template.{kind}.jinja").read_text(encoding="utf-8")
    macros = page[: page.index("{% set icons")] if kind == "html" else ""
    source = macros + "{% include 'sections/sensitivity." + kind + ".jinja' %}"
    return environment.from_string(source).render(section(content))


def texts(html: str) -> list[str]:
    return [re.sub(r"<[^>]+>", "", each).strip() for each in re.findall(r"<text[^>]*>.*?</text>", html, re.DOTALL)]


# --- the stage


def test_the_stage_keeps_what_the_function_finds(measured):
    images, labels = drawn_images(measured.data.validation, measured.data.preprocessing, count=16, seed=3)
    calibration, _ = drawn_images(measured.data.calibration, measured.data.preprocessing, count=16, seed=3)
    expected = sensitivity(
        measured.model,
        measured.data.input_shape,
        images,
        labels,
        calibration=calibration,
        formats=CONFIG.formats,
    )
    assert measured.table == expected
    assert measured.table.num_samples == 16
    assert measured.output.metrics["worst_kl"] == max(row.kl for row in expected.rows)
    assert measured.output.metrics["worst_kl_half_the_channels"] == max(
        row.kl for row in expected.column("half the channels").values()
    )
    assert measured.output.metrics["layers"] == 3
    assert measured.output.info["worst"]["int8"] == expected.worst()[0]


def test_the_csv_has_every_row_and_mlflow_gets_it(measured):
    text = (measured.folder / "sensitivity.csv").read_text()
    assert measured.run.files == {"sensitivity/sensitivity.csv": text}
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["layer"], row["format"], float(row["kl"])) for row in rows] == [
        (row.layer, row.format, row.kl) for row in measured.table.rows
    ]


def test_progress_ends_at_its_total(measured):
    assert measured.steps[-1] == ("measuring the layers of student-0", 3, 3)


def test_the_table_is_measured_again_for_other_questions_only(measured):
    inputs = measured.inputs
    same = measure_sensitivity.key("student-0", inputs)
    assert same == measure_sensitivity.key("student-0", dict(inputs))
    others = ({"seed": 4}, {"config": CONFIG.model_copy(update={"images": 8})}, {"model": inputs["data"]})
    assert len({same, *(measure_sensitivity.key("student-0", inputs | change) for change in others)}) == 4


def test_images_are_drawn_by_the_seed_and_at_most_all():
    data: Dataset = tiny_dataset(validation=32)
    draw = [drawn_images(data.validation, data.preprocessing, count=8, seed=seed) for seed in (0, 0, 1)]
    assert draw[0][0].equal(draw[1][0])
    assert not draw[0][0].equal(draw[2][0])
    images, labels = drawn_images(data.validation, data.preprocessing, count=999, seed=5)
    assert images.shape == (32, 1, 8, 8)
    assert labels.equal(data.validation.labels)


# --- the section


def test_the_map_has_a_row_for_each_layer_and_a_number_in_each_cell(measured):
    content = {"student-0": {"table": json.loads(measured.table.model_dump_json()), "keep_float": [], "control": None}}
    html = rendered(content, "html")
    found = texts(html)
    assert [text for text in found if text in measured.table.layers] == measured.table.layers
    assert {short_number(row.kl) for row in measured.table.rows} <= set(found)
    assert found.count("–") == 1  # the classifier is not pruned
    assert "Accuracy control was not asked for" in html
    assert MARK not in "".join(found)
    assert "var(--s1)" in html
    assert "#0101" not in html


def test_colour_grows_with_the_logarithm():
    rows = [{"layer": str(i), "format": "int8", "kl": 10.0**-i} for i in range(4)]
    figure = heat_map(rows)
    assert figure is not None
    alphas = [patch.get_alpha() for patch in figure.axes[0].patches]
    steps = [before - after for before, after in pairwise(alphas)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert steps[0] > 0
    assert heat_map([]) is None


def test_layers_in_float_are_marked_in_map_and_tables(measured):
    table = json.loads(measured.table.model_dump_json())
    content = {"s": {"table": table, "keep_float": ["ste*"], "control": record()}}
    marked = [text for text in texts(rendered(content, "html")) if MARK in text]
    assert marked == [f"{MARK} stem.0"]
    assert f"| {MARK} stem.0 |" in rendered(content, "md")


def test_steps_of_accuracy_control_are_told_and_listed():
    content = {"s": {"table": None, "keep_float": ["stem.0"], "control": record()}}
    html, markdown = (rendered(content, kind) for kind in ("html", "md"))
    sentence = "INT8 costs 0.30 points (0.50 points allowed) with stem.0 back in float."
    for text in (html, markdown):
        assert sentence in text
        assert "were not measured" in text
    assert "✓ bound met" in html
    assert [line.split(" | ") for line in markdown.splitlines() if "stem.0 |" in line] == [
        ["| stem.0", "float", "+2.00", "+0.20", "yes |"]
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"met": False, "drop": 0.02}, "the bound is not met, with stem.0 back in float"),
        ({"rows": (), "keep_float": ()}, "no layer had to go back to float"),
        ({"rows": (), "met": False, "drop": 0.02}, "the bound is not met, with no layer back in float"),
    ],
)
def test_what_came_out_is_said_plainly(changes, words):
    html = rendered({"s": {"table": None, "keep_float": [], "control": record(**changes)}}, "html")
    assert words in html
    assert ("✕ bound not met" in html) == (changes.get("met") is False)


@pytest.mark.parametrize("content", [None, {}])
def test_without_data_both_say_not_run(content):
    assert "Sensitivity was not run" in rendered(content, "html")
    assert "Not run." in rendered(content, "md")


def test_of_a_deep_network_the_most_sensitive_layers_are_drawn_in_order(monkeypatch):
    monkeypatch.setattr(figures, "MOST", 3)
    rows = [{"layer": str(i), "format": "int8", "kl": kl} for i, kl in enumerate((5.0, 0.0, 9.0, 1.0, 7.0))]
    assert drawn_layers(rows) == ["0", "2", "4"]
    table = {"rows": [row | {"flips": 0.0, "accuracy_drop": 0.0} for row in rows], "num_samples": 8, "accuracy": 0.5}
    html = rendered({"s": {"table": table, "keep_float": [], "control": None}}, "html")
    assert "the 3 most sensitive of 5 layers" in html
    assert "All 5 layers in numbers" in html


def test_numbers_are_short():
    found = [short_number(value) for value in (0.0, 2.14e-5, 9.99e-13, 0.0342, 1.234, 130.4)]
    assert found == ["0", "2.1e-5", "1.0e-12", "0.034", "1.2", "130"]
