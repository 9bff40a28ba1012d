"""The report's section on corrupted images: accuracy over severity per corruption, and what compression cost there.

Its source is ``robustness.json``, which the stage ``robustness`` writes:

    {"reference": file, "config": {...}, "files": {file: Robustness, ...}}

with :class:`compression.robustness.accuracy.Robustness` as JSON.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from export.comparison import Column
from export.report.plots import MARKS, SERIES, SIZE, canvas, svg
from export.report.tables import table

COLUMNS = (
    Column("file", "file", "the file that ran on the corrupted images"),
    Column("clean_accuracy", "clean", "share of correct answers on the same images uncorrupted", "share"),
    Column("corrupted_accuracy", "corrupted", "mean over all corruptions and severities", "share"),
    Column("robust_gap", "gap", "clean minus corrupted, in points", "points"),
    Column("increase", "gap vs reference", "how much wider the gap is than the reference's, in points", "points"),
    Column("interval", "95 % interval", "of that, paired over images", missing="reference"),
    Column("worst", "hardest", "the corruption with the lowest mean accuracy"),
)

FORMS = ("float32", "int8")
MOST = 5
"""Lines in a panel."""


def section(content: Mapping[str, Any] | None, shown: Sequence[str] | None = None) -> dict[str, Any]:
    """The variables of ``sections/robustness.html.jinja`` and its Markdown twin.

    Args:
        content: Of ``robustness.json``; None where the stage was not run.
        shown: Files to draw; the reference and the students' float32 and INT8 files by default. The table has all.
    """
    reference = (content or {}).get("reference", "")
    files = dict(sorted((content or {}).get("files", {}).items(), key=lambda file: file[0] != reference))
    if content is None or not files:
        return {"robustness_table": table([], COLUMNS), "robustness_plot": "", "robustness_facts": {}}
    names = [name for name in (drawn_by_default(files, reference) if shown is None else shown) if name in files]
    figure = accuracy_over_severity({name: files[name] for name in names})
    description = "accuracy over severity, one panel per corruption"
    conditions = files[reference]["conditions"] if reference in files else next(iter(files.values()))["conditions"]
    return {
        "robustness_table": table([_row(name, file) for name, file in files.items()], COLUMNS),
        "robustness_plot": "" if figure is None else svg(figure, "robustness", description),
        "robustness_facts": {
            "reference": reference,
            "images": next(iter(files.values()))["num_images"],
            "corruptions": list(dict.fromkeys(row["corruption"] for row in conditions)),
            "severities": len({row["severity"] for row in conditions}),
        },
    }


def drawn_by_default(files: Mapping[str, Any], reference: str) -> list[str]:
    """The reference, then the students' own float32 and INT8 files; no control arms."""
    wanted = [
        name
        for name in files
        for student, _, form in [name.rpartition(".")]
        if form in FORMS and student.startswith("student-") and student.removeprefix("student-").isdigit()
    ]
    return [name for name in (reference, *wanted) if name in files][:MOST]


def accuracy_over_severity(files: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """A panel per corruption, a line per file: accuracy (%) from clean (severity 0) to the strongest.

    Args:
        files: Name -> ``Robustness`` as JSON.
    """
    corruptions = list(dict.fromkeys(row["corruption"] for file in files.values() for row in file["conditions"]))
    if not corruptions:
        return None
    rows = math.ceil((len(corruptions) + 1) / 2)  # one place is the legend's
    with canvas((SIZE[0], 0.35 + 1.75 * rows)) as (figure, first):
        first.remove()
        panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten().tolist()
        for panel, corruption in zip(panels, corruptions, strict=False):
            severity: list[int] = []
            for i, file in enumerate(files.values()):
                severity, accuracy = _line(file, corruption)
                panel.plot(severity, accuracy, color=SERIES[i % 7], marker=MARKS[i % 7], markersize=4.5, linewidth=1.6)
            panel.set_title(corruption, fontsize=10.5, loc="left")
            panel.set_xticks(severity)
            panel.tick_params(labelbottom=True)
        for panel in panels[len(corruptions) :]:
            panel.axis("off")
        panels[len(corruptions)].legend(panels[0].get_lines(), list(files), loc="center", fontsize=9.5)
        figure.supxlabel("severity, 0 is clean", fontsize=10.5)
        figure.supylabel("accuracy (%)", fontsize=10.5)
    return figure


def _line(file: Mapping[str, Any], corruption: str) -> tuple[list[int], list[float]]:
    points = {row["severity"]: row["accuracy"] for row in file["conditions"] if row["corruption"] == corruption}
    points |= {0: file["clean_accuracy"]}
    return sorted(points), [100 * points[severity] for severity in sorted(points)]


def _row(name: str, file: Mapping[str, Any]) -> dict[str, Any]:
    increase = file.get("gap_increase")
    return {
        "file": name,
        "clean_accuracy": file["clean_accuracy"],
        "corrupted_accuracy": file["corrupted_accuracy"],
        "robust_gap": file["robust_gap"],
        "increase": increase["estimate"] if increase else 0.0,
        "interval": f"{100 * increase['low']:+.2f} to {100 * increase['high']:+.2f}" if increase else None,
        "worst": _worst(file["conditions"]),
    }


def _worst(conditions: Sequence[Mapping[str, Any]]) -> str:
    accuracies: dict[str, list[float]] = {}
    for row in conditions:
        accuracies.setdefault(row["corruption"], []).append(row["accuracy"])
    means = {corruption: sum(values) / len(values) for corruption, values in accuracies.items()}
    worst = min(means, key=means.__getitem__)
    return f"{worst} ({100 * means[worst]:.1f} %)"
