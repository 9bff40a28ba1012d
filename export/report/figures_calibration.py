"""The report's section about calibration: what a temperature does to every file, measured on the test split.

``calibration.json`` of a run holds ``teacher`` (name of the file that is the reference), ``class_names``, and
``files``: name -> a ``CalibratedRow`` of :mod:`compression.calibration`.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from export.comparison import Column, is_missing, show
from export.report.plots import INK, MUTED, SERIES, SIZE, canvas
from export.report.tables import table

COLUMNS = (
    Column("id", "file", "what was run on the test split"),
    Column(
        "temperature",
        "T",
        "what the logits are divided by; fitted on the calibration split",
        "number",
        missing="not fitted",
    ),
    Column("where", "divided by", "the graph itself, or whoever reads its logits", missing="nobody"),
    Column("ece", "ECE", "calibration error over 15 bins of equal width, before → after division", "number"),
    Column("ece_adaptive", "adaptive ECE", "the same over 15 bins of equally many images", "number"),
    Column("ece_classwise", "classwise ECE", "error of every class probability, mean over classes", "number"),
    Column("nll", "NLL", "negative log-likelihood, nats, before → after division", "number"),
    Column("brier", "Brier", "squared error of the probabilities, before → after division", "number"),
    Column("worst", "worst class", "lowest accuracy of a class; division does not change it", "number"),
    Column(
        "drop",
        "largest drop",
        "points of accuracy lost to the teacher on the class that loses most",
        "number",
        missing="reference",
    ),
)


def section(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """What ``sections/calibration.*.jinja`` show besides the plots; of an empty mapping, nothing."""
    files: Mapping[str, Mapping[str, Any]] = calibration.get("files", {})
    names = list(calibration.get("class_names", ()))
    teacher = calibration.get("teacher")
    reference = files.get(teacher, {}).get("per_class") if teacher is not None else None
    rows = [
        _row(name, row, names, None if name == teacher else reference, is_reference=name == teacher)
        for name, row in files.items()
    ]
    fitted = any(row.get("after") for row in files.values())
    return {"calibration": {"table": table(rows, COLUMNS), "fitted": fitted, "teacher": teacher}}


def figures(calibration: Mapping[str, Any]) -> dict[str, tuple[Figure | None, str]]:
    """Plot name -> figure and its description; none where nothing was measured."""
    return {"ece": (ece_change(calibration), "calibration error of every file before and after its temperature")}


def ece_change(calibration: Mapping[str, Any]) -> Figure | None:
    """One line per file from its calibration error as it answers (ring) to the one after division (dot)."""
    files: Mapping[str, Mapping[str, Any]] = calibration.get("files", {})
    drawn = {name: row for name, row in files.items() if not is_missing(row["before"].get("ece"))}
    if not drawn:
        return None
    names = list(drawn)[::-1]
    before = [drawn[name]["before"]["ece"] for name in names]
    after = {place: drawn[name]["after"]["ece"] for place, name in enumerate(names) if drawn[name].get("after")}
    with canvas((SIZE[0], 1.35 + 0.3 * len(names))) as (figure, axes):
        for place, value in after.items():
            axes.plot([before[place], value], [place, place], color=MUTED, linewidth=1.4, zorder=1)
        places = range(len(names))
        axes.scatter(before, places, s=46, facecolors="none", edgecolors=SERIES[1], linewidths=1.6, label="undivided")
        if after:
            axes.scatter(list(after.values()), list(after), s=34, color=SERIES[2], label="divided by T", zorder=3)
        axes.set_yticks(list(places), names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="expected calibration error", ylim=(-0.6, len(names) - 0.4))
        axes.set_xlim(left=0, right=1.08 * max([*before, *after.values(), 1e-3]))
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.3, columnspacing=1.2)
    return figure


def _row(
    name: str, row: Mapping[str, Any], classes: list[str], reference: list[float | None] | None, *, is_reference: bool
) -> dict[str, Any]:
    before, after = row["before"], row.get("after") or {}
    accuracies = dict(enumerate(row.get("per_class", ())))
    measured = {place: value for place, value in accuracies.items() if value is not None}
    worst = min(measured, key=lambda place: measured[place], default=None)

    def named(place: int) -> str:
        return classes[place] if place < len(classes) else f"class {place}"

    def change(key: str) -> str | None:
        first, then = before.get(key), after.get(key)
        if is_missing(first):
            return None
        return f"{first:.3f}" if is_missing(then) else f"{first:.3f} → {then:.3f}"

    drop = None
    if not is_reference:
        lost = {
            place: taught - measured[place]
            for place, taught in enumerate(reference or ())
            if taught is not None and place in measured
        }
        most = max(lost, key=lambda place: lost[place], default=None)
        drop = "not measured" if most is None else f"{show(lost[most], 'points')} ({named(most)})"
    return {
        "id": name,
        "temperature": row.get("temperature"),
        "where": None if is_missing(row.get("temperature")) else "the graph" if row.get("applied") else "the reader",
        **{key: change(key) for key in ("ece", "ece_adaptive", "ece_classwise", "nll", "brier")},
        "worst": None if worst is None else f"{show(measured[worst], 'share')} ({named(worst)})",
        "drop": drop,
    }
