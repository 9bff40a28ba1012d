"""Losses: each a function of the student's outputs, the teachers' outputs and the labels."""

from compression.distill.losses.base import LossConfig, LossFn
from compression.distill.losses.cross_entropy import CrossEntropy
from compression.distill.losses.kd import Kd

AnyLoss = CrossEntropy | Kd
"""What a recipe may name under ``distill.losses``."""

__all__ = ["AnyLoss", "CrossEntropy", "Kd", "LossConfig", "LossFn"]
