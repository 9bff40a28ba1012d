"""A run folder as a real run on clothing images leaves it, with made-up numbers."""

import csv
import json
from pathlib import Path

import numpy as np
import torch

from compression.calibration import calibrated_rows
from compression.statistics import Interval
from export.benchmark import BenchmarkJob, summarize
from export.comparison import write_comparison
from export.evidence import Evidence
from export.gate import Policy
from export.ladder import Ladder
from export.latency import AGAIN
from export.parity import ENGINE_NOT_RUN, Rung, compare
from export.runtime import cpu_features
from export.shipping import choose_shipped
from export.verdict import combine

MODELS = {
    "teacher-resnet": (1.0, 0.9221, 16_300_000, 746_000, 181_658),
    "teacher-convnext": (0.64, 0.8933, 5_700_000, 420_000, 96_000),
    "scratch-float32": (0.157, 0.8912, 1_399_424, 131_000, 28_410),
    "student-float32": (0.155, 0.8973, 1_399_424, 131_000, 28_410),
    "student-int8": (0.148, 0.8969, 1_399_424, 67_000, 28_410),
}


def make_run(root: Path) -> Path:
    """A run folder as a real run on clothing images leaves it, with made-up numbers."""
    run = root / "runs" / "edge-classifier" / "20261120-021500-3f9c"
    run.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = {}
    for name, (_, _, _, size, _) in MODELS.items():
        files[name] = root / f"{name}.onnx"
        files[name].write_bytes(b"\0" * size)
    job = BenchmarkJob(models=files, reference="teacher-resnet", rounds=30)
    samples, raw = {}, []
    for batch, base in ((1, 0.38), (32, 8.8)):
        mood = 1 + 0.06 * rng.random(30)
        for order, name in enumerate((*MODELS, "teacher-resnet" + AGAIN)):
            ratio = MODELS[name.removesuffix(AGAIN)][0]
            rounds = [m * base * ratio * (1 + 0.03 * rng.standard_gamma(1.0, 8)) for m in mood]
            samples[name, batch] = rounds
            raw += [(batch, t, order, name, ms) for t, times in enumerate(rounds) for ms in times]
    result = summarize(
        job,
        samples,
        memory={
            name: {"load_ms": 9.5, "first_inference_ms": 1.2, "peak_rss_bytes": 61e6, "model_rss_bytes": 6e6}
            for name in MODELS
        },
    )
    environment = {"cpu": "AMD EPYC", "isa": ["avx2"], "threads": 1, "onnxruntime": "1.31.1"}
    result = result.model_copy(update={"environment": environment})
    (run / "latency.json").write_text(result.model_dump_json())
    _write(run / "latency_raw.csv", ("batch", "round", "order", "model", "ms"), raw)

    files_evidence = [
        Evidence(
            target="cpu",
            candidate=name,
            precision=precision,
            num_samples=10_000,
            num_classes=10,
            accuracy=MODELS[name][1],
            teacher_accuracy=0.9221,
            accuracy_drop=Interval(estimate=drop, low=drop - 0.004, high=drop + 0.004, level=0.95),
            mcnemar_p=0.0001,
            worst_class_drop=Interval(estimate=0.041, low=0.012, high=0.068, level=0.95),
            ece=0.0134,
            teacher_ece=0.0121,
            flips=flips,
            parent="teacher-resnet",
            latency_ratio=Interval(
                estimate=MODELS[name][0], low=MODELS[name][0] * 0.98, high=MODELS[name][0] * 1.02, level=0.95
            ),
            latency_noise_floor=0.06,
            latency_p50_ms=0.38 * MODELS[name][0],
            latency_p95_ms=Interval(estimate=0.066, low=0.063, high=0.071, level=0.95),
            size_bytes=MODELS[name][3],
            peak_rss_bytes=61_000_000,
            integer_share=share,
            vnni=False,
            num_nodes=nodes,
        )
        for name, precision, drop, flips, share, nodes in (
            ("student-float32", "float32", 0.0248, 0.0, None, 24),
            ("student-int8", "int8", 0.0252, 0.004, 0.78, 41),
        )
    ]
    policy = Policy(max_accuracy_drop=0.03, max_worst_class_drop=0.08, max_latency_p95_ms=0.1, max_size_kib=256)
    engine = Evidence(
        target="rtx", candidate="student-int8-SM89.engine", precision="int8", ran=False, size_bytes=200_000
    )
    verdict = combine({"cpu": choose_shipped(policy, files_evidence), "rtx": choose_shipped(policy, [engine])})
    (run / "verdict.json").write_text(verdict.model_dump_json(indent=2))

    rows = []
    for name, (_, accuracy, macs, size, params) in MODELS.items():
        role = name.split("-")[0]
        for batch in (1, 32):
            timing = result.row(name, batch)
            rows.append(
                {
                    "id": name,
                    "role": {"scratch": "control", "student": "file"}.get(role, role),
                    "parent": None if role == "teacher" else "teacher-resnet",
                    "control": {"student-float32": "scratch-float32", "student-int8": "student-float32"}.get(name),
                    "stages": "search > distil > quantize > export" if role == "student" else None,
                    "accuracy": accuracy,
                    "delta_teacher": None if name == "teacher-resnet" else accuracy - 0.9221,
                    "ece": 0.0121 if role == "teacher" else 0.0134,
                    "nll": 0.2891,
                    "params": params,
                    "macs": macs,
                    "size_bytes": size,
                    "precision": "int8" if name.endswith("int8") else "float32",
                    "runtime": "onnxruntime 1.31.1",
                    "threads": 1,
                    "batch": batch,
                    "latency_p50_ms": timing.latency_p50_ms,
                    "latency_p95_ms": timing.latency_p95_ms,
                    "ratio_to_reference": timing.ratio_to_reference,
                    "seconds": {"student-float32": 104.0, "scratch-float32": 89.0, "student-int8": 131.0}.get(name),
                    "pareto": name in ("teacher-resnet", "student-float32", "student-int8"),
                    "verdict": "ships" if name == "student-float32" else None,
                    "status": "measured",
                }
            )
    rows.append({"id": "student-int8-SM89.engine", "role": "file", "precision": "int8", "size_bytes": 200_000,
                 "runtime": "tensorrt_rtx 1.7.1", "status": "built, not run here"})  # fmt: skip
    write_comparison(rows, run / "comparison.csv")

    trials = []
    for number in range(24):
        latency = float(0.045 + 0.2 * rng.random())
        accuracy = 0.84 + 0.07 * (1 - np.exp(-latency * 14)) - 0.012 * rng.random()
        state = "infeasible" if number % 9 == 8 else "complete"
        trials.append([number, "scale-plain_cnn", '{"width": 0.5}', state, "", accuracy, latency, 131_000, False])
    front, best = set(), 0.0
    for row in sorted(trials, key=lambda r: r[6]):
        if row[3] == "complete" and row[5] > best:
            best = row[5]
            front.add(row[0])
    for row in trials:
        row[8] = row[0] in front
        if row[3] == "infeasible":
            row[5:7] = [None, None]
    header = "number space choices state reason accuracy latency_p50_ms size_bytes on_front".split()
    _write(run / "trials.csv", header, trials)

    def history(top: float, epochs: int, start: float) -> list[dict[str, float]]:
        return [
            {
                "epoch": epoch,
                "loss": start * 0.7**epoch + 0.3,
                "validation_accuracy": top - 0.12 * 0.55**epoch,
                "validation_nll": 0.3,
                "seconds": 18.2,
            }
            for epoch in range(epochs)
        ]

    distilled = history(0.899, 5, 1.6)
    for row, (kl, nll) in zip(distilled, ((0.9, 0.8), (0.5, 0.5), (0.3, 0.4), (0.2, 0.42), (0.1, 0.5)), strict=True):
        row |= {"teacher_kl": kl, "validation_nll": nll, "hacking_u_shape": float(nll == 0.5 and kl < 0.2)}
    histories = {
        "teacher-resnet": history(0.924, 7, 1.1),
        "student distilled": distilled,
        "student from scratch": history(0.892, 5, 1.5),
        "quantization-aware": history(0.898, 2, 0.5),
    }
    (run / "histories.json").write_text(json.dumps(histories))
    bins = np.linspace(0.25, 0.98, 9)
    reliability = {
        name: [[c, float(c + shift * (1 - c)), int(40 * np.exp(4 * c))] for c in bins]
        for name, shift in (("teacher-resnet", -0.12), ("student-float32", -0.2), ("student-int8", -0.17))
    }
    (run / "reliability.json").write_text(json.dumps(reliability))
    ladder = [
        ("torch float32", None, "measured", 0.8973, None, None, None, 0.00002, ""),
        ("onnx float32", "torch float32", "measured", 0.8973, 0.0, 1.2e-9, 4.8e-6, 0.00002, ""),
        ("torch fake-quantized", "torch float32", "measured", 0.8971, 0.006, 0.0021, 0.31, 0.04, ""),
        ("onnx int8", "torch fake-quantized", "measured", 0.8969, 0.004, 0.0004, 0.074, 0.04, ""),
        ("engine int8 SM89", "onnx int8", "built, not run here", None, None, None, None, None, "no GPU here"),
    ]
    header = "name against status top1 flips kl max_abs floor note".split()
    _write(run / "parity.csv", header, ladder)
    _write(
        run / "teachers.csv",
        "name accuracy nll ece params macs size_bytes latency_p50_ms".split(),
        [
            ("teacher-resnet", 0.9221, 0.221, 0.0121, 181_658, 16_300_000, 746_000, 0.38),
            ("teacher-convnext", 0.8933, 0.301, 0.0182, 96_000, 5_700_000, 420_000, 0.243),
        ],
    )
    selection = {
        "rank_by": "nll",
        "scores": {
            "nll": {"teacher-resnet": -0.221, "teacher-convnext": -0.301},
            "tmi": {"teacher-resnet": 1.93, "teacher-convnext": 1.71},
        },
        "ranks": {
            "nll": {"teacher-resnet": 1, "teacher-convnext": 2},
            "tmi": {"teacher-resnet": 1, "teacher-convnext": 2},
        },
        "panel": ["teacher-resnet"],
    }
    (run / "selection.json").write_text(json.dumps(selection))
    lineage = [
        {"stage": stage, "name": name, "key": f"{i:02d}9ab3c41d77e0", "cached": cached, "seconds": seconds,
         "inputs": [], "output": f"{i:02d}c0ffee12345678", "mlflow_run_id": f"run{i:02d}aa55"}
        for i, (stage, name, cached, seconds) in enumerate(
            (
                ("data", "fashion_mnist", True, 1.8), ("teachers", "resnet", True, 0.4),
                ("teachers", "convnext", True, 0.4), ("teacher outputs", "resnet", True, 0.2),
                ("selection", "panel", False, 0.9), ("search", "24 trials", False, 212.0),
                ("distil", "student", False, 104.0), ("distil", "scratch control", False, 89.0),
                ("quantize", "int8", False, 27.3), ("export", "cpu", False, 14.1), ("export", "rtx", False, 1.9),
                ("evaluate", "benchmark", False, 48.6), ("gate", "policy", False, 0.1),
            )
        )
    ]  # fmt: skip
    (run / "lineage.json").write_text(json.dumps(lineage))
    env = {"run_id": run.name, "seed": 0, "commit": "3f9c2a1", "packages": {"torch": "2.14.1"}}
    env |= {"cpu": {"model": "AMD EPYC"}}
    (run / "env.json").write_text(json.dumps(env))
    for name, content in evidence().items():
        (run / name).write_text(json.dumps(content))
    champion = {"version": 4, "file": "student-float32", "run": "20261119T021500-77aa", "accuracy": 0.8951}
    champion |= {"ece": 0.0121, "size_bytes": 131_000, "latency_p50_ms": 0.07}
    champion |= {"latency_p50_ms_by_batch": {"1": 0.07, "32": 1.4}}
    (run / "champion.json").write_text(json.dumps(champion))
    hashes = {split: f"{split}-0a1b2c" for split in ("train", "validation", "calibration", "test")}
    (run / "data.json").write_text(json.dumps({"sha256": "d1", "hashes": hashes, "warnings": []}))
    (run / "recipe.resolved.yaml").write_text("name: edge-classifier\nseed: 0\n# <script>alert(1)</script>\n")
    return run


def evidence() -> dict[str, object]:
    """The smallest files behind the sections that say what was lost, and why."""
    labels = torch.arange(40) % 4
    logits = {name: 3 * torch.eye(4)[labels] + 0.1 * i for i, name in enumerate(("teacher-resnet", "student-int8"))}
    parity = compare(logits["teacher-resnet"], logits["student-int8"], labels)
    rungs = [
        Rung(name="student: torch float32", against=None, parity=parity),
        Rung(name="student: ONNX INT8 u8", against="student: torch float32", parity=parity, exceeded=("flips 9 %",)),
        Rung(name="engine int8 SM89", against=None, parity=None, status=ENGINE_NOT_RUN, note="no GPU here"),
    ]
    rows = calibrated_rows(logits, labels, {"student-int8": (1.5, False)})
    layers = [{"layer": "stem.0", "format": f, "kl": 0.1, "flips": 0.0, "accuracy_drop": 0.0} for f in ("int8", "w4")]
    seen = {
        "clean_accuracy": 0.9,
        "corrupted_accuracy": 0.5,
        "robust_gap": 0.4,
        "num_images": 40,
        "conditions": [{"corruption": "noise", "severity": severity, "accuracy": 0.6} for severity in (1, 2)],
    }
    agreed = {"pearson": 0.9, "spearman": 0.9, "iou": 0.7, "images": 8, "skipped": 0}
    return {
        "ladder.json": [Ladder(student="student", sentence="It all fits.", rungs=tuple(rungs)).model_dump(mode="json")],
        "diagnosis.json": {"reference": "teacher-resnet", "cpu": cpu_features().model_dump(), "files": {}},
        "sensitivity.json": {
            "student": {
                "table": {"rows": layers, "num_samples": 40, "accuracy": 0.9},
                "keep_float": [],
                "control": None,
            }
        },
        "calibration.json": {
            "teacher": "teacher-resnet",
            "class_names": list("abcd"),
            "files": {name: row.model_dump(mode="json") for name, row in rows.items()},
        },
        "robustness.json": {"reference": "teacher-resnet", "files": {"teacher-resnet": seen, "student-int8": seen}},
        "attention.json": {
            "teacher": "resnet",
            "rows": [{"model": "student", "method": "grad_cam", "against": "teacher", **agreed}],
            "failures": {},
            "pictures": [],
        },
    }


def _write(path: Path, header, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
