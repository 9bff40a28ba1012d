"""A small student that is made sparse in a fraction of a second."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from compression.augment import ShiftFlip
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.models import ModelSpec, build_model
from compression.sparsify import Sparsifier, sparsify
from compression.sparsify.session import Session
from compression.teacher_outputs import StoredOutputs
from compression.train import Hardware, History, TrainConfig
from compression.zoo import PlainCnn
from tests.compression.tiny_data import CLASSES

SHIFT = ShiftFlip(pad=1, flip=False)
CPU = Hardware(accelerator="cpu")
TRAIN = TrainConfig(epochs=2, batch_size=16, learning_rate=0.01, checkpoint_every_steps=1)
DISTILL = DistillConfig(train=TRAIN, losses=(CrossEntropy(), Kd()), views=2)
NET = PlainCnn(widths=(8, 12), depths=(1, 1), strides=(2, 1), stem_width=8)
SPARSE = ("blocks.0.0.weight", "blocks.1.0.weight", "head.weight")
"""The stem sums over one channel, and stays dense."""


def student(dataset: Dataset, *, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    spec = ModelSpec(
        model=NET,
        num_classes=len(CLASSES),
        input_shape=dataset.input_shape,
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(spec).eval(), spec


def made_sparse(
    config: Sparsifier,
    dataset: Dataset,
    panel: Sequence[StoredOutputs] = (),
    *,
    seed: int = 0,
    folder: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, History]:
    model, spec = student(dataset)
    history = sparsify(
        model,
        spec,
        config,
        panel,
        dataset,
        DISTILL,
        seed=seed,
        augment=SHIFT,
        checkpoint_dir=folder,
        on_step=on_step,
        hardware=CPU,
    )
    return model, history


def session(model: nn.Module, spec: ModelSpec, dataset: Dataset, *, seed: int = 0) -> Session:
    return Session(
        model=model, spec=spec, panel=(), dataset=dataset, distillation=DISTILL, seed=seed, augment=SHIFT, hardware=CPU
    )
