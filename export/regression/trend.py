"""A recipe over the nights: one row per finished run, and the plots that show where it is going."""

import datetime as dt
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from compression.statistics import Interval, wilson
from compression.types import Frozen
from export.comparison import Column, hypervolume
from export.regression.night import Night
from export.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NIGHTS = 60
"""How many nights a plot shows."""


class TrendRow(Frozen):
    """One night."""

    run: str
    time: dt.datetime
    outcome: str
    file: str | None
    """The first target's file: what ships, or what was judged and does not."""
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    latency_p50_ms: float | None
    """As measured that night."""
    size_bytes: float | None
    ece: float | None
    hypervolume: float | None
    """Area between the measured front and the point (the best teacher's time, guessing), of 1 at most."""
    version: int | None
    champion: bool


COLUMNS = (
    Column("time", "night", "when the run ended, UTC"),
    Column("outcome", "verdict", "what the gate decided"),
    Column("accuracy", "accuracy", "share of correct answers on the test split", "share"),
    Column("interval", "95 % interval", "Wilson's interval of it"),
    Column("latency_p50_ms", "p50", "median time of one call, measured that night", "ms"),
    Column("size_bytes", "size", "size of the file that ships", "bytes"),
    Column("ece", "ECE", "expected calibration error", "number"),
    Column("hypervolume", "hypervolume", "area under the front: time ratio to the teacher x accuracy", "number"),
    Column("version", "version", "of the registered model", "count", missing="none"),
    Column("champion", "champion", "whether this run's file is the champion"),
    Column("run", "run", "its folder"),
)


def trend(nights: Sequence[Night], champion: str | None = None) -> list[TrendRow]:
    """A row for each finished run, oldest first; ``champion`` is the id of the champion's run."""
    return [_row(night, champion) for night in nights]


def cells(row: TrendRow) -> dict[str, Any]:
    """The row as the table shows it."""
    interval = None
    if row.accuracy_low is not None and row.accuracy_high is not None:
        interval = f"{row.accuracy_low * 100:.2f} to {row.accuracy_high * 100:.2f}"
    return {
        **row.model_dump(),
        "time": f"{row.time:%Y-%m-%d %H:%M}",
        "interval": interval,
        "champion": "champion" if row.champion else "-",
    }


def started(run: str) -> dt.datetime:
    """The time in a run's id; the epoch for a folder of another name."""
    try:
        return dt.datetime.strptime(run.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    except ValueError:
        return dt.datetime.fromtimestamp(0, dt.UTC)


def measured_front(night: Night) -> float | None:
    """Hypervolume of (time over the best teacher's, accuracy) of the files timed at the smallest batch."""
    rows = [row for row in night.folder.comparison if row.get("batch") and row.get("ratio_to_reference")]
    if not rows:
        return None
    batch = min(row["batch"] for row in rows)
    points = [
        (float(row["ratio_to_reference"]), float(row["accuracy"]))
        for row in rows
        if row["batch"] == batch and row.get("accuracy") is not None
    ]
    return hypervolume(points, reference=(1.0, 1 / (night.count("classes") or 1e9)))


def drawings(rows: Sequence[TrendRow]) -> dict[str, str]:
    """Inline SVG of accuracy, latency and hypervolume over the nights; empty text where there is one night alone."""
    shown = rows[-NIGHTS:]
    champion = next((row for row in rows if row.champion), None)
    wanted: tuple[tuple[str, str, float, str, Callable[[TrendRow], Interval | None] | None], ...] = (
        ("accuracy", "accuracy (%)", 100.0, "accuracy over the nights", _interval),
        ("latency_p50_ms", "latency p50 (ms)", 1.0, "latency over the nights", None),
        ("hypervolume", "hypervolume", 1.0, "hypervolume of the measured front over the nights", None),
    )
    found = {}
    for name, label, scale, description, interval in wanted:
        figure = _over_nights(shown, champion, name, label, scale, interval)
        found[name] = "" if figure is None else plots.svg(figure, f"trend-{name}", description)
    return found


def _over_nights(
    rows: Sequence[TrendRow],
    champion: TrendRow | None,
    name: str,
    label: str,
    scale: float,
    interval: Callable[[TrendRow], Interval | None] | None,
) -> "Figure | None":
    points = [(place, row) for place, row in enumerate(rows) if getattr(row, name) is not None]
    if len(points) < 2:
        return None
    with plots.canvas() as (figure, axes):
        x = [place for place, _ in points]
        y = [getattr(row, name) * scale for _, row in points]
        axes.plot(x, y, color=plots.SERIES[0], linewidth=1.5)
        for place, row in points:
            around = interval(row) if interval else None
            if around is not None:
                axes.vlines(place, around.low * scale, around.high * scale, color=plots.SERIES[0], alpha=0.4)
        for accepted, mark, colour, text in (
            (True, "o", plots.SERIES[0], "accepted"),
            (False, "X", plots.SERIES[4], "not accepted"),
        ):
            some = [(p, getattr(row, name) * scale) for p, row in points if (row.outcome == "accept") is accepted]
            if some:
                axes.plot(*zip(*some, strict=True), linestyle="", marker=mark, markersize=6, color=colour, label=text)
        if champion is not None and getattr(champion, name) is not None:
            value = getattr(champion, name) * scale
            axes.axhline(value, color=plots.SERIES[2], linestyle=(0, (4, 3)), linewidth=1.4, label="champion")
        step = max(1, -(-len(rows) // 5))
        ticks = list(range(0, len(rows), step))
        axes.set_xticks(ticks, [f"{rows[place].time:%d %b}" for place in ticks])
        axes.set(xlabel="night", ylabel=label)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.5, columnspacing=1.2)
    return figure


def _row(night: Night, champion: str | None) -> TrendRow:
    shipped = _judged_row(night)
    count, accuracy = night.count("test"), shipped.get("accuracy")
    around = wilson(round(accuracy * count), count) if accuracy is not None and count else None
    version = (night.summary.get("registered") or {}).get("version")
    return TrendRow(
        run=night.name,
        time=started(night.name),
        outcome=night.outcome,
        file=shipped.get("id"),
        accuracy=accuracy,
        accuracy_low=around.low if around else None,
        accuracy_high=around.high if around else None,
        latency_p50_ms=shipped.get("latency_p50_ms"),
        size_bytes=shipped.get("size_bytes"),
        ece=shipped.get("ece"),
        hypervolume=measured_front(night),
        version=version,
        champion=night.name == champion,
    )


def _judged_row(night: Night) -> dict[str, Any]:
    """The first target's file, shipped or not, at its smallest batch."""
    file = next((night.file_of(target) for target in night.judged()), None)
    rows = [row for row in night.folder.comparison if row.get("id") == file]
    return min(rows, key=lambda row: row.get("batch") or float("inf"), default={})


def _interval(row: TrendRow) -> Interval | None:
    if row.accuracy is None or row.accuracy_low is None or row.accuracy_high is None:
        return None
    return Interval(estimate=row.accuracy, low=row.accuracy_low, high=row.accuracy_high)
