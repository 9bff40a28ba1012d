"""The section on layers: a heat map of what each costs, and what accuracy control tried.

Its source is ``sensitivity.json`` of a run folder, by name of the model:

    {name: {"table": Sensitivity, "keep_float": [pattern, ...], "control": Reverted.record(...) or null}, ...}

with :class:`compression.quantize.sensitivity.Sensitivity` as JSON, which the stage ``sensitivity`` writes. ``table`` is
null where only accuracy control is known; ``keep_float`` and ``control`` are facts of the quantize stage.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from export.comparison import Column, show
from export.report.plots import PAPER, SCREEN, SIZE, Palette, canvas, svg
from export.report.tables import Cells, table

SMALLEST = 1e-8
"""Divergences below it, 0 among them, have the palest cell."""
PALEST, DARKEST = 0.05, 0.55
"""Opacity of a cell: the numbers stay readable on the darkest one, in both colour schemes."""
MOST = 36
"""Layers drawn; of a deeper network those with the largest divergences."""
LONGEST_NAME = 17
MARK = "◆"
NOT_PRUNED = "not pruned"
SHORT = {"int8 activations": "int8\nactiv.", "half the channels": "half the\nchannels"}
"""Heads that are too wide for their cells."""

STEPS = (
    Column("layer", "layer", "the layer that was tried"),
    Column("to", "put to", "back to float, or given back to INT8"),
    Column("drop_before", "drop before", "accuracy INT8 cost until then, in points", "points"),
    Column("drop_after", "drop after", "accuracy it would cost with this layer changed, in points", "points"),
    Column("kept", "kept", "whether the change stayed"),
)


def section(content: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables of ``sections/sensitivity.html.jinja`` and its Markdown twin, from ``sensitivity.json``."""
    return {"sensitivity_models": [_model(name, facts) for name, facts in (content or {}).items()]}


def save_heat_maps(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``sensitivity-<model>.png`` on white for every model of ``sensitivity.json`` that has a table."""
    import matplotlib as mpl

    for name, facts in content.items():
        rows = (facts.get("table") or {}).get("rows", [])
        figure = heat_map(rows, facts.get("keep_float") or [], palette=PAPER)
        if figure is not None:
            with mpl.rc_context(PAPER.style()):
                figure.savefig(folder / f"sensitivity-{name}.png", dpi=150, facecolor="white")


def heat_map(
    rows: Sequence[Mapping[str, Any]], keep_float: Sequence[str] = (), *, palette: Palette = SCREEN
) -> Figure | None:
    """Layers down, in the order they run, formats across: the colour is log10 of the KL that the cell shows.

    Args:
        rows: Of a table, with ``layer``, ``format`` and ``kl``.
        keep_float: Patterns of layers that stay in float; they are marked.
        palette: The page's colours, or those of a picture on white.
    """
    values = {(row["layer"], row["format"]): float(row["kl"]) for row in rows}
    if not values:
        return None
    formats = list(dict.fromkeys(row["format"] for row in rows))
    layers = drawn_layers(rows)
    logs = {cell: math.log10(max(value, SMALLEST)) for cell, value in values.items() if cell[0] in layers}
    low, high = min(logs.values()), max(logs.values())
    with canvas((SIZE[0], 0.75 + 0.28 * len(layers)), palette=palette) as (figure, axes):
        for place, layer in enumerate(layers):
            for column, format in enumerate(formats):
                if (value := values.get((layer, format))) is None:
                    axes.text(column, place, "–", ha="center", va="center", color=palette.muted, fontsize=10.5)
                    continue
                share = (logs[layer, format] - low) / (high - low) if high > low else 0.0
                axes.add_patch(
                    Rectangle(
                        (column - 0.48, place - 0.46),
                        0.96,
                        0.92,
                        facecolor=palette.series[0],
                        alpha=PALEST + share * (DARKEST - PALEST),
                        linewidth=0,
                    )
                )
                number = short_number(value)
                axes.text(column, place, number, ha="center", va="center", color=palette.ink, fontsize=10.5)
            if _is_kept(layer, keep_float):
                frame = {"fill": False, "edgecolor": palette.series[1], "linewidth": 1.4}
                axes.add_patch(Rectangle((-0.49, place - 0.47), len(formats) - 0.02, 0.94, **frame))
        axes.set(xlim=(-0.5, len(formats) - 0.5), ylim=(len(layers) - 0.5, -0.5))
        axes.set_xticks(range(len(formats)), [_head(each) for each in formats], fontsize=10)
        axes.set_yticks(range(len(layers)), [_label(layer, keep_float) for layer in layers], fontsize=10)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure


def drawn_layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The layers in the order they run; of more than ``MOST`` those whose largest KL is largest."""
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["layer"]] = max(largest.get(row["layer"], 0.0), float(row["kl"]))
    chosen = set(sorted(largest, key=lambda layer: -largest[layer])[:MOST])
    return [layer for layer in largest if layer in chosen]


def short_number(value: float) -> str:
    """At most six characters: 0, 2.1e-5, 0.034, 1.2, 130."""
    if value == 0.0:
        return "0"
    if value < 0.001:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _model(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    found = facts.get("table") or {}
    rows, keep_float = found.get("rows", []), facts.get("keep_float") or []
    control = facts.get("control")
    figure = heat_map(rows, keep_float)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    return {
        "name": name,
        "plot": ""
        if figure is None
        else svg(figure, f"sensitivity_{name}", f"divergence by layer and format of {name}"),
        "num_samples": found.get("num_samples"),
        "accuracy": show(found.get("accuracy"), "share"),
        "drawn": min(MOST, len(layers)),
        "layers": len(layers),
        "table": layer_table(rows, keep_float),
        "keep_float": list(keep_float),
        "control": None if control is None else _control(control),
    }


def layer_table(rows: Sequence[Mapping[str, Any]], keep_float: Sequence[str]) -> Cells:
    """One row for each layer: its KL in each format, and what it costs in INT8."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    columns = [
        Column("layer", "layer", f"module path; {MARK} stays in float"),
        *(Column(each, each, "mean KL(float || changed), nats", "number", missing=NOT_PRUNED) for each in formats),
    ]
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["layer"], {"layer": f"{_mark(row['layer'], keep_float)}{row['layer']}"})
        line[row["format"]] = float(row["kl"])
        if row["format"] == "int8":
            line |= {"flips": row["flips"], "accuracy_drop": row["accuracy_drop"]}
    if "int8" in formats:
        columns += [
            Column("flips", "int8 flips", "share of images whose answer changed", "share"),
            Column("accuracy_drop", "int8 drop", "accuracy it costs alone, in points", "points"),
        ]
    return table(lines.values(), columns)


def _control(record: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy control in a sentence, and its steps."""
    drop, bound = (f"{float(record[key]) * 100:.2f}" for key in ("drop", "max_drop"))
    went = [row["layer"] for row in record["rows"] if row["to"] == "float" and row["kept"]]
    back = [row["layer"] for row in record["rows"] if row["to"] == "int8" and row["kept"]]
    reverted = [layer for layer in went if layer not in back]
    least = f"at most {record['max_layers']} layers tried" if record.get("max_layers") is not None else ""
    allowed = f"{bound} points allowed" + (f", {least}" if least else "")
    names = ", ".join(reverted)
    if not record["rows"] and record["met"]:
        words = f"INT8 costs {drop} points ({allowed}): no layer had to go back to float."
    elif record["met"]:
        words = f"INT8 costs {drop} points ({allowed}) with {names or 'no layer'} back in float."
    else:
        words = f"INT8 costs {drop} points ({allowed}): the bound is not met, with {names or 'no layer'} back in float."
    return {"met": bool(record["met"]), "sentence": words, "steps": table(record["rows"], STEPS)}


def _head(format: str) -> str:
    return SHORT.get(format, format.replace(" ", "\n"))


def _label(layer: str, keep_float: Sequence[str]) -> str:
    """The end of a path tells layers apart."""
    short = layer if len(layer) <= LONGEST_NAME else f"…{layer[-LONGEST_NAME + 1 :]}"
    return f"{_mark(layer, keep_float)}{short}"


def _mark(layer: str, keep_float: Sequence[str]) -> str:
    return f"{MARK} " if _is_kept(layer, keep_float) else ""


def _is_kept(layer: str, keep_float: Sequence[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in keep_float)
