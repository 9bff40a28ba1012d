import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.calibration import calibrated_rows
from compression.errors import ArtifactError
from compression.statistics import Interval
from export.benchmark import BenchmarkJob, summarize
from export.comparison import write_comparison
from export.evidence import Evidence
from export.gate import Policy
from export.ladder import Ladder
from export.latency import AGAIN
from export.parity import ENGINE_NOT_RUN, Rung, compare
from export.report import plots
from export.report.page import build_report, shipped_row
from export.report.run_folder import open_run
from export.runtime import cpu_features
from export.shipping import choose_shipped
from export.verdict import combine

MODELS = {
    "teacher-resnet": (1.0, 0.9221, 16_300_000, 746_000, 181_658),
    "teacher-convnext": (0.64, 0.8933, 5_700_000, 420_000, 96_000),
    "scratch-float32": (0.157, 0.8912, 1_399_424, 131_000, 28_410),
    "student-float32": (0.155, 0.8973, 1_399_424, 131_000, 28_410),
    "student-int8": (0.148, 0.8969, 1_399_424, 67_000, 28_410),
}


def make_run(root: Path) -> Path:
    """A run folder as a real run on clothing images leaves it, with made-up numbers."""
    run = root / "runs" / "edge-classifier" / "20261120-021500-3f9c"
    run.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = {}
    for name, (_, _, _, size, _) in MODELS.items():
        files[name] = root / f"{name}.onnx"
        files[name].write_bytes(b"\0" * size)
    job = BenchmarkJob(models=files, reference="teacher-resnet", rounds=30)
    samples, raw = {}, []
    for batch, base in ((1, 0.38), (32, 8.8)):
        mood = 1 + 0.06 * rng.random(30)
        for order, name in enumerate((*MODELS, "teacher-resnet" + AGAIN)):
            ratio = MODELS[name.removesuffix(AGAIN)][0]
            rounds = [m * base * ratio * (1 + 0.03 * rng.standard_gamma(1.0, 8)) for m in mood]
            samples[name, batch] = rounds
            raw += [(batch, t, order, name, ms) for t, times in enumerate(rounds) for ms in times]
    result = summarize(
        job,
        samples,
        memory={
            name: {"load_ms": 9.5, "first_inference_ms": 1.2, "peak_rss_bytes": 61e6, "model_rss_bytes": 6e6}
            for name in MODELS
        },
    )
    environment = {"cpu": "AMD EPYC", "isa": ["avx2"], "threads": 1, "onnxruntime": "1.31.1"}
    result = result.model_copy(update={"environment": environment})
    (run / "latency.json").write_text(result.model_dump_json())
    _write(run / "latency_raw.csv", ("batch", "round", "order", "model", "ms"), raw)

    files_evidence = [
        Evidence(
            target="cpu",
            candidate=name,
            precision=precision,
            num_samples=10_000,
            num_classes=10,
            accuracy=MODELS[name][1],
            teacher_accuracy=0.9221,
            accuracy_drop=Interval(estimate=drop, low=drop - 0.004, high=drop + 0.004, level=0.95),
            mcnemar_p=0.0001,
            worst_class_drop=Interval(estimate=0.041, low=0.012, high=0.068, level=0.95),
            ece=0.0134,
            teacher_ece=0.0121,
            flips=flips,
            parent="teacher-resnet",
            latency_ratio=Interval(
                estimate=MODELS[name][0], low=MODELS[name][0] * 0.98, high=MODELS[name][0] * 1.02, level=0.95
            ),
            latency_noise_floor=0.06,
            latency_p50_ms=0.38 * MODELS[name][0],
            latency_p95_ms=Interval(estimate=0.066, low=0.063, high=0.071, level=0.95),
            size_bytes=MODELS[name][3],
            peak_rss_bytes=61_000_000,
            integer_share=share,
            vnni=False,
            num_nodes=nodes,
        )
        for name, precision, drop, flips, share, nodes in (
            ("student-float32", "float32", 0.0248, 0.0, None, 24),
            ("student-int8", "int8", 0.0252, 0.004, 0.78, 41),
        )
    ]
    policy = Policy(max_accuracy_drop=0.03, max_worst_class_drop=0.08, max_latency_p95_ms=0.1, max_size_kib=256)
    engine = Evidence(
        target="rtx", candidate="student-int8-SM89.engine", precision="int8", ran=False, size_bytes=200_000
    )
    verdict = combine({"cpu": choose_shipped(policy, files_evidence), "rtx": choose_shipped(policy, [engine])})
    (run / "verdict.json").write_text(verdict.model_dump_json(indent=2))

    rows = []
    for name, (_, accuracy, macs, size, params) in MODELS.items():
        role = name.split("-")[0]
        for batch in (1, 32):
            timing = result.row(name, batch)
            rows.append(
                {
                    "id": name,
                    "role": {"scratch": "control", "student": "file"}.get(role, role),
                    "parent": None if role == "teacher" else "teacher-resnet",
                    "control": {"student-float32": "scratch-float32", "student-int8": "student-float32"}.get(name),
                    "stages": "search > distil > quantize > export" if role == "student" else None,
                    "accuracy": accuracy,
                    "delta_teacher": None if name == "teacher-resnet" else accuracy - 0.9221,
                    "ece": 0.0121 if role == "teacher" else 0.0134,
                    "nll": 0.2891,
                    "params": params,
                    "macs": macs,
                    "size_bytes": size,
                    "precision": "int8" if name.endswith("int8") else "float32",
                    "runtime": "onnxruntime 1.31.1",
                    "threads": 1,
                    "batch": batch,
                    "latency_p50_ms": timing.latency_p50_ms,
                    "latency_p95_ms": timing.latency_p95_ms,
                    "ratio_to_reference": timing.ratio_to_reference,
                    "seconds": {"student-float32": 104.0, "scratch-float32": 89.0, "student-int8": 131.0}.get(name),
                    "pareto": name in ("teacher-resnet", "student-float32", "student-int8"),
                    "verdict": "ships" if name == "student-float32" else None,
                    "status": "measured",
                }
            )
    rows.append({"id": "student-int8-SM89.engine", "role": "file", "precision": "int8", "size_bytes": 200_000,
                 "runtime": "tensorrt_rtx 1.7.1", "status": "built, not run here"})  # fmt: skip
    write_comparison(rows, run / "comparison.csv")

    trials = []
    for number in range(24):
        latency = float(0.045 + 0.2 * rng.random())
        accuracy = 0.84 + 0.07 * (1 - np.exp(-latency * 14)) - 0.012 * rng.random()
        state = "infeasible" if number % 9 == 8 else "complete"
        trials.append([number, "scale-plain_cnn", '{"width": 0.5}', state, "", accuracy, latency, 131_000, False])
    front, best = set(), 0.0
    for row in sorted(trials, key=lambda r: r[6]):
        if row[3] == "complete" and row[5] > best:
            best = row[5]
            front.add(row[0])
    for row in trials:
        row[8] = row[0] in front
        if row[3] == "infeasible":
            row[5:7] = [None, None]
    header = "number space choices state reason accuracy latency_p50_ms size_bytes on_front".split()
    _write(run / "trials.csv", header, trials)

    def history(top: float, epochs: int, start: float) -> list[dict[str, float]]:
        return [
            {
                "epoch": epoch,
                "loss": start * 0.7**epoch + 0.3,
                "validation_accuracy": top - 0.12 * 0.55**epoch,
                "validation_nll": 0.3,
                "seconds": 18.2,
            }
            for epoch in range(epochs)
        ]

    distilled = history(0.899, 5, 1.6)
    for row, (kl, nll) in zip(distilled, ((0.9, 0.8), (0.5, 0.5), (0.3, 0.4), (0.2, 0.42), (0.1, 0.5)), strict=True):
        row |= {"teacher_kl": kl, "validation_nll": nll, "hacking_u_shape": float(nll == 0.5 and kl < 0.2)}
    histories = {
        "teacher-resnet": history(0.924, 7, 1.1),
        "student distilled": distilled,
        "student from scratch": history(0.892, 5, 1.5),
        "quantization-aware": history(0.898, 2, 0.5),
    }
    (run / "histories.json").write_text(json.dumps(histories))
    bins = np.linspace(0.25, 0.98, 9)
    reliability = {
        name: [[c, float(c + shift * (1 - c)), int(40 * np.exp(4 * c))] for c in bins]
        for name, shift in (("teacher-resnet", -0.12), ("student-float32", -0.2), ("student-int8", -0.17))
    }
    (run / "reliability.json").write_text(json.dumps(reliability))
    ladder = [
        ("torch float32", None, "measured", 0.8973, None, None, None, 0.00002, ""),
        ("onnx float32", "torch float32", "measured", 0.8973, 0.0, 1.2e-9, 4.8e-6, 0.00002, ""),
        ("torch fake-quantized", "torch float32", "measured", 0.8971, 0.006, 0.0021, 0.31, 0.04, ""),
        ("onnx int8", "torch fake-quantized", "measured", 0.8969, 0.004, 0.0004, 0.074, 0.04, ""),
        ("engine int8 SM89", "onnx int8", "built, not run here", None, None, None, None, None, "no GPU here"),
    ]
    header = "name against status top1 flips kl max_abs floor note".split()
    _write(run / "parity.csv", header, ladder)
    _write(
        run / "teachers.csv",
        "name accuracy nll ece params macs size_bytes latency_p50_ms".split(),
        [
            ("teacher-resnet", 0.9221, 0.221, 0.0121, 181_658, 16_300_000, 746_000, 0.38),
            ("teacher-convnext", 0.8933, 0.301, 0.0182, 96_000, 5_700_000, 420_000, 0.243),
        ],
    )
    selection = {
        "rank_by": "nll",
        "scores": {
            "nll": {"teacher-resnet": -0.221, "teacher-convnext": -0.301},
            "tmi": {"teacher-resnet": 1.93, "teacher-convnext": 1.71},
        },
        "ranks": {
            "nll": {"teacher-resnet": 1, "teacher-convnext": 2},
            "tmi": {"teacher-resnet": 1, "teacher-convnext": 2},
        },
        "panel": ["teacher-resnet"],
    }
    (run / "selection.json").write_text(json.dumps(selection))
    lineage = [
        {"stage": stage, "name": name, "key": f"{i:02d}9ab3c41d77e0", "cached": cached, "seconds": seconds,
         "inputs": [], "output": f"{i:02d}c0ffee12345678", "mlflow_run_id": f"run{i:02d}aa55"}
        for i, (stage, name, cached, seconds) in enumerate(
            (
                ("data", "fashion_mnist", True, 1.8), ("teachers", "resnet", True, 0.4),
                ("teachers", "convnext", True, 0.4), ("teacher outputs", "resnet", True, 0.2),
                ("selection", "panel", False, 0.9), ("search", "24 trials", False, 212.0),
                ("distil", "student", False, 104.0), ("distil", "scratch control", False, 89.0),
                ("quantize", "int8", False, 27.3), ("export", "cpu", False, 14.1), ("export", "rtx", False, 1.9),
                ("evaluate", "benchmark", False, 48.6), ("gate", "policy", False, 0.1),
            )
        )
    ]  # fmt: skip
    (run / "lineage.json").write_text(json.dumps(lineage))
    env = {"run_id": run.name, "seed": 0, "git": "3f9c2a1", "cpu": "AMD EPYC", "packages": {"torch": "2.14.1"}}
    (run / "env.json").write_text(json.dumps(env))
    for name, content in evidence().items():
        (run / name).write_text(json.dumps(content))
    (run / "recipe.resolved.yaml").write_text("name: edge-classifier\nseed: 0\n# <script>alert(1)</script>\n")
    return run


def evidence() -> dict[str, object]:
    """The smallest files behind the sections that say what was lost, and why."""
    labels = torch.arange(40) % 4
    logits = {name: 3 * torch.eye(4)[labels] + 0.1 * i for i, name in enumerate(("teacher-resnet", "student-int8"))}
    parity = compare(logits["teacher-resnet"], logits["student-int8"], labels)
    rungs = [
        Rung(name="student: torch float32", against=None, parity=parity),
        Rung(name="student: ONNX INT8 u8", against="student: torch float32", parity=parity, exceeded=("flips 9 %",)),
        Rung(name="engine int8 SM89", against=None, parity=None, status=ENGINE_NOT_RUN, note="no GPU here"),
    ]
    rows = calibrated_rows(logits, labels, {"student-int8": (1.5, False)})
    layers = [{"layer": "stem.0", "format": f, "kl": 0.1, "flips": 0.0, "accuracy_drop": 0.0} for f in ("int8", "w4")]
    seen = {
        "clean_accuracy": 0.9,
        "corrupted_accuracy": 0.5,
        "robust_gap": 0.4,
        "num_images": 40,
        "conditions": [{"corruption": "noise", "severity": severity, "accuracy": 0.6} for severity in (1, 2)],
    }
    agreed = {"pearson": 0.9, "spearman": 0.9, "iou": 0.7, "images": 8, "skipped": 0}
    return {
        "ladder.json": [Ladder(student="student", sentence="It all fits.", rungs=tuple(rungs)).model_dump(mode="json")],
        "diagnosis.json": {"reference": "teacher-resnet", "cpu": cpu_features().model_dump(), "files": {}},
        "sensitivity.json": {
            "student": {
                "table": {"rows": layers, "num_samples": 40, "accuracy": 0.9},
                "keep_float": [],
                "control": None,
            }
        },
        "calibration.json": {
            "teacher": "teacher-resnet",
            "class_names": list("abcd"),
            "files": {name: row.model_dump(mode="json") for name, row in rows.items()},
        },
        "robustness.json": {"reference": "teacher-resnet", "files": {"teacher-resnet": seen, "student-int8": seen}},
        "attention.json": {
            "teacher": "resnet",
            "rows": [{"model": "student", "method": "grad_cam", "against": "teacher", **agreed}],
            "failures": {},
            "pictures": [],
        },
    }


def _write(path: Path, header, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


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
    assert "script" not in tags.tags
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert len(tags.ids) == len(set(tags.ids)), "ids of inlined plots must not clash"
    assert tags.tags.count("svg") == 11


def test_every_section_is_there_and_filled(html):
    sections = "pipeline gate comparison search training gains latency diagnosis parity sensitivity calibration"
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
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


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
        "parity.csv latency.json latency_raw.csv reliability.json " + " ".join(evidence())
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
