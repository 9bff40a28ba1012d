"""Distillation: losses x combinations of teachers, on outputs stored once or on live teachers."""

from compression.distill.config import DistillConfig
from compression.distill.losses import AnyLoss, CrossEntropy, Kd
from compression.distill.run import (
    DistillationStep,
    check_panel,
    distill,
    distillation_step,
    live_distillation_step,
    plain_step,
)
from compression.distill.teachers import AnyCombination, Confidence, Uniform
from compression.distill.types import CombineFn, Helper, LossFn, Needs, Progress, Shapes, TeacherLogits

__all__ = [
    "AnyCombination",
    "AnyLoss",
    "CombineFn",
    "Confidence",
    "CrossEntropy",
    "DistillConfig",
    "DistillationStep",
    "Helper",
    "Kd",
    "LossFn",
    "Needs",
    "Progress",
    "Shapes",
    "TeacherLogits",
    "Uniform",
    "check_panel",
    "distill",
    "distillation_step",
    "live_distillation_step",
    "plain_step",
]
