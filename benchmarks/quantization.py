"""INT8 files of several tools beside ours, from the same students: accuracy, calibration, latency, size and cost.

    sh benchmarks/peers/setup.sh PEERS                                 # the other tools, each in its environment
    .venv/bin/python benchmarks/quantization.py WORK --peers PEERS [--teacher FOLDER] [--seeds 0 1]
    .venv/bin/python benchmarks/quantization.py WORK --only "NNCF" "QAT"   # some arms
    .venv/bin/python benchmarks/quantization.py WORK --sensitivity         # which layers of its students INT8 hurts
    .venv/bin/python benchmarks/quantization.py WORK --latency             # times what WORK has, when all is quiet
    .venv/bin/python benchmarks/quantization.py WORK --table               # reports what WORK has

Students learn from the stored outputs of one teacher, all on the same short schedule. Every quantizer gets the same
float32 ONNX file (ours: the same weights) and the same calibration images; accuracy control, NNCF's and ours, gets the
validation split. What is scored is the INT8 file in ONNX Runtime, against the float32 file of the same student. Latency
is a ratio to that file, all files of one student side by side in one run. Cost is CPU time, without imports.

The row "ours, chosen" is decided before the test split is read: of our arms, per student and seed, the file with the
most correct answers on the validation split; of equals the one that comes first in ``quantization_arms.OURS``, which is
ordered by cost. An arm that fails is a row with its reason.
"""

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from distillation import interval
from quantization_arms import ARMS, CALIBRATION_IMAGES, OURS, SCHEDULES, STUDENTS, Case
from search import Setting, distillation, prepare

from compression import profile
from compression.augment import normalise
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data import open_dataset
from compression.data.dataset import Dataset, Split
from compression.distill import distill
from compression.metrics import metrics_of
from compression.models import ModelSpec
from compression.quantize.sensitivity import Sensitivity, sensitivity
from compression.statistics import accuracy_drop
from compression.teacher_outputs import StoredOutputs
from compression.train import TrainConfig
from compression.types import Preprocessing
from export.benchmark import BenchmarkJob, run_benchmark
from export.latency import BenchmarkResult
from export.onnx_graph import to_onnx
from export.runtime import integer_share
from export.timing import open_session
from flows.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

FLOAT32 = "float32"
CHOSEN = "ours, chosen"
BATCHES = (1, 32)
SENSITIVITY_IMAGES = 512
"""Of the validation split."""


@dataclass
class Row:
    """One file of one student, or why there is none."""

    student: str
    seed: int
    arm: str
    failure: str = ""
    accuracy: float = 0.0
    """On the test split, percent; so are all shares here."""
    drop: float = 0.0
    """Accuracy of the float32 file less this one's, in points."""
    drop_low: float = 0.0
    """95 % bounds, paired bootstrap over test images."""
    drop_high: float = 0.0
    validation_drop: float = 0.0
    flips: float = 0.0
    """Test images whose class differs from the float32 file's."""
    nll: float = 0.0
    ece: float = 0.0
    kib: float = 0.0
    cpu_seconds: float = 0.0
    integer_layers: str = ""
    chosen: bool = False
    p50: dict[int, float] = field(default_factory=dict)
    """Batch -> ratio to the float32 file of the same run."""
    p95: dict[int, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def make_student(setting: Setting, recipe: Recipe, name: str, seed: int) -> Path:
    """Folder of a trained student: checkpoint, ``float32.onnx`` and ``train.json``; trained if it isn't there."""
    folder = setting.work / "students" / f"{name}-{seed}"
    if (folder / "train.json").exists():
        return folder
    dataset = open_dataset(setting.work / "data")
    torch.manual_seed(seed)
    model = STUDENTS[name].build(dataset.num_classes, dataset.input_shape)
    stored = [StoredOutputs.open(setting.work / "outputs")]
    config = distillation(setting.final.model_copy(update=SCHEDULES.get(name, {})))
    before = time.process_time()
    distill(model, stored, dataset, config, seed=seed, augment=recipe.augment)
    seconds = time.process_time() - before
    spec = ModelSpec(
        model=STUDENTS[name],
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )
    save_checkpoint(model, spec, folder)
    to_onnx(model, folder / "float32.onnx", input_shape=dataset.input_shape, metadata={})
    facts = {"cpu_seconds": seconds, "macs": profile.macs(model, dataset.input_shape), "params": profile.params(model)}
    (folder / "train.json").write_text(json.dumps(facts))
    logger.info("%s, seed %d: trained in %.0f CPU seconds", name, seed, seconds)
    return folder


def case_of(setting: Setting, recipe: Recipe, dataset: Dataset, peers: Path, name: str, seed: int) -> Case:
    """What the quantizers of one student get, images written where other processes can read them."""
    calibration, control = setting.work / "calibration.npy", setting.work / "validation.npz"
    if not calibration.exists():
        images = dataset.calibration.images[:CALIBRATION_IMAGES]
        np.save(calibration, normalise(images, dataset.preprocessing).numpy())
    if not control.exists():
        images = normalise(dataset.validation.images, dataset.preprocessing).numpy()
        np.savez(control, images=images, labels=dataset.validation.labels.numpy())
    return Case(
        name=name,
        folder=make_student(setting, recipe, name, seed),
        seed=seed,
        dataset=dataset,
        calibration=calibration.absolute(),
        control=control.absolute(),
        peers=peers.absolute(),
        augment=recipe.augment,
    )


def run_arm(setting: Setting, case: Case, arm: str) -> None:
    """Makes the INT8 file and its answers, or writes down why not; what is there stays."""
    folder = arms_folder(setting, case.name, case.seed)
    file, facts = folder / f"{file_name(arm)}.onnx", folder / f"{file_name(arm)}.json"
    if facts.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = ARMS[arm](case, file)
        write_answers(file, case.dataset)
        kept = asdict(made)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        kept = {"failure": f"{type(error).__name__}: {words[0][:300]}"}
        logger.exception("%s, seed %d, %s failed", case.name, case.seed, arm)
    facts.write_text(json.dumps(kept, indent=1))
    logger.info("%s, seed %d, %s: %s", case.name, case.seed, arm, kept.get("failure") or f"{kept['cpu_seconds']:.1f} s")


def write_answers(file: Path, dataset: Dataset) -> None:
    """Logits of the file on the validation and test splits, as ``<file>.npz``."""
    np.savez(
        file.with_suffix(".npz"),
        validation=logits_of(file, dataset.validation, dataset.preprocessing),
        test=logits_of(file, dataset.test, dataset.preprocessing),
    )


def logits_of(file: Path, split: Split, preprocessing: Preprocessing) -> np.ndarray:
    """Logits [N, classes] float32 of a file in ONNX Runtime."""
    session = open_session(file, threads=1)
    name = session.get_inputs()[0].name
    parts = []
    for start in range(0, len(split.labels), 500):
        images = normalise(split.images[start : start + 500], preprocessing).numpy()
        parts.append(session.run(None, {name: images})[0].astype(np.float32))
    return np.concatenate(parts)


def time_student(setting: Setting, name: str, seed: int, rounds: int) -> None:
    """Latency of all files of one student, side by side, as ``latency.json`` beside them."""
    folder = arms_folder(setting, name, seed)
    made = {arm: folder / f"{file_name(arm)}.onnx" for arm in ARMS}
    files = {FLOAT32: setting.work / "students" / f"{name}-{seed}" / "float32.onnx"}
    files |= {arm: file for arm, file in made.items() if file.with_suffix(".npz").exists()}
    job = BenchmarkJob(models=files, reference=FLOAT32, batches=BATCHES, rounds=rounds, memory=False)
    result = run_benchmark(job, folder)
    floors = ", ".join(f"batch {floor.batch}: {floor.spread:.1%}" for floor in result.noise_floors)
    logger.info("%s, seed %d: timed, noise floor %s", name, seed, floors)


def layers_of(setting: Setting, dataset: Dataset, name: str, seed: int) -> str:
    """Markdown: the layers that INT8 hurts most, each rounded alone; all of them go to ``sensitivity.json``."""
    path = arms_folder(setting, name, seed) / "sensitivity.json"
    if path.exists():
        found = Sensitivity.model_validate_json(path.read_text())
    else:
        model, _ = load_checkpoint(setting.work / "students" / f"{name}-{seed}")
        seen = dataset.validation.images[:SENSITIVITY_IMAGES]
        found = sensitivity(
            model,
            dataset.input_shape,
            normalise(seen, dataset.preprocessing),
            dataset.validation.labels[:SENSITIVITY_IMAGES],
            calibration=normalise(dataset.calibration.images[:CALIBRATION_IMAGES], dataset.preprocessing),
            formats=("int8 weights", "int8 activations", "int8"),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.model_dump_json(indent=1))
    cells = {(row.layer, row.format): row for row in found.rows}
    lines = [
        f"### {name}, seed {seed}: the five layers that INT8 hurts most, of {len(found.worst())}\n",
        "| layer | KL, weights | KL, activations | KL, both | flips %, both |",
        "|---|---|---|---|---|",
    ]
    for layer in found.worst()[:5]:
        weights, activations, both = (cells[layer, kind] for kind in ("int8 weights", "int8 activations", "int8"))
        lines.append(f"| {layer} | {weights.kl:.2e} | {activations.kl:.2e} | {both.kl:.2e} | {100 * both.flips:.2f} |")
    return "\n".join(lines)


def rows_of(setting: Setting, dataset: Dataset, name: str, seed: int) -> list[Row]:
    """Everything WORK has on one student; the float32 file first."""
    labels, seen = dataset.test.labels, dataset.validation.labels.numpy()
    folder = arms_folder(setting, name, seed)
    float32 = setting.work / "students" / f"{name}-{seed}" / "float32.onnx"
    if not float32.with_suffix(".npz").exists():
        write_answers(float32, dataset)
    reference = np.load(float32.with_suffix(".npz"))
    best = validation_correct(reference["validation"], seen)
    timing = timing_of(folder)
    rows = []
    for arm in (FLOAT32, *ARMS):
        file = float32 if arm == FLOAT32 else folder / f"{file_name(arm)}.onnx"
        noted = (
            setting.work / "students" / f"{name}-{seed}" / "train.json" if arm == FLOAT32 else file.with_suffix(".json")
        )
        if not noted.exists():
            continue
        facts = json.loads(noted.read_text())
        if facts.get("failure"):
            rows.append(Row(name, seed, arm, failure=facts["failure"]))
            continue
        logits = np.load(file.with_suffix(".npz"))
        metrics = metrics_of(torch.from_numpy(logits["test"]), labels)
        gap = accuracy_drop(correct_of(reference["test"], labels), correct_of(logits["test"], labels), seed=0)
        share = integer_share(file)
        row = Row(
            student=name,
            seed=seed,
            arm=arm,
            accuracy=100 * metrics.accuracy,
            drop=100 * gap.estimate,
            drop_low=100 * gap.low,
            drop_high=100 * gap.high,
            validation_drop=100 * (best - validation_correct(logits["validation"], seen)),
            flips=100 * float((logits["test"].argmax(1) != reference["test"].argmax(1)).mean()),
            nll=metrics.nll,
            ece=metrics.ece,
            kib=file.stat().st_size / 1024,
            cpu_seconds=facts["cpu_seconds"],
            integer_layers=f"{share.integer} of {share.total}",
            info={key: value for key, value in facts.items() if key != "cpu_seconds"},
        )
        add_timing(row, timing)
        rows.append(row)
    ranked = sorted(
        (row for row in rows if row.arm in OURS and not row.failure),
        key=lambda row: (row.validation_drop, list(OURS).index(row.arm)),
    )
    if ranked:
        ranked[0].chosen = True
    return rows


def validation_correct(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


def correct_of(logits: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(logits.argmax(1)) == labels


def timing_of(folder: Path) -> BenchmarkResult | None:
    path = folder / "latency.json"
    return BenchmarkResult.model_validate_json(path.read_text()) if path.exists() else None


def add_timing(row: Row, timing: BenchmarkResult | None) -> None:
    """Ratios of p50 (median over rounds) and of p95 (over all calls) to the float32 file."""
    for found in timing.rows if timing is not None else ():
        if found.model == row.arm and timing is not None:
            base = timing.row(FLOAT32, found.batch)
            row.p50[found.batch] = found.ratio_to_reference
            row.p95[found.batch] = found.latency_p95_ms / base.latency_p95_ms


def table(setting: Setting, rows: Sequence[Row], dataset: Dataset) -> str:
    """Markdown: one table a student, means over seeds; drops with bootstrap bounds over seeds and images together."""
    labels = dataset.test.labels
    parts = []
    for name in dict.fromkeys(row.student for row in rows):
        own = [row for row in rows if row.student == name]
        seeds = sorted({row.seed for row in own})
        facts = json.loads((setting.work / "students" / f"{name}-{seeds[0]}" / "train.json").read_text())
        right = {
            (row.arm, row.seed): correct_of(np.load(answers_path(setting, row))["test"], labels).numpy()
            for row in own
            if not row.failure
        }
        lines = [
            f"### {name}: {facts['macs'] / 1e6:.2f} M MACs, {facts['params']:,} parameters, seeds "
            f"{', '.join(map(str, seeds))}\n",
            "| file | test accuracy % | drop, points | validation drop | flips % | NLL | ECE | batch 1 p50 | p95 "
            "| batch 32 p50 | p95 | KiB | integer layers | CPU s |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in (FLOAT32, *ARMS):
            lines += line_of(arm, [row for row in own if row.arm == arm], right, seeds)
        chosen = [row for row in own if row.chosen]
        lines += line_of(CHOSEN, chosen, right, seeds)
        if chosen:
            lines.append("\nChosen: " + ", ".join(f"seed {row.seed}: {row.arm}" for row in chosen) + ".")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def line_of(
    arm: str, rows: Sequence[Row], right: Mapping[tuple[str, int], np.ndarray], seeds: Sequence[int]
) -> list[str]:
    """The line of one arm, or of the rows that were chosen; none without rows. Names its seeds where some lack."""
    failed = [row for row in rows if row.failure]
    made = [row for row in rows if not row.failure]
    lines = [f"| {arm}, seed {row.seed} | failed: {row.failure} |" + " |" * 12 for row in failed]
    if not made:
        return lines
    if arm == FLOAT32:
        drop = ""
    else:
        candidate = np.stack([right[row.arm, row.seed] for row in made])
        base = np.stack([right[FLOAT32, row.seed] for row in made])
        points, low, high = interval(base, candidate)
        drop = f"{points:+.2f} ({low:+.2f} to {high:+.2f})"
    have = [row.seed for row in made]
    cells = [
        arm if have == list(seeds) else f"{arm} (seed {', '.join(map(str, have))})",
        f"{mean(row.accuracy for row in made):.2f}",
        drop,
        f"{mean(row.validation_drop for row in made):+.2f}",
        f"{mean(row.flips for row in made):.2f}",
        f"{mean(row.nll for row in made):.4f}",
        f"{mean(row.ece for row in made):.4f}",
        *(ratio(made, batch, which) for batch in BATCHES for which in ("p50", "p95")),
        f"{mean(row.kib for row in made):.0f}",
        "-" if arm == FLOAT32 else " / ".join(dict.fromkeys(row.integer_layers for row in made)),
        f"{mean(row.cpu_seconds for row in made):.1f}",
    ]
    return [*lines, "| " + " | ".join(cells) + " |"]


def ratio(rows: Sequence[Row], batch: int, which: str) -> str:
    values = [getattr(row, which)[batch] for row in rows if batch in getattr(row, which)]
    return f"{mean(values):.3f}" if values else "not run"


def answers_path(setting: Setting, row: Row) -> Path:
    if row.arm == FLOAT32:
        return setting.work / "students" / f"{row.student}-{row.seed}" / "float32.npz"
    return arms_folder(setting, row.student, row.seed) / f"{file_name(row.arm)}.npz"


def arms_folder(setting: Setting, name: str, seed: int) -> Path:
    return setting.work / "quantized" / f"{name}-{seed}"


def file_name(arm: str) -> str:
    return arm.lower().replace(",", "").replace(" ", "-")


def found_units(setting: Setting) -> list[tuple[str, int]]:
    """Students and seeds that WORK has, in the order of the arms file."""
    places = [place.parent.name.rpartition("-") for place in setting.work.glob("students/*/train.json")]
    units = [(name, int(seed)) for name, _, seed in places if name in STUDENTS]
    return sorted(units, key=lambda unit: (list(STUDENTS).index(unit[0]), unit[1]))


def main() -> None:
    """Runs what the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that keeps data, teacher, students, files and results")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/fashion-mnist.yaml"), help="of data and teacher")
    parser.add_argument("--teacher", type=Path, help="checkpoint to use for the teacher 'residual'")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder that peers/setup.sh filled")
    parser.add_argument("--students", nargs="+", choices=sorted(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="*", choices=sorted(ARMS), help="arms to run; all by default, none trains only")
    parser.add_argument("--epochs", type=int, default=5, help="of a student's training")
    parser.add_argument("--latency", action="store_true", help="time the files that WORK has, then report")
    parser.add_argument("--rounds", type=int, default=30, help="of the timing")
    parser.add_argument("--sensitivity", action="store_true", help="measure the layers of WORK's students, then report")
    parser.add_argument("--table", action="store_true", help="make nothing: report what WORK has")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)

    recipe = load_recipe(options.recipe)
    schedule = {"batch_size": 256, "learning_rate": 0.004, "checkpoint_every_steps": 10**6}
    train = TrainConfig(epochs=options.epochs, **schedule)
    setting = Setting(work=options.work, budgets=(), trials=0, trial=train, final=train, batch=32)
    prepare(setting, recipe, options.teacher)
    dataset = open_dataset(setting.work / "data")
    if not (options.latency or options.table or options.sensitivity):
        arms = list(ARMS) if options.only is None else options.only
        for seed in options.seeds:
            for name in options.students:
                case = case_of(setting, recipe, dataset, options.peers, name, seed)
                for arm in arms:
                    run_arm(setting, case, arm)
    units = found_units(setting)
    if options.latency:
        for name, seed in units:
            time_student(setting, name, seed, options.rounds)
    rows = [row for name, seed in units for row in rows_of(setting, dataset, name, seed)]
    text = table(setting, rows, dataset)
    for name, seed in units:
        if options.sensitivity or (arms_folder(setting, name, seed) / "sensitivity.json").exists():
            text += "\n" + layers_of(setting, dataset, name, seed) + "\n"
    (setting.work / "table.md").write_text(text)
    (setting.work / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(text)


if __name__ == "__main__":
    main()
