import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compression.errors import ArtifactError
from export.comparison import COLUMNS, show
from export.report import figures_cost, plots
from export.report.page import build_report, shipped_row
from export.report.run_folder import open_run
from tests.export.made_up_run import evidence, make_run


class _Tags(HTMLParser):
    """Collects tags, ids and every attribute that could load something from elsewhere."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.outside, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.outside += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith(("#", "data:"))
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("report"))
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text()


def test_the_page_is_well_formed_and_loads_nothing_from_outside(html):
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.outside == []
    assert tags.tags.count("script") == 2, "the rows as JSON, and what filters them"
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\b", html)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert len(tags.ids) == len(set(tags.ids)), "ids of inlined plots must not clash"
    assert tags.tags.count("svg") == 11


def test_every_section_is_there_and_filled(html):
    sections = "pipeline gate comparison search training gains cost latency diagnosis parity sensitivity calibration"
    for section in f"{sections} robustness attention teachers".split():
        assert f'<section id="{section}">' in html
    assert "was not run" not in html
    assert "was not measured.</p>" not in html
    assert "It all fits." in html
    assert "flips 9 %" in html


def test_the_banner_and_the_key_numbers_say_what_was_decided(html):
    text = re.sub(r"<[^>]+>", " ", html)
    assert "Accepted" in text
    assert "student-float32" in text
    assert "12× less" in text
    assert "-2.48 points" in text
    assert "cached" in text


def test_the_reasons_say_why_the_smaller_format_did_not_ship(html):
    assert "is not faster than &#39;student-float32&#39;" in html
    assert "78% of the weight layers" in html
    assert "without VNNI" in html
    assert "The net is tiny" in html


def test_what_was_built_and_not_run_is_never_called_passed(html, run):
    assert html.count("built, not run here") >= 2
    row = next(line for line in (run / "report.md").read_text().splitlines() if "SM89.engine" in line and "|" in line)
    assert "not measured" in row


def test_plots_take_their_colours_from_the_page(html):
    plots = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    for plot in plots:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", plot))
        assert not colours, f"fixed colours are invisible in one of the schemes: {colours}"
        assert "var(--" in plot
        assert "<text" in plot


def test_distance_from_the_teachers_is_drawn_for_students_that_have_one():
    rows = [{"epoch": n, "teacher_kl": 1.0 - 0.1 * n, "validation_nll": 0.5 + 0.1 * n} for n in range(4)]
    alarmed = [row | {"hacking_u_shape": float(n == 3), "hacking_power_law": 0.0} for n, row in enumerate(rows)]
    figure = plots.teacher_hacking({"student": alarmed, "control": [{"epoch": 0, "validation_nll": 0.4}] * 4})
    assert figure is not None
    axes = figure.axes[0]
    path, rings = axes.lines
    assert path.get_label() == "student"
    assert list(path.get_xdata()) == [row["teacher_kl"] for row in rows]
    assert list(path.get_ydata()) == [row["validation_nll"] for row in rows]
    assert list(rings.get_xdata()) == [rows[3]["teacher_kl"]]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert plots.teacher_hacking({"control": [{"epoch": 0, "validation_nll": 0.4}] * 4, "short": rows[:1]}) is None


def test_user_text_is_escaped(html):
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


def test_no_text_of_a_row_can_end_the_json_of_the_page(tmp_path):
    (tmp_path / "comparison.csv").write_text('id,role,accuracy\n"</script><script>alert(1)</script>",student,0.5\n')
    page = build_report(tmp_path).read_text()
    assert "<script>alert" not in page
    assert embedded(page)["rows"] == [{"id": "</script><script>alert(1)</script>", "role": "student", "accuracy": 0.5}]


def embedded(html):
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


def test_the_page_holds_every_number_of_the_comparison_as_it_was_measured(html, run):
    rows = open_run(run).comparison
    shown = embedded(html)
    assert shown["rows"] == [{key: value for key, value in row.items() if value is not None} for row in rows]
    columns = {column.name: column for column in COLUMNS}
    (table,) = re.findall(r'aria-label="comparison">.*?<tbody>(.*?)</tbody>', html, flags=re.DOTALL)
    lines = [
        re.findall(r"<td[^>]*>(.*?)</td>", unescape(line))
        for line in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
    ]
    used = [columns[column["name"]] for column in shown["columns"]]
    assert lines == [[show(row[c.name], c.kind, c.missing) for c in used] for row in rows]


def test_the_plots_show_the_champion_and_the_knee(html, run):
    assert embedded(html)["marks"] == [
        {"label": "champion, version 4", "accuracy": 0.8951, "latency_p50_ms": time, "batch": batch}
        for batch, time in ((1, 0.07), (32, 1.4))
    ]
    trials = [
        {"latency_p50_ms": 0.1 * n, "accuracy": 0.8 + 0.01 * n, "on_front": True, "knee": n == 2} for n in (1, 2, 3)
    ]
    champion = {"id": "champion, version 4", "accuracy": 0.9, "latency_p50_ms": 0.2, "champion": True}
    axes = plots.pareto(trials, [champion]).axes[0]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([0.2], [90.0])
    (ring,) = [drawn for drawn in axes.collections if drawn.get_label() == "knee"]
    assert ring.get_offsets().tolist() == [[0.2, 82.0]]


def test_markdown_has_the_same_verdict_and_well_formed_tables(run):
    text = (run / "report.md").read_text()
    assert text.startswith("# edge-classifier / 20261120-021500-3f9c: Accepted")
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) >= 6
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_two_builds_give_the_same_bytes(run):
    before = (run / "report.html").read_bytes()
    build_report(run)
    assert (run / "report.html").read_bytes() == before


def test_an_empty_run_folder_reads_not_run_everywhere(tmp_path):
    page = build_report(tmp_path).read_text()
    tags = _Tags()
    tags.feed(page)
    assert tags.tags.count("svg") == 0
    assert "Not judged" in page
    assert page.count("not measured") >= 4
    assert page.count("not run") >= 5
    assert "Not run." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "pareto.png").exists()


FILES = sorted(
    (
        "env.json lineage.json verdict.json comparison.csv teachers.csv selection.json trials.csv histories.json "
        "parity.csv latency.json latency_raw.csv reliability.json champion.json data.json " + " ".join(evidence())
    ).split()
)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_leaves_the_others_readable(tmp_path, run, name):
    shutil.copytree(run, tmp_path / "copy")
    whole = open_run(tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(b"{broken \xff")
    broken = open_run(tmp_path / "copy")
    assert [problem.split(":")[0] for problem in broken.problems] == [name]
    fields = [f for f in vars(whole) if f not in ("path", "problems")]
    assert sum(str(getattr(whole, f)) != str(getattr(broken, f)) for f in fields) == 1


def test_a_run_whose_files_are_all_broken_still_gets_a_page_that_names_them(tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes(b"{broken \xff")
    page = build_report(tmp_path).read_text()
    for name in FILES:
        assert f"Could not be read: {name}" in page


def test_a_missing_run_folder_says_what_was_expected(tmp_path):
    with pytest.raises(ArtifactError, match="expected runs/<recipe>/<run-id>"):
        build_report(tmp_path / "nowhere")


LINEAGE = [
    {"stage": stage, "name": name, "key": key, "cached": cached, "seconds": seconds, "cpu_seconds": cpu,
     "energy_j": energy, "inputs": inputs, "output": output}
    for stage, name, key, cached, seconds, cpu, energy, inputs, output in (
        ("data", "digits", "k1", True, 1.0, 0.9, 5.0, [], "d1"),
        ("teacher", "residual", "k2", True, 100.0, 180.0, 900.0, ["d1"], "t1"),
        ("search", "study", "k3", False, 20.0, 30.0, None, ["d1", "t1"], "s1"),
        ("distill", "student-0", "k4", False, 10.0, 12.0, 80.0, ["s1", "t1"], "m1"),
        ("distill", "student-0-control", "k5", False, 6.0, 7.0, 40.0, ["s1"], "m2"),
        ("quantize", "student-0", "k6", False, 4.0, 4.5, 20.0, ["m1"], "q1"),
        ("export", "student-0.float32", "k7", False, 2.0, 2.0, 9.0, ["m1"], "f1"),
        ("export", "student-0-control.float32", "k8", False, 2.0, 2.0, 9.0, ["m2"], "f2"),
        ("export", "student-0.int8", "k9", False, 1.0, 1.0, 4.0, ["q1"], "f3"),
    )
]  # fmt: skip


def test_a_file_costs_what_all_it_descends_from_cost_each_counted_once():
    found = figures_cost.costs(LINEAGE, ["student-0.float32", "student-0.int8", "unknown"])
    assert set(found) == {"student-0.float32", "student-0.int8"}
    assert found["student-0.float32"] == {
        "stages": 5, "seconds": 133.0, "cpu_seconds": pytest.approx(224.9), "energy_j": None, "spent": 32.0
    }  # fmt: skip
    assert found["student-0.int8"]["seconds"] == 136.0


def test_a_gain_stands_beside_the_stages_its_control_does_without():
    rows = [
        {"id": "student-0.float32", "control": "student-0-control.float32", "accuracy": 0.9, "seconds": 10.0},
        {"id": "student-0-control.float32", "accuracy": 0.88, "seconds": 6.0},
    ]
    (gain,) = figures_cost.gains(LINEAGE, rows)
    assert gain["gain"] == pytest.approx(0.02)
    assert (gain["seconds"], gain["cpu_seconds"], gain["energy_j"]) == (12.0, 14.0, 89.0)
    (gain,) = figures_cost.gains([], rows)
    assert gain["seconds"] == 4.0


def test_the_ledger_tells_what_was_spent_from_what_was_kept():
    cost = figures_cost.section(LINEAGE, [{"id": "student-0.float32"}])["cost"]
    assert (cost["spent"]["seconds"], cost["spent"]["cpu_seconds"]) == ("45 s", "58 s")
    assert cost["spent"]["energy_j"] == "not measured", "a part of it would look like all"
    assert cost["saved"] == {"seconds": "101 s", "cpu_seconds": "181 s", "energy_j": "905 J"}
    assert [bar["stage"] for bar in cost["bars"]][:2] == ["teacher", "search"]
    assert sum(bar["share"] for bar in cost["bars"]) == pytest.approx(1.0)
    teacher = cost["bars"][0]
    assert (teacher["ran_width"], teacher["kept_width"]) == (0.0, 1.0)
    kept = cost["stages"]["rows"][1]["cells"]
    assert [cell["text"] for cell in kept] == ["teacher", "residual", "kept", "100 s", "180 s", "900 J", "0.0 s"]


def test_pareto_png_is_an_image(run):
    assert (run / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_shipped_file_the_best_student_is_shown():
    rows = [
        {"id": "a", "role": "student", "accuracy": 0.8, "batch": 1},
        {"id": "b", "role": "file", "accuracy": 0.9, "batch": 32},
        {"id": "b", "role": "file", "accuracy": 0.9, "batch": 1},
        {"id": "c", "role": "control", "accuracy": 0.95, "batch": 1},
    ]
    assert shipped_row(rows) == rows[2]
