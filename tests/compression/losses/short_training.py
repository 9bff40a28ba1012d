"""Stored outputs with features, and a distillation on them that takes a fraction of a second."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from compression.augment import ShiftFlip
from compression.data.dataset import Dataset
from compression.distill import AnyLoss, CrossEntropy, DistillationStep, DistillConfig, Uniform, distill
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, History, TrainConfig
from compression.train.step_checkpoint import load_state
from tests.compression.tiny_data import CLASSES

SHIFT = ShiftFlip(pad=1, flip=False)


class Stop(BaseException):
    """Ends a training as a kill would, but in this process."""


def net(width: int, seed: int) -> nn.Module:
    """A network whose penultimate features are ``width`` wide."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(width, len(CLASSES)),
        )


def stored(dataset: Dataset, folder: Path, *, width: int, seed: int) -> StoredOutputs:
    spec = OutputsSpec(views=2, seed=0, augment=SHIFT, features=True)
    write_teacher_outputs(net(width, seed), dataset, spec, folder)
    return StoredOutputs.open(folder)


@contextmanager
def one_thread():
    """Equal bits are promised for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh_parts(loss: AnyLoss, student: nn.Module, panel: list[StoredOutputs], dataset: Dataset) -> dict[str, Tensor]:
    """The helper's state with which :func:`distilled` starts."""
    step = DistillationStep((CrossEntropy(), loss), Uniform(), panel)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        step.prepare(student, dataset)
    return step.helpers.state_dict()


def distilled(
    loss: AnyLoss,
    panel: list[StoredOutputs],
    dataset: Dataset,
    folder: Path,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, dict[str, Tensor], History]:
    """A student, the state of its helper, and the history of 12 steps in 3 epochs with ``loss`` beside labels."""
    student = net(6, seed=3)
    train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    config = DistillConfig(train=train, losses=(CrossEntropy(), loss), views=2)
    with one_thread():
        history = distill(
            student,
            panel,
            dataset,
            config,
            seed=0,
            augment=SHIFT,
            hardware=Hardware(accelerator="cpu"),
            checkpoint_dir=folder,
            on_step=on_step,
        )
    state = load_state(folder)
    assert state is not None
    return student, state["helpers"], history


def stop_at(step: int) -> Callable[[int, int], None]:
    def on_step(done: int, total: int) -> None:
        del total
        if done == step:
            raise Stop

    return on_step


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
