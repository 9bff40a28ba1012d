"""What the student is asked to match. One file per loss; a new one adds its name to ``AnyLoss``."""

from compression.distill.losses.cross_entropy import CrossEntropy
from compression.distill.losses.kd import Kd

AnyLoss = CrossEntropy | Kd
"""What a recipe may list under ``distill.losses``."""

__all__ = ["AnyLoss", "CrossEntropy", "Kd"]
