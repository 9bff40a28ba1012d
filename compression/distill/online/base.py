"""The shape of an online augmentation: it changes a batch in ways that stored outputs do not know.

Legend: B batch, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from compression.distill.types import Helper
from compression.types import Batch


@dataclass(frozen=True)
class Changed:
    """What a batch has become."""

    images: Tensor
    """Normalised, [B,C,H,W]."""
    labels: Tensor
    """Int64 [B]; -1 where the image is no longer of one class."""
    soft_labels: Tensor | None = None
    """[B,C], rows sum to 1; for losses that can learn from them."""


class OnlineAugment(Helper):
    """Changes images after their keyed view was made; teachers see what the student sees, so they run live."""

    def forward(self, batch: Batch, student: nn.Module, teachers: Sequence[nn.Module]) -> Changed:
        """Return the changed batch; called once a step, before student and teachers look at it.

        Args:
            batch: on the device of the student.
            student: being trained; must keep its gradients, statistics and mode.
            teachers: live, in inference mode.
        """
        raise NotImplementedError
