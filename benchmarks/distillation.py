"""Every loss, combination and single teacher on the same student, schedule and seeds: accuracy, intervals, cost.

    .venv/bin/python benchmarks/distillation.py recipes/digits.yaml [--seeds 3] [--jobs 2] [--epochs 30]
    .venv/bin/python benchmarks/distillation.py recipes/fashion-mnist.yaml --only kd pld "no teachers"

Teachers and data are those of the recipe, taken from its store (trained on first use). All arms share the views, the
schedule and, seed by seed, the student's initial weights and the order of samples; what differs is what it learns from.
Differences are paired, with a 95 % bootstrap interval over seeds and test images together. Cost is CPU time of a whole
training over that of the kd arm, median over seeds.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, get_args

import numpy as np
import torch
from scipy.stats import spearmanr

from compression import profile
from compression.data import open_dataset
from compression.data.dataset import Dataset
from compression.distill import AnyCombination, AnyLoss, CrossEntropy, DistillConfig, Kd, Uniform, distill
from compression.metrics import evaluate, predict
from compression.select import AnySelector
from compression.teacher_outputs import OutputsSpec, StoredOutputs
from compression.train import TrainConfig
from compression.zoo.residual_cnn import ResidualCnn
from flows.recipe import Recipe, load_recipe
from tasks import tracking
from tasks.artifacts import Store
from tasks.data import prepare_data, source_digest
from tasks.settings import settings
from tasks.stage import DirectRunner, StageIndex, use_runner
from tasks.teachers import make_teacher, store_outputs

STUDENTS = {
    "digits": ResidualCnn(widths=(8, 16, 24), strides=(1, 2, 1), stem_width=8),
    "fashion-mnist": ResidualCnn(widths=(8, 24, 64), strides=(1, 2, 2), stem_width=16, stem_stride=2),
}
"""At most a tenth of the best teacher's MACs."""

BASELINE, KD_ARM = "no teachers", "kd"
DRAWS = 1000


@dataclass(frozen=True)
class Arm:
    """What the student learns from; no losses means labels alone."""

    losses: tuple[AnyLoss, ...] = ()
    combination: AnyCombination = field(default_factory=Uniform)
    teachers: tuple[str, ...] = ()
    """Names; all of the panel when empty."""


@dataclass
class Result:
    """One training."""

    correct: np.ndarray
    """[N_test] bool."""
    nll: float
    ece: float
    cpu_seconds: float


@dataclass
class Work:
    """What every training needs; sent to the worker processes."""

    data: Path
    outputs: Mapping[str, Path]
    panel: tuple[str, ...]
    student: ResidualCnn
    train: TrainConfig
    recipe: Recipe
    arms: Mapping[str, Arm] = field(default_factory=dict)


def loss_arms() -> dict[str, Arm]:
    """Every loss of the catalogue at its defaults, beside what its paper puts beside it."""
    ce, kd = CrossEntropy(weight=0.5), Kd(weight=0.5, temperature=2.0)
    beside: dict[str, tuple[AnyLoss, ...]] = {"pld": (), "sinkd": (ce, kd), "nd": (ce, kd), "cross_entropy": ()}
    arms = {BASELINE: Arm(), KD_ARM: Arm((ce, kd))}
    for member in get_args(AnyLoss):
        kind = member.model_fields["kind"].default
        if kind not in (KD_ARM, "cross_entropy"):
            arms[kind] = Arm((*beside.get(kind, (ce,)), member()))
    return arms


def all_arms(teachers: Sequence[str]) -> dict[str, Arm]:
    """Losses with the uniform panel; kd with every combination; kd from each teacher alone."""
    arms = loss_arms()
    kd = arms[KD_ARM].losses
    for member in get_args(AnyCombination):
        kind = member.model_fields["kind"].default
        if kind != "uniform":
            arms[f"kd, {kind}"] = Arm(kd, member())
    for teacher in teachers:
        arms[f"kd, {teacher} alone"] = Arm(kd, teachers=(teacher,))
    return arms


def prepare(recipe: Recipe, student: ResidualCnn, train: TrainConfig, panel: int) -> Work:
    """Data, teachers and their outputs from the recipe's store, made where they are missing."""
    store = Store(settings().store_dir)
    store.prepare(min_free_bytes=settings().min_free_mib * 2**20)
    with (
        tracking.recipe_run(f"benchmark-{recipe.name}", {"recipe": recipe}, {"benchmark": "distillation"}) as parent,
        use_runner(DirectRunner(index=StageIndex(store), parent_run=parent)),
    ):
        source = source_digest(recipe.data)
        data = prepare_data(name=recipe.data.kind, config=recipe.data, source=source, seed=recipe.seed)
        spec = OutputsSpec(views=recipe.distill.views, seed=recipe.seed, augment=recipe.augment, features=True)
        teachers = {
            each.name: make_teacher(
                name=each.name, teacher=each, weights="", data=data, augment=recipe.augment, seed=recipe.seed
            )
            for each in recipe.teachers
        }
        outputs = {
            name: store_outputs(name=name, teacher=teacher, data=data, spec=spec) for name, teacher in teachers.items()
        }
        best_first = sorted(teachers, key=lambda name: teachers[name].metrics["nll"])
        return Work(
            data=store.open(data.artifact),
            outputs={name: store.open(result.artifact) for name, result in outputs.items()},
            panel=tuple(best_first[:panel]),
            student=student,
            train=train,
            recipe=recipe,
        )


def train_one(work: Work, job: tuple[int, str]) -> tuple[str, Result]:
    """One arm with one seed, in a process of its own with one thread."""
    seed, name = job
    arm = work.arms[name]
    torch.set_num_threads(1)
    dataset = open_dataset(work.data)
    names = () if not arm.losses else arm.teachers or work.panel
    panel = [StoredOutputs.open(work.outputs[teacher]) for teacher in names]
    torch.manual_seed(seed)
    student = work.student.build(dataset.num_classes, dataset.input_shape)
    config = DistillConfig(train=work.train, views=work.recipe.distill.views)
    if arm.losses:
        config = config.model_copy(update={"losses": arm.losses, "teachers": arm.combination})
    started = time.process_time()
    distill(student, panel, dataset, config, seed=seed, augment=work.recipe.augment)
    seconds = time.process_time() - started
    logits = predict(student, dataset.test, dataset.preprocessing)
    metrics = evaluate(student, dataset.test, dataset.preprocessing)
    correct = (logits.argmax(1) == dataset.test.labels).numpy()
    return name, Result(correct=correct, nll=metrics.nll, ece=metrics.ece, cpu_seconds=seconds)


def interval(arm: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Mean difference and its 95 % bounds, in points; seeds [S] and images [N] are both drawn again."""
    gap = arm.astype(np.float32) - base.astype(np.float32)
    rng = np.random.default_rng(0)
    seeds, images = gap.shape
    draws = []
    for _ in range(DRAWS):
        rows = gap[rng.integers(0, seeds, seeds)].mean(0)
        draws.append(rows[rng.integers(0, images, images)].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    return 100 * float(gap.mean()), 100 * float(low), 100 * float(high)


def table(results: Mapping[str, list[Result]]) -> Iterator[tuple[dict[str, Any], str]]:
    """A row of numbers and a row of Markdown for each arm."""
    stacked = {name: np.stack([each.correct for each in rows]) for name, rows in results.items()}
    cost = {name: [each.cpu_seconds for each in rows] for name, rows in results.items()}
    for name, rows in results.items():
        accuracy = [100 * float(each.correct.mean()) for each in rows]
        record: dict[str, Any] = {
            "arm": name,
            "accuracy": mean(accuracy),
            "sd": stdev(accuracy) if len(accuracy) > 1 else None,
            "nll": mean(each.nll for each in rows),
            "ece": mean(each.ece for each in rows),
        }
        cells = []
        for base in (BASELINE, KD_ARM):
            if base in results and name != base:
                gap, low, high = interval(stacked[name], stacked[base])
                record[f"to {base}"] = [gap, low, high]
                cells.append(f"{gap:+.2f} ({low:+.2f} to {high:+.2f})")
            else:
                cells.append("")
        if KD_ARM in cost:
            record["cost"] = median(mine / theirs for mine, theirs in zip(cost[name], cost[KD_ARM], strict=True))
        spread = "" if record["sd"] is None else f" ± {record['sd']:.2f}"
        yield (
            record,
            f"| {name} | {record['accuracy']:.2f}{spread} | {cells[0]} | {cells[1]} | {record['ece']:.3f} "
            f"| {record['nll']:.3f} | {record.get('cost', float('nan')):.2f} |",
        )


def selectors(work: Work, results: Mapping[str, list[Result]]) -> Iterator[str]:
    """Rank correlation of each selector's scores with the students that each teacher made alone."""
    from compression.select import SelectConfig, rank_teachers

    dataset: Dataset = open_dataset(work.data)
    stored = {name: StoredOutputs.open(path) for name, path in work.outputs.items()}
    made = {
        name: mean(float(each.correct.mean()) for each in results[f"kd, {name} alone"])
        for name in stored
        if f"kd, {name} alone" in results
    }
    if len(made) < 2:
        return
    members = tuple(member() for member in get_args(AnySelector))
    report = rank_teachers(
        {name: stored[name] for name in made},
        dataset.validation.labels,
        SelectConfig(panel_size=1, selectors=members),
    )
    yield "\n| selector | " + " | ".join(made) + " | rank correlation with the students |"
    yield "|---" * (len(made) + 2) + "|"
    for kind, scores in report.scores.items():
        correlation = spearmanr([scores[name] for name in made], list(made.values())).statistic
        yield f"| {kind} | " + " | ".join(f"{scores[name]:.3f}" for name in made) + f" | {correlation:+.2f} |"
    yield "| *student, %* | " + " | ".join(f"{100 * value:.2f}" for value in made.values()) + " | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms alone")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    train = recipe.distill.train
    if arguments.epochs is not None:
        train = train.model_copy(update={"epochs": arguments.epochs})
    work = prepare(recipe, STUDENTS[recipe.name], train, recipe.select.panel_size)
    arms = all_arms(list(work.outputs))
    if arguments.only:
        if unknown := set(arguments.only) - set(arms):
            parser.error(f"unknown arms {sorted(unknown)}, expected some of {sorted(arms)}")
        arms = {name: arms[name] for name in arguments.only}
    work.arms = arms
    dataset = open_dataset(work.data)
    student = work.student.build(dataset.num_classes, dataset.input_shape)
    size = f"{profile.macs(student, dataset.input_shape) / 1e6:.2f} M MACs, {profile.params(student):,} parameters"
    print(
        f"{recipe.name}: student {size}; panel {', '.join(work.panel)}; {train.epochs} epochs, {arguments.seeds} seeds"
    )
    jobs = list(product(range(arguments.seeds), arms))
    results: dict[str, list[Result]] = {name: [] for name in arms}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for done, (name, result) in enumerate(pool.map(partial(train_one, work), jobs), start=1):
            results[name].append(result)
            print(f"  {done} of {len(jobs)}: {name} {100 * result.correct.mean():.2f} %", flush=True)
    print(
        f"\n| arm | test accuracy, % | to {BASELINE}, points (95 %) | to {KD_ARM}, points (95 %) | ECE | NLL | cost "
        "|\n|---|---|---|---|---|---|---|"
    )
    records = []
    for record, line in table(results):
        records.append(record)
        print(line)
    for line in selectors(work, results):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
