"""Run folders of a small chain as real runs leave them, with causes injected."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from compression.data.dataset import Dataset, Split, save_dataset
from compression.types import Preprocessing
from export.comparison import write_comparison
from export.regression.night import Night, open_night

TESTS = 1000
RECIPE: dict[str, Any] = {
    "name": "shapes",
    "seed": 0,
    "data": {"kind": "digits", "limit": None},
    "augment": {"kind": "none"},
    "teachers": [{"name": "residual", "source": {"kind": "train", "train": {"epochs": 24}}}],
    "select": {"panel_size": 1},
    "search": {"kind": "study", "trials": 6, "train": {"epochs": 6}},
    "distill": {"train": {"epochs": 30}, "views": 10},
    "sparsify": None,
    "quantize": {"kind": "qat", "train": {"epochs": 4}},
    "targets": [{"kind": "onnxruntime", "name": "cpu", "batch_sizes": [1], "threads": 1}],
    "policy": {"max_accuracy_drop": 0.02, "max_worst_class_drop": None, "max_ece_increase": 0.02},
}
LIBRARIES = {
    "quantize": ("torch", "torchao"),
    "evaluate": ("torch", "onnxruntime-gpu"),
    "benchmark": ("onnxruntime-gpu",),
}
VERSIONS = {"torch": "2.14.1", "torchao": "0.18.0", "onnxruntime-gpu": "1.31.1"}
READS = {
    "data": ("data", "seed"),
    "teacher": ("teachers", "augment", "seed"),
    "teacher_outputs": ("teachers", "augment", "seed"),
    "select": ("select",),
    "search": ("search", "distill", "seed"),
    "distill": ("distill", "seed"),
    "sparsify": ("sparsify", "seed"),
    "quantize": ("quantize", "seed"),
    "gate": ("policy", "targets"),
}


@dataclass
class Scene:
    """What a night is like; change a field to inject a cause."""

    recipe: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(RECIPE))
    versions: dict[str, str] = field(default_factory=lambda: dict(VERSIONS))
    code: dict[str, str] = field(default_factory=dict)
    """Stage -> its code, where it is not the usual."""
    source: str = "images"
    """What the data stage reads."""
    repeat: dict[str, str] = field(default_factory=dict)
    """Stage -> salt of an output that is not a function of what it was made of."""
    wrong: dict[str, int] = field(default_factory=dict)
    """File -> how many of the test images it gets wrong."""
    size: int = 60_000
    ece: float = 0.01
    outcome: str = "accept"
    made_of: bool = True
    onnx: dict[str, bytes] = field(default_factory=dict)
    """File -> its bytes, where it is kept."""
    commit: str = "a" * 40
    ratios: dict[str, float] = field(default_factory=dict)
    """File -> time over the teacher's."""


WRONG = {"teacher-residual.float32": 20, "student-0.float32": 30, "student-0.int8-symmetric": 32, "student-0.int8": 32}
RATIOS = {"teacher-residual.float32": 1.0, "student-0.float32": 0.4, "student-0.int8": 0.2}


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _dataset() -> Dataset:
    """Test images whose classes take turns; what else there is does not matter here."""
    ids = torch.arange(TESTS)
    split = Split(images=torch.zeros(TESTS, 1, 2, 2, dtype=torch.uint8), labels=ids % 10, ids=ids)
    preprocessing = Preprocessing(scale=255.0, mean=(0.5,), std=(0.5,))
    names = tuple(str(each) for each in range(10))
    return Dataset("digits", names, preprocessing, split, split, split, split, hashes={})


def make_night(root: Path, run: str, scene: Scene | None = None) -> Night:
    """Write ``root/runs/shapes/<run>`` and the artifacts it names; returns it opened."""
    scene = scene or Scene()
    folder = root / "runs" / "shapes" / run
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    outputs: dict[str, str] = {}

    def stage(name: str, of: str, *inputs: str, metrics: Mapping[str, float] | None = None, facts: Any = None) -> None:
        code = scene.code.get(f"{name}/{of}", scene.code.get(name, f"code of {name}"))
        versions = {each: scene.versions[each] for each in LIBRARIES.get(name, ("torch",))}
        config = digest(name, {part: scene.recipe[part] for part in READS.get(name, ())}, facts)
        made = {"code": digest(code), "libraries": versions, "config": config}
        gone_in = sorted(outputs[each] for each in inputs)
        key = digest(name, of, made, gone_in)
        output = digest("output", key, scene.repeat.get(name))
        outputs[f"{name}/{of}"] = output
        row = {"stage": name, "name": of, "key": key, "cached": False, "seconds": 1.0, "inputs": gone_in}
        row |= {"output": output, "size_bytes": 1, "mlflow_run_id": "", "metrics": dict(metrics or {})}
        rows.append(row | ({"made_of": made} if scene.made_of else {}))

    counts = {"num_train": 3000.0, "num_validation": 500.0, "num_test": float(TESTS), "num_classes": 10.0}
    stage("data", "digits", metrics=counts, facts=scene.source)
    stage("teacher", "residual", "data/digits", metrics={"accuracy": 0.98})
    stage("teacher_outputs", "residual", "data/digits", "teacher/residual")
    stage("select", "panel", "data/digits", "teacher_outputs/residual")
    stage("search", "study", "data/digits", "teacher_outputs/residual", metrics={"finalist_accuracy": 0.95})
    stage("distill", "student-0", "data/digits", "teacher_outputs/residual", "search/study")
    student = "distill/student-0"
    if scene.recipe["sparsify"]:
        stage("sparsify", "student-0", student, "data/digits")
        student = "sparsify/student-0"
    stage("export", "student-0.float32", student, "data/digits")
    stage("quantize", "student-0", student, "data/digits", "teacher_outputs/residual")
    stage("export", "student-0.int8-symmetric", "quantize/student-0", "data/digits")
    stage("export", "student-0.int8", "export/student-0.int8-symmetric", "quantize/student-0", "data/digits")
    stage("export", "teacher-residual.float32", "teacher/residual", "data/digits")
    files = [key for key in outputs if key.startswith("export/")]
    stage("evaluate", "test", "data/digits", *files)
    stage("benchmark", "cpu", *files)
    stage("gate", "shapes", "evaluate/test", "benchmark/cpu", *files)

    wrong, ratios = {**WRONG, **scene.wrong}, {**RATIOS, **scene.ratios}
    place = root / "objects" / outputs["evaluate/test"]
    place.mkdir(parents=True, exist_ok=True)
    for file, count in wrong.items():
        np.save(place / f"{file}.correct.npy", np.arange(TESTS) >= count)
    save_dataset(_dataset(), root / "objects" / outputs["data/digits"])
    for file, content in scene.onnx.items():
        kept = root / "objects" / outputs[f"export/{file}"]
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "model.onnx").write_bytes(content)

    def accuracy(file: str) -> float:
        return 1 - wrong[file] / TESTS

    table = [
        {
            "id": file,
            "role": file.partition("-")[0],
            "accuracy": accuracy(file),
            "ece": scene.ece,
            "size_bytes": scene.size if file == "student-0.int8" else 200_000,
            "batch": 1 if file in ratios else None,
            "latency_p50_ms": ratios.get(file),
            "ratio_to_reference": ratios.get(file),
            "verdict": "ships" if file == "student-0.int8" and scene.outcome == "accept" else None,
        }
        for file in wrong
    ]
    write_comparison(table, folder / "comparison.csv")
    bins = {file: [[accuracy(file) - scene.ece, accuracy(file), TESTS]] for file in wrong}
    judged = {"target": "cpu", "candidate": "student-0.int8", "outcome": scene.outcome, "checks": []}
    judged |= {"ships": "student-0.int8" if scene.outcome == "accept" else None, "reasons": ["'student-0.int8' did."]}
    verdict = {"outcome": scene.outcome, "summary": "cpu", "targets": {"cpu": judged}}
    env = {"python": "3.11.7", "platform": "Linux", "cores": 2, "commit": scene.commit}
    env |= {"cpu": {"model": "AMD EPYC"}, "packages": {**scene.versions}}
    names = {"teacher": "teacher-residual.float32", "class_names": [str(each) for each in range(10)], "files": {}}
    for name, content in {
        "env": env,
        "lineage": rows,
        "verdict": verdict,
        "reliability": bins,
        "calibration": names,
        "summary": {"recipe": "shapes", "run": run, "folder": str(folder), "outcome": scene.outcome},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(scene.recipe))
    return open_night(folder, lambda sha: found if (found := root / "objects" / sha).is_dir() else None)
