"""All spaces a study can draw from; a new one adds its name to ``AnySpace``."""

from compression.search.design import Design
from compression.search.prune import Prune
from compression.search.scale import Scale

AnySpace = Prune | Scale | Design
"""What a recipe may list under ``search.spaces``."""

__all__ = ["AnySpace", "Design", "Prune", "Scale"]
