"""Plots as SVG text for the page, readable in light and dark.

Figures are drawn in stand-in colours that are then replaced by the page's CSS variables, so one drawing
follows the reader's colour scheme. Text stays text. ``None`` comes back when there is nothing to draw.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from export.latency import Samples


@dataclass(frozen=True)
class Palette:
    """The colours of a figure: text, secondary text, lines of the grid, and one per series."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]

    def style(self) -> Any:
        """Matplotlib settings that draw in these colours."""
        return {
            "font.family": "DejaVu Sans",
            "font.size": 10.5,
            "axes.edgecolor": self.grid,
            "axes.labelcolor": self.muted,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.7,
            "xtick.color": self.grid,
            "ytick.color": self.grid,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "text.color": self.ink,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "figure.facecolor": "none",
            "svg.fonttype": "none",
        }


SCREEN = Palette("#010101", "#020202", "#030303", tuple(f"#0{i}0{i}0f" for i in range(1, 8)))
"""Stand-ins, one for each CSS variable of the page."""

PAPER = Palette(
    "#1c2530",
    "#5b6775",
    "#d9dfe6",
    ("#2563eb", "#d9660b", "#0d8a72", "#8a3ffc", "#c2255c", "#7a7000", "#0b7285"),
)

VARIABLES = {SCREEN.ink: "--ink", SCREEN.muted: "--muted", SCREEN.grid: "--line"} | {
    colour: f"--s{i}" for i, colour in enumerate(SCREEN.series, start=1)
}

INK, MUTED, SERIES = SCREEN.ink, SCREEN.muted, SCREEN.series

MARKS = ("o", "s", "^", "D", "v", "P", "X")

SIZE = (5.0, 3.3)
"""Inches at 72 points: narrow enough that labels stay readable on a telephone."""


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline ``<svg>`` that scales with the page and takes its colours from it."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context(SCREEN.style() | {"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = text.replace("'DejaVu Sans'", "inherit").replace("inherit, sans-serif", "inherit")
    text = re.sub(r"font: (\S+) [^;\"]*?(?=[;\"])", r"font-size: \1; font-family: inherit", text)
    # Groups are called axes_1 in every figure; an id nothing refers to would only clash with another plot's.
    used = set(re.findall(r"#(\w+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    width, height = (value * 72 for value in figure.get_size_inches())
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{description}" class="plot" '
        f'style="max-width: {width * 1.35:g}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + text[text.index(">") + 1 :]


def save_pareto(path: Path, trials: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Writes the Pareto plot as a PNG on white; false when there is nothing to draw."""
    import matplotlib as mpl

    figure = pareto(trials, marks, palette=PAPER)
    if figure is None:
        return False
    with mpl.rc_context(PAPER.style()):
        figure.savefig(path, dpi=150, facecolor="white")
    return True


def pareto(
    trials: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]] = (), *, palette: Palette = SCREEN
) -> Figure | None:
    """Accuracy over latency: searched candidates, their front and its knee, and the named models of ``marks``.

    Args:
        trials: Rows with ``latency_p50_ms``, ``accuracy``, ``on_front`` and ``knee``.
        marks: Rows with ``id``, ``latency_p50_ms`` and ``accuracy`` to name in the plot; one with ``champion`` is a
            star.
    """
    done = [row for row in trials if _has(row, "latency_p50_ms", "accuracy")]
    named = [row for row in marks if _has(row, "latency_p50_ms", "accuracy")]
    if len(done) + len(named) < 2:
        return None
    with canvas(palette=palette) as (figure, axes):
        front = sorted((row for row in done if row.get("on_front")), key=lambda row: row["latency_p50_ms"])
        rest = [row for row in done if not row.get("on_front")]
        if rest:
            axes.scatter(*_xy(rest), s=26, color=palette.muted, alpha=0.55, linewidths=0, label="candidate")
        if front:
            axes.plot(
                *_xy(front),
                color=palette.series[0],
                marker="o",
                markersize=5.5,
                linewidth=1.6,
                label="Pareto front",
            )
        knee = [row for row in done if row.get("knee") is True]
        if knee:
            axes.scatter(*_xy(knee), s=150, facecolors="none", edgecolors=palette.ink, linewidths=1.3, label="knee")
        champions = [row for row in named if row.get("champion")]
        others = [row for row in named if not row.get("champion")]
        for i, row in enumerate([*champions, *others][: len(palette.series) - 1], start=1):
            x, y = row["latency_p50_ms"], row["accuracy"] * 100
            star = bool(row.get("champion"))
            axes.plot(
                [x],
                [y],
                linestyle="",
                marker="*" if star else MARKS[i % 7],
                markersize=13 if star else 8,
                color=palette.series[i],
                label=row["id"],
            )
        axes.set(xlabel="latency p50 (ms, log scale)", ylabel="accuracy (%)", xscale="log")
        _plain_log(axes)
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.5, columnspacing=1.2)
    return figure


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str, label: str) -> Figure | None:
    """One line per training: ``key`` over epochs; shares are drawn in percent."""
    drawn = {name: rows for name, rows in histories.items() if any(_has(row, key) for row in rows)}
    if not drawn:
        return None
    with canvas() as (figure, axes):
        scale = 100 if "accuracy" in key else 1
        for i, (name, rows) in enumerate(drawn.items()):
            kept = [row for row in rows if _has(row, key)]
            x = [row.get("epoch", n) + 1 for n, row in enumerate(kept)]
            y = [row[key] * scale for row in kept]
            style = "--" if i >= len(SERIES) else "-"
            axes.plot(x, y, style, color=SERIES[i % 7], marker=MARKS[i % 7], markersize=4, linewidth=1.6, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.5, columnspacing=1.2)
    return figure


def teacher_hacking(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """Validation NLL over the divergence from the teachers, a path from right to left per distilled student.

    A path that turns upward on its way to the left is a student that learns its teachers' faults; epochs of an
    alarm have a ring.
    """
    keys = ("teacher_kl", "validation_nll")
    paths = {name: [row for row in rows if _has(row, *keys)] for name, rows in histories.items()}
    paths = {name: rows for name, rows in paths.items() if len(rows) > 1}
    if not paths:
        return None
    with canvas() as (figure, axes):
        for i, (name, rows) in enumerate(paths.items()):
            x, y = ([row[key] for row in rows] for key in keys)
            style, colour, mark = "--" if i >= len(SERIES) else "-", SERIES[i % 7], MARKS[i % 7]
            axes.plot(x, y, style, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)
            alarms = [n for n, row in enumerate(rows) if row.get("hacking_u_shape") or row.get("hacking_power_law")]
            if alarms:
                rings = ([values[n] for n in alarms] for values in (x, y))
                axes.plot(*rings, "o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
        axes.set(xlabel="divergence from the teachers (nats)", ylabel="validation NLL (nats)")
        axes.invert_xaxis()
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.5, columnspacing=1.2)
    return figure


def latency(samples: "Samples", reference: str, batch: int, floor: float | None) -> Figure | None:
    """Bar per model: median ratio to the reference of the same round, with its IQR; noise floor shaded."""
    from export.latency import AGAIN, round_ratios

    base = samples.get((reference, batch))
    names = [name for name, b in samples if b == batch and name not in (reference, reference + AGAIN)]
    if base is None or not names:
        return None
    ratios = {name: round_ratios(samples[name, batch], base) for name in names}
    names.sort(key=lambda name: -float(np.median(ratios[name])))
    with canvas((SIZE[0], 1.25 + 0.34 * len(names))) as (figure, axes):
        if floor is not None:
            axes.axvspan(1 - floor, 1 + floor, color=SERIES[1], alpha=0.3, linewidth=0)
        axes.axvline(1, color=SERIES[1], linewidth=1.2)
        medians = [float(np.median(ratios[name])) for name in names]
        low, high = (np.array([np.percentile(ratios[name], q) for name in names]) for q in (25, 75))
        axes.barh(names, medians, height=0.56, color=SERIES[0], alpha=0.75)
        axes.errorbar(
            medians,
            names,
            xerr=[medians - low, high - medians],
            fmt="none",
            color=INK,
            ecolor=INK,
            elinewidth=1.3,
            capsize=3,
        )
        for i, median in enumerate(medians):
            axes.annotate(
                f"{median:.2f}×",
                (1, i),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=f"time / {reference}, same round, batch {batch}")
        axes.set_xlim(left=0)
    return figure


def reliability(bins: Mapping[str, Sequence[Sequence[float]]]) -> Figure | None:
    """Accuracy over confidence per model; the diagonal is perfect calibration, dots grow with the count."""
    drawn = {name: [row for row in rows if row[2] > 0] for name, rows in bins.items()}
    drawn = {name: rows for name, rows in drawn.items() if rows}
    if not drawn:
        return None
    with canvas((SIZE[0], 3.8)) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
        for i, (name, rows) in enumerate(drawn.items()):
            confidence, accuracy, count = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
            colour = SERIES[i % 7]
            axes.plot(confidence, accuracy, color=colour, linewidth=1.5, label=name)
            axes.scatter(confidence, accuracy, s=8 + 90 * np.sqrt(count / count.max()), color=colour, alpha=0.45)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.5, columnspacing=1.2)
    return figure


def bars(values: Mapping[str, float], label: str, *, digits: int = 2) -> Figure | None:
    """Horizontal bars with their values; negative ones in another colour."""
    if not values:
        return None
    names = list(values)[::-1]
    numbers = [values[name] for name in names]
    with canvas((SIZE[0], 1.0 + 0.36 * len(names))) as (figure, axes):
        axes.barh(names, numbers, color=[SERIES[2] if n >= 0 else SERIES[4] for n in numbers], alpha=0.8, height=0.6)
        span = max(max(numbers), 0) - min(min(numbers), 0) or 1
        for i, number in enumerate(numbers):
            left = number < 0
            axes.annotate(
                f"{number:+.{digits}f}",
                (number, i),
                xytext=(-4 if left else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if left else "left",
                fontsize=9.5,
            )
        axes.set_xlim(min(min(numbers), 0) - 0.2 * span * (min(numbers) < 0), max(max(numbers), 0) + 0.2 * span)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=label)
    return figure


@contextmanager
def canvas(size: tuple[float, float] = SIZE, *, palette: Palette = SCREEN) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib as mpl

    with mpl.rc_context(palette.style()):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot()


def _plain_log(axes: Axes) -> None:
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low > 3 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))


def _xy(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["latency_p50_ms"] for row in rows], [row["accuracy"] * 100 for row in rows]


def _has(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), int | float) for name in names)
