"""Narrower and shallower members of a convolutional zoo family, trained from a fresh start."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from compression.card import MethodCard
from compression.models import ModelSpec, build_model
from compression.search.space import Choices, Genes, Space, Workshop
from compression.zoo.depthwise_cnn import DepthwiseCnn
from compression.zoo.gated_cnn import GatedCnn
from compression.zoo.group import Group
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn

Width = Annotated[float, Field(gt=0.0, le=4.0)]
Depth = Annotated[int, Field(ge=-8, le=8)]


class Scale(Space):
    """Every width multiplier with every depth change of one hand-made network is a candidate student."""

    kind: Literal["scale"] = "scale"
    base: ResidualCnn | PlainCnn | DepthwiseCnn | Group | GatedCnn
    """The network that is scaled."""
    widths: tuple[Width, ...] = Field(default=(0.5, 0.75, 1.0), min_length=1)
    """Multipliers of all channel counts of ``base``."""
    depths: tuple[Depth, ...] = Field(default=(0,), min_length=1)
    """Layers to add to (or, below 0, take from) each stage of ``base``."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Channel counts are multiples of this."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Width and depth scaling",
        paper="Howard et al. 2017, MobileNets, arXiv:1704.04861 (width multiplier)",
        summary="Builds the same family with other widths and depths and trains it from a fresh start.",
        needs="A zoo network; no trained parent.",
        cost="Nothing before training.",
        evidence="Measured on Fashion-MNIST: a hand-made net with 1.6x the MACs of a pruned one ran in 55 % "
        "of its time at +1.1 points.",
    )

    @field_validator("widths")
    @classmethod
    def _ascending_widths(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(widths)))

    @field_validator("depths")
    @classmethod
    def _ascending_depths(cls, depths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(depths)))

    @property
    def label(self) -> str:
        return f"scale-{self.base.kind}"

    def genes(self, shop: Workshop) -> Genes:
        del shop
        return {"width": self.widths, "depth": self.depths}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        width, depth = float(choices["width"]), int(choices["depth"])
        return scale_model(self, shop.template(), width=width, depth=depth, seed=shop.seed)


def scale_model(
    space: Scale, template: ModelSpec, *, width: float, depth: int, seed: int
) -> tuple[nn.Module, ModelSpec]:
    """A fresh network (eval mode) of the scaled family, and its spec.

    Classes, input shape and preprocessing are those of ``template``; weights depend on ``seed`` alone.
    """
    model_config = space.base.scaled(width=width, depth_delta=depth, round_to=space.round_to)
    return fresh_model(template.model_copy(update={"model": model_config, "edits": ()}), seed)


def fresh_model(spec: ModelSpec, seed: int) -> tuple[nn.Module, ModelSpec]:
    """The network of ``spec`` in eval mode with weights that depend on ``seed`` alone, and the spec."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(spec)
    return model.eval(), spec
