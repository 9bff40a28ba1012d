"""What a merge is given, and the shape of a merge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from compression.augment import AnyAugment, NoAugment, augment
from compression.data.dataset import Dataset, Split


@dataclass(frozen=True)
class Merging:
    """Models of one architecture, and the data a merge may look at. Nothing in here is changed."""

    base: nn.Module
    """Where the members come from; gives the structure, the device and the integer buffers of the result."""
    members: Sequence[nn.Module]
    """The models whose weights are merged."""
    dataset: Dataset
    """Its train split for images, its calibration split where labels are learned from; never validation or test."""
    seed: int
    """Of drawn images, labels and views."""
    augment: AnyAugment = field(default_factory=NoAugment)
    """Which views of the images are looked at, say those of the training; plain images unless told otherwise."""

    def view(self, split: Split, rows: Tensor, number: int) -> Tensor:
        """Return raw images [B,C,H,W] of a split, rows int64 [B], in the numbered view."""
        return augment(split.images[rows], split.ids[rows], view=number, seed=self.seed, config=self.augment)


MergeFn = Callable[[Merging], nn.Module]
"""A merging -> a new module on the device and in the modes of the base, batch norm statistics re-estimated."""
