"""TAS: width and depth of a convolutional network, learnt by gradient under a latency target."""

from compression.search.tas.space import Tas

__all__ = ["Tas"]
