"""Stage 5: students on a front of accuracy against latency measured through the runtime that ships."""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint
from compression.data import open_dataset, with_pool
from compression.distill import DistillConfig, distill
from compression.distill.procedures import Training
from compression.errors import InputError
from compression.metrics import evaluate
from compression.search import AnySearch
from compression.search.bank import PastTrial, past_trials, read_bank, task_of, write_bank
from compression.search.candidate import OnEpoch, labels_of
from compression.search.study import run_study
from compression.search.task_embedding import data_hash, embedding_of
from compression.search.trials import Latency, Score, TrialResult
from compression.teacher_outputs import StoredOutputs
from compression.train import TrainConfig
from export.latency_model import (
    NETS,
    DeviceFactor,
    DevicePoint,
    FittedLatency,
    build_latency_model,
    factor_of,
    kept_latency_model,
    points_of,
)
from export.onnx_graph import to_onnx
from export.timing import latency_beside, latency_p50_ms
from tasks import tracking
from tasks.devices import hardware
from tasks.progress import Report
from tasks.sensitivity import open_table
from tasks.settings import settings
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import TRAINING_CODE

KEPT_OF_SHOP = ("n2n/policy.safetensors", "predictor.json")
"""What samplers and filters learned, kept with the trials."""


def trials_folder() -> Path:
    """Where the trials of all finished studies are, for those to come."""
    return settings().home_dir / "trials"


def past_at_start(kept: Path) -> list[PastTrial]:
    """Trials of earlier studies, as they were when this one began: one that goes on after a kill sees no others."""
    if not kept.exists():
        write_bank(kept, read_bank(trials_folder().glob("*.jsonl")))
    return read_bank([kept])


def latency_model_for(
    input_shape: tuple[int, int, int], *, batch: int, folder: Path | None = None, report: Report | None = None
) -> FittedLatency:
    """The latency model of this machine: measured on first use, then read from ``<home>/latency``."""

    def on_progress(done: int, total: int) -> None:
        if report is not None:
            report("measuring networks for the latency model", done, total)

    place = latency_folder() if folder is None else folder
    return build_latency_model(
        input_shape, batch=batch, folder=place, nets=settings().latency_networks or NETS, on_progress=on_progress
    )


def latency_folder() -> Path:
    """Where the tables of this machine are kept, and what devices reported."""
    return settings().home_dir / "latency"


def require_points(device: str) -> tuple[DevicePoint, ...]:
    """What a device measured.

    Raises:
        InputError: nothing.
    """
    points = points_of(latency_folder(), device)
    if not points:
        raise InputError(f"Device '{device}' has no measured model, expected one. Roll a bundle out to it first.")
    return points


def device_factor(device: str) -> DeviceFactor:
    """How many times as long as predicted here a device takes; nothing is measured for it.

    Raises:
        InputError: the device has reported on no model, or on none whose image size this machine has a table for.
    """
    points = require_points(device)

    @cache
    def table_for(input_shape: tuple[int, int, int], batch: int) -> FittedLatency | None:
        nets = settings().latency_networks or NETS
        return kept_latency_model(input_shape, batch=batch, folder=latency_folder(), nets=nets)

    found = factor_of(points, table_for)
    if found is None:
        size = "x".join(map(str, points[-1].input_shape))
        raise InputError(
            f"Device '{device}' has measured models for images {size}, for which this machine has no latency model, "
            f"expected one to compare with. Measure it: stillhouse latency {size} --batch 1"
        )
    return found


def check_device(config: AnySearch) -> None:
    """Refuse a budget in the milliseconds of a device that has not reported; see ``device_factor``."""
    if config.device is not None:
        device_factor(config.device)


class Clock:
    """Times candidates beside the best teacher, so that a slow spell of a shared machine does not tell against them.

    Milliseconds are shares of the teacher's p50, which is measured once: those of one study can be compared.
    """

    def __init__(self, reference: nn.Module, input_shape: tuple[int, int, int], *, batch: int, folder: Path) -> None:
        self.input_shape, self.batch, self.folder = input_shape, batch, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.reference = folder / "reference.onnx"
        to_onnx(reference, self.reference, input_shape=input_shape, metadata={}, fast=True)
        kept = folder / f"reference-{batch}.json"
        if not kept.exists():
            found = latency_p50_ms(self.reference, batch=batch)
            draft = kept.with_suffix(".part")
            draft.write_text(json.dumps(found))
            draft.replace(kept)
        self.reference_ms = float(json.loads(kept.read_text()))

    def __call__(self, model: nn.Module) -> Latency:
        """Latency of the model's float32 ONNX file in ONNX Runtime, one thread."""
        path = self.folder / "candidate.onnx"
        to_onnx(model, path, input_shape=self.input_shape, metadata={}, fast=True)
        p50, p95 = latency_beside(path, self.reference, batch=self.batch)
        path.unlink()
        return Latency(p50 * self.reference_ms, p95 * self.reference_ms)


def search(*, name: str, config: AnySearch, **inputs: Any) -> StageResult:
    """The stage ``search``; the factor of the device, where the budget is in its milliseconds, is one of its inputs.

    Raises:
        InputError: the device has no factor.
    """
    if config.device is not None:
        inputs["device_factor"] = device_factor(config.device).factor
    return search_students(name=name, config=config, **inputs)


@stage(
    "search",
    code=(*TRAINING_CODE, "compression.search", "compression.distill", "export.timing", "export.latency_model"),
    libraries=("torch", "torch-pruning", "optuna", "onnxruntime-gpu"),
    tags=("training",),
)
def search_students(
    work: Work,
    *,
    name: str,
    config: AnySearch,
    distillation: DistillConfig,
    teachers: Mapping[str, StageResult],
    best_teacher: str,
    panel: Mapping[str, StageResult],
    data: StageResult,
    augment: AnyAugment,
    machine: str,
    seed: int,
    sensitivity: StageResult | None = None,
    device_factor: float | None = None,
) -> StageOutput:
    """Try students of all spaces; keep every trial, and the finalists as they were before training.

    ``sensitivity`` is the table of the best teacher, for spaces that start from it. With ``device_factor`` the budget
    is in the milliseconds of a device: it is divided by the factor, and all else stays in those of this machine.
    """
    if device_factor is not None and config.max_latency_ms is not None:
        config = config.model_copy(update={"max_latency_ms": config.max_latency_ms / device_factor})
    dataset = open_dataset(work.open(data))
    parents = {teacher: load_checkpoint(work.open(result)) for teacher, result in teachers.items()}
    stored = [StoredOutputs.open(work.open(result)) for result in panel.values()]
    short = distillation.plain(config.train)

    def train_trial(model: nn.Module, number: int, checkpoints: Path, on_epoch: OnEpoch) -> Score:
        torch.manual_seed(seed)
        distill(
            model,
            stored,
            dataset,
            short,
            seed=seed,
            augment=augment,
            checkpoint_dir=checkpoints,
            on_epoch=lambda row: on_epoch(float(row["validation_accuracy"])),
            on_step=lambda done, total: work.report(f"trial {number + 1}", done, total),
            hardware=hardware(),
        )
        found = evaluate(model, dataset.validation, dataset.preprocessing)
        return Score(found.accuracy, found.ece)

    def start_training(model: nn.Module, train: TrainConfig, checkpoints: Path) -> Training:
        return Training(
            student=model,
            panel=stored,
            teachers=(),
            dataset=with_pool(dataset),
            config=distillation.plain(train),
            seed=seed,
            augment=augment,
            hardware=hardware(),
            checkpoint_dir=checkpoints,
            on_step=lambda done, total: work.report(f"training {checkpoints.name}", done, total),
        )

    done: list[TrialResult] = []

    def on_trial(row: TrialResult) -> None:
        done.append(row)
        finished = sum(each.state in ("complete", "failed", "stopped") for each in done)
        work.report("searching students", finished, config.trials)
        measured = ("accuracy", "ece", "latency_p50_ms", "latency_p95_ms", "latency_predicted_ms", "size_bytes")
        measured += ("macs", "params", "score", "seconds", "cpu_seconds")
        metrics = {key: float(getattr(row, key)) for key in measured if getattr(row, key) is not None}
        facts = {"space": row.space, **row.choices, "state": row.state, "reason": row.reason}
        curve = [{"epoch": epoch, "validation_accuracy": value} for epoch, value in enumerate(row.curve)]
        tracking.log_candidate(work.run, f"trial-{row.number}", params=facts, metrics=metrics, series=curve)

    predictor = None
    if config.wants_latency_model:
        predictor = latency_model_for(dataset.input_shape, batch=config.batch, report=work.report)
    past = past_at_start(work.scratch / "past.jsonl") if config.wants_past else []
    clock = Clock(parents[best_teacher][0], dataset.input_shape, batch=config.batch, folder=work.scratch / "clock")
    database = settings().study_storage
    result = run_study(
        config,
        parents=parents,
        dataset=dataset,
        seed=seed,
        latency=clock,
        train_trial=train_trial,
        start_training=start_training,
        storage=database if database is not None else work.scratch / "study.db",
        folder=work.scratch / "candidates",
        best_teacher=best_teacher,
        latency_model=predictor,
        past=past,
        sensitivity={} if sensitivity is None else {best_teacher: open_table(work.open(sensitivity))},
        on_trial=on_trial,
    )
    shop = work.scratch / "candidates" / "shop"
    bank = past_trials(
        result.trials,
        task=task_of(dataset, embedding_of(dataset, seed=seed, folder=trials_folder() / data_hash(dataset))),
        study=result.fingerprint,
        objectives=config.objectives,
        kinds={label: str(space.model_dump()["kind"]) for label, space in labels_of(config.spaces).items()},
        train=config.train,
        teacher_accuracy=teachers[best_teacher].metrics.get("accuracy"),
    )
    write_bank(trials_folder() / f"{result.fingerprint}.jsonl", bank)
    with work.store.put("search") as draft:
        for place, folder in enumerate(result.finalists):
            shutil.copytree(folder, draft.folder / "finalists" / str(place))
        shutil.copyfile(work.scratch / "candidates" / "trials.csv", draft.folder / "trials.csv")
        write_bank(draft.folder / "bank.jsonl", bank)
        for kept in KEPT_OF_SHOP:
            if (shop / kept).is_file():
                (draft.folder / kept).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(shop / kept, draft.folder / kept)
        if database is None:
            shutil.copyfile(work.scratch / "study.db", draft.folder / "study.db")
    work.run.log_file(work.store.place(draft.done()) / "trials.csv", "search")
    metrics = {
        "trials": float(len(result.trials)),
        "front": float(len(result.front)),
        "hypervolume": result.hypervolume,
        "finalist_accuracy": result.chosen[0].accuracy or 0.0,
        "finalist_latency_p50_ms": result.chosen[0].latency_p50_ms or 0.0,
    }
    info: dict[str, Any] = {
        "finalists": [f"{trial.space} {trial.choices}" for trial in result.chosen],
        "knee": result.knee.number,
    }
    if device_factor is not None:
        info["device"] = {"name": config.device, "factor": device_factor, "max_latency_ms_here": config.max_latency_ms}
        metrics |= {"device_factor": device_factor}
        metrics |= {"finalist_device_p50_ms": metrics["finalist_latency_p50_ms"] * device_factor}
    if predictor is not None and (held := predictor.table.held_out) is not None:
        metrics |= {"latency_model_median_error": held.median_error, "latency_model_kendall_tau": held.kendall_tau}
    if (shop / "predictor.json").is_file():
        info["predictor"] = json.loads((shop / "predictor.json").read_text())
        found = {name: info["predictor"][name] for name in ("leave_one_out", "leave_one_study_out")}
        metrics |= {f"predictor_{name}": float(value) for name, value in found.items() if value is not None}
    return StageOutput(artifact=draft.done(), metrics=metrics, info=info)
