"""Combinations: how much each teacher counts, sample by sample."""

from compression.distill.teachers.base import CombineFn
from compression.distill.teachers.confidence import Confidence
from compression.distill.teachers.uniform import Uniform

AnyCombination = Uniform | Confidence
"""What a recipe may name under ``distill.teachers``."""

__all__ = ["AnyCombination", "CombineFn", "Confidence", "Uniform"]
