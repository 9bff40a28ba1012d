"""A tiny workshop with one teacher of each family, for the contracts of search."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from compression import profile
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.distill.procedures import Training
from compression.models import ModelSpec, build_model
from compression.search.space import Operator, Workshop
from compression.teacher_outputs import StoredOutputs
from compression.train import Hardware, TrainConfig
from compression.types import Preprocessing
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn, VisionTransformer
from tests.compression.losses.short_training import SHIFT
from tests.compression.tiny_data import CLASSES

SHORT = TrainConfig(epochs=1, batch_size=16, learning_rate=0.01)

FAMILIES = {
    "residual": ResidualCnn(widths=(16, 32), depths=(2, 2), strides=(1, 2), stem_width=16),
    "plain": PlainCnn(widths=(16, 16), depths=(2, 2), strides=(1, 2), stem_width=16),
    "depthwise": DepthwiseCnn(widths=(16, 32), depths=(2, 2), strides=(1, 2), stem_width=16, stem_stride=1, kernel=3),
    "transformer": VisionTransformer(width=16, depth=3, num_heads=2, patch_size=2, stem_width=8),
}


def teacher(name: str) -> tuple[nn.Module, ModelSpec]:
    """A network with weights and batch-norm statistics that differ from channel to channel."""
    spec = ModelSpec(
        model=FAMILIES[name],
        num_classes=len(CLASSES),
        input_shape=(1, 8, 8),
        class_names=CLASSES,
        preprocessing=Preprocessing(scale=255.0, mean=(0.3,), std=(0.2,)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = build_model(spec)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 1.8)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), spec


class ByMacs:
    """A latency model that needs no clock: time is in proportion to MACs."""

    batch = 8

    def predict_ms(self, model: nn.Module, input_shape: tuple[int, int, int]) -> float:
        return 0.01 + profile.macs(model, input_shape) / 1e6

    def operators_ms(self, operators: Sequence[Operator]) -> list[float]:
        def macs(each: Operator) -> float:
            pixels = each.height * each.width * each.kernel**2
            return max(1.0, each.in_channels * each.out_channels * pixels / each.groups)

        return [macs(each) / 1e6 for each in operators]


def workshop(data: Dataset, panel: Sequence[StoredOutputs], folder: Path, *, seed: int = 0) -> Workshop:
    """Four teachers, a panel and a way to train on it."""

    def start_training(model: nn.Module, train: TrainConfig, checkpoints: Path) -> Training:
        return Training(
            student=model,
            panel=panel,
            teachers=(),
            dataset=data,
            config=DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2),
            seed=seed,
            augment=SHIFT,
            hardware=Hardware(accelerator="cpu"),
            checkpoint_dir=checkpoints,
        )

    parents = {name: teacher(name) for name in FAMILIES}
    return Workshop(parents, data, seed, folder, start_training, ByMacs(), "residual")
