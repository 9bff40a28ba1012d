"""The parity section: one table and one figure for each student's ladder, from ``ladder.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from export.comparison import NONE, NOT_RUN, show
from export.report.plots import INK, MARKS, MUTED, SERIES, SIZE, canvas, svg
from export.report.tables import PARITY, table, used_columns

SMALLEST = 1e-8
"""Where errors of 0 are drawn."""
NAMES_SHOWN = 14
LONGEST_NAME = 18
BADGES = {"ok": ("pass", "✓"), "exceeded": ("fail", "✕"), "not run": ("skipped", "–")}


def section(ladders: Sequence[Mapping[str, Any]], rungs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What the parity partials show.

    Args:
        ladders: Of ``ladder.json``, empty if there is none.
        rungs: Of ``parity.csv``, shown for runs without ladders.
    """
    return {
        "parity_ladders": [_ladder(ladder) for ladder in ladders],
        "parity_table": table(rungs, used_columns(PARITY, rungs)),
    }


def error_by_layer(ladder: Mapping[str, Any]) -> Figure | None:
    """Relative error over the layers in execution order, one line per hop; rings mark layers over their limit.

    Dashed lines are the limits of what one layer may add, in the colour of their hop.
    """
    hops = [rung for rung in ladder["rungs"] if rung.get("attribution") and rung["attribution"]["layers"]]
    if not hops:
        return None
    longest = max(hops, key=lambda rung: len(rung["attribution"]["layers"]))
    layers = [row["layer"] for row in longest["attribution"]["layers"]]
    places = {layer: place for place, layer in enumerate(layers)}
    with canvas((SIZE[0], 4.9)) as (figure, axes):
        for number, rung in enumerate(hops):
            found = rung["attribution"]
            rows = [row for row in found["layers"] if row["layer"] in places]
            x = [places[row["layer"]] for row in rows]
            y = [max(row["relative_error"], SMALLEST) for row in rows]
            colour, mark = SERIES[number % len(SERIES)], MARKS[number % len(MARKS)]
            label = _label(rung["name"], ladder)
            axes.plot(x, y, color=colour, marker=mark, markersize=3.5, linewidth=1.5, label=label)
            axes.axhline(found["limit"], color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
            for row in rows:
                if row["layer"] == found["first"]:
                    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": INK}
                    axes.plot([places[row["layer"]]], [max(row["relative_error"], SMALLEST)], "o", **ring)
        axes.set(ylabel="relative error (log scale)", yscale="log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
        step = -(-len(layers) // NAMES_SHOWN)
        names = [_short(layer) for layer in layers[::step]]
        axes.set_xticks(range(0, len(layers), step), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=8.5, labelcolor=MUTED)
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.5, columnspacing=1.2)
    return figure


def _ladder(ladder: Mapping[str, Any]) -> dict[str, Any]:
    figure = error_by_layer(ladder)
    student = str(ladder["student"])
    return {
        "student": student,
        "sentence": ladder["sentence"],
        "rungs": [_rung(rung, ladder) for rung in ladder["rungs"]],
        "plot": "" if figure is None else svg(figure, f"parity_{student}", f"relative error by layer of {student}"),
        "matched": next(
            (
                f"{found['matched']} of {found['reference_layers']} layers, by {found['matched_by']}"
                for rung in ladder["rungs"]
                if (found := rung.get("attribution"))
            ),
            "",
        ),
    }


def _rung(rung: Mapping[str, Any], ladder: Mapping[str, Any]) -> dict[str, Any]:
    parity = rung.get("parity") or {}
    tone, icon = BADGES[rung["outcome"]]
    found = rung.get("attribution")
    layer = (
        next((row for row in found["layers"] if row["layer"] == (found["first"] or found["worst"])), None)
        if found
        else None
    )
    lost = None
    if parity and rung.get("against"):
        lost = (parity["top1"] - parity["reference_top1"]) * 100
    missing = NOT_RUN if rung["outcome"] == "not run" else NONE
    return {
        "name": _label(rung["name"], ladder),
        "against": _label(rung["against"], ladder) if rung.get("against") else NONE,
        "outcome": rung["outcome"],
        "tone": tone,
        "icon": icon,
        "accuracy": show(parity.get("top1"), "share", NOT_RUN),
        "points": missing if lost is None else f"{lost:+.2f}",
        "flips": show(parity.get("flips"), "share", NOT_RUN),
        "kl": show(parity.get("kl"), "number", NOT_RUN),
        "max_abs": show(parity.get("max_abs"), "number", NOT_RUN),
        "mean_abs": show(parity.get("mean_abs"), "number", NOT_RUN),
        "floor": show(rung.get("floor"), "number", missing),
        "layer": f"{layer['layer']} ({layer['relative_error']:.2g}, {layer['input_error']:.2g} before)"
        if layer
        else missing,
        "words": [*rung["exceeded"], *([rung["note"]] if rung["note"] else [])],
    }


def _label(name: str, ladder: Mapping[str, Any]) -> str:
    return name.removeprefix(f"{ladder['student']}: ")


def _short(layer: str) -> str:
    """The end of a path tells layers apart."""
    return layer if len(layer) <= LONGEST_NAME else f"…{layer[-LONGEST_NAME + 1 :]}"
