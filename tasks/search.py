"""Stage 5: students on a front of accuracy against latency measured through the runtime that ships."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint
from compression.data import open_dataset
from compression.distill import DistillConfig, distill
from compression.metrics import evaluate
from compression.search import AnySearch
from compression.search.study import run_study
from compression.search.trials import TrialResult
from compression.teacher_outputs import StoredOutputs
from export.onnx_graph import to_onnx
from export.timing import latency_p50_ms
from tasks import tracking
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import TRAINING_CODE


def probe_latency(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int) -> float:
    """p50 in milliseconds of the candidate's float32 ONNX file in ONNX Runtime, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.onnx"
        to_onnx(model, path, input_shape=input_shape, metadata={}, fast=True)
        return latency_p50_ms(path, batch=batch)


@stage(
    "search",
    code=(*TRAINING_CODE, "compression.search", "compression.distill", "export.timing"),
    libraries=("torch", "torch-pruning", "optuna", "onnxruntime-gpu"),
    tags=("training",),
)
def search(
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
) -> StageOutput:
    """Try pruned and scaled students; keep every trial, and the finalists as they were before training."""
    dataset = open_dataset(work.open(data))
    parents = {teacher: load_checkpoint(work.open(result)) for teacher, result in teachers.items()}
    stored = [StoredOutputs.open(work.open(result)) for result in panel.values()]
    short = distillation.plain(config.train)

    def train_trial(model: nn.Module, number: int, checkpoints: Path) -> float:
        torch.manual_seed(seed)
        distill(
            model,
            stored,
            dataset,
            short,
            seed=seed,
            augment=augment,
            checkpoint_dir=checkpoints,
            on_step=lambda done, total: work.report(f"trial {number + 1}", done, total),
        )
        return evaluate(model, dataset.validation, dataset.preprocessing).accuracy

    done: list[TrialResult] = []

    def on_trial(row: TrialResult) -> None:
        done.append(row)
        finished = sum(each.state in ("complete", "failed") for each in done)
        work.report("searching students", finished, config.trials)
        measured = ("accuracy", "latency_p50_ms", "size_bytes", "macs", "params", "seconds")
        metrics = {key: float(getattr(row, key)) for key in measured if getattr(row, key) is not None}
        facts = {"space": row.space, **row.choices, "state": row.state, "reason": row.reason}
        tracking.log_candidate(work.run, f"trial-{row.number}", params=facts, metrics=metrics)

    result = run_study(
        config,
        parents=parents,
        dataset=dataset,
        seed=seed,
        latency_ms=lambda model: probe_latency(model, dataset.input_shape, batch=config.batch),
        train_trial=train_trial,
        storage=work.scratch / "study.db",
        folder=work.scratch / "candidates",
        best_teacher=best_teacher,
        on_trial=on_trial,
    )
    with work.store.put("search") as draft:
        for place, folder in enumerate(result.finalists):
            shutil.copytree(folder, draft.folder / "finalists" / str(place))
        shutil.copyfile(work.scratch / "candidates" / "trials.csv", draft.folder / "trials.csv")
        shutil.copyfile(work.scratch / "study.db", draft.folder / "study.db")
    work.run.log_file(work.store.place(draft.done()) / "trials.csv", "search")
    finalists = [f"{trial.space} {trial.choices}" for trial in result.chosen]
    return StageOutput(
        artifact=draft.done(),
        metrics={
            "trials": float(len(result.trials)),
            "front": float(len(result.front)),
            "hypervolume": result.hypervolume,
            "finalist_accuracy": result.chosen[0].accuracy or 0.0,
            "finalist_latency_p50_ms": result.chosen[0].latency_p50_ms or 0.0,
        },
        info={"finalists": finalists, "knee": result.knee.number},
    )
