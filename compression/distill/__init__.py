"""Distillation: losses of tensors, combinations of teachers, and the step that joins them."""

from compression.distill.config import DistillConfig
from compression.distill.losses import AnyLoss, LossFn
from compression.distill.run import distill, distillation_step, live_distillation_step, plain_step
from compression.distill.teachers import AnyCombination, CombineFn

__all__ = [
    "AnyCombination",
    "AnyLoss",
    "CombineFn",
    "DistillConfig",
    "LossFn",
    "distill",
    "distillation_step",
    "live_distillation_step",
    "plain_step",
]
