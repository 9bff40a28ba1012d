"""Search: candidate students from teachers and zoo families, judged by accuracy and measured latency."""

from compression.search.prune import Prune
from compression.search.scale import Scale
from compression.search.study import Study

AnySpace = Prune | Scale
"""What a study draws candidates from."""

AnySearch = Study
"""What a recipe's search stage may be."""

__all__ = ["AnySearch", "AnySpace", "Prune", "Scale", "Study"]
