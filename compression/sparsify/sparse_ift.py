"""Sparse-IFT (Thangarasa et al. 2023, arXiv:2303.11525): a larger sparse layer for a dense one, at equal arithmetic.

The functions are the arithmetic of its four families. What trains is the first, wide: a ``scale`` space whose width is
``wide_factor(sparsity)`` gives the student, and ``Rigl`` here gives it that sparsity.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.models import build_model
from compression.sparsify.config import Sparsifier
from compression.sparsify.nm import Layer, apply_masks, largest, layers_of
from compression.sparsify.session import Session
from compression.train import History


def branches(sparsity: float) -> int:
    """How many sparse layers do the arithmetic of a dense one: 1 / (1 - sparsity), to the nearest whole number."""
    return round(1 / (1 - sparsity))


def wide_factor(sparsity: float) -> float:
    """What all widths of a network are multiplied by: its layers then have ``branches(sparsity)`` times the weights."""
    return math.sqrt(branches(sparsity))


def doped_rank(inputs: int, outputs: int, *, sparsity: float, window: int = 9) -> int:
    """Channels between the two convolutions (of ``window`` taps, then of one) beside a sparse one."""
    return math.floor(sparsity * window * inputs * outputs / (window * inputs + outputs))


def factorised_width(inputs: int, outputs: int, *, sparsity: float, window: int = 9) -> int:
    """Channels between the two sparse convolutions (of ``window`` taps, then of one) in place of one."""
    return math.ceil(window * inputs * outputs / ((1 - sparsity) * (window * inputs + outputs)))


def flops_ratio(
    family: Literal["wide", "parallel", "doped", "factorised"],
    inputs: int,
    outputs: int,
    *,
    sparsity: float,
    window: int = 9,
) -> float:
    """Arithmetic of the layer that a family puts in place of a dense convolution, as a share of the dense one's.

    Counts products with weights that are not zero. ``window`` is the number of taps, 9 for 3x3.
    """
    kept, dense, low_rank = 1 - sparsity, window * inputs * outputs, window * inputs + outputs
    if family == "wide":
        factor = wide_factor(sparsity)
        return kept * window * int(inputs * factor) * int(outputs * factor) / dense
    if family == "parallel":
        return kept * branches(sparsity)
    if family == "doped":
        return kept + doped_rank(inputs, outputs, sparsity=sparsity, window=window) * low_rank / dense
    return kept * factorised_width(inputs, outputs, sparsity=sparsity, window=window) * low_rank / dense


def drop_share(config: "Rigl", done: int, total: int) -> float:
    """Share of a layer's weights that are exchanged after ``done`` of ``total`` steps; 0 when it is no time for it."""
    end = config.until * total
    if done % config.every_steps or done >= end:
        return 0.0
    return config.drop / 2 * (1 + math.cos(math.pi * done / end))


def exchanged(mask: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The mask with its smallest weights, a share of them, out, and as many others with the largest gradients in.

    Weights that just went may come back. The number kept stays the same; all tensors have one shape.
    """
    count = int(mask.sum())
    moved = min(int(share * count), mask.numel() - count)
    stay = largest(weight.abs().masked_fill(~mask, -1.0), count - moved)
    return stay | largest(gradient.abs().masked_fill(stay, -1.0), moved)


class MovingMasks(nn.Module):
    """Masks that are part of a training's state, by name; ``a.b`` is kept as ``a:b``."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        super().__init__()
        for name, mask in masks.items():
            self.register_buffer(name.replace(".", ":"), mask)

    def current(self) -> dict[str, Tensor]:
        """The masks, by the names of the weights."""
        return {name.replace(":", "."): mask for name, mask in self.named_buffers()}


class Rigl(Sparsifier):
    """Unstructured sparsity whose mask moves while the student trains, the same share in every layer.

    The arithmetic of Sparse-IFT's wide family is met when the student is ``wide_factor(sparsity)`` times as wide as
    a dense one. Ours are: AdamW's moments of a masked weight move on with its gradient, where RigL starts them at
    zero; and a recipe distils the dense student first, so that ``student`` starts from the largest of its weights.
    ``fresh`` throws them away, as the paper does: then ``train`` must be the whole training.
    """

    kind: Literal["rigl"] = "rigl"
    sparsity: Annotated[float, Field(ge=0.125, lt=1)] = 0.75
    """Share of the weights of each layer that are zero."""
    drop: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the kept weights that are exchanged at first; falls as a cosine to 0."""
    every_steps: Annotated[int, Field(gt=0)] = 100
    """Optimiser steps from one exchange to the next."""
    until: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of the steps after which the masks stay."""
    start: Literal["student", "fresh"] = "student"
    """``student``: its weights, the largest of them; ``fresh``: new weights and a random mask."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Moving sparse masks (RigL), for Sparse-IFT",
        paper="Evci et al. 2019, Rigging the Lottery, arXiv:1911.11134; Thangarasa et al. 2023, Sparse-IFT, "
        "arXiv:2303.11525",
        summary="Research: every hundred steps the smallest weights go and those with the largest gradients come. On a "
        "student twice as wide, three quarters zeros cost no more products than the dense one.",
        needs="A wide student, say from a scale space.",
        cost="One training of the wide, dense network. Zeros have no pattern: the runtimes here multiply them, so the "
        "product is as slow and as large as its dense form.",
        evidence="The Sparse-IFT paper reports +3.5 points for ResNet-18 on ImageNet at equal arithmetic. "
        "Not measured on our data yet.",
    )

    def run(self, session: Session) -> History:
        """See the base."""
        model, layers = session.model, layers_of(session.model, skip=self.skip)
        if self.start == "fresh":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(session.seed)
                model.load_state_dict(build_model(session.spec).state_dict())
        generator = torch.Generator().manual_seed(session.seed)
        masks = MovingMasks({name: self._first_mask(layer, generator) for name, layer in layers.items()})
        apply_masks(model, masks.current())

        def after_step(done: int, total: int) -> None:
            share, moving = drop_share(self, done, total), masks.current()
            for name, layer in layers.items():
                gradient = layer.weight.grad
                if share and gradient is not None:
                    moving[name].copy_(exchanged(moving[name], layer.weight.detach(), gradient, share))
            apply_masks(model, moving)

        return session.train(self.train, name="weights", after_step=after_step, state=masks)

    def _first_mask(self, layer: Layer, generator: torch.Generator) -> Tensor:
        weight = layer.weight.detach()
        size = weight.abs() if self.start == "student" else torch.rand(tuple(weight.shape), generator=generator)
        return largest(size.to(weight.device), max(1, math.floor((1 - self.sparsity) * weight.numel())))
