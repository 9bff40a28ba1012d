"""Which channels of a group can go alone, and how many of them stay."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Units:
    """The smallest sets of channels that can go alone: one channel, one head, or one slot of all groups."""

    members: Tensor
    """[units, channels per unit]: channel indices of the group's root."""
    step: int
    """Kept counts are multiples of this many units."""

    def dropped(self, scores: Tensor, ratio: float) -> tuple[list[int], int]:
        """The channels to cut, worst units first and ties by position, and how many units stay."""
        kept = kept_units(len(self.members), ratio, self.step)
        order = scores.float().cpu()[self.members].mean(dim=1).argsort(stable=True)
        gone = order[: len(self.members) - kept]
        return sorted(self.members[gone].flatten().tolist()), kept


def kept_units(units: int, ratio: float, step: int) -> int:
    """How many of ``units`` stay: the multiple of ``step`` nearest to ``units * (1 - ratio)``, at least one.

    All stay when there are not more than ``step``, or when ``ratio`` is 0.
    """
    if ratio <= 0.0 or units <= step:
        return units
    nearest = math.floor(units * (1.0 - ratio) / step + 0.5) * step
    return min(max(nearest, step), units // step * step)


def units_of(graph: Any, group: Any, channels: int, attention: nn.Module | None, round_to: int) -> Units:
    """How the ``channels`` of a group fall into units that can go alone."""
    index = torch.arange(channels)
    if attention is not None:
        heads = int(cast("Any", attention).num_heads)
        head_dim = channels // heads
        return Units(index.view(heads, head_dim), round_to // math.gcd(head_dim, round_to))
    slots = _slots(graph, group)
    return Units(index.view(slots, channels // slots).T, round_to // math.gcd(slots, round_to))


def _slots(graph: Any, group: Any) -> int:
    """How many equal parts a grouped convolution or group norm divides the channels into; 1 for none."""
    counts = [1]
    for dep, _ in group:
        module = dep.target.module
        if not isinstance(module, nn.Conv2d | nn.GroupNorm):
            continue
        if isinstance(module, nn.Conv2d) and module.groups == module.out_channels:
            continue  # depthwise: each channel is on its own
        pruner = graph.get_pruner_of_module(module)
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        of = pruner.get_out_channel_groups if is_out else pruner.get_in_channel_groups
        counts.append(int(of(module)))
    return math.lcm(*counts)
