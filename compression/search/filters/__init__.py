"""Who looks at a candidate before it is trained. One file per filter; a new one adds its name to ``AnyFilter``."""

from compression.search.filters.look import Filter

AnyFilter = Filter
"""What a recipe may name under ``search.filter``."""

__all__ = ["AnyFilter", "Filter"]
