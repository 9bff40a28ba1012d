"""Which stage is to blame: the first whose output differs though its inputs are equal, and where the quality falls."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from compression.statistics import Interval, accuracy_drop
from compression.types import Frozen
from export.regression.changes import Change, recipe_changes, values_of
from export.regression.judging import Word, judged, negated, unpaired_change
from export.regression.night import Night

Row = Mapping[str, Any]

SECTIONS: dict[str, tuple[str, ...]] = {
    "data": ("data", "unlabelled", "seed"),
    "teacher": ("teachers", "augment", "seed"),
    "teacher_outputs": ("teachers", "distill.views", "distill.teacher_features", "augment", "seed"),
    "select": ("select",),
    "search": ("search", "distill", "augment", "seed"),
    "distill": ("distill", "augment", "seed"),
    "sparsify": ("sparsify", "distill", "augment", "seed"),
    "sensitivity": ("sensitivity", "seed"),
    "quantize": ("quantize", "distill", "augment", "seed"),
    "calibrate": ("calibrate",),
    "export": ("targets", "quantize"),
    "engine": ("targets",),
    "openvino": ("targets",),
    "robustness": ("robustness", "seed"),
    "attention": ("attention", "seed"),
    "benchmark": ("targets", "benchmark_rounds", "seed"),
    "diagnose": ("targets",),
    "gate": ("policy", "targets", "seed"),
}
"""Stage -> the parts of a recipe that it reads."""

ON_THE_MACHINE = ("search", "evaluate", "robustness", "benchmark", "diagnose", "export")
"""Stages whose configuration names the machine."""

SHOWN = 3


class Cause(Frozen):
    """Why a stage gave something else."""

    kind: Literal["data", "code", "library", "recipe", "machine", "new", "gone", "repeat", "unknown"]
    words: str


class Origin(Frozen):
    """A stage that gave something else from the same inputs, or is there in one run alone."""

    stage: str
    name: str
    causes: tuple[Cause, ...]

    @property
    def label(self) -> str:
        return f"{self.stage}/{self.name}"

    @property
    def words(self) -> str:
        return listed([cause.words for cause in self.causes])


class Step(Frozen):
    """The quality after one stage, in both runs."""

    stage: str
    name: str
    measured_on: str
    now: float | None
    before: float | None
    change: Interval | None
    word: Word

    @property
    def label(self) -> str:
        return f"{self.stage}/{self.name}"


class Blame(Frozen):
    """What changed first, where the accuracy fell, and one sentence that says so."""

    sentence: str
    origins: tuple[Origin, ...]
    followed: tuple[str, ...]
    """Stages that differ because their inputs do."""
    fell_at: str | None
    steps: tuple[Step, ...]


def find_blame(now: Night, before: Night, target: str, *, margin: float, seed: int = 0) -> Blame:
    """Walk both lineages in stage order and say what changed of itself, and where the accuracy of a target fell."""
    own, followed = differences(now, before)
    origins = [origin for origin in own if origin.label not in followed]
    steps = quality_steps(now, before, target, margin=margin, seed=seed)
    fell = _fall(steps)
    if fell is not None and now.output(fell.stage, fell.name) == before.output(fell.stage, fell.name):
        tested = now.row("evaluate") or {"name": "test"}  # the same file gave other answers
        fell = fell.model_copy(update={"stage": "evaluate", "name": tested["name"]})
    return Blame(
        sentence=_sentence(now, own, origins, followed, fell),
        origins=tuple(origins),
        followed=tuple(followed),
        fell_at=fell.label if fell else None,
        steps=tuple(steps),
    )


def differences(now: Night, before: Night) -> tuple[list[Origin], list[str]]:
    """(stages with a cause of their own, labels of the stages whose inputs differ), in stage order.

    A stage may be in both: other inputs, and another library as well.
    """
    changes = recipe_changes(now, before)
    rows, others = _numbered(now.lineage), _numbered(before.lineage)
    own: list[Origin] = []
    followed: list[str] = []
    for key, row in rows.items():
        other = others.get(key)
        if other is None:
            cause = Cause(kind="new", words="it is new" + _because(row["stage"], changes))
            own.append(Origin(stage=row["stage"], name=row["name"], causes=(cause,)))
            continue
        if row["output"] == other["output"]:
            continue
        same_inputs = sorted(row["inputs"]) == sorted(other["inputs"])
        causes = _causes(row, other, now, before, changes, sure=same_inputs)
        if not same_inputs:
            followed.append(f"{row['stage']}/{row['name']}")
        if causes:
            own.append(Origin(stage=row["stage"], name=row["name"], causes=tuple(causes)))
    for key, row in others.items():
        if key not in rows:
            cause = Cause(kind="gone", words="it is there no more" + _because(row["stage"], changes))
            own.append(Origin(stage=row["stage"], name=row["name"], causes=(cause,)))
    return own, list(dict.fromkeys(followed))


def quality_steps(now: Night, before: Night, target: str, *, margin: float, seed: int) -> list[Step]:
    """The accuracy after each stage that made the target's file, both runs side by side.

    Every stage but the search leaves a file that answered the test split, so that the runs are compared sample by
    sample; the search has a validation accuracy alone.
    """
    files = now.file_of(target), before.file_of(target)
    if files[0] is None or files[1] is None:
        return []
    steps = []
    if now.reference and before.reference:
        name = now.reference.removeprefix("teacher-").removesuffix(".float32")
        steps.append(_file_step(now, before, "teacher", name, (now.reference, before.reference), margin, seed))
    if now.row("search") and before.row("search"):
        steps.append(_search_step(now, before, margin))
    bases = files[0].partition(".")[0], files[1].partition(".")[0]
    for stage, forms in (
        ("distill", ("-dense.float32", ".float32")),
        ("sparsify", (".float32",)),
        ("quantize", (".int8-symmetric",)),
    ):
        if now.row(stage, bases[0]) is None or (stage == "quantize" and "int8" not in files[0]):
            continue
        if files[0].endswith("-ptq") and stage == "quantize":
            continue
        pair = tuple(
            next((base + form for form in forms if night.measured(base + form, "accuracy") is not None), None)
            for night, base in zip((now, before), bases, strict=True)
        )
        if pair[0] and pair[1]:
            steps.append(_file_step(now, before, stage, bases[0], (pair[0], pair[1]), margin, seed))
    steps.append(_file_step(now, before, "export", files[0], (files[0], files[1]), margin, seed))
    return steps


def accuracy_change(now: Night, before: Night, files: tuple[str, str], *, seed: int) -> tuple[Interval | None, str]:
    """Accuracy of one run's file minus the other's, and a note on how it was compared; paired where it can be."""
    answers = now.correct(files[0]), before.correct(files[1])
    if now.data == before.data and answers[0] is not None and answers[1] is not None:
        return negated(accuracy_drop(answers[1], answers[0], seed=seed)), ""
    values = now.measured(files[0], "accuracy"), before.measured(files[1], "accuracy")
    counts = now.count("test"), before.count("test")
    if values[0] is None or values[1] is None or not counts[0] or not counts[1]:
        return None, "not measured in both runs"
    why = "the data differ" if now.data != before.data else "its answers are kept no more"
    return unpaired_change(values[0], counts[0], values[1], counts[1]), f"not paired: {why}"


def listed(words: Sequence[str], limit: int = SHOWN) -> str:
    """``a, b and c``; what is beyond the limit is counted."""
    shown = list(dict.fromkeys(words))
    if len(shown) > limit:
        shown = [*shown[:limit], f"{len(shown) - limit} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""


def _numbered(lineage: Sequence[Row]) -> dict[tuple[str, str, int], Row]:
    """Rows by stage, name and how many of that name came before."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in lineage:
        key = row["stage"], row["name"]
        found[*key, seen[key]] = row
        seen[key] += 1
    return found


def _causes(row: Row, other: Row, now: Night, before: Night, changes: Sequence[Change], *, sure: bool) -> list[Cause]:
    """What the stage is made of that differs; with equal inputs something must be found."""
    stage, made, was = str(row["stage"]), row.get("made_of") or {}, other.get("made_of") or {}
    if not made or not was:
        return [_guess(row, other, now, before, changes)] if sure else []
    causes = []
    if made.get("code") != was.get("code"):
        commits = [str(night.folder.env.get("commit", ""))[:10] for night in (before, now)]
        between = f" ({commits[0]} to {commits[1]})" if all(commits) and commits[0] != commits[1] else ""
        causes.append(Cause(kind="code", words=f"its code changed{between}"))
    versions, old = made.get("libraries", {}), was.get("libraries", {})
    for library in sorted({*versions, *old}):
        a, b = old.get(library, "not used"), versions.get(library, "not used")
        if a != b:
            causes.append(Cause(kind="library", words=f"{library} went from {a} to {b}"))
    if made.get("config") != was.get("config"):
        causes.append(_config_cause(stage, row, now, before, changes))
    if not causes and sure:
        words = "it ran again and gave something else from the same code, libraries and settings"
        causes.append(Cause(kind="repeat", words=words))
    return causes


def _config_cause(stage: str, row: Row, now: Night, before: Night, changes: Sequence[Change]) -> Cause:
    read = _read_by(stage, changes, str(row["name"]))
    if read:
        return Cause(kind="recipe", words=listed([change.words for change in read]))
    if stage == "data":
        return Cause(kind="data", words="the source data changed")
    machine = [night.folder.env.get("cpu", {}).get("model") for night in (before, now)]
    if stage in ON_THE_MACHINE and machine[0] != machine[1]:
        return Cause(kind="machine", words=f"the machine went from {machine[0]} to {machine[1]}")
    if stage == "teacher":
        return Cause(kind="data", words="the teacher's weights file changed")
    if changes:
        return Cause(kind="recipe", words=listed([change.words for change in changes]))
    if stage in ON_THE_MACHINE:
        return Cause(kind="machine", words="the machine is another one, or is set up otherwise")
    return Cause(kind="unknown", words="its settings changed, though the recipe did not")


def _guess(row: Row, other: Row, now: Night, before: Night, changes: Sequence[Change]) -> Cause:
    """For rows of older runs, which do not say what they were made of."""
    stage = str(row["stage"])
    if row.get("key") == other.get("key"):
        words = "it ran again and gave something else from the same code, libraries and settings"
        return Cause(kind="repeat", words=words)
    read = _read_by(stage, changes, str(row["name"]))
    packages = values_of(before.folder.env, now.folder.env, "packages")
    known = [change.words for change in [*read, *packages]]
    if stage == "data" and not read:
        return Cause(kind="data", words="the source data, or the code that reads them, changed")
    if known:
        words = f"the older run does not say what it was made of, but {listed(known)}"
    else:
        words = "the older run does not say what it was made of"
    return Cause(kind="unknown", words=words)


def _read_by(stage: str, changes: Sequence[Change], name: str = "") -> list[Change]:
    """The changes of the recipe that a stage reads; of a teacher's only its own."""
    sections = SECTIONS.get(stage, ())
    found = [c for c in changes if any(c.name == part or c.name.startswith(f"{part}.") for part in sections)]
    if stage in ("teacher", "teacher_outputs") and any(c.name.startswith(f"teachers.{name}.") for c in found):
        found = [c for c in found if not c.name.startswith("teachers.") or c.name.startswith(f"teachers.{name}.")]
    own = [c for c in found if c.name == stage or c.name.startswith(f"{stage}.")]
    return own or found


def _because(stage: str, changes: Sequence[Change]) -> str:
    read = _read_by(stage, changes)
    return f", since {listed([change.words for change in read])}" if read else ""


def _file_step(
    now: Night, before: Night, stage: str, name: str, files: tuple[str, str], margin: float, seed: int
) -> Step:
    change, note = accuracy_change(now, before, files, seed=seed)
    shown = files[0] if files[0] == files[1] else f"{files[0]} (before: {files[1]})"
    return Step(
        stage=stage,
        name=name,
        measured_on=f"test images, {shown}" + (f"; {note}" if note else ""),
        now=now.measured(files[0], "accuracy"),
        before=before.measured(files[1], "accuracy"),
        change=change,
        word="cannot tell" if change is None else judged(change, margin, higher_is_better=True),
    )


def _search_step(now: Night, before: Night, margin: float) -> Step:
    rows = now.row("search"), before.row("search")
    a, b = ((row or {}).get("metrics", {}).get("finalist_accuracy") for row in rows)
    counts = now.count("validation"), before.count("validation")
    change = None
    if a is not None and b is not None and counts[0] and counts[1]:
        change = unpaired_change(a, counts[0], b, counts[1])
    return Step(
        stage="search",
        name=str((rows[0] or {}).get("name", "study")),
        measured_on="validation images, not paired",
        now=a,
        before=b,
        change=change,
        word="cannot tell" if change is None else judged(change, margin, higher_is_better=True),
    )


def _fall(steps: Sequence[Step]) -> Step | None:
    """The first drop beyond chance that is still there at the end."""
    if not steps or steps[-1].word != "worse":
        return None
    fell = steps[-1]
    for step in reversed(steps[:-1]):
        if step.word != "worse":
            break
        fell = step
    return fell


def _sentence(
    now: Night, own: Sequence[Origin], origins: Sequence[Origin], followed: Sequence[str], fell: Step | None
) -> str:
    first = f"the first change is `{origins[0].label}`: {origins[0].words}" if origins else ""
    others = len({origin.label for origin in origins[1:]})
    beyond = [origin for origin in origins[1:] if set(_words(origin)) - set(_words(origins[0]))] if origins else []
    more = "" if not others else f"; {_counted(others)} changed of themselves too"
    if beyond:
        more += f" (`{beyond[0].label}`: {beyond[0].words})"
    if fell is None:
        if not origins:
            return "Nothing differs: every stage gave what it gave before." if not followed else NO_ORIGIN
        return f"Accuracy did not fall beyond chance; {first}{more}."
    points = f"Accuracy fell by {-(fell.change.estimate if fell.change else 0.0) * 100:.1f} points at `{fell.label}`"
    at_fall = next((origin for origin in own if origin.label == fell.label), None)
    if at_fall is not None and fell.label not in followed:
        return f"{points}; its inputs are the same, {at_fall.words}."
    upstream = [origin for origin in origins if origin.label in _ancestors(now, fell)] or list(origins[:1])
    if not upstream:
        return f"{points}; {NO_ORIGIN[0].lower()}{NO_ORIGIN[1:]}"
    text = f"{points}; its inputs differ since `{upstream[0].label}`: {upstream[0].words}"
    if at_fall is not None:
        text += f"; besides, {at_fall.words} at `{fell.label}`"
    return f"{text}."


NO_ORIGIN = "Stages differ, yet no stage has a cause of its own: a run folder is incomplete."


def _words(origin: Origin) -> list[str]:
    return [cause.words for cause in origin.causes]


def _counted(number: int) -> str:
    return "1 other stage" if number == 1 else f"{number} other stages"


def _ancestors(night: Night, step: Step) -> set[str]:
    """Labels of every stage whose output went into a stage, directly or not."""
    makers: dict[str, list[Row]] = {}
    for row in night.lineage:
        makers.setdefault(str(row["output"]), []).append(row)
    start = night.row(step.stage, step.name)
    todo, found = list((start or {}).get("inputs", ())), set()
    seen: set[str] = set()
    while todo:
        digest = todo.pop()
        if digest in seen:
            continue
        seen.add(digest)
        for row in makers.get(digest, ()):
            found.add(f"{row['stage']}/{row['name']}")
            todo.extend(row["inputs"])
    return found
