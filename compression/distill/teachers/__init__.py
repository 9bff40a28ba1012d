"""How much each teacher counts, per sample. One file per combination; a new one joins ``AnyCombination``."""

from compression.distill.teachers.confidence import Confidence
from compression.distill.teachers.partition import Partition
from compression.distill.teachers.router import Router
from compression.distill.teachers.specialists import Specialists
from compression.distill.teachers.uniform import Uniform
from compression.distill.teachers.validation_weighted import ValidationWeighted

AnyCombination = Uniform | Confidence | ValidationWeighted | Partition | Router | Specialists
"""What a recipe may name under ``distill.teachers``."""

__all__ = ["AnyCombination", "Confidence", "Partition", "Router", "Specialists", "Uniform", "ValidationWeighted"]
