"""What the student is shown. One file per sampler; a new one adds its name to ``AnySampler``."""

from compression.distill.samplers.class_subset import ClassSubset
from compression.distill.samplers.full import Full
from compression.distill.samplers.kd3 import Kd3
from compression.distill.samplers.random_subset import RandomSubset
from compression.distill.samplers.rs2 import Rs2

AnySampler = Full | Rs2 | RandomSubset | Kd3 | ClassSubset
"""What a recipe may name under ``distill.sampler``."""

__all__ = ["AnySampler", "ClassSubset", "Full", "Kd3", "RandomSubset", "Rs2"]
