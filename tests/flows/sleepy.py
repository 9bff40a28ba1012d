"""A flow for tests that trains for real but slowly, and leaves a trace of what it did: its source and what it wrote."""

import os
from pathlib import Path
from typing import Any

import psutil

from tests.flows.running_up import RunningUp, wait_for

SOURCE = """
import os
import time
from pathlib import Path

import torch
from prefect import flow, task
from prefect.runtime import flow_run
from torch import nn

from compression.augment import NoAugment
from compression.data.dataset import Dataset, Split
from compression.distill import plain_step
from compression.train import Hardware, TrainConfig, fit
from compression.types import Preprocessing
from flows.cancelling import cancellable
from tasks import tracking
from tasks.running import running


def split(count, first):
    labels = torch.arange(count) % 4
    return Split(images=torch.zeros(count, 1, 8, 8, dtype=torch.uint8), labels=labels, ids=torch.arange(count) + first)


def write(name, what, value):
    with Path(f"{name}.{what}").open("a") as file:
        file.write(f"{value}\\n")


@task(tags=["training"])
def train(name, steps, pause, every, parent_id):
    parts = {part: split(8, number * 1000) for number, part in enumerate(("validation", "calibration", "test"), 1)}
    data = Dataset(
        name="grey", class_names=tuple("abcd"), preprocessing=Preprocessing(scale=255.0, mean=(0.5,), std=(0.2,)),
        train=split(steps * 4, 0), hashes={"train": name}, **parts,
    )

    def on_step(done, total):
        write(name, "steps", done)
        time.sleep(pause)

    with tracking.stage_run(tracking.Run(parent_id), stage="distill", name=name, key=name, params={}):
        fit(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), plain_step(), data,
            TrainConfig(epochs=1, batch_size=4, checkpoint_every_steps=every), seed=0, augment=NoAugment(),
            hardware=Hardware(accelerator="cpu"), checkpoint_dir=Path(f"{name}-checkpoints"), on_step=on_step,
        )


@flow(log_prints=True)
def sleepy(name: str = "sleepy", steps: int = 100, pause: float = 0.1, every: int = 10):
    write(name, "starts", os.getpid())
    tags = {"prefect.flow_run_id": str(flow_run.id)}
    lock = running(name, flow_run_id=str(flow_run.id))
    with cancellable(), lock as lease, tracking.recipe_run(name, {"name": name}, tags) as run:
        lease.note(mlflow_run=run.id)
        train(name, steps, pause, every, run.id)
    write(name, "ends", os.getpid())


@flow
def tick():
    write("tick", "ends", os.getpid())
"""

DEPLOYMENTS = """
name: test
deployments:
  - {name: compress, entrypoint: "flow_here.py:sleepy", tags: [stillhouse], work_pool: {name: stillhouse}}
  - {name: other, entrypoint: "flow_here.py:sleepy", tags: [stillhouse], work_pool: {name: stillhouse}}
  - {name: tick, entrypoint: "flow_here.py:tick", tags: [stillhouse], work_pool: {name: stillhouse}}
"""


def start_up(folder: Path) -> RunningUp:
    """``stillhouse up`` with these flows: ``compress`` is started again after a crash, ``other`` is not."""
    (folder / "flow_here.py").write_text(SOURCE)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    return RunningUp(folder, source=folder, deployments=folder / "prefect.yaml")


def lines(folder: Path, name: str, what: str) -> list[int]:
    """What the runs called ``name`` wrote: process ids of ``starts`` and ``ends``, or ``steps`` done."""
    path = folder / f"{name}.{what}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def until_step(folder: Path, name: str, step: int, *, starts: int = 1) -> psutil.Process:
    """The process of the newest start, as soon as it has done so many steps."""

    def ready() -> bool:
        return len(lines(folder, name, "starts")) >= starts and len(lines(folder, name, "steps")) >= step

    wait_for(ready, 120, f"step {step} of {name}")
    return psutil.Process(lines(folder, name, "starts")[-1])


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def left_of(folder: Path) -> list[dict[str, Any]]:
    """Every process of this machine that works for the project in ``folder``."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "environ", "status"]):
        root = (process.info["environ"] or {}).get("STILLHOUSE_ROOT")
        if root == str(folder) and process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append({"pid": process.pid, "command": " ".join(process.info["cmdline"] or [])})
    return found
