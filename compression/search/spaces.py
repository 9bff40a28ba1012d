"""All spaces a study can draw from; a new one adds its name to ``AnySpace``."""

from compression.search.design import Design
from compression.search.fastnas import FastNas
from compression.search.layers import Layers
from compression.search.prune import Prune
from compression.search.scale import Scale
from compression.search.shrink import Shrink
from compression.search.subnets import Subnets
from compression.search.tas import Tas
from compression.search.tokens import Tokens

AnySpace = Prune | Scale | Design | Layers | Tokens | Tas | Subnets | FastNas | Shrink
"""What a recipe may list under ``search.spaces``."""

__all__ = [
    "AnySpace",
    "Design",
    "FastNas",
    "Layers",
    "Prune",
    "Scale",
    "Shrink",
    "Subnets",
    "Tas",
    "Tokens",
]
