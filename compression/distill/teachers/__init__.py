"""How much each teacher counts, per sample. One file per combination; a new one joins ``AnyCombination``."""

from compression.distill.teachers.confidence import Confidence
from compression.distill.teachers.uniform import Uniform

AnyCombination = Uniform | Confidence
"""What a recipe may name under ``distill.teachers``."""

__all__ = ["AnyCombination", "Confidence", "Uniform"]
