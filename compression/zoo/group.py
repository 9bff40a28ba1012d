"""A group of small networks whose logits add up; a sample may leave before the last member has run.

After the progressive group of students of Medina et al. 2025 (arXiv:2503.01727), with convolutional members: the
selective scan of the paper's has no plain operator in ONNX or TensorRT.

Legend: B batch, C classes.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.features import frozen
from compression.types import Frozen
from compression.zoo.depthwise_cnn import DepthwiseCnn
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn

Member = ResidualCnn | PlainCnn | DepthwiseCnn


class Group(Frozen):
    """Networks that all see the image; the group's logits are the sum of theirs."""

    kind: Literal["group"] = "group"
    members: Annotated[tuple[Member, ...], Field(min_length=2, max_length=8)] = (
        PlainCnn(widths=(16, 32, 32), depths=(1, 1, 1), stem_width=8),
        PlainCnn(widths=(16, 32, 64), depths=(1, 1, 1)),
        PlainCnn(widths=(32, 64, 64), depths=(1, 1, 1)),
    )
    """In the order in which they run; the cheapest first lets easy samples leave early."""

    def scaled(self, *, width: float = 1.0, depth_delta: int = 0, round_to: int = 8) -> Self:
        """The same group with every member wider or narrower and deeper or shallower, as one member alone would be."""
        members = tuple(
            member.scaled(width=width, depth_delta=depth_delta, round_to=round_to) for member in self.members
        )
        return type(self)(members=members)

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
        return GroupNet([member.build(num_classes, input_shape) for member in self.members])


class GroupNet(nn.Module):
    """The module behind :class:`Group`."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return reduce(torch.add, (member(images) for member in self.members))


def early_exit(model: GroupNet, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the logits [B,C] with which each sample leaves, and how many members it used, int64 [B].

    A sample leaves after the first member whose running sum has a largest probability above ``threshold``, and after
    the last member in any case; a member runs on the samples that are left. Modes are given back, no gradients.

    Args:
        model: the group; runs in inference mode.
        images: normalised, [B,C,H,W].
        threshold: 0 stops everyone after the first member, 1 nobody before the last.
    """
    with frozen(model), torch.no_grad():
        logits = model.members[0](images)
        used = torch.ones(len(images), dtype=torch.int64, device=images.device)
        for member in list(model.members)[1:]:
            left = (logits.float().softmax(dim=-1).amax(dim=-1) <= threshold).nonzero().squeeze(-1)
            if not len(left):
                break
            logits[left] += member(images[left])
            used[left] += 1
    return logits, used
