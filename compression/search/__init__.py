"""Search: candidate students from teachers and zoo families, judged by accuracy and measured latency."""

from compression.search.filters import AnyFilter
from compression.search.priors import AnyPriors
from compression.search.samplers import AnySampler
from compression.search.spaces import AnySpace, Design, Prune, Scale
from compression.search.study import Study

AnySearch = Study
"""What a recipe's search stage may be."""

__all__ = ["AnyFilter", "AnyPriors", "AnySampler", "AnySearch", "AnySpace", "Design", "Prune", "Scale", "Study"]
