"""The stage that asks exported files about corrupted images, and the section that shows what they answered."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import DictLoader, Environment, StrictUndefined

from compression.augment import normalise
from compression.data import Dataset, Split, save_dataset
from compression.errors import CompressionError
from compression.robustness.accuracy import Robustness, RobustnessConfig
from compression.types import Preprocessing
from export.report.figures_robustness import accuracy_over_severity, drawn_by_default, section
from tasks.artifacts import Artifact, Store
from tasks.robustness import measure_robustness
from tasks.stage import StageResult, Work
from tests.export.conftest import Exported

SECTIONS = Path(__file__).resolve().parents[2] / "export" / "report" / "sections"
CONFIG = RobustnessConfig(corruptions=("noise", "shift"), severities=(1, 5), images=64)
PREPROCESSING = Preprocessing(scale=255.0, mean=(0.5,), std=(0.25,))
FILES = ("teacher-big.float32", "student-0.float32", "student-0.int8", "student-0-control.float32")


def labelled_by(exported: Exported) -> Dataset:
    """Images whose labels are what the float model says, so that its clean accuracy is 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, *exported.shape), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = exported.model(normalise(images, PREPROCESSING)).argmax(dim=1)
    split = Split(images=images, labels=labels, ids=torch.arange(100))
    return Dataset(
        name="noise",
        class_names=("a", "b", "c", "d"),
        preprocessing=PREPROCESSING,
        train=split,
        validation=split,
        calibration=split,
        test=split,
        hashes={},
    )


def result(name: str, artifact: Artifact) -> StageResult:
    return StageResult(stage="made here", name=name, key=name, artifact=artifact)


class Logged:
    """In place of an MLflow run: keeps what it is given."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def log_file(self, path: Path, folder: str = "") -> None:
        self.files[folder + path.name] = path.read_text()


def test_the_stage_measures_every_file_on_the_same_corrupted_images(exported: Exported, tmp_path: Path) -> None:
    store, logged, progress = Store(tmp_path / "store"), Logged(), []
    store.prepare()
    with store.put("dataset") as draft:
        save_dataset(labelled_by(exported), draft.folder)
    data, files = result("data", draft.done()), {}
    for name in FILES[:3]:
        graph = exported.symmetric if name.endswith("int8") else exported.float32
        with store.put("onnx") as draft:
            (draft.folder / "model.onnx").write_bytes(graph.path.read_bytes())
        files[name] = result(name, draft.done())
    run: Any = logged
    work = Work(store=store, run=run, scratch=tmp_path, report=lambda text, done, total: progress.append((done, total)))
    output = measure_robustness.fn(
        work, name="test", data=data, files=files, reference=FILES[0], config=CONFIG, machine="here", seed=0
    )
    content = json.loads((store.open(output.artifact) / "robustness.json").read_text())
    assert json.loads(logged.files["robustness.json"]) == content
    assert progress == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert list(content["files"]) == sorted(FILES[:3])
    found = {name: Robustness.model_validate(file) for name, file in content["files"].items()}
    teacher, student, int8 = (found[name] for name in FILES[:3])
    assert teacher.clean_accuracy == 1.0
    assert teacher.num_images == 64
    assert teacher.corrupted_accuracy < 0.95
    assert teacher.gap_increase is None
    assert student.conditions == teacher.conditions
    assert student.gap_increase is not None
    assert student.gap_increase.estimate == 0
    assert int8.gap_increase is not None
    assert int8.gap_increase.estimate == pytest.approx(int8.robust_gap - teacher.robust_gap)
    assert output.metrics["student-0.int8/corrupted_accuracy"] == int8.corrupted_accuracy
    assert output.metrics["student-0.int8/robust_gap"] == int8.robust_gap
    assert len(section(content)["robustness_table"]["rows"]) == 3


def test_a_reference_that_is_no_file_is_refused_before_anything_is_opened() -> None:
    nothing: Any = None
    with pytest.raises(CompressionError, match="Reference 'teacher-small' has no file, expected one of teacher-big"):
        measure_robustness.fn(
            nothing,
            name="test",
            data=nothing,
            files={FILES[0]: nothing},
            reference="teacher-small",
            config=CONFIG,
            machine="here",
            seed=0,
        )


def measured(clean: float, loss: float, increase: float | None) -> dict[str, Any]:
    conditions = [
        {"corruption": corruption, "severity": severity, "accuracy": clean - loss * severity * (1 + number)}
        for number, corruption in enumerate(("noise", "blur", "contrast", "occlusion", "shift"))
        for severity in range(1, 6)
    ]
    corrupted = sum(row["accuracy"] for row in conditions) / len(conditions)
    interval = None if increase is None else {"estimate": increase, "low": increase - 0.01, "high": increase + 0.01}
    return {
        "clean_accuracy": clean,
        "conditions": conditions,
        "corrupted_accuracy": corrupted,
        "robust_gap": clean - corrupted,
        "num_images": 1000,
        "gap_increase": interval,
    }


CONTENT = {
    "reference": FILES[0],
    "config": {},
    "files": {
        FILES[0]: measured(0.92, 0.01, None),
        FILES[1]: measured(0.9, 0.015, 0.045),
        FILES[2]: measured(0.89, 0.02, 0.09),
        FILES[3]: measured(0.88, 0.02, 0.09),
    },
}

DATA_TABLE = """{% macro data_table(t, caption='') %}<table>
{% for row in t.rows %}
<tr>{% for cell in row.cells %}<td>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
{% macro absent(what='This stage was not run.') %}<p class="absent">{{ what }}</p>{% endmacro %}
{% include 'part' %}"""
MD_TABLE = """{% macro md_table(t) %}{% for row in t.rows %}
| {% for cell in row.cells %}{{ cell.text }} | {% endfor %}{% endfor %}{% endmacro %}
{% include 'part' %}"""


def rendered(parent: str, part: str, facts: dict[str, Any]) -> str:
    loader = DictLoader({"page": parent, "part": (SECTIONS / part).read_text()})
    return (
        Environment(loader=loader, undefined=StrictUndefined, autoescape="html" in part)
        .get_template("page")
        .render(facts)
    )


def test_the_page_shows_every_file_with_its_gap_and_the_interval() -> None:
    page = rendered(DATA_TABLE, "robustness.html.jinja", section(CONTENT))
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert [row[0] for row in cells] == list(FILES)
    assert cells[0][1:] == ["92.00 %", "83.00 %", "+9.00", "+0.00", "reference", "shift (77.0 %)"]
    assert cells[2][3:6] == ["+18.00", "+9.00", "+8.00 to +10.00"]
    assert "noise, blur, contrast, occlusion, shift, in 5 strengths" in page
    assert page.count("<svg") == 1
    markdown = rendered(MD_TABLE, "robustness.md.jinja", section(CONTENT))
    assert "1000 corrupted test images" in markdown
    assert all(name in markdown for name in FILES)


@pytest.mark.parametrize("content", [None, {}, {"reference": "", "files": {}}])
def test_a_stage_that_was_not_run_says_so(content: dict[str, Any] | None) -> None:
    assert "Robustness was not run." in rendered(DATA_TABLE, "robustness.html.jinja", section(content))
    assert "Not run." in rendered(MD_TABLE, "robustness.md.jinja", section(content))


def test_the_reference_and_the_students_own_files_are_drawn() -> None:
    assert drawn_by_default(CONTENT["files"], FILES[0]) == list(FILES[:3])
    assert drawn_by_default({"student-0-dense.float32": {}, "student-12.int8": {}}, "x") == ["student-12.int8"]


def test_a_panel_per_corruption_starts_at_the_clean_accuracy_and_colours_are_the_pages() -> None:
    figure = accuracy_over_severity({name: CONTENT["files"][name] for name in FILES[:3]})
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_lines()]
    assert [axes.get_title(loc="left") for axes in panels] == ["noise", "blur", "contrast", "occlusion", "shift"]
    lines = [[np.array(line.get_xydata()) for line in axes.get_lines()] for axes in panels]
    for panel in lines:
        assert all(line[:, 0].tolist() == [0, 1, 2, 3, 4, 5] for line in panel)
        assert [round(line[0, 1]) for line in panel] == [92, 90, 89]
    assert lines[-1][2][5, 1] == pytest.approx(100 * (0.89 - 0.02 * 5 * 5))
    plot = section(CONTENT)["robustness_plot"]
    assert {"var(--s1)", "var(--s2)", "var(--s3)"} <= set(re.findall(r"var\(--s\d\)", plot))
    assert all(f">{text}<" in plot for text in ("noise", "occlusion", *FILES[:3]))
    assert section(CONTENT, shown=())["robustness_plot"] == ""
