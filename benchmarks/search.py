"""Every way to find a small network, at the same latency budgets and the same budget of training.

    .venv/bin/python benchmarks/search.py WORK [--recipe recipes/fashion-mnist.yaml] [--teacher FOLDER] [--seeds 0 1]
    .venv/bin/python benchmarks/search.py WORK --only "random search" "nsga2" --budgets 0.1 0.16 0.22 --jobs 2
    .venv/bin/python benchmarks/search.py WORK --table                       # what is in WORK, trains nothing
    .venv/bin/python benchmarks/search.py WORK --ranking 32                  # DisWOT against trained accuracy

One arm is a search section of a recipe. Each gets the same teacher and its stored outputs, the same number of trials of
the same length, and for each budget (a share of the teacher's p50 in ONNX Runtime at batch 32) the best trial within it
gets the same full distillation. Arms without a search spend nothing on trials and take the largest network that fits.
What is scored is the ONNX file: test accuracy in ONNX Runtime, latency of all files side by side in one run at the end.
Cost is CPU time of the process: search (building, timing and training of trials), then the full distillations.
WORK keeps everything, so that a later call adds arms and seeds to what is there.
"""

import argparse
import csv
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from distillation import interval
from scipy.stats import kendalltau
from search_arms import ARMS, DESIGN, MEASURES, NO_TRIALS, TEACHER
from torch import nn

from compression import profile
from compression.augment import normalise
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data import load_dataset, open_dataset, save_dataset, with_pool
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, DistillConfig, Kd, distill
from compression.distill.procedures import Training
from compression.metrics import evaluate
from compression.search import Study
from compression.search.bank import PastTrial, past_trials, read_bank, task_of, write_bank
from compression.search.candidate import OnEpoch, labels_of
from compression.search.space import Workshop
from compression.search.study import run_study
from compression.search.trials import Score, TrialResult
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.teachers import obtain_teacher
from compression.train import TrainConfig
from export.benchmark import BenchmarkJob, run_benchmark
from export.onnx_graph import to_onnx
from export.timing import open_session
from flows.recipe import Recipe, load_recipe
from tasks.search import Clock, latency_model_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What all arms share."""

    work: Path
    budgets: tuple[float, ...]
    trials: int
    trial: TrainConfig
    final: TrainConfig
    batch: int
    teachers: tuple[str, ...] = (TEACHER,)


@dataclass(frozen=True)
class Final:
    """One arm at one budget and seed."""

    arm: str
    seed: int
    budget: float
    space: str
    choices: dict[str, Any]
    searched_ratio: float
    """Latency over the teacher's, as the search saw it."""
    macs: int
    trial_accuracy: float | None
    accuracy: float
    """On the test split, percent, of the ONNX file."""
    search_cpu: float
    """Of the whole search, all budgets together; 0 where nothing was trained."""
    final_cpu: float
    hypervolume: float | None
    """Of the study's front: accuracy on the validation split, latency and size."""


def prepare(setting: Setting, recipe: Recipe, given: Path | None) -> None:
    """Data, teachers and stored outputs, made once."""
    work = setting.work
    if not (work / "data" / "dataset.json").exists():
        save_dataset(load_dataset(recipe.data, seed=recipe.seed), work / "data")
    dataset = open_dataset(work / "data")
    for teacher in recipe.teachers:
        place = work / "teachers" / teacher.name
        if teacher.name not in setting.teachers or (place / "spec.json").exists():
            continue
        if given is not None and teacher.name == TEACHER:
            model, spec = load_checkpoint(given)
        else:
            model, spec, _ = obtain_teacher(teacher, dataset, seed=recipe.seed, augment=recipe.augment)
        save_checkpoint(model, spec, place)
    if not (work / "outputs").exists():
        model, _ = load_checkpoint(work / "teachers" / TEACHER)
        spec = OutputsSpec(views=setting.final.epochs, seed=recipe.seed, augment=recipe.augment)
        write_teacher_outputs(model, dataset, spec, work / "outputs")
    path = work / "teacher.onnx"
    if not path.exists():
        model, _ = load_checkpoint(work / "teachers" / TEACHER)
        to_onnx(model, path, input_shape=dataset.input_shape, metadata={})


def run_arm(setting: Setting, recipe: Recipe, name: str, seed: int) -> list[Final]:
    """Search, then the full distillation of the best within each budget; kept in WORK as it gets done."""
    torch.set_num_threads(1)
    folder = setting.work / "arms" / f"{folder_name(name)}-{seed}"
    kept = folder / "finals.json"
    if kept.exists():
        return [Final(**row) for row in json.loads(kept.read_text())]
    folder.mkdir(parents=True, exist_ok=True)
    dataset = open_dataset(setting.work / "data")
    stored = [StoredOutputs.open(setting.work / "outputs")]
    config = distillation(setting.final)
    started = time.process_time()
    picks, volume = found(setting, recipe, name, seed, folder, dataset, stored)
    searched = time.process_time() - started
    finals: list[Final] = []
    trained: dict[Path, tuple[nn.Module, float]] = {}
    for budget, trial, place in picks:
        model, spec = load_checkpoint(place)
        if place in trained:  # the best for one budget may be the best for a larger one too
            model, cpu = trained[place][0], 0.0
        else:
            before = time.process_time()
            distill(model, stored, dataset, config, seed=seed, augment=recipe.augment)
            cpu = time.process_time() - before
        trained[place] = (model, cpu)
        path = folder / f"{budget:g}.onnx"
        to_onnx(model, path, input_shape=spec.input_shape, metadata={})
        save_checkpoint(model, spec, folder / f"final-{budget:g}")
        correct = answers(path, dataset) == dataset.test.labels.numpy()
        np.save(folder / f"{budget:g}.npy", correct)
        finals.append(
            Final(
                arm=name,
                seed=seed,
                budget=budget,
                space=trial.space,
                choices=trial.choices,
                searched_ratio=(trial.latency_p50_ms or 0.0) / reference_ms(setting, folder),
                macs=profile.macs(model, spec.input_shape),
                trial_accuracy=trial.accuracy,
                accuracy=100 * float(correct.mean()),
                search_cpu=searched,
                final_cpu=cpu,
                hypervolume=volume,
            )
        )
        logger.info("%s, seed %d, budget %g: %.2f %%", name, seed, budget, finals[-1].accuracy)
    kept.write_text(json.dumps([asdict(each) for each in finals], indent=1))
    return finals


def distillation(train: TrainConfig) -> DistillConfig:
    """Cross entropy and kd at temperature 2, half each."""
    return DistillConfig(
        train=train,
        losses=(CrossEntropy(weight=0.5), Kd(weight=0.5, temperature=2.0)),
        views=train.epochs,
        control=False,
    )


def reference_ms(setting: Setting, folder: Path) -> float:
    """The teacher's p50 as the arm's clock saw it."""
    return float(json.loads((folder / "clock" / f"reference-{setting.batch}.json").read_text()))


def found(
    setting: Setting,
    recipe: Recipe,
    name: str,
    seed: int,
    folder: Path,
    dataset: Dataset,
    stored: Sequence[StoredOutputs],
) -> tuple[list[tuple[float, TrialResult, Path]], float | None]:
    """For each budget that a candidate meets: the budget, its best trial and the checkpoint it starts from."""
    parents = {each: load_checkpoint(setting.work / "teachers" / each) for each in setting.teachers}
    clock = Clock(parents[TEACHER][0], dataset.input_shape, batch=setting.batch, folder=folder / "clock")
    common = {"trials": setting.trials, "train": setting.trial.model_dump(), "batch": setting.batch}
    study = Study.model_validate(common | {"max_latency_share": max(setting.budgets)} | ARMS[name])
    if name in NO_TRIALS:
        return largest_within(setting, study, parents, dataset, clock, seed, folder), None
    short = distillation(setting.final).plain(setting.trial)

    def train_trial(model: nn.Module, number: int, checkpoints: Path, on_epoch: OnEpoch) -> Score:
        del number
        torch.manual_seed(seed)
        distill(
            model,
            stored,
            dataset,
            short,
            seed=seed,
            augment=recipe.augment,
            checkpoint_dir=checkpoints,
            on_epoch=lambda row: on_epoch(float(row["validation_accuracy"])),
        )
        reached = evaluate(model, dataset.validation, dataset.preprocessing)
        return Score(reached.accuracy, reached.ece)

    def start_training(model: nn.Module, train: TrainConfig, checkpoints: Path) -> Training:
        return Training(
            student=model,
            panel=stored,
            teachers=(),
            dataset=with_pool(dataset),
            config=distillation(setting.final).plain(train),
            seed=seed,
            augment=recipe.augment,
            checkpoint_dir=checkpoints,
        )

    latency_model = None
    if study.wants_latency_model:
        latency_model = latency_model_for(dataset.input_shape, batch=setting.batch, folder=setting.work / "latency")
    result = run_study(
        study,
        parents=parents,
        dataset=dataset,
        seed=seed,
        latency=clock,
        train_trial=train_trial,
        start_training=start_training,
        latency_model=latency_model,
        past=past_of(setting, folder) if study.wants_past else (),
        storage=folder / "study.db",
        folder=folder / "candidates",
        best_teacher=TEACHER,
    )
    bank = past_trials(
        result.trials,
        task=task_of(dataset),
        study=result.fingerprint,
        objectives=study.objectives,
        kinds={label: str(space.model_dump()["kind"]) for label, space in labels_of(study.spaces).items()},
        train=study.train,
    )
    write_bank(folder / "bank.jsonl", bank)
    limit = reference_ms(setting, folder)
    picks = []
    for budget in setting.budgets:
        within = [
            trial
            for trial in result.trials
            if trial.state == "complete" and (trial.latency_p50_ms or 0.0) <= budget * limit
        ]
        if within:
            best = max(within, key=lambda trial: (trial.accuracy or 0.0, -trial.number))
            picks.append((budget, best, folder / "candidates" / f"trial-{best.number:04d}"))
    return picks, result.hypervolume


def past_of(setting: Setting, folder: Path) -> list[PastTrial]:
    """Trials of the other arms' finished studies."""
    return read_bank(path for path in sorted(setting.work.glob("arms/*/bank.jsonl")) if path.parent != folder)


def largest_within(
    setting: Setting, study: Study, parents: Mapping[str, Any], dataset: Dataset, clock: Clock, seed: int, folder: Path
) -> list[tuple[float, TrialResult, Path]]:
    """For each budget the candidate of the first space with most MACs among those that meet it; nothing is trained."""
    shop = Workshop(parents, dataset, seed, folder / "shop", best_teacher=TEACHER)
    (space,) = study.spaces
    genes = space.genes(shop)
    gene = max(genes, key=lambda each: len(genes[each]))
    fixed = {each: values[0] for each, values in genes.items()}
    rows = []
    for number, value in enumerate(genes[gene]):
        choices = fixed | {gene: value}
        model, spec = space.build(choices, shop)
        macs = profile.macs(model, spec.input_shape)
        if any(row.macs == macs for row, _ in rows):
            continue
        place = folder / "candidates" / f"trial-{number:04d}"
        save_checkpoint(model, spec, place)
        row = TrialResult(number, space.label, choices, "complete", macs=macs, latency_p50_ms=clock(model).p50)
        rows.append((row, place))
    picks = []
    for budget in setting.budgets:
        within = [each for each in rows if (each[0].latency_p50_ms or 0.0) <= budget * clock.reference_ms]
        if within:
            best, place = max(within, key=lambda each: each[0].macs or 0)
            picks.append((budget, best, place))
    return picks


def answers(path: Path, dataset: Dataset) -> np.ndarray:
    """Classes that the ONNX file gives for the test images, int64 [N]."""
    session = open_session(path, threads=1)
    name = session.get_inputs()[0].name
    parts = []
    for start in range(0, len(dataset.test.labels), 500):
        images = normalise(dataset.test.images[start : start + 500], dataset.preprocessing).numpy()
        parts.append(session.run(None, {name: images})[0].argmax(axis=1))
    return np.concatenate(parts)


def timed(setting: Setting, finals: Sequence[Final], rounds: int) -> dict[tuple[str, int, float], float]:
    """Latency of every file over the teacher's, all side by side in one run."""
    files = {"teacher": setting.work / "teacher.onnx"}
    keys = {}
    for final in finals:
        name = f"{final.arm}|{final.seed}|{final.budget:g}"
        folder = setting.work / "arms" / f"{folder_name(final.arm)}-{final.seed}"
        files[name] = folder / f"{final.budget:g}.onnx"
        keys[name] = (final.arm, final.seed, final.budget)
    job = BenchmarkJob(models=files, reference="teacher", batches=(setting.batch,), rounds=rounds, memory=False)
    result = run_benchmark(job, setting.work / "timing")
    return {keys[row.model]: row.ratio_to_reference for row in result.rows if row.model in keys}


def table(setting: Setting, finals: Sequence[Final], ratios: Mapping[tuple[str, int, float], float]) -> str:
    """One row per arm: at each budget mean accuracy over seeds (and the seeds), latency ratio, then costs."""
    head = ["arm"]
    for budget in setting.budgets:
        head += [f"accuracy at {budget:g}", "ratio"]
    lines = [" | ".join([*head, "search, CPU s", "training, CPU s", "hypervolume"])]
    lines.append("|".join("---" for _ in lines[0].split(" | ")))
    for arm in dict.fromkeys(final.arm for final in finals):
        cells = [arm]
        own = [final for final in finals if final.arm == arm]
        for budget in setting.budgets:
            here = [final for final in own if final.budget == budget]
            if not here:
                cells += ["nothing fits", ""]
                continue
            seeds = ", ".join(f"{final.accuracy:.2f}" for final in here)
            cells.append(f"{mean(final.accuracy for final in here):.2f} ({seeds})")
            cells.append(f"{mean(ratios.get((arm, f.seed, budget), f.searched_ratio) for f in here):.3f}")
        searches = {final.seed: final.search_cpu for final in own}
        volumes = {final.seed: final.hypervolume for final in own if final.hypervolume is not None}
        cells.append(f"{mean(searches.values()):.0f}")
        cells.append(f"{sum(final.final_cpu for final in own) / len(searches):.0f}")
        cells.append(f"{mean(volumes.values()):.4f}" if volumes else "")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def repeat_winners(setting: Setting, recipe: Recipe, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """For each budget the best trial of all seeds of an arm, by validation accuracy, distilled once with each seed."""
    torch.set_num_threads(1)
    dataset = open_dataset(setting.work / "data")
    stored = [StoredOutputs.open(setting.work / "outputs")]
    found: dict[float, tuple[Final, Path]] = {}
    for path in sorted(setting.work.glob(f"arms/{folder_name(arm)}-*/finals.json")):
        for row in json.loads(path.read_text()):
            final = Final(**row)
            best = found.get(final.budget)
            if final.arm != arm:
                continue
            if best is None or (final.trial_accuracy or 0.0) > (best[0].trial_accuracy or 0.0):
                found[final.budget] = (final, path.parent)
    kept = setting.work / "winners" / f"{folder_name(arm)}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for seed in seeds:
        for budget, (final, folder) in sorted(found.items()):
            if any((row["seed"], row["budget"]) == (seed, budget) for row in rows):
                continue
            start = next(place for place in trials_of(folder) if same_choices(place, final))
            model, spec = load_checkpoint(folder / "candidates" / f"trial-{int(start['number']):04d}")
            distill(model, stored, dataset, distillation(setting.final), seed=seed, augment=recipe.augment)
            path = kept.parent / f"{folder_name(arm)}-{budget:g}-{seed}.onnx"
            to_onnx(model, path, input_shape=spec.input_shape, metadata={})
            right = answers(path, dataset) == dataset.test.labels.numpy()
            row = {"seed": seed, "budget": budget, "space": final.space, "choices": final.choices}
            row |= {"ratio": final.searched_ratio, "macs": final.macs, "accuracy": 100 * float(right.mean())}
            rows.append(row)
            kept.write_text(json.dumps(rows, indent=1))
            logger.info("winner of %s at %g, seed %d: %.2f %%", arm, budget, seed, row["accuracy"])
    return rows


def folder_name(arm: str) -> str:
    """An arm's name as part of a path."""
    return arm.replace(", ", "-").replace(" ", "-")


def trials_of(folder: Path) -> list[dict[str, str]]:
    """Rows of ``trials.csv``."""
    with (folder / "candidates" / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_choices(row: Mapping[str, str], final: Final) -> bool:
    """Whether a trial that was trained is the one behind a result."""
    return row["state"] == "complete" and row["space"] == final.space and json.loads(row["choices"]) == final.choices


def cpu_per_seed(finals: Sequence[Final], arm: str) -> float:
    """CPU seconds of an arm's search and trainings, mean over its seeds; 0 when it was not run."""
    own = [final for final in finals if final.arm == arm]
    searches = {final.seed: final.search_cpu for final in own}
    return (sum(searches.values()) + sum(final.final_cpu for final in own)) / max(1, len(searches))


def measured(setting: Setting, finals: Sequence[Final]) -> list[dict[str, Any]]:
    """Records for ``compression/measured.json``, at the largest budget: gaps to no search and to random search."""
    budget = max(setting.budgets)
    right: dict[tuple[str, int], np.ndarray] = {}
    for final in finals:
        if final.budget == budget:
            folder = setting.work / "arms" / f"{folder_name(final.arm)}-{final.seed}"
            right[final.arm, final.seed] = np.load(folder / f"{budget:g}.npy")
    rows = []
    for arm, method in MEASURES.items():
        seeds = sorted(seed for name, seed in right if name == arm)
        if not seeds:
            continue
        gaps = []
        for base in ("uniform width", "random search"):
            shared = [seed for seed in seeds if (base, seed) in right]
            if base == arm or not shared:
                continue
            pairs = [np.stack([right[name, seed] for seed in shared]) for name in (arm, base)]
            points, low, high = (round(number, 2) for number in interval(*pairs))
            gaps.append({"base": base, "points": points, "low": low, "high": high})
        spent, theirs = cpu_per_seed(finals, arm), cpu_per_seed(finals, "random search")
        rows.append(
            {
                "method": method,
                "arm": arm,
                "data": "fashion-mnist",
                "setting": f"at most {budget:g} of the teacher's latency at batch {setting.batch}, {setting.trials} "
                f"trials, then {setting.final.epochs} epochs, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
                "accuracy": round(100 * float(mean(right[arm, seed].mean() for seed in seeds)), 2),
                "gaps": gaps,
                "cost": round(spent / theirs, 2) if theirs else None,
            }
        )
    return rows


def ranking(setting: Setting, recipe: Recipe, count: int, seed: int = 0) -> dict[str, float]:
    """How well DisWOT ranks ``count`` students by their accuracy after a trial's training, and what either costs."""
    import random

    from compression.search.filters import Diswot

    torch.set_num_threads(1)
    dataset = open_dataset(setting.work / "data")
    stored = [StoredOutputs.open(setting.work / "outputs")]
    parents = {TEACHER: load_checkpoint(setting.work / "teachers" / TEACHER)}
    shop = Workshop(parents, dataset, seed, setting.work / "ranking" / "shop", best_teacher=TEACHER)
    study = Study.model_validate({"spaces": DESIGN, "train": setting.trial.model_dump()})
    rng, rows, seen = random.Random(seed), [], set()
    kept = setting.work / "ranking" / "students.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(kept.read_text()) if kept.exists() else []
    while len(seen) < count:
        space = rng.choice(study.spaces)
        choices = {gene: rng.choice(values) for gene, values in space.genes(shop).items()}
        key = json.dumps([space.label, choices], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        if len(seen) <= len(rows):
            continue
        model, spec = space.build(choices, shop)
        row = TrialResult(len(rows), space.label, choices, "failed", macs=profile.macs(model, spec.input_shape))
        before = time.process_time()
        score = Diswot().score(model, spec, row, (), shop)
        scored = time.process_time()
        distill(
            model, stored, dataset, distillation(setting.final).plain(setting.trial), seed=seed, augment=recipe.augment
        )
        accuracy = evaluate(model, dataset.validation, dataset.preprocessing).accuracy
        trained = time.process_time()
        rows.append(
            {
                "choices": choices,
                "macs": row.macs,
                "params": profile.params(model),
                "score": score,
                "accuracy": accuracy,
                "score_cpu": scored - before,
                "train_cpu": trained - scored,
            }
        )
        kept.write_text(json.dumps(rows, indent=1))
        logger.info("%d of %d: score %.5f, accuracy %.4f", len(rows), count, score, accuracy)
    truth = [row["accuracy"] for row in rows]

    def agreement(name: str) -> float:
        return float(kendalltau([row[name] for row in rows], truth).statistic)

    return {
        "students": len(rows),
        "tau_diswot": agreement("score"),
        "tau_macs": agreement("macs"),
        "tau_params": agreement("params"),
        "score_cpu": sum(row["score_cpu"] for row in rows),
        "train_cpu": sum(row["train_cpu"] for row in rows),
    }


def main() -> None:
    """Runs what the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that keeps data, teachers, studies and results")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/fashion-mnist.yaml"), help="of data and teachers")
    parser.add_argument("--teacher", type=Path, help="checkpoint to use for the teacher 'residual'")
    parser.add_argument("--only", nargs="+", choices=sorted(ARMS), help="arms to run; all of them by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.16, 0.22], help="shares of teacher latency")
    parser.add_argument("--trials", type=int, default=10, help="trained candidates of each search")
    parser.add_argument("--trial-epochs", type=int, default=2)
    parser.add_argument("--trial-steps", type=int, default=110, help="most steps of an epoch of a trial")
    parser.add_argument("--epochs", type=int, default=5, help="of the full distillation")
    parser.add_argument("--batch", type=int, default=32, help="images per call when latency is measured")
    parser.add_argument("--rounds", type=int, default=20, help="of the final timing")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--measured", type=Path, help="write records for compression/measured.json here")
    parser.add_argument("--table", action="store_true", help="train nothing: report what WORK has")
    parser.add_argument(
        "--repeat", metavar="ARM", help="distil the arm's best trial at each budget once per seed, then end"
    )
    parser.add_argument("--ranking", type=int, metavar="N", help="rank N students by DisWOT and by training, then end")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logger.setLevel(logging.INFO)
    logger.info("arguments: %s", vars(options))

    recipe = load_recipe(options.recipe)
    schedule = {"batch_size": 256, "learning_rate": 0.004, "checkpoint_every_steps": 10**6}
    setting = Setting(
        work=options.work,
        budgets=tuple(sorted(options.budgets)),
        trials=options.trials,
        trial=TrainConfig(epochs=options.trial_epochs, max_steps_per_epoch=options.trial_steps, **schedule),
        final=TrainConfig(epochs=options.epochs, **schedule),
        batch=options.batch,
        teachers=tuple(teacher.name for teacher in recipe.teachers if teacher.model is not None),
    )
    prepare(setting, recipe, options.teacher)
    if options.ranking:
        print(json.dumps(ranking(setting, recipe, options.ranking), indent=1))
        return
    if options.repeat:
        print(json.dumps(repeat_winners(setting, recipe, options.repeat, options.seeds), indent=1))
        return
    units = [(arm, seed) for seed in options.seeds for arm in options.only or ARMS]
    finals: list[Final] = []
    if options.table:
        for path in sorted(setting.work.glob("arms/*/finals.json")):
            finals += [Final(**row) for row in json.loads(path.read_text())]
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            work = partial(run_arm, setting, recipe)
            waiting = {pool.submit(work, arm, seed): (arm, seed) for arm, seed in units}
            for done in as_completed(waiting):
                finals += done.result()
                print(f"{waiting[done][0]}, seed {waiting[done][1]}: done", flush=True)
    order = list(ARMS)
    finals.sort(key=lambda final: (order.index(final.arm), final.seed, final.budget))
    ratios = timed(setting, finals, options.rounds)
    print(table(setting, finals, ratios))
    if options.measured:
        options.measured.write_text(json.dumps(measured(setting, finals), indent=1))
    if options.json:
        rows = [asdict(final) | {"ratio": ratios.get((final.arm, final.seed, final.budget))} for final in finals]
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
