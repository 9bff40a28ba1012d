"""``model_card.md`` and ``model_card.html`` of a run that was accepted.

What people state (use, licences) is the recipe's section ``card``; everything else is read from the run's files, and
what is not in them is "not stated" or "not measured".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compression.errors import InputError
from export.comparison import BY_NAME, Column, is_missing, show
from export.model_card.running import how_to_run
from export.profiles import Manifest, read_manifest
from export.report import figures_cost
from export.report.page import best_teacher, flat, shipped_row
from export.report.render import render
from export.report.run_folder import RunFolder, open_run
from export.report.tables import PARITY, Cells, table, used_columns

NOT_STATED = "not stated"
STEMS = ("model_card.md", "model_card.html")

TEACHERS = (
    Column("name", "teacher", "its name in the recipe"),
    Column("kind", "architecture", "family of the network", missing=NOT_STATED),
    Column("source", "source", "where its weights come from", missing=NOT_STATED),
    Column("licence", "licence", "as the recipe states it", missing=NOT_STATED),
    Column("in_panel", "taught", "whether it was one of the panel"),
    BY_NAME["accuracy"],
)
RESULTS = (
    *("id", "batch", "precision", "accuracy", "delta_teacher", "size_bytes", "latency_p50_ms", "latency_p95_ms"),
    *("ratio_to_reference", "peak_rss_bytes", "energy_j"),
)
CHANGES = (
    Column("what", "number", "what is compared"),
    Column("before", "champion", "as its own run measured it"),
    Column("now", "this model", "as this run measured it"),
    Column("word", "verdict", "by the bounds of the interval", missing="not judged"),
)


@dataclass(frozen=True)
class Part:
    """One section: sentences, then facts, tables and code, each if there are any."""

    title: str
    text: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Cells] = ()
    code: Sequence[Mapping[str, Any]] = ()
    points: Sequence[str] = field(default=())


def write_card(folder: Path, registered: Mapping[str, Any] | None = None) -> Path:
    """Write both files into the run folder; returns the Markdown file.

    Args:
        folder: A finished run.
        registered: ``model`` and ``version`` of the registry; default: those of ``summary.json``.

    Raises:
        InputError: the run was not accepted, so that there is no model to describe.
    """
    run = open_run(folder)
    if run.verdict is None or run.verdict.outcome != "accept":
        found = run.verdict.outcome if run.verdict else "no verdict"
        raise InputError(
            f"Run '{run.name}' has the verdict '{found}', expected 'accept'. Only an accepted model has a card; "
            "report.html says why this one was not."
        )
    facts = contents(run, registered if registered is not None else _json(run.path / "summary.json").get("registered"))
    for stem in STEMS:
        text = render(f"{stem}.jinja", facts, escape=stem.endswith("html"), folder=Path(__file__).parent)
        (run.path / stem).write_text(text, encoding="utf-8")
    return run.path / STEMS[0]


def contents(run: RunFolder, registered: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Title, summary and parts of the card."""
    recipe = yaml.safe_load(run.recipe) or {}
    row, teacher = shipped_row(run.comparison) or {}, best_teacher(run.comparison) or {}
    manifests = [read_manifest(path.parent) for path in sorted((run.path / "export").glob("*/manifest.json"))]
    manifests.sort(key=lambda each: not each.accepted)  # what ships comes first
    parts = [
        _what(run, recipe, row, manifests, registered or {}),
        _use(recipe, row, manifests),
        _teachers(run, recipe),
        _data(run, recipe),
        _training(run, recipe, row),
        _results(run, row, teacher),
        _reliability(run, row),
        _parity(run, row),
        _limits(run, manifests),
        _running(manifests),
        _cost(run, row),
        _lineage(run, recipe, row, registered or {}),
        _gate(run),
        _change(run, row),
    ]
    return {"title": recipe.get("name", run.path.parent.name), "run": run.name, "short": short(run), "parts": parts}


def short(run: RunFolder) -> str:
    """One paragraph, as the registry shows it."""
    row = shipped_row(run.comparison) or {}
    description = (yaml.safe_load(run.recipe) or {}).get("description") or ""
    numbers = ", ".join(
        f"{title} {show(row.get(name), BY_NAME[name].kind)}"
        for name, title in (
            ("accuracy", "accuracy"),
            ("latency_p50_ms", f"p50 at batch {row.get('batch')}"),
            ("size_bytes", "size"),
            ("ece", "ECE"),
        )
    )
    return f"{description} {row.get('id')} of run {run.path.name}: {numbers}.".strip()


def _what(
    run: RunFolder,
    recipe: Mapping[str, Any],
    row: Mapping[str, Any],
    manifests: Sequence[Manifest],
    registered: Mapping[str, Any],
) -> Part:
    file = manifests[0] if manifests else None
    version = f"{registered['model']}, version {registered['version']}" if registered.get("version") else "not yet"
    return Part(
        "What it is",
        [recipe.get("description") or f"The recipe does not describe it: {NOT_STATED}."],
        [
            ("File", str(row.get("id"))),
            ("Made by", str(row.get("stages") or NOT_STATED)),
            ("Precision", str(row.get("precision"))),
            *((name, show(row.get(key), BY_NAME[key].kind)) for name, key in _SIZES),
            ("Input", f"{file.input.name}, {file.input.dtype}, {_shape(file.input.shape)}" if file else NOT_STATED),
            ("Output", f"{file.output.name}, {_shape(file.output.shape)}: one logit per class" if file else NOT_STATED),
            ("Classes", ", ".join(file.class_names) if file and file.class_names else NOT_STATED),
            ("Registered as", version),
        ],
    )


_SIZES = (("Parameters", "params"), ("Multiply-accumulates of one image", "macs"), ("Size", "size_bytes"))


def _use(recipe: Mapping[str, Any], row: Mapping[str, Any], manifests: Sequence[Manifest]) -> Part:
    classes = len(manifests[0].class_names) if manifests else 0
    points = [
        f"Every image gets one of the {classes} classes, also one that shows none of them."
        if classes
        else "Every image gets one of the classes, also one that shows none of them.",
        "It was measured on the test split below alone; images from elsewhere have to be measured first.",
    ]
    if not is_missing(row.get("accuracy_corrupted")):
        points.append(
            f"On corrupted test images it is right on {show(row['accuracy_corrupted'], 'share')} of them, on clean "
            f"ones on {show(row.get('accuracy'), 'share')}."
        )
    stated = _stated(recipe)
    intended = stated.get("intended") or recipe.get("description")
    return Part(
        "Intended and unsuited use",
        [f"Intended: {intended}" if intended else f"Intended use: {NOT_STATED}.", "Unsuited:"],
        points=[*stated.get("unsuited", ()), *points],
    )


def _teachers(run: RunFolder, recipe: Mapping[str, Any]) -> Part:
    measured = {row.get("name"): row for row in run.teachers}
    licences = {each["teacher"]: each["licence"] for each in _stated(recipe).get("teacher_licences") or ()}
    rows = []
    for teacher in recipe.get("teachers", ()):
        source = teacher.get("source") or {}
        found = measured.get(teacher["name"], {})
        rows.append(
            {
                "name": teacher["name"],
                "kind": (teacher.get("model") or {}).get("kind") or "black box",
                "source": " ".join(str(source[key]) for key in ("kind", "path") if source.get(key)),
                "licence": licences.get(teacher["name"]),
                "in_panel": found.get("in_panel"),
                "accuracy": found.get("accuracy"),
            }
        )
    return Part("Teachers", tables=[table(rows, TEACHERS)])


def _data(run: RunFolder, recipe: Mapping[str, Any]) -> Part:
    entry = next((each for each in run.lineage if each.get("stage") == "data"), {})
    counts, hashes = entry.get("metrics") or {}, run.data.get("hashes") or {}
    splits = ("train", "validation", "calibration", "test", "pool")
    rows = [
        {"split": split, "images": counts.get(f"num_{split}"), "sha256": hashes.get(split)}
        for split in splits
        if f"num_{split}" in counts or split in hashes
    ]
    columns = (
        Column("split", "split", ""),
        Column("images", "images", "", "count"),
        Column("sha256", "SHA-256 of images, labels and ids", "", missing="not recorded"),
    )
    return Part(
        "Data",
        [
            "Trained on train; chosen on validation; ranges and temperature fitted on calibration; "
            "measured on test, which nothing else looks at."
        ],
        [
            ("Source", str(entry.get("name") or (recipe.get("data") or {}).get("kind"))),
            ("Licence", _stated(recipe).get("data_licence") or NOT_STATED),
            ("SHA-256 of all", str(entry.get("output") or "not recorded")),
        ],
        [table(rows, columns)],
        points=[str(warning) for warning in run.data.get("warnings", ())],
    )


def _training(run: RunFolder, recipe: Mapping[str, Any], row: Mapping[str, Any]) -> Part:
    sections = ("augment", "distill", "sparsify", "quantize", "calibrate")
    facts = [pair for name in sections if recipe.get(name) for pair in flat(_worded({name: recipe[name]}))]
    search = recipe.get("search") or {}
    return Part(
        "Training and compression",
        [f"Stages: {row.get('stages')}. The whole recipe is recipe.resolved.yaml beside this card."],
        [
            ("search", f"{search.get('kind', 'not run')}, {search.get('trials', '?')} trials"),
            ("seed", str(recipe.get("seed"))),
            *((name, text) for name, text in facts if text not in ("not measured", "none")),
        ],
    )


def _worded(section: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of methods in words: ``cross_entropy (weight 0.5), kd (weight 0.5, temperature 2.0)``."""

    def method(each: Any) -> Any:
        if not isinstance(each, Mapping):
            return each
        fields = [f"{key} {value}" for key, value in each.items() if key != "kind" and value is not None]
        return f"{each.get('kind', '')} ({', '.join(fields)})".strip()

    def word(value: Any) -> Any:
        return [method(each) for each in value] if isinstance(value, list) else value

    return {key: _worded(value) if isinstance(value, Mapping) else word(value) for key, value in section.items()}


def _results(run: RunFolder, row: Mapping[str, Any], teacher: Mapping[str, Any]) -> Part:
    controls = {row.get("control"), teacher.get("id"), row.get("id")}
    rows = [each for each in run.comparison if each.get("id") in controls]
    cpu = (run.env.get("cpu") or {}).get("model") or "an unknown processor"
    return Part(
        "Results on this hardware",
        [
            f"On the test split; times of {row.get('runtime')} on {cpu} ({row.get('isa') or 'no vector extensions'}), "
            f"{show(row.get('threads'), 'count')} thread, interleaved with the teacher's. "
            "They hold for this hardware alone. "
            f"The shipped file is {row.get('id')}, the best teacher {teacher.get('id')}, "
            f"the control arm {row.get('control') or 'none'}."
        ],
        tables=[table(rows, used_columns([BY_NAME[name] for name in RESULTS], rows))],
    )


def _reliability(run: RunFolder, row: Mapping[str, Any]) -> Part:
    found = (run.calibration.get("files") or {}).get(row.get("id")) or {}
    before, after = found.get("before") or {}, found.get("after") or {}
    names = run.calibration.get("class_names") or []
    known = {place: value for place, value in enumerate(found.get("per_class", ())) if value is not None}
    worst = min(known, key=lambda place: known[place], default=None)
    temperature = found.get("temperature")
    where = "the file divides by it" if found.get("applied") else "divide the logits by it before the softmax"
    return Part(
        "Reliability",
        facts=[
            ("Calibration error (ECE) as it answers", show(before.get("ece"), "number")),
            ("ECE after the temperature", show(after.get("ece"), "number", "not fitted")),
            ("Temperature", "not fitted" if is_missing(temperature) else f"{temperature:.4f}: {where}"),
            (
                "Worst class",
                "not measured"
                if worst is None
                else f"{show(known[worst], 'share')} of class {names[worst] if worst < len(names) else worst}",
            ),
            ("Accuracy on corrupted images", show(row.get("accuracy_corrupted"), "share")),
            ("Answers like the best teacher's", show(row.get("agreement_teacher"), "share")),
        ],
    )


def _parity(run: RunFolder, row: Mapping[str, Any]) -> Part:
    base = str(row.get("id")).partition(".")[0]
    rungs = [each for each in run.parity if str(each.get("name", "")).removeprefix("engine ").startswith(base)]
    rungs = [each for each in rungs if not str(each.get("name")).startswith(f"{base}-control")]
    names = ("name", "against", "status", "top1", "flips", "kl", "max_abs")
    return Part(
        "Parity ladder",
        ["Whether it still says the same after each conversion; what could not be run here is not counted as passed."],
        tables=[table(rungs, [column for column in PARITY if column.name in names])],
    )


def _limits(run: RunFolder, manifests: Sequence[Manifest]) -> Part:
    facts = []
    for each in manifests:
        where = [each.runtime, f"version {each.runtime_versions}", f"built with {each.built_with}"]
        where += [f"ISA {each.isa}"] if each.isa else []
        where += [f"needs {', '.join(each.cpu_features)} for full accuracy and speed"] if each.cpu_features else []
        where += [f"GPU generations {', '.join(each.compute_capabilities)}"] if each.compute_capabilities else []
        batches = "any batch size" if each.batches is None else f"batch {each.batches[0]} to {each.batches[1]}"
        facts.append((each.target, "; ".join([*where, batches])))
    if manifests:
        first = manifests[0]
        facts.append(("Input", f"{_shape(first.input.shape)}, {first.input.dtype}, channels first"))
        if first.preprocessing is not None:
            spec = first.preprocessing
            facts.append(("Range of a raw value", f"0 to {spec.scale:g}"))
            facts.append(
                (
                    "Preprocessing",
                    f"(value / {spec.scale:g} - mean) / std per channel; mean {_numbers(spec.mean)}, "
                    f"std {_numbers(spec.std)}",
                )
            )
    return Part("Limits", ["Outside of these nothing was checked."], facts)


def _running(manifests: Sequence[Manifest]) -> Part:
    found = [how_to_run(each, f"export/{each.target}") for each in manifests]
    return Part("How to run it", ["In the run folder:"], code=[each for each in found if each is not None])


def _cost(run: RunFolder, row: Mapping[str, Any]) -> Part:
    cost = figures_cost.costs(run.lineage, [str(row.get("id"))]).get(str(row.get("id")), {})
    kinds = {"seconds": "seconds", "cpu_seconds": "seconds", "energy_j": "joules", "spent": "seconds"}
    titles = {
        "seconds": "Wall time of all stages it descends from",
        "cpu_seconds": "Processor time of those",
        "energy_j": "Energy of the processor meanwhile",
        "spent": "Of the wall time, spent in this run",
    }
    facts = [(title, show(cost.get(key), kinds[key])) for key, title in titles.items()]
    return Part("Cost", facts=[*facts, ("Energy of one inference", show(row.get("energy_j"), "number"))])


def _lineage(run: RunFolder, recipe: Mapping[str, Any], row: Mapping[str, Any], registered: Mapping[str, Any]) -> Part:
    made = figures_cost.ancestors(run.lineage, str(row.get("id")))
    entries = [entry for entry in run.lineage if str(entry.get("key")) in made]
    columns = (
        Column("stage", "stage", ""),
        Column("name", "for", ""),
        Column("key", "stage key", ""),
        Column("output", "SHA-256 of what it made", ""),
        Column("mlflow_run_id", "MLflow run", "", missing="none"),
    )
    rows = [{**entry, "key": str(entry.get("key"))[:12], "output": str(entry.get("output"))[:12]} for entry in entries]
    return Part(
        "Lineage",
        facts=[
            ("Run", run.name),
            ("Recipe", f"{recipe.get('name')}, seed {recipe.get('seed')}"),
            ("Code", str(run.env.get("commit") or NOT_STATED)),
            *((f"Library {name}", str(text)) for name, text in (run.env.get("packages") or {}).items()),
        ],
        tables=[table(rows, columns)],
    )


def _gate(run: RunFolder) -> Part:
    verdict = run.verdict
    targets = verdict.targets.values() if verdict else ()
    checks = [{"target": each.target, **check.model_dump()} for each in targets if each.ran for check in each.checks]
    columns = [Column(name, name, "") for name in ("target", "name", "outcome", "found", "expected")]
    return Part(
        "Verdict of the gate",
        [f"{verdict.outcome}: {verdict.summary}." if verdict else "The gate was not run."],
        tables=[table(checks, columns)],
        points=[reason for each in targets if each.ran for reason in each.reasons],
    )


def _change(run: RunFolder, row: Mapping[str, Any]) -> Part:
    regression = _json(run.path / "regression.json")
    against = [each for each in regression.get("comparisons", ()) if each.get("against") == "champion"]
    title = "Change since the last champion"
    if against:
        rows = [
            {
                "what": f"{each['what']} ({each['target']})",
                "word": each.get("word"),
                **{key: show(each.get(key), str(each["kind"])) for key in ("before", "now")},
            }
            for each in against[0]["rows"]
        ]
        return Part(title, [str(regression.get("sentence", ""))], tables=[table(rows, CHANGES)])
    champion = run.champion
    if not champion:
        return Part(title, ["This is the first: there was no champion when the run ended."])
    batch, time = row.get("batch"), row.get("latency_p50_ms")
    pairs: list[tuple[str, Any, Any, str]] = [
        (BY_NAME[name].title, champion.get(name), row.get(name), BY_NAME[name].kind)
        for name in ("accuracy", "ece", "size_bytes")
    ]
    times = champion.get("latency_p50_ms_by_batch") or {}
    pairs.append((f"p50 at batch {batch}, each in its own night", times.get(str(batch)), time, "ms"))
    rows = [{"what": what, "before": show(old, kind), "now": show(new, kind)} for what, old, new, kind in pairs]
    return Part(
        title,
        [f"The champion is version {champion.get('version')}, {champion.get('file')} of run {champion.get('run')}."],
        tables=[table(rows, CHANGES)],
    )


def _stated(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    return recipe.get("card") or {}


def _shape(sizes: Iterable[int]) -> str:
    return " × ".join("batch" if size < 1 else str(size) for size in sizes)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
