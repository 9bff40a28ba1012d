"""Supernets: one set of weights that holds networks of many sizes.

``slicing`` says which part of a large network a small one takes, ``supernet`` trains the sizes together, ``space``
makes candidates of them.
"""

from compression.search.subnets.space import Subnets

__all__ = ["Subnets"]
