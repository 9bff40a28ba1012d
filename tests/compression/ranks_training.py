"""What each rank of tests/compression/test_ddp.py runs: the trainings a JSON file lists, one after the other."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import NoAugment
from compression.errors import CompressionError
from compression.train import Hardware, TrainConfig, fit, launcher, ranks
from compression.types import Batch
from tests.compression.tiny_data import tiny_dataset


def net(kind: str) -> nn.Module:
    """``plain`` has neither batch norm nor dropout; ``norm`` has batch norm, ``dropout`` drops."""
    torch.manual_seed(0)
    between: dict[str, nn.Module] = {"norm": nn.BatchNorm2d(8), "dropout": nn.Dropout(0.2)}
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        between.get(kind, nn.Identity()),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


class Projector(nn.Module):
    """Trained beside the model: a second reading of its logits, and a mean that each rank sees another part of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))


def train(job: dict[str, Any], hardware: Hardware) -> None:
    """One training; the first rank leaves ``<name>.safetensors`` and ``<name>.json`` in the job's folder."""
    model, helpers = net(job["net"]), Projector()
    folder, name, rank = Path(job["folder"]), job["name"], int(os.environ.get("RANK", "0"))

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        terms = {"cross_entropy": F.cross_entropy(logits, batch.labels)}
        if job.get("helpers"):
            helpers.seen.copy_(logits.detach().mean(dim=0))
            terms["projected"] = F.cross_entropy(helpers.layer(logits), batch.labels)
        return terms

    def on_step(done: int, total: int) -> None:
        launcher.tell(text=name, done=done, total=total)
        if done == job.get("dies_at") and rank == job["rank"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if done == job.get("fails_at") and rank == job["rank"]:
            raise CompressionError(f"Rank '{rank}' has had enough, expected more. Let it rest.")

    history = fit(
        model,
        step,
        tiny_dataset(train=128, validation=64),
        TrainConfig.model_validate(job["train"]),
        seed=0,
        augment=NoAugment(),
        hardware=hardware,
        checkpoint_dir=Path(job["checkpoints"]) if "checkpoints" in job else None,
        on_step=on_step,
        helpers=helpers if job.get("helpers") else None,
        should_stop=(lambda rows: len(rows) >= job["stops_after"] + 5 * rank) if "stops_after" in job else None,
    )
    state = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    state |= {f"helpers.{key}": value.contiguous() for key, value in helpers.state_dict().items()}
    suffix = "" if rank == 0 else f".rank-{rank}"
    save_file(state, folder / f"{name}{suffix}.safetensors")
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(history.rows))


def work() -> None:
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        train(each, Hardware(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"])))
    ranks.part()


if __name__ == "__main__":
    launcher.serve(work)
