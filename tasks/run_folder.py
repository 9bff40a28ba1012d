"""``runs/<recipe>/<run-id>/``: everything a person or a script wants to know about a run, as plain files."""

import csv
import datetime as dt
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from export.comparison import COLUMNS, pareto_flags, read_comparison, write_comparison
from export.latency import BenchmarkResult
from export.profiles import forms_of, runs_here
from export.report.page import build_report
from export.runtime import cpu_features
from export.targets import AnyTarget, OnnxRuntimeTarget
from export.temperature import temperature_of
from export.verdict import RunVerdict
from tasks import tracking
from tasks.artifacts import Store
from tasks.candidates import champion_facts, log_rows
from tasks.export import write_target
from tasks.model_card import write_card
from tasks.settings import SOURCE_ROOT, settings
from tasks.stage import StageResult

PACKAGES = (
    *("torch", "torchvision", "torchao", "timm", "torch-pruning", "optuna"),
    *("onnx", "onnxruntime-gpu", "tensorrt-rtx", "prefect", "mlflow"),
)
Results = Mapping[str, StageResult]


class OutcomeLike(Protocol):
    """The handles of a finished run, by role and name (``flows.compress.Outcome``)."""

    data: StageResult
    teachers: dict[str, StageResult]
    selection: StageResult
    search: StageResult
    students: dict[str, StageResult]
    controls: dict[str, StageResult]
    sensitivities: dict[str, StageResult]
    quantized: dict[str, StageResult]
    files: dict[str, StageResult]
    unrun: dict[str, StageResult]
    failures: dict[str, str]
    engines: dict[str, StageResult]
    evaluation: StageResult | None
    robustness: StageResult | None
    attention: StageResult | None
    benchmark: StageResult | None
    diagnosis: StageResult | None
    verdict: StageResult | None
    registered: StageResult | None


SPARSE_FACTS = ("nonzero_share", "tensorrt_sparse_layers", "compressed_bytes")
"""Of files whose weights have many zeros."""


def write_run_folder(
    recipe: Mapping[str, Any],
    recipe_yaml: str,
    outcome: OutcomeLike,
    results: Sequence[StageResult],
    store: Store,
    parent: tracking.Run,
) -> dict[str, Any]:
    """Write the folder, log it on the parent run, and return the summary that is shown to people (JSON)."""
    if outcome.evaluation is None or outcome.benchmark is None or outcome.verdict is None:
        raise ValueError("A run folder needs the evaluation, the benchmark and the verdict.")
    name = str(recipe["name"])
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = settings().runs_dir / name / f"{stamp}-{parent.id[:8]}"
    _clear_unfinished(folder.parent, parent)
    folder.mkdir(parents=True, exist_ok=True)
    facts = json.loads((store.open(outcome.evaluation.artifact) / "evaluation.json").read_text())
    timing = BenchmarkResult.model_validate_json((store.open(outcome.benchmark.artifact) / "latency.json").read_text())
    verdict = RunVerdict.model_validate(outcome.verdict.info)

    (folder / "recipe.resolved.yaml").write_text(recipe_yaml, encoding="utf-8")
    _write_json(folder / "env.json", environment(recipe))
    _write_json(folder / "lineage.json", [_lineage_row(result) for result in results])
    _write_json(folder / "selection.json", outcome.selection.info)
    trained = {**outcome.teachers, **outcome.students, **outcome.controls}
    histories = {key: result.info.get("history", []) for key, result in trained.items()}
    histories |= {f"{key} (quantize)": result.info.get("history", []) for key, result in outcome.quantized.items()}
    _write_json(folder / "histories.json", {key: rows for key, rows in histories.items() if rows})
    _write_json(folder / "reliability.json", facts["reliability"])
    (folder / "verdict.json").write_text(verdict.model_dump_json(indent=1))
    shutil.copyfile(store.open(outcome.search.artifact) / "trials.csv", folder / "trials.csv")
    for kept, files in (
        (outcome.benchmark, ("latency.json", "latency_raw.csv")),
        (outcome.evaluation, ("ladder.json", "layer_diff.csv")),
        (outcome.diagnosis, ("diagnosis.json",)),
        (outcome.robustness, ("robustness.json",)),
        (outcome.attention, ("attention.json",)),
    ):
        if kept is None:
            continue
        for file in files:
            shutil.copyfile(store.open(kept.artifact) / file, folder / file)
    calibration = {"teacher": timing.reference, "class_names": outcome.data.info.get("class_names", [])}
    _write_json(folder / "calibration.json", {**calibration, "files": facts["calibration"]})
    _write_json(folder / "sensitivity.json", _layers(folder, outcome, store))
    _write_parity(folder / "parity.csv", facts["parity"])
    rows = comparison_rows(recipe, outcome, facts, timing, verdict)
    write_comparison(rows, folder / "comparison.csv")
    _write_json(folder / "data.json", {"sha256": outcome.data.artifact.sha256, **outcome.data.info})
    if champion := champion_facts(name):
        _write_json(folder / "champion.json", champion)
    _write_teachers(folder / "teachers.csv", recipe, outcome, facts, timing)
    _write_exports(folder / "export", recipe, outcome, verdict, store)
    build_report(folder)
    if verdict.outcome == "accept":
        write_card(folder, outcome.registered.info if outcome.registered else {})

    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "latency_raw.csv":
            parent.log_file(path)
    log_rows(parent, rows)
    parent.log_metrics(_headline(rows, verdict))
    parent.tag({"verdict": verdict.outcome, "run_folder": str(folder)})
    return {
        "recipe": name,
        "run": folder.name,
        "folder": str(folder),
        "outcome": verdict.outcome,
        "ships": {target: item.ships for target, item in verdict.targets.items() if item.ships},
        "reasons": [reason for item in verdict.targets.values() if item.ran for reason in item.reasons],
        "summary": verdict.summary,
        "registered": outcome.registered.info if outcome.registered else {},
        "mlflow_run": parent.id,
        "mlflow_url": parent.url,
    }


def _clear_unfinished(folder: Path, parent: tracking.Run) -> None:
    """Remove what this run had begun to write when it was killed."""
    for begun in folder.glob(f"*-{parent.id[:8]}"):
        if not (begun / "summary.json").is_file():
            shutil.rmtree(begun, ignore_errors=True)


def _layers(folder: Path, outcome: OutcomeLike, store: Store) -> dict[str, Any]:
    """Model -> its sensitivity table (also as CSV), which layers stayed in float, and what accuracy control did."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*outcome.sensitivities, *outcome.quantized]):
        facts: dict[str, Any] = {}
        if name in outcome.sensitivities:
            place = store.open(outcome.sensitivities[name].artifact)
            facts["table"] = json.loads((place / "sensitivity.json").read_text())
            shutil.copyfile(place / "sensitivity.csv", folder / f"sensitivity-{name}.csv")
        if name in outcome.quantized:
            facts |= {key: outcome.quantized[name].info.get(key) for key in ("keep_float", "control")}
        if "table" in facts or facts.get("control"):
            found[name] = facts
    return found


def comparison_rows(
    recipe: Mapping[str, Any],
    outcome: OutcomeLike,
    facts: Mapping[str, Any],
    timing: BenchmarkResult,
    verdict: RunVerdict,
) -> list[dict[str, Any]]:
    """One row per file and batch size, in the columns of ``export.comparison``."""
    shipped = {item.ships: target for target, item in verdict.targets.items() if item.ships}
    judged = {item.candidate: item for item in verdict.targets.values()}
    best = timing.reference
    features = cpu_features()
    isa = "+".join(flag for flag in ("avx2", "avx512", "vnni", "dot_product") if getattr(features, flag))
    rungs = {row["file"]: row["parity"] for row in facts["parity"] if row.get("file") and row["parity"]}
    corrupted = outcome.robustness.metrics if outcome.robustness is not None else {}
    rows: list[dict[str, Any]] = []
    batches = sorted({row.batch for row in timing.rows})
    points = []
    for file, result in outcome.files.items():
        base, _, form = file.partition(".")
        role, model, seconds = _origin(base, outcome)
        metrics = facts["metrics"][file]
        control = None
        if role == "student":
            control = f"{base}.int8-ptq" if form in ("int8", "int8-arm") else f"{base}-control.float32"
            control = control if control in outcome.files and form != "int8-ptq" else None
        if form.startswith("int8") and form != "int8-ptq" and base in outcome.quantized:
            seconds += outcome.quantized[base].seconds
        row: dict[str, Any] = {
            "id": file,
            "role": "control" if form == "int8-ptq" else role,
            "parent": {"teacher": None, "student": best, "control": best}[role]
            if form == "float32"
            else f"{base}.float32",
            "control": control,
            "stages": _stages(role, form, sparse="sparsity" in model.metrics, dense=base.endswith("-dense")),
            "recipe": recipe["name"],
            "teachers": ", ".join(model.info.get("panel", [])) or None,
            "seed": recipe["seed"],
            **{key: metrics[key] for key in ("accuracy", "nll", "ece", "brier")},
            "ece_scaled": ((facts["calibration"].get(file) or {}).get("after") or {}).get("ece"),
            "accuracy_corrupted": corrupted.get(f"{file}/corrupted_accuracy"),
            "delta_teacher": metrics["accuracy"] - facts["metrics"][best]["accuracy"],
            "params": model.metrics.get("params"),
            "macs": model.metrics.get("macs"),
            "target": ", ".join(_targets(recipe, role, form)) or None,
            "precision": "int8" if form.startswith("int8") else form,
            "size_bytes": result.metrics["size_bytes"],
            **{key: result.metrics[key] for key in SPARSE_FACTS if key in result.metrics},
            "runtime": f"onnxruntime {timing.environment.get('onnxruntime', '')}".strip(),
            "provider": "CPU",
            "isa": isa or None,
            "seconds": seconds,
            "verdict": _verdict_word(file, shipped, judged),
            "status": "cached" if result.cached else "measured",
        }
        if control is not None:
            row["delta_control"] = metrics["accuracy"] - facts["metrics"][control]["accuracy"]
        if file in rungs:
            row |= {
                "flips": rungs[file]["flips"],
                "parity_max_abs": rungs[file]["max_abs"],
                "parity_kl": rungs[file]["kl"],
            }
        timed = {row_.batch: row_ for row_ in timing.rows if row_.model == file}
        for batch in batches if timed else [None]:
            measured = timed.get(batch) if batch is not None else None
            cells = dict(row)
            if measured is not None:
                names = {column.name for column in COLUMNS}
                cells |= {key: value for key, value in measured.model_dump().items() if key in names}
                cells |= {"threads": timing.environment.get("threads")}
            elif file in timing.failures:
                cells["status"] = f"failed: {timing.failures[file]}"
            rows.append(cells)
            points.append((measured.latency_p50_ms if measured else float("nan"), metrics["accuracy"], batch))
    for batch in batches:
        places = [place for place, point in enumerate(points) if point[2] == batch]
        for place, flag in zip(places, pareto_flags([points[place][:2] for place in places]), strict=True):
            rows[place]["pareto"] = flag
    for file, why in outcome.failures.items():
        rows.append({"id": file, "role": "file", "recipe": recipe["name"], "status": f"failed: {why}"})
    for file, result in outcome.unrun.items():
        rows.append(
            {
                "id": file,
                "role": "file",
                "precision": result.info.get("form"),
                "recipe": recipe["name"],
                "size_bytes": result.metrics["size_bytes"],
                "status": "built, not run",
            }
        )
    for engine, result in outcome.engines.items():
        rows.append(
            {
                "id": engine,
                "role": "engine",
                "target": verdict.targets[engine].target if engine in verdict.targets else None,
                "precision": result.info.get("precision"),
                "recipe": recipe["name"],
                "size_bytes": result.metrics["size_bytes"],
                "runtime": f"{result.info.get('backend')} {result.info.get('backend_version')}",
                "seconds": result.seconds,
                "status": result.info.get("status"),
            }
        )
    return rows


def _targets(recipe: Mapping[str, Any], role: str, form: str) -> list[str]:
    """The targets a file was measured on, as those of this CPU are, or built for."""
    known = [TypeAdapter[AnyTarget](AnyTarget).validate_python(target) for target in recipe["targets"]]
    cpus = [target for target in known if isinstance(target, OnnxRuntimeTarget)]
    return [
        target.name
        for target in cpus
        if (form in forms_of(target) if role == "student" and form != "int8-ptq" else runs_here(target))
    ]


def _origin(base: str, outcome: OutcomeLike) -> tuple[str, StageResult, float]:
    """(role, the result that trained it, seconds its stages took)."""
    if base in outcome.students:
        result = outcome.students[base]
        return "student", result, result.seconds
    if base in outcome.controls:
        result = outcome.controls[base]
        return "control", result, result.seconds
    result = outcome.teachers[base.removeprefix("teacher-")]
    return "teacher", result, result.seconds


def _stages(role: str, form: str, *, sparse: bool, dense: bool) -> str:
    made = {"teacher": ["train"], "student": ["search", "distil"], "control": ["search", "train"]}[role]
    made = ["search", "distil"] if dense else [*made, "sparsify"] if sparse else made
    extra = ["ptq"] if form == "int8-ptq" else ["quantize", "export"] if form.startswith("int8") else ["export"]
    return " > ".join([*made, *extra])


def _verdict_word(file: str, shipped: Mapping[str, str], judged: Mapping[str, Any]) -> str | None:
    if file in shipped:
        return "ships"
    return judged[file].outcome if file in judged else None


def _headline(rows: Sequence[Mapping[str, Any]], verdict: RunVerdict) -> dict[str, float]:
    """The shipped file's numbers under the names every stage uses, for the parent run."""
    names = ("accuracy", "ece", "nll", "params", "macs", "size_bytes", "latency_p50_ms", "latency_p95_ms")
    for row in rows:
        if row.get("verdict") == "ships":
            shipped = {name: float(row[name]) for name in names if row.get(name) is not None}
            return {**shipped, "accepted": float(verdict.outcome == "accept")}
    return {"accepted": float(verdict.outcome == "accept")}


def _lineage_row(result: StageResult) -> dict[str, Any]:
    return {
        "stage": result.stage,
        "name": result.name,
        "key": result.key,
        "cached": result.cached,
        "seconds": round(result.seconds, 3),
        "cpu_seconds": None if result.cpu_seconds is None else round(result.cpu_seconds, 3),
        "energy_j": result.energy_j,
        "made_of": result.made_of,
        "inputs": list(result.inputs),
        "output": result.artifact.sha256,
        "size_bytes": result.artifact.size_bytes,
        "mlflow_run_id": result.run_id,
        "parent_run": result.parent_run,
        "metrics": result.metrics,
    }


def environment(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=SOURCE_ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu_features().model_dump(mode="json"),
        "cores": os.cpu_count(),
        "packages": versions,
        "commit": commit or "not a git checkout",
        "seed": recipe["seed"],
    }


def _write_parity(path: Path, rungs: Sequence[Mapping[str, Any]]) -> None:
    columns = ("name", "against", "status", "top1", "flips", "kl", "max_abs", "mean_abs", "floor", "note")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        for rung in rungs:
            row: dict[str, Any] = {**rung, **(rung["parity"] or {})}
            writer.writerow({key: value for key, value in row.items() if key in columns})


def _write_teachers(
    path: Path,
    recipe: Mapping[str, Any],
    outcome: OutcomeLike,
    facts: Mapping[str, Any],
    timing: BenchmarkResult,
) -> None:
    scores = outcome.selection.info
    columns = (
        *("name", "kind", "in_panel", "accuracy", "validation_accuracy", "nll", "ece"),
        *("params", "macs", "size_bytes", "latency_p50_ms"),
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, result in outcome.teachers.items():
            row = f"teacher-{name}.float32"
            measured = facts["metrics"].get(row, {})  # a black box has no file to measure
            latency = next((item.latency_p50_ms for item in timing.rows if item.model == row), None)
            writer.writerow(
                {
                    "name": name,
                    "kind": result.info.get("kind"),
                    "in_panel": name in scores.get("panel", []),
                    **{key: measured.get(key) for key in ("accuracy", "nll", "ece")},
                    "validation_accuracy": result.metrics.get("accuracy"),
                    **{key: result.metrics.get(key) for key in ("params", "macs")},
                    "size_bytes": outcome.files[row].metrics["size_bytes"] if row in outcome.files else None,
                    "latency_p50_ms": latency,
                }
            )


def _write_exports(
    folder: Path, recipe: Mapping[str, Any], outcome: OutcomeLike, verdict: RunVerdict, store: Store
) -> None:
    for target in recipe["targets"]:
        name = target["name"]
        files: dict[str, Path] = {}
        notes: dict[str, Any] = {"recipe": recipe["name"], "data": outcome.data.artifact.sha256}
        if target["kind"] == "onnxruntime" and name in verdict.targets:
            ships = verdict.targets[name].ships
            candidate = ships or verdict.targets[name].candidate
            notes |= {"accepted": ships is not None, "file": candidate}
            files["model.onnx"] = store.open(outcome.files[candidate].artifact) / "model.onnx"
            notes["temperature"] = temperature_of(files["model.onnx"])
        elif target["kind"] == "onnxruntime":  # for another kind of processor than this one
            for candidate, judged in verdict.targets.items():
                if judged.target == name and candidate in outcome.files:
                    files[f"{candidate}.onnx"] = store.open(outcome.files[candidate].artifact) / "model.onnx"
        else:
            for engine, result in outcome.engines.items():
                if verdict.targets[engine].target != name:
                    continue
                place = store.open(result.artifact)
                if target["kind"] == "openvino":
                    files |= {f"{engine}.{end}": place / f"model.{end}" for end in ("xml", "bin")}
                    files[f"{engine}.json"] = place / "openvino.json"
                else:
                    files[f"{engine}.engine"] = place / "model.engine"
                    files[f"{engine}.json"] = place / "engine.json"
        if not files:
            continue
        write_target(folder / name, target, files, notes)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def run_folders(recipe: str | None = None) -> list[Path]:
    """Finished run folders, oldest first; of one recipe or of all."""
    places = [settings().runs_dir / recipe] if recipe else sorted(settings().runs_dir.glob("*"))
    return [
        run for place in places if place.is_dir() for run in sorted(place.iterdir()) if (run / "summary.json").is_file()
    ]


def save_summary(summary: Mapping[str, Any]) -> None:
    """Mark the run folder as finished."""
    _write_json(Path(summary["folder"]) / "summary.json", dict(summary))


def latest_finished(recipe: str, recipe_yaml: str) -> dict[str, Any] | None:
    """Summary of the newest finished run of exactly this recipe."""
    for folder in reversed(run_folders(recipe)):
        if (folder / "recipe.resolved.yaml").read_text(encoding="utf-8") == recipe_yaml:
            return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Comparison rows of a run folder.

    Raises:
        FileNotFoundError: it is not a run folder.
    """
    return read_comparison(folder / "comparison.csv")
