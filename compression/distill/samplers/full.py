"""Every sample in every epoch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compression.card import MethodCard
from compression.train.batches import Sampler, shuffled
from compression.types import Frozen


@dataclass(frozen=True)
class FullSampler:
    """The whole split, shuffled anew in each epoch."""

    name: str = "full"

    def size(self, n: int) -> int:
        """All ``n``."""
        return n

    def indices(self, epoch: int, labels: Tensor, seed: int) -> Tensor:
        """A permutation int64 [N]."""
        return shuffled(len(labels), seed=seed, epoch=epoch)


class Full(Frozen):
    """Every sample in every epoch."""

    kind: Literal["full"] = "full"

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are asked which samples to show."""
    adaptive: ClassVar[bool] = False
    """Whether the choice looks at the student or at what the teachers said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="All data",
        paper="The ordinary epoch; none to cite.",
        summary="Shows the student every training sample once per epoch, in a new order each time.",
        needs="Nothing.",
        cost="The reference: one pass over the train split per epoch.",
        evidence="All results measured on our data so far were trained like this.",
    )

    def build(self) -> Sampler:
        """Return the sampler."""
        return FullSampler()
