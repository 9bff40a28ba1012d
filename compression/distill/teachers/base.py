"""What all combinations are."""

from collections.abc import Callable

from torch import Tensor

CombineFn = Callable[[Tensor, Tensor], Tensor]
"""(teachers' logits [K,B,C], labels [B]) -> weights [K,B], non-negative, summing to 1 over teachers."""
