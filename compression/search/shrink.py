"""A teacher without some of its blocks, and with a narrower rest: the space of N2N.

Ashok et al. 2018, "N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning"
(arXiv:1709.06030).
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compression.card import MethodCard
from compression.errors import CompressionError
from compression.features import frozen
from compression.models import ModelSpec
from compression.search.layers import removable, without_blocks
from compression.search.prune import Survey, survey_of
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.units import Coupled, kept_counts, stages_of

Multiplier = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a teacher, as a policy sees it."""

    kind: Literal["conv", "linear"]
    kernel: int
    """1 for a linear layer."""
    stride: int
    channels: int
    """That come out."""
    padding: int
    block: int | None = None
    """Number of the removable block it lies in."""
    stage: int | None = None
    """Number of the stage whose multiplier its width follows."""


class Shrink(Space):
    """Every choice of blocks to leave out, with every choice of a width for each stage, of one teacher.

    What remains keeps the teacher's weights: a block that can be left out becomes an identity, and a stage keeps the
    channels whose weights are largest; where nothing is taken away the candidate is a copy of the teacher. Equal
    choices give equal bits, whatever the seed. Stages are resolutions, or attention heads, MLP widths and embedding
    width. The paper narrows convolutions one by one, to 10 channels at least; here a whole stage is narrowed at once,
    by dependency graph, and each width to ``round_to`` channels at least.
    """

    kind: Literal["shrink"] = "shrink"
    parent: str = Field(min_length=1)
    """Name of the teacher that is compressed."""
    widths: tuple[Multiplier, ...] = Field(default=(0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), min_length=1)
    """Shares of its channels that a stage may keep; 1, which leaves it as it is, is one of them."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Channel counts that remain are multiples of this; counts below 16 save MACs, not time."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Block removal and shrinkage (N2N's space)",
        paper="Ashok et al. 2018, N2N, arXiv:1709.06030; Fang et al. 2023, DepGraph, arXiv:2301.12900 (how widths are "
        "cut)",
        summary="Research: leaves out any of a teacher's blocks whose output has the shape of their input, and narrows "
        "each stage by a share of its own; the rest keeps its weights.",
        needs="A trained teacher whose operations can be traced.",
        cost="Seconds per candidate.",
        evidence="Not measured on our data yet.",
    )

    @field_validator("widths")
    @classmethod
    def _up_to_one(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in widths:
            raise ValueError(f"widths are {', '.join(map(str, widths))}, expected 1 among them. Add 1.")
        return tuple(sorted(set(widths)))

    @property
    def label(self) -> str:
        return f"shrink-{self.parent}"

    def genes(self, shop: Workshop) -> Genes:
        """``keep_<i>``, 0 or 1, for each removable block and ``width_<i>`` for each stage, in the network's order."""
        plan = self._plan(shop)
        keeps = {f"keep_{block}": (0, 1) for block in range(len(plan.blocks))}
        return keeps | {f"width_{stage}": self.widths for stage in sorted(set(plan.stages.values()))}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        genes = self.genes(shop)
        if missing := genes.keys() - choices.keys():
            raise CompressionError(
                f"Candidate of '{self.label}' has no choice of {', '.join(sorted(missing))}, expected one of each. "
                "Name all genes."
            )
        plan = self._plan(shop)
        gone = [name for block, name in enumerate(plan.blocks) if not choices[f"keep_{block}"]]
        shares = {gene: float(choices[gene]) for gene in genes if gene.startswith("width_")}
        model, spec = shop.parent(self.parent)
        if any(share < 1.0 for share in shares.values()):
            kept: dict[str, int] = {}
            for group in plan.survey.groups:
                if (stage := plan.stages.get(group.name)) is not None:
                    kept |= kept_counts([group], 1.0 - shares[f"width_{stage}"])
            model, spec = plan.survey.pruned(kept)
        return without_blocks(model, spec, gone)

    def layers(self, shop: Workshop) -> tuple[Layer, ...]:
        """The convolutions and linear layers of the parent in the order in which they run, the classifier last."""
        return self._plan(shop).layers

    def _plan(self, shop: Workshop) -> "_Plan":
        kept_as = json.dumps(["shrink", self.parent, self.round_to])
        if kept_as not in shop.memory:
            shop.memory[kept_as] = _plan_of(*shop.parent(self.parent), round_to=self.round_to, name=self.parent)
        return shop.memory[kept_as]


@dataclass(frozen=True)
class _Plan:
    """What can be taken from a parent."""

    blocks: tuple[str, ...]
    survey: Survey
    stages: Mapping[str, int]
    """The stage of each group of channels that can shrink, by name."""
    layers: tuple[Layer, ...]


def _plan_of(model: nn.Module, spec: ModelSpec, *, round_to: int, name: str) -> _Plan:
    blocks = removable(model, spec.input_shape)
    survey = survey_of(model, spec, round_to=round_to)
    if stages := stages_of(survey.groups):
        survey = survey.usable()
        stages = stages_of(survey.groups)
    if not blocks and not stages:
        raise CompressionError(
            f"Parent '{name}' ({spec.model.kind}) has no removable block and no layer wider than round_to {round_to}, "
            "expected one or the other. Lower round_to, or choose another parent."
        )
    return _Plan(blocks, survey, stages, _layers_of(survey, blocks, stages))


def _layers_of(survey: Survey, blocks: tuple[str, ...], stages: Mapping[str, int]) -> tuple[Layer, ...]:
    """Layers in the order of their last run; a convolution belongs to the stage of its resolution."""
    areas = {group.area: stages[group.name] for group in survey.groups if group.name in stages and _is_image(group)}
    ran: dict[str, Tensor] = {}
    with ExitStack() as stack, frozen(survey.model), torch.no_grad():
        for name, module in survey.model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):

                def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                    ran.pop(name, None)
                    ran[name] = output

                stack.callback(module.register_forward_hook(keep).remove)
        survey.model(survey.example)
    classifier = list(ran)[-1]
    found = []
    for name, output in ran.items():
        stage = stages.get(name)
        if stage is None and output.ndim == 4 and name != classifier:
            stage = areas.get(output.shape[2] * output.shape[3])
        block = next((number for number, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        found.append(_layer(survey.model.get_submodule(name), block, stage))
    return tuple(found)


def _is_image(group: Coupled) -> bool:
    return group.part == "channels"


def _layer(module: nn.Module, block: int | None, stage: int | None) -> Layer:
    if isinstance(module, nn.Linear):
        return Layer("linear", 1, 1, module.out_features, 0, block, stage)
    conv = cast("nn.Conv2d", module)
    padding = conv.padding[0] if isinstance(conv.padding, tuple) else conv.kernel_size[0] // 2
    return Layer("conv", conv.kernel_size[0], conv.stride[0], conv.out_channels, int(padding), block, stage)
