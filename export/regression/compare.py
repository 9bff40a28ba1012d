"""This night's files against those of the last good run and of the champion's: every number with its word."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from compression.errors import ExportError
from compression.statistics import Interval, accuracy_drop
from compression.types import Frozen
from export.benchmark import BenchmarkJob, run_benchmark
from export.latency import BenchmarkResult
from export.regression.blame import Blame, accuracy_change, find_blame, listed
from export.regression.changes import Change, changes_between
from export.regression.judging import Row, ece_change, judged, judged_ratio, negated
from export.regression.night import Night

Against = Literal["last good run", "champion", "previous champion", "chosen run"]

TONIGHT = "tonight"
MARGINS = {"max_accuracy_drop": 0.01, "max_worst_class_drop": 0.05, "max_ece_increase": 0.02}
"""What a policy that sets no limit counts as the same."""
SIZE_MARGIN = 0.01
"""Metadata alone moves a file's size by less."""
SAME_FILE = "the very same file"
ALARMING = ("accuracy", "worst class", "ECE", "latency")
"""Numbers whose fall makes a night a regression; a larger file is shown, and the policy's size budget guards it."""


class Comparison(Frozen):
    """One run against another."""

    against: Against
    run: str
    folder: str
    outcome: str
    """The gate's verdict on the other run."""
    rows: tuple[Row, ...]
    changes: tuple[Change, ...]
    blame: Blame
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> list[Row]:
        return [row for row in self.rows if row.word == "worse"]


class Regression(Frozen):
    """What a night became; ``regression.json``."""

    recipe: str
    run: str
    outcome: str
    """The gate's verdict on this run."""
    regressed: bool
    """A recipe that was accepted before is not now, or is worse than it was, beyond chance."""
    sentence: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SideBySide:
    """Files timed in the same rounds, tonight; or why they were not."""

    result: BenchmarkResult | None
    batch: int
    note: str = ""


def compare_runs(now: Night, others: Mapping[Against, Night], *, rounds: int = 30, seed: int = 0) -> Regression:
    """Compare a run with each of the others; shipped files are timed again, side by side.

    Args:
        now: This night.
        others: The last good run, the champion's run, or a run somebody chose.
        rounds: Interleaved rounds of the timing.
        seed: Of bootstrap and timing.
    """
    timed = {target: time_side_by_side(now, others, target, rounds=rounds, seed=seed) for target in now.judged()}
    comparisons = tuple(_comparison(now, before, against, timed, seed) for against, before in others.items())
    basis = next((each for each in comparisons if each.against in ("last good run", "chosen run")), None)
    rejected = basis is not None and basis.outcome == "accept" and now.outcome != "accept"
    alarming = [row for row in basis.worse if row.what in ALARMING] if basis else []
    return Regression(
        recipe=str(now.recipe.get("name", now.path.parent.name)),
        run=now.name,
        outcome=now.outcome,
        regressed=rejected or bool(alarming),
        sentence=_headline(now, basis),
        comparisons=comparisons,
    )


def time_side_by_side(
    now: Night, others: Mapping[Against, Night], target: str, *, rounds: int, seed: int
) -> SideBySide:
    """Time tonight's file of a target beside the others' files: one process, shuffled rounds, noise floor."""
    if all(
        _same_file(now, night, (now.file_of(target) or "", night.file_of(target) or "")) for night in others.values()
    ):
        return SideBySide(None, 1, SAME_FILE)
    asked = next((each for each in now.recipe.get("targets", ()) if each["name"] == target), {})
    batch, threads = int((asked.get("batch_sizes") or [1])[0]), int(asked.get("threads") or 1)
    models: dict[str, Path] = {}
    for label, night in {TONIGHT: now, **others}.items():
        file = night.file_of(target)
        path = night.onnx(file) if file else None
        if path is not None:
            models[label] = path
    if TONIGHT not in models:
        return SideBySide(None, batch, "tonight's file is kept no more")
    own = models[TONIGHT].read_bytes()
    different = {label: path for label, path in models.items() if label == TONIGHT or path.read_bytes() != own}
    if len(different) == 1:
        return SideBySide(None, batch)
    job = BenchmarkJob(
        models=different,
        reference=TONIGHT,
        batches=(batch,),
        rounds=max(3, rounds),
        threads=threads,
        memory=False,
        seed=seed,
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return SideBySide(run_benchmark(job, Path(scratch)), batch)
    except ExportError as error:
        return SideBySide(None, batch, str(error))


def _comparison(now: Night, before: Night, against: Against, timed: Mapping[str, SideBySide], seed: int) -> Comparison:
    limits = {name: (now.recipe.get("policy") or {}).get(name) or default for name, default in MARGINS.items()}
    rows: list[Row] = []
    notes: list[str] = []
    for target in now.judged():
        files = now.file_of(target), before.file_of(target)
        if files[0] is None or files[1] is None:
            notes.append(f"The other run has no file for target '{target}'.")
            continue
        pair = files[0], files[1]
        if pair[0] != pair[1]:
            notes.append(f"For '{target}' another file is compared: {pair[0]} now, {pair[1]} before.")
        if now.data == before.data and _same_file(now, before, pair):
            rows += _unchanged(now, target, pair[0])
            continue
        rows += [
            _accuracy(now, before, target, pair, limits["max_accuracy_drop"], seed),
            _worst_class(now, before, target, pair, limits["max_worst_class_drop"], seed),
            _calibration(now, before, target, pair, limits["max_ece_increase"], seed),
            _latency(now, before, target, pair, timed[target], against),
            _size(now, before, target, pair),
        ]
    if now.data != before.data:
        notes.append("The data differ, so that accuracies are compared without pairing, on different test images.")
    first = next(iter(now.judged()), None)
    margin = limits["max_accuracy_drop"]
    worst = next((row.target for row in rows if row.what == "accuracy" and row.word == "worse"), first)
    return Comparison(
        against=against,
        run=before.name,
        folder=str(before.path),
        outcome=before.outcome,
        rows=tuple(rows),
        changes=tuple(changes_between(now, before)),
        blame=find_blame(now, before, worst or "", margin=margin, seed=seed),
        notes=tuple(notes),
    )


def _same_file(now: Night, before: Night, files: tuple[str, str]) -> bool:
    """Whether the files are equal and were found to be: another runtime may have other answers from the same file."""
    made = now.output("export", files[0])
    equal = (now.measured(files[0], each) == before.measured(files[1], each) for each in ("accuracy", "nll", "ece"))
    return made is not None and made == before.output("export", files[1]) and all(equal)


def _unchanged(now: Night, target: str, file: str) -> list[Row]:
    """The rows of a file that is the very same, byte by byte, on the same test images."""
    none = Interval(estimate=0.0, low=0.0, high=0.0)
    once = Interval(estimate=1.0, low=1.0, high=1.0)
    numbers = {name: now.measured(file, name) for name in ("accuracy", "ece", "size_bytes")}
    return [
        Row(target=target, what=what, kind=kind, now=value, before=value, change=change, word="same", note=SAME_FILE)
        for what, kind, value, change in (
            ("accuracy", "share", numbers["accuracy"], none),
            ("worst class", "share", None, none),
            ("ECE", "number", numbers["ece"], none),
            ("latency", "ms", None, once),
            ("size", "bytes", numbers["size_bytes"], once),
        )
    ]


def _accuracy(now: Night, before: Night, target: str, files: tuple[str, str], margin: float, seed: int) -> Row:
    change, note = accuracy_change(now, before, files, seed=seed)
    return Row(
        target=target,
        what="accuracy",
        kind="share",
        now=now.measured(files[0], "accuracy"),
        before=before.measured(files[1], "accuracy"),
        change=change,
        word="cannot tell" if change is None else judged(change, margin, higher_is_better=True),
        note=note,
    )


def _worst_class(now: Night, before: Night, target: str, files: tuple[str, str], margin: float, seed: int) -> Row:
    """The class that lost most; its interval is wider, since the worst of many looks bad by chance alone."""
    answers, labels = (before.correct(files[1]), now.correct(files[0])), now.labels()
    if now.data != before.data:
        note = "not compared: other test images"
    elif answers[0] is None or answers[1] is None or labels is None:
        note = "not compared: the answers are kept no more"
    else:
        return _lost_most(target, answers[0], answers[1], labels, now, margin, seed)
    return Row(target=target, what="worst class", kind="share", now=None, before=None, word="cannot tell", note=note)


def _lost_most(target: str, was: Tensor, got: Tensor, labels: Tensor, now: Night, margin: float, seed: int) -> Row:
    classes = [int(label) for label in labels.unique()]
    level = 1 - 0.05 / len(classes)
    drops = {
        label: accuracy_drop(was[labels == label], got[labels == label], level=level, seed=seed) for label in classes
    }
    label = max(drops, key=lambda each: drops[each].estimate)
    change = negated(drops[label])
    names = now.folder.calibration.get("class_names") or []
    shown = names[label] if label < len(names) else label
    return Row(
        target=target,
        what="worst class",
        kind="share",
        now=float(got[labels == label].double().mean()),
        before=float(was[labels == label].double().mean()),
        change=change,
        word=judged(change, margin, higher_is_better=True),
        note=f"class {shown}, {int((labels == label).sum())} images",
    )


def _calibration(now: Night, before: Night, target: str, files: tuple[str, str], margin: float, seed: int) -> Row:
    bins = now.folder.reliability.get(files[0]), before.folder.reliability.get(files[1])
    change = ece_change(bins[0], bins[1], seed=seed) if bins[0] and bins[1] else None
    return Row(
        target=target,
        what="ECE",
        kind="number",
        now=now.measured(files[0], "ece"),
        before=before.measured(files[1], "ece"),
        change=change,
        word="cannot tell" if change is None else judged(change, margin, higher_is_better=False),
        note="" if change else "no reliability bins in both runs",
    )


def _latency(
    now: Night, before: Night, target: str, files: tuple[str, str], timed: SideBySide, against: Against
) -> Row:
    def row(ratio: Interval | None, word: str, note: str, ms: tuple[float | None, float | None] = (None, None)) -> Row:
        facts = {"target": target, "what": "latency", "kind": "ms", "now": ms[0], "before": ms[1]}
        return Row.model_validate({**facts, "change": ratio, "word": word, "note": note})

    paths = now.onnx(files[0]), before.onnx(files[1])
    if paths[0] is None or paths[1] is None:
        which = "tonight's file" if paths[0] is None else "the other run's file"
        return row(None, "cannot tell", f"not timed: {which} is kept no more")
    if paths[0].read_bytes() == paths[1].read_bytes():
        return row(Interval(estimate=1.0, low=1.0, high=1.0), "same", SAME_FILE)
    if timed.result is None:
        return row(None, "cannot tell", f"not timed: {timed.note}")
    measured = {each.model: each for each in timed.result.rows}
    if against not in measured:
        return row(None, "cannot tell", f"not timed: {timed.result.failures.get(against, 'it gave no row')}")
    other = measured[against]
    ratio = Interval(
        estimate=1 / other.ratio_to_reference, low=1 / other.ratio_high, high=1 / other.ratio_low, level=0.95
    )
    floor = timed.result.noise_floor(timed.batch)
    ms = measured[TONIGHT].latency_p50_ms, other.latency_p50_ms
    return row(ratio, judged_ratio(ratio, floor), f"timed tonight, batch {timed.batch}, noise floor {floor:.1%}", ms)


def _size(now: Night, before: Night, target: str, files: tuple[str, str]) -> Row:
    sizes = now.measured(files[0], "size_bytes"), before.measured(files[1], "size_bytes")
    if not sizes[0] or not sizes[1]:
        return Row(target=target, what="size", kind="bytes", now=sizes[0], before=sizes[1], word="cannot tell")
    ratio = sizes[0] / sizes[1]
    word = "same" if abs(ratio - 1) <= SIZE_MARGIN else "better" if ratio < 1 else "worse"
    return Row(
        target=target,
        what="size",
        kind="bytes",
        now=sizes[0],
        before=sizes[1],
        change=Interval(estimate=ratio, low=ratio, high=ratio),
        word=word,
    )


def _headline(now: Night, basis: Comparison | None) -> str:
    if basis is None:
        return "There is no earlier accepted run of this recipe to compare with."
    parts = []
    if now.outcome != "accept" and basis.outcome == "accept":
        reasons = [reason for verdict in now.judged().values() for reason in verdict.reasons]
        parts.append(f"The gate says {now.outcome}, and accepted before: {reasons[0] if reasons else 'no reason kept'}")
    for word in ("worse", "better"):
        named = [_named(row, basis.rows) for row in basis.rows if row.word == word]
        if named:
            parts.append(f"{word.capitalize()} than the {basis.against}: {listed(named, 6)}.")
    if not any(row.word in ("worse", "better") for row in basis.rows):
        parts.append(f"Nothing is better or worse than the {basis.against} beyond chance.")
    parts.append(basis.blame.sentence)
    return " ".join(parts)


def _named(row: Row, rows: Sequence[Row]) -> str:
    several = len({each.target for each in rows}) > 1
    change = ""
    if row.change is not None:
        change = f" ({amount(row)})"
    return row.what + change + (f" on {row.target}" if several else "")


def amount(row: Row) -> str:
    """The change with its unit: points, a factor, or a number."""
    if row.change is None:
        return "not measured"
    if row.kind == "share":
        return f"{row.change.estimate * 100:+.2f} points"
    if row.kind in ("ms", "bytes"):
        return f"{row.change.estimate:.3f}×"
    return f"{row.change.estimate:+.4f}"


def bounds(row: Row) -> str:
    """The change's interval in the same unit; empty for exact numbers."""
    if row.change is None or row.change.low == row.change.high:
        return ""
    low, high = row.change.low, row.change.high
    if row.kind == "share":
        return f"{low * 100:+.2f} to {high * 100:+.2f}"
    return f"{low:.3f}× to {high:.3f}×" if row.kind == "ms" else f"{low:+.4f} to {high:+.4f}"
