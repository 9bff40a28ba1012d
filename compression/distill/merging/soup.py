"""Uniform soup: the mean of the weights."""

from typing import ClassVar, Literal

from torch import nn

from compression.card import MethodCard
from compression.distill.merging.types import MergeFn, Merging
from compression.distill.merging.weights import assembled, check_merging, mean, wide_parameters
from compression.types import Frozen


def uniform_soup(merging: Merging) -> nn.Module:
    """Return a model whose every weight is the mean over the members.

    Wortsman et al. 2022 (arXiv:2203.05482), the uniform soup. The base gives structure, not weights.

    Raises:
        ShapeError: the models differ in names or shapes.
        CompressionError: there are no members, or weights are quantized or not finite.
    """
    check_merging(merging)
    members = [wide_parameters(member) for member in merging.members]
    return assembled(merging, {name: mean([member[name] for member in members]) for name in members[0]})


class UniformSoup(Frozen):
    """All members alike."""

    kind: Literal["uniform_soup"] = "uniform_soup"

    card: ClassVar[MethodCard] = MethodCard(
        name="Uniform soup",
        paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
        summary="Averages the weights of models that were trained on from one ancestor: one network with something of "
        "an ensemble, at the price of a single one.",
        needs="Models of one architecture and one ancestor, not far from it; with batch norm, train images.",
        cost="One pass over 2048 images when there is batch norm; nothing else.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> MergeFn:
        """Return the merge."""
        return uniform_soup
