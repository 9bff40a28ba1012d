"""Who proposes the next candidate of a study. One file per sampler; a new one adds its name to ``AnySampler``."""

from compression.search.samplers.n2n import N2n
from compression.search.samplers.nsga2 import Nsga2
from compression.search.samplers.random_search import RandomSearch
from compression.search.samplers.sampler import Sampler, Situation
from compression.search.samplers.tpe import Tpe
from compression.search.samplers.training_free import TrainingFree

AnySampler = Nsga2 | Tpe | RandomSearch | TrainingFree | N2n
"""What a recipe may name under ``search.sampler``."""

__all__ = ["AnySampler", "N2n", "Nsga2", "RandomSearch", "Sampler", "Situation", "Tpe", "TrainingFree"]
