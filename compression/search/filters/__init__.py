"""Who looks at a candidate before it is trained. One file per filter; a new one adds its name to ``AnyFilter``."""

from compression.search.filters.diswot import Diswot
from compression.search.filters.inherited import Inherited
from compression.search.filters.look import Filter
from compression.search.filters.predictor import Predictor

AnyFilter = Diswot | Inherited | Predictor
"""What a recipe may name under ``search.filter``."""

__all__ = ["AnyFilter", "Diswot", "Filter", "Inherited", "Predictor"]
