"""Every distillation method on the same student, schedule and seeds: accuracy, intervals, cost.

    .venv/bin/python benchmarks/distillation.py recipes/digits.yaml [--seeds 3] [--jobs 2] [--epochs 30]
    .venv/bin/python benchmarks/distillation.py recipes/fashion-mnist.yaml --share 0.25 --only kd pld "no teachers"

Teachers and data are those of the recipe, taken from its store (trained on first use). All arms share the views, the
schedule and, seed by seed, the student's initial weights and the order of samples; what differs is what it learns from.
Differences are paired, with a 95 % bootstrap interval over seeds and test images together; each arm is compared with
the arms named in its row, which have its student and its teachers. Cost is CPU time of a whole training over that of
the second of them, median over seeds. Methods that run the teachers at every step have the best one alone.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
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
from compression.catalogue import catalogue
from compression.checkpoint import load_checkpoint
from compression.data import open_dataset
from compression.data.dataset import Dataset, Split
from compression.distill import (
    Active,
    AnyCombination,
    AnyLoss,
    AnyMerge,
    ClassRelation,
    CrossEntropy,
    DistillConfig,
    G2sd,
    Hard,
    Kd,
    Kd3,
    Merge,
    MixStd,
    Mixup,
    ModuleToModule,
    MultiAspect,
    Ofa,
    OnlineTeacher,
    Peers,
    Progressive,
    RandomSubset,
    Rs2,
    SigmoidKd,
    Specialists,
    Uniform,
    distill,
)
from compression.metrics import evaluate, predict
from compression.models import AnyModel
from compression.select import AnySelector
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_given_outputs, write_teacher_outputs
from compression.teachers import Teacher, Untrained
from compression.train import TrainConfig
from compression.zoo import Group, PlainCnn, ResidualCnn, VisionTransformer
from flows.recipe import Recipe, load_recipe
from tasks import tracking
from tasks.artifacts import Store
from tasks.data import prepare_data, source_digest
from tasks.settings import settings
from tasks.stage import DirectRunner, StageIndex, use_runner
from tasks.teachers import make_teacher, store_outputs

STUDENTS = {
    "digits": ResidualCnn(widths=(8, 16, 24), strides=(1, 2, 1), stem_width=8),
    "fashion-mnist": ResidualCnn(widths=(8, 16, 32), strides=(1, 2, 2), stem_width=8, stem_stride=2),
}
"""At most a tenth of the best teacher's MACs."""

TOKENS = VisionTransformer(width=32, depth=2, num_heads=2, stem_width=16)
GROUP = Group(members=(PlainCnn(widths=(8, 16), depths=(1, 1), strides=(2, 2), stem_width=8),) * 3)
"""Students for methods that want tokens, or a group."""

ASPECTS = {
    "digits": {
        "a closed loop": "0689",
        "a straight stroke": "14570",
        "an open curve": "23569",
        "a sharp corner": "14725",
        "the same upside down": "0181",
        "a tail below": "79",
    },
    "fashion-mnist": {
        "sleeves": "0246",
        "worn on the feet": "579",
        "covers the legs": "13",
        "a collar or lapels": "46",
        "open at the front": "45",
        "a handle or strap": "85",
        "longer than wide": "13",
        "knitted": "2",
    },
}
"""Yes-no questions about classes, by hand: which classes answer yes. They stand in for a multimodal model's answers."""

BASELINE, KD_ARM = "no teachers", "kd"
DRAWS = 1000


@dataclass(frozen=True)
class Arm:
    """What the student learns from; no losses means labels alone."""

    losses: tuple[AnyLoss, ...] = ()
    combination: AnyCombination = field(default_factory=Uniform)
    teachers: tuple[str, ...] = ()
    """Names of stored outputs; all of the panel when empty."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of other fields of the configuration."""
    student: AnyModel | None = None
    """The common one when None."""
    labelled: float = 1.0
    """Share of the train labels that is known; the others are hidden, or, without teachers, their samples left out."""
    bases: tuple[str, str] = (BASELINE, KD_ARM)
    """Arms it is compared with."""
    method: str = ""
    """Of the catalogue, whose worth the arm shows: ``losses.pld``."""


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
    """Stored outputs, by name of teacher; others say how: ``black box``, ``<teacher>: first half``."""
    checkpoints: Mapping[str, Path]
    panel: tuple[str, ...]
    """Names, the best first."""
    student: AnyModel
    train: TrainConfig
    recipe: Recipe
    share: float = 1.0
    """Of the train split that students see; teachers saw all of it."""
    arms: Mapping[str, Arm] = field(default_factory=dict)


def loss_arms(best: str, answers: Path) -> dict[str, Arm]:
    """Every loss of the catalogue at its defaults, beside what its paper puts beside it."""
    ce, kd = CrossEntropy(weight=0.5), Kd(weight=0.5, temperature=2.0)
    add_ons = ("sinkd", "nd", "talking", "aggregated", "normalised_features", "trg", "proc_kd", "multi_aspect")
    both: tuple[AnyLoss, ...] = (ce, kd)
    beside = dict.fromkeys(add_ons, both) | {"pld": (), "tgeo": (), "mix_std": (CrossEntropy(weight=0.1),)}
    alone = f"kd, {best} alone"
    arms = {
        BASELINE: Arm(method="losses.cross_entropy"),
        KD_ARM: Arm((ce, kd), method="losses.kd"),
        alone: Arm((ce, kd), teachers=(best,)),
    }
    for member in get_args(AnyLoss):
        kind = member.model_fields["kind"].default
        if kind in (KD_ARM, "cross_entropy"):
            continue
        loss = MultiAspect(answers=answers) if kind == "multi_aspect" else member()
        live = loss.needs.teacher_maps
        arms[kind] = Arm(
            (*beside.get(kind, (ce,)), loss),
            teachers=(best,) if live else (),
            bases=(BASELINE, alone if live else KD_ARM),
            method=f"losses.{kind}",
        )
    arms["ofa, branches"] = Arm((ce, Ofa(branches=1.0)), method="losses.ofa")
    arms["dhkd, aligned"] = Arm((ce, member_of("dhkd", align_gradients=True)), method="losses.dhkd")
    return arms


def member_of(kind: str, **fields: Any) -> AnyLoss:
    """The loss of this kind."""
    return next(member for member in get_args(AnyLoss) if member.model_fields["kind"].default == kind)(**fields)


def all_arms(teachers: Sequence[str], panel: Sequence[str], answers: Path, epochs: int) -> dict[str, Arm]:
    """Losses with the uniform panel; kd with everything else the catalogue has; kd from each teacher alone."""
    best = panel[0]
    arms = loss_arms(best, answers)
    kd, alone = arms[KD_ARM].losses, f"kd, {best} alone"
    for member in get_args(AnyCombination):
        kind = member.model_fields["kind"].default
        if kind not in ("uniform", "specialists"):
            arms[f"kd, {kind}"] = Arm(kd, member())
    arms["kd, uniform, all teachers"] = Arm(kd, teachers=tuple(teachers))
    for teacher in (*teachers, "untrained", "black box"):
        method = {"untrained": "sources.untrained", "black box": "sources.outputs"}.get(teacher, "")
        arms[f"kd, {teacher} alone"] = Arm(kd, teachers=(teacher,), bases=(BASELINE, alone), method=method)
    halves = (f"{panel[0]}: first half", f"{panel[-1]}: second half")
    arms["kd, specialists"] = Arm(kd, Specialists(), halves)
    arms["sigmoid_kd, specialists"] = Arm(
        (kd[0], SigmoidKd(self_paced=True)), Specialists(), halves, method="losses.sigmoid_kd"
    )
    arms["class_relation, half the classes"] = Arm(
        (kd[0], ClassRelation()), teachers=halves[:1], bases=(BASELINE, alone), method="losses.class_relation"
    )
    arms["kd, no labels"] = Arm((Kd(temperature=2.0),), changes={"labels": "none"})
    arms["no teachers, a tenth of the labels"] = Arm(labelled=0.1)
    arms["kd, a tenth of the labels"] = Arm(kd, labelled=0.1, bases=("no teachers, a tenth of the labels", KD_ARM))
    arms["kd, active"] = Arm(kd, changes={"procedure": Active()}, bases=("kd, a tenth of the labels", KD_ARM))
    arms["kd, half the epochs"] = Arm(kd, changes={"epochs": max(1, epochs // 2)})
    arms["kd, rs2"] = Arm(kd, changes={"sampler": Rs2(share=0.5)}, bases=("kd, half the epochs", KD_ARM))
    arms["kd, random_subset"] = Arm(
        kd, changes={"sampler": RandomSubset(share=0.5)}, bases=("kd, half the epochs", KD_ARM)
    )
    arms["kd, kd3"] = Arm(kd, changes={"sampler": Kd3(share=0.5)}, bases=("kd, half the epochs", KD_ARM))
    live = {
        "mixup": ({"online": Mixup()}, kd),
        "mixup, all mixed, mix_std": ({"online": Mixup(fraction=1.0)}, (CrossEntropy(weight=0.1), MixStd())),
        "hard": ({"online": Hard()}, kd),
        "online_teacher": ({"procedure": OnlineTeacher()}, kd),
        "module_to_module": ({"procedure": ModuleToModule()}, kd),
    }
    for name, (changes, losses) in live.items():
        arms[f"kd, {name}"] = Arm(losses, teachers=(best,), changes=changes, bases=(BASELINE, alone))
    arms["kd, peers"] = Arm(kd, changes={"procedure": Peers()})
    for member in get_args(AnyMerge):
        merge = Merge(method=member(), train=TrainConfig(epochs=2, learning_rate=3e-4))
        arms[f"kd, {member.model_fields['kind'].default}"] = Arm(kd, changes={"merge": merge})
    arms["group: no teachers"] = Arm(student=GROUP)
    arms["group: kd"] = Arm(kd, student=GROUP, bases=("group: no teachers", KD_ARM))
    arms["group: progressive"] = Arm(
        kd, changes={"procedure": Progressive()}, student=GROUP, bases=("group: no teachers", "group: kd")
    )
    if "transformer" in teachers:
        told = ("transformer",)
        arms["tokens: no teachers"] = Arm(student=TOKENS)
        arms["tokens: kd"] = Arm(kd, teachers=told, student=TOKENS, bases=("tokens: no teachers", KD_ARM))
        arms["tokens: g2sd"] = Arm(
            kd,
            teachers=told,
            changes={"procedure": G2sd()},
            student=TOKENS,
            bases=("tokens: no teachers", "tokens: kd"),
        )
    methods = {_kind(config): f"{kind}.{_kind(config)}" for kind in SHOWN for config in catalogue()[kind]}

    def method_of(name: str) -> str:
        words = [word for part in name.split(", ") for word in part.split(": ")]
        return next((methods[word] for word in words if word in methods), "")

    return {name: replace(arm, method=arm.method or method_of(name)) for name, arm in arms.items()}


SHOWN = ("combinations", "samplers", "procedures", "mergers", "augmenters")
"""Kinds of the catalogue that arms are named after, beside losses."""


def _kind(config: Any) -> str:
    return config.model_fields["kind"].default


def prepare(recipe: Recipe, student: AnyModel, train: TrainConfig, panel: int) -> Work:
    """Data, teachers and their outputs from the recipe's store, made where they are missing."""
    store = Store(settings().store_dir)
    store.prepare(min_free_bytes=settings().min_free_mib * 2**20)
    with (
        tracking.recipe_run(f"benchmark-{recipe.name}", {"recipe": recipe}, {"benchmark": "distillation"}) as parent,
        use_runner(DirectRunner(index=StageIndex(store), parent_run=parent)),
    ):
        source = source_digest(recipe.data)
        data = prepare_data(name=recipe.data.kind, config=recipe.data, source=source, seed=recipe.seed)
        first = Teacher(name="untrained", model=recipe.teachers[0].model, source=Untrained())
        teachers = {
            each.name: make_teacher(
                name=each.name, teacher=each, weights="", data=data, augment=recipe.augment, seed=recipe.seed
            )
            for each in (*recipe.teachers, first)
        }
        spec = OutputsSpec(views=recipe.distill.views, seed=recipe.seed, augment=recipe.augment, features=True)
        outputs = {
            name: store_outputs(name=name, teacher=teacher, data=data, spec=spec) for name, teacher in teachers.items()
        }
        best_first = sorted((each.name for each in recipe.teachers), key=lambda name: teachers[name].metrics["nll"])
        return Work(
            data=store.open(data.artifact),
            outputs={name: store.open(result.artifact) for name, result in outputs.items()},
            checkpoints={name: store.open(result.artifact) for name, result in teachers.items()},
            panel=tuple(best_first[:panel]),
            student=student,
            train=train,
            recipe=recipe,
        )


def add_variants(work: Work, folder: Path) -> Work:
    """Stored outputs of the panel as specialists and as a black box."""
    dataset = open_dataset(work.data)
    names, half = dataset.class_names, dataset.num_classes // 2
    plain = StoredOutputs.open(work.outputs[work.panel[0]]).spec
    outputs = dict(work.outputs)
    for teacher, part, classes in (
        (work.panel[0], "first half", names[:half]),
        (work.panel[-1], "second half", names[half:]),
    ):
        model, _ = load_checkpoint(work.checkpoints[teacher])
        place = folder / f"{teacher}-{part}"
        write_teacher_outputs(model, dataset, plain.model_copy(update={"classes": classes}), place)
        outputs[f"{teacher}: {part}"] = place
    model, _ = load_checkpoint(work.checkpoints[work.panel[0]])
    splits = (dataset.train, dataset.validation)
    answers = torch.cat([predict(model.eval(), split, dataset.preprocessing) for split in splits]).softmax(1)
    np.savez(
        folder / "answers.npz", ids=torch.cat([split.ids for split in splits]).numpy(), probabilities=answers.numpy()
    )
    spec = OutputsSpec(views=plain.views, seed=plain.seed, augment=plain.augment)
    write_given_outputs(folder / "answers.npz", dataset, spec, folder / "black-box")
    return replace(work, outputs=outputs | {"black box": folder / "black-box"})


def write_aspects(recipe: Recipe, class_names: Sequence[str], path: Path) -> None:
    """The answers of :data:`ASPECTS` as the file that ``multi_aspect`` reads."""
    questions = ASPECTS[recipe.name].values()
    answers = np.array([[str(number) in yes for yes in questions] for number in range(len(class_names))])
    np.savez(path, answers=answers.astype(np.float32), classes=np.array(class_names))


def train_one(work: Work, job: tuple[int, str]) -> tuple[str, Result]:
    """One arm with one seed, in a process of its own with one thread."""
    seed, name = job
    arm = work.arms[name]
    torch.set_num_threads(1)
    dataset = open_dataset(work.data)
    train = some_rows(dataset.train, work.share, seed)
    if arm.labelled < 1:
        kept = some_rows(train, arm.labelled, seed)
        if not arm.losses:
            train = kept
        else:
            train = replace(train, labels=torch.where(torch.isin(train.ids, kept.ids), train.labels, -1))
    learnt = replace(dataset, train=train)
    names = () if not arm.losses else arm.teachers or work.panel
    panel = [StoredOutputs.open(work.outputs[teacher]) for teacher in names]
    changes = dict(arm.changes)
    schedule = work.train.model_copy(update={"epochs": changes.pop("epochs", work.train.epochs)})
    config = DistillConfig(train=schedule, views=work.recipe.distill.views)
    if arm.losses:
        config = DistillConfig(
            train=schedule,
            views=work.recipe.distill.views,
            losses=arm.losses,
            teachers=arm.combination,
            **changes,
        )
    live = [load_checkpoint(work.checkpoints[teacher])[0] for teacher in names] if config.needs_teachers else []
    torch.manual_seed(seed)
    student = (arm.student or work.student).build(dataset.num_classes, dataset.input_shape)
    started = time.process_time()
    distill(student, panel, learnt, config, seed=seed, augment=work.recipe.augment, teachers=live)
    seconds = time.process_time() - started
    logits = predict(student, dataset.test, dataset.preprocessing)
    metrics = evaluate(student, dataset.test, dataset.preprocessing)
    correct = (logits.argmax(1) == dataset.test.labels).numpy()
    return name, Result(correct=correct, nll=metrics.nll, ece=metrics.ece, cpu_seconds=seconds)


def some_rows(split: Split, share: float, seed: int) -> Split:
    """A share of the samples, every class alike."""
    if share >= 1:
        return split
    rows = RandomSubset(share=share).build().indices(0, split.labels, seed).sort().values
    return Split(images=split.images[rows], labels=split.labels[rows], ids=split.ids[rows])


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


def setting(work: Work, seeds: int) -> str:
    """Student, schedule and data in words."""
    dataset = open_dataset(work.data)
    student = work.student.build(dataset.num_classes, dataset.input_shape)
    return (
        f"student of {profile.macs(student, dataset.input_shape) / 1e6:.2f} M MACs and {profile.params(student):,} "
        f"parameters, panel {' and '.join(work.panel)}, {work.train.epochs} epochs on {100 * work.share:.0f} % of the "
        f"train split, {seeds} seeds"
    )


def table(work: Work, results: Mapping[str, list[Result]]) -> Iterator[tuple[dict[str, Any], str]]:
    """A record, as ``compression/measured.json`` has it, and a row of Markdown for each arm."""
    arms = work.arms
    stacked = {name: np.stack([each.correct for each in rows]) for name, rows in results.items()}
    cost = {name: [each.cpu_seconds for each in rows] for name, rows in results.items()}
    for name, rows in results.items():
        accuracy = [100 * float(each.correct.mean()) for each in rows]
        spread = stdev(accuracy) if len(accuracy) > 1 else None
        nll, ece = mean(each.nll for each in rows), mean(each.ece for each in rows)
        gaps: list[dict[str, Any]] = []
        cells = []
        for base in arms[name].bases:
            if base in results and name != base:
                gap, low, high = interval(stacked[name], stacked[base])
                numbers = {"points": gap, "low": low, "high": high}
                gaps.append({"base": base} | {key: round(value, 2) for key, value in numbers.items()})
                named = "" if base in (BASELINE, KD_ARM) else f" to *{base}*"
                cells.append(f"{gap:+.2f} ({low:+.2f} to {high:+.2f}){named}")
            else:
                cells.append("")
        beside = arms[name].bases[1]
        ratio = None
        if beside in cost:
            ratio = median(mine / theirs for mine, theirs in zip(cost[name], cost[beside], strict=True))
        record: dict[str, Any] = {
            "method": arms[name].method,
            "arm": name,
            "data": work.recipe.name,
            "setting": setting(work, len(rows)),
            "accuracy": round(mean(accuracy), 2),
            "ece": round(ece, 4),
            "gaps": gaps,
            "cost": None if ratio is None else round(ratio, 2),
        }
        plus = "" if spread is None else f" ± {spread:.2f}"
        yield (
            record,
            f"| {name} | {mean(accuracy):.2f}{plus} | {cells[0]} | {cells[1]} | {ece:.3f} | {nll:.3f} "
            f"| {'' if ratio is None else f'{ratio:.2f}'} |",
        )


def selectors(work: Work, results: Mapping[str, list[Result]]) -> Iterator[str]:
    """Rank correlation of each selector's scores with the students that each teacher made alone."""
    from compression.select import SelectConfig, rank_teachers

    dataset: Dataset = open_dataset(work.data)
    stored = {name: StoredOutputs.open(path) for name, path in work.outputs.items()}
    made = {
        name: mean(float(each.correct.mean()) for each in results[f"kd, {name} alone"])
        for name in work.checkpoints
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
        correlation = spearmanr([scores[name] for name in made], list(made.values()))[0]  # pyright: ignore[reportArgumentType]
        yield f"| {kind} | " + " | ".join(f"{scores[name]:.3f}" for name in made) + f" | {correlation:+.2f} |"
    yield "| *student, %* | " + " | ".join(f"{100 * value:.2f}" for value in made.values()) + " | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--share", type=float, default=1.0, help="of the train split that students see")
    parser.add_argument("--set", action="append", metavar="NAME.NAME=VALUE", help="override a value of the recipe")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms alone")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set or [])
    train = recipe.distill.train
    if arguments.epochs is not None:
        train = train.model_copy(update={"epochs": arguments.epochs})
    prepared = prepare(recipe, STUDENTS[recipe.name], train, recipe.select.panel_size)
    with tempfile.TemporaryDirectory() as folder:
        work = replace(add_variants(prepared, Path(folder)), share=arguments.share)
        dataset = open_dataset(work.data)
        write_aspects(recipe, dataset.class_names, Path(folder) / "aspects.npz")
        teachers = [each.name for each in recipe.teachers]
        arms = all_arms(teachers, work.panel, Path(folder) / "aspects.npz", train.epochs)
        if arguments.only:
            if unknown := set(arguments.only) - set(arms):
                parser.error(f"unknown arms {sorted(unknown)}, expected some of {sorted(arms)}")
            arms = {name: arms[name] for name in arguments.only}
        work.arms = arms
        run(work, arguments.seeds, arguments.jobs, arguments.json)


def run(work: Work, seeds: int, processes: int, json_path: Path | None) -> None:
    """Train every arm with every seed and print the tables."""
    arms = work.arms
    print(f"{work.recipe.name}: {setting(work, seeds)}")
    jobs = list(product(range(seeds), arms))
    results: dict[str, list[Result]] = {name: [] for name in arms}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done, (name, result) in enumerate(pool.map(partial(train_one, work), jobs), start=1):
            results[name].append(result)
            print(f"  {done} of {len(jobs)}: {name} {100 * result.correct.mean():.2f} %", flush=True)
    report(work, results, json_path)


def report(work: Work, results: Mapping[str, list[Result]], json_path: Path | None) -> None:
    """Print the tables, and write the numbers to a file if asked to."""
    print(
        f"\n| arm | test accuracy, % | to {BASELINE}, points (95 %) | to {KD_ARM}, points (95 %) | ECE | NLL | cost "
        "|\n|---|---|---|---|---|---|---|"
    )
    records = []
    for record, line in table(work, results):
        records.append(record)
        print(line)
    for line in selectors(work, results):
        print(line)
    if json_path is not None:
        json_path.write_text(json.dumps([row for row in records if row["method"]], indent=1) + "\n")


if __name__ == "__main__":
    main()
