"""Distillation: losses x combinations of teachers, on outputs stored once or on live teachers."""

from compression.distill.config import DistillConfig
from compression.distill.losses import AnyLoss, BdKd, CrossEntropy, Dhkd, Dist, Dkd, Kd, Nd, Ofa, Pld, Sinkd, TopKld
from compression.distill.monitor import Monitor
from compression.distill.run import (
    DistillationStep,
    check_panel,
    distill,
    distillation_step,
    live_distillation_step,
    plain_step,
)
from compression.distill.samplers import AnySampler, Full, RandomSubset, Rs2
from compression.distill.teachers import AnyCombination, Confidence, Partition, Uniform, ValidationWeighted
from compression.distill.types import CombineFn, Helper, LossFn, Needs, Progress, Shapes, TeacherLogits

__all__ = [
    "AnyCombination",
    "AnyLoss",
    "AnySampler",
    "BdKd",
    "CombineFn",
    "Confidence",
    "CrossEntropy",
    "Dhkd",
    "Dist",
    "DistillConfig",
    "DistillationStep",
    "Dkd",
    "Full",
    "Helper",
    "Kd",
    "LossFn",
    "Monitor",
    "Nd",
    "Needs",
    "Ofa",
    "Partition",
    "Pld",
    "Progress",
    "RandomSubset",
    "Rs2",
    "Shapes",
    "Sinkd",
    "TeacherLogits",
    "TopKld",
    "Uniform",
    "ValidationWeighted",
    "check_panel",
    "distill",
    "distillation_step",
    "live_distillation_step",
    "plain_step",
]
