"""The report's section about cost: seconds, CPU seconds and energy of every stage, and what each file cost in all.

All of it comes from ``lineage.json``: one entry per stage with ``seconds``, ``cpu_seconds``, ``energy_j`` (joules of
the processor; absent where the machine does not tell) and ``cached``. A kept stage shows what it had cost when it was
made; in this run it cost nothing. What a file cost is the sum over every stage it descends from, each counted once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from export.comparison import NONE, Column, is_missing, marginal_gains, show
from export.report.tables import table

Entry = Mapping[str, Any]
MEASURES = ("seconds", "cpu_seconds", "energy_j")

COST = (
    Column("seconds", "time", "wall time, when it was made", "seconds"),
    Column("cpu_seconds", "CPU time", "processor time of the run's processes", "seconds"),
    Column("energy_j", "energy", "joules of the processor meanwhile", "joules"),
)
STAGES = (
    Column("stage", "stage", "part of the pipeline"),
    Column("name", "for", "what it was done for", missing=NONE),
    Column("state", "state", "ran in this run, or was kept from an earlier one"),
    *COST,
    Column("spent", "spent in this run", "wall time that this run needed for it", "seconds"),
)
FILES = (
    Column("id", "file", "what the comparison lists"),
    Column("stages", "stages", "how many stages it descends from", "count"),
    *COST,
    Column("spent", "spent in this run", "the part of the time that this run needed", "seconds"),
)
GAINS = (
    Column("id", "with the stage", "the file"),
    Column("control", "control", "the same without the stage"),
    Column("gain", "points", "accuracy it gained", "points"),
    Column("ece_change", "ECE", "change of the calibration error; below zero is better", "number"),
    Column("seconds", "extra time", "wall time of the stages its control does without", "seconds"),
    Column("cpu_seconds", "extra CPU time", "processor time of those stages", "seconds"),
    Column("energy_j", "extra energy", "joules of the processor meanwhile", "joules"),
)


def section(lineage: Sequence[Entry], comparison: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``sections/cost.*.jinja`` show."""
    ran = [entry for entry in lineage if not entry.get("cached")]
    kept = [entry for entry in lineage if entry.get("cached")]
    files = costs(lineage, list(dict.fromkeys(str(row["id"]) for row in comparison if not is_missing(row.get("id")))))
    return {
        "cost": {
            "stages": table([_stage_row(entry) for entry in lineage], STAGES),
            "files": table([{"id": name, **cost} for name, cost in files.items()], FILES),
            "bars": _bars(lineage),
            "spent": _totals(ran),
            "saved": _totals(kept),
            "num_ran": len(ran),
            "num_kept": len(kept),
            "energy_measured": any(not is_missing(entry.get("energy_j")) for entry in lineage),
        },
        "gains_table": table(gains(lineage, comparison), GAINS),
    }


def gains(lineage: Sequence[Entry], comparison: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Marginal gains of ``export.comparison`` beside what the stages cost that the control does without.

    Without a lineage, the difference of what the comparison says both rows cost.
    """
    rows = []
    for gain in marginal_gains(comparison):
        own, control = (ancestors(lineage, str(gain[key])) for key in ("id", "control"))
        extra = {key: entry for key, entry in own.items() if key not in control}
        known = {name: _sum(extra.values(), name) for name in MEASURES} if own and control else {}
        rows.append({**gain, **known})
    return rows


def costs(lineage: Sequence[Entry], files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """File -> what all stages cost that it descends from, and how much of it was spent in this run."""
    found = {}
    for file in files:
        made = ancestors(lineage, file)
        if made:
            spent = [entry for entry in made.values() if not entry.get("cached")]
            found[file] = {
                "stages": len(made),
                **{name: _sum(made.values(), name) for name in MEASURES},
                "spent": _sum(spent, "seconds") if spent else 0.0,
            }
    return found


def ancestors(lineage: Sequence[Entry], file: str) -> dict[str, Entry]:
    """Stage key -> entry of everything a file descends from, itself included; empty when nothing made it."""
    made_by = {str(entry.get("output")): entry for entry in reversed(lineage) if not is_missing(entry.get("output"))}
    makers = ("export", "engine", "openvino")
    todo = [entry for entry in lineage if entry.get("name") == file and entry.get("stage") in makers]
    found: dict[str, Entry] = {}
    while todo:
        entry = todo.pop()
        key = str(entry.get("key"))
        if key not in found:
            found[key] = entry
            todo.extend(made_by[digest] for digest in entry.get("inputs") or () if digest in made_by)
    return found


def _stage_row(entry: Entry) -> dict[str, Any]:
    kept = bool(entry.get("cached"))
    return {
        "stage": entry.get("stage"),
        "name": entry.get("name"),
        "state": "kept" if kept else "ran",
        **{name: entry.get(name) for name in MEASURES},
        "spent": 0.0 if kept else entry.get("seconds"),
    }


def _bars(lineage: Sequence[Entry]) -> list[dict[str, Any]]:
    """Stage by stage: its share of all the time, and how much of that was kept; dearest first."""
    total = _sum(lineage, "seconds") or 0.0
    stages: dict[str, list[Entry]] = {}
    for entry in lineage:
        stages.setdefault(str(entry.get("stage")), []).append(entry)
    bars = []
    for stage, entries in stages.items():
        seconds = _sum(entries, "seconds") or 0.0
        kept = _sum([entry for entry in entries if entry.get("cached")], "seconds") or 0.0
        bars.append(
            {
                "stage": stage,
                "shown": show(seconds, "seconds"),
                "seconds": seconds,
                "share": seconds / total if total else 0.0,
                "kept": kept / total if total else 0.0,
            }
        )
    bars.sort(key=lambda bar: -bar["seconds"])
    longest = max((bar["share"] for bar in bars), default=0.0) or 1.0
    return [
        {**bar, "ran_width": (bar["share"] - bar["kept"]) / longest, "kept_width": bar["kept"] / longest}
        for bar in bars
    ]


def _totals(entries: Sequence[Entry]) -> dict[str, str]:
    """Each measure in words; of no entries it is nothing, of one that did not tell it is "not measured"."""
    kinds = {column.name: column.kind for column in COST}
    return {name: show(_sum(entries, name) if entries else 0.0, kinds[name]) for name in MEASURES}


def _sum(entries: Iterable[Entry], name: str) -> float | None:
    """None when one of the entries was not measured: a sum of the others would look like all of it."""
    values = [entry.get(name) for entry in entries]
    if not values or any(is_missing(value) for value in values):
        return None
    return float(sum(values))  # type: ignore[arg-type]
