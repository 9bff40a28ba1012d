"""The network that holds all sizes, and the step that trains several of them at once.

The sandwich rule and batch norm are those of Yu and Huang 2019 (arXiv:1903.05134), the relation loss that of AutoDistil
(Xu et al. 2022, arXiv:2201.12507).

Legend: B batch, N tokens, H heads of the teacher, A width of the student's queries, T of the teacher's.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compression.distill.losses import AnyLoss, Kd
from compression.distill.types import widened
from compression.features import captured
from compression.models import ModelSpec
from compression.search.scale import fresh_model
from compression.search.space import Choices, Genes
from compression.search.subnets.slicing import Family, borrowed
from compression.train import StepFn
from compression.types import Batch


def sandwich(genes: Genes, *, count: int, seed: int, epoch: int, step: int) -> dict[str, Choices]:
    """The networks one step trains, by name: the largest, the smallest and ``count`` random ones.

    A pure function of its arguments, so that a training that goes on meets the same networks.
    """
    draw = random.Random(f"subnets:{seed}:{epoch}:{step}")
    picks: dict[str, Choices] = {
        "largest": {gene: values[-1] for gene, values in genes.items()},
        "smallest": {gene: values[0] for gene, values in genes.items()},
    }
    for number in range(1, count + 1):
        picks[f"random_{number}"] = {gene: draw.choice(values) for gene, values in genes.items()}
    return picks


def relations(qkv: Tensor, heads: int) -> Tensor:
    """Dot products over sqrt(width) between queries, between keys and between values, float32 [3,B,H,N,N].

    ``qkv`` [B,N,3A] holds the three side by side; each is split into ``heads``, whatever number it was made with.
    """
    batch, tokens, _ = qkv.shape
    split = widened(qkv).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return split @ split.transpose(-2, -1) / math.sqrt(split.shape[-1])


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Sum over queries, keys and values of the mean squared difference of their ``relations``.

    Raw products are compared, not softmaxes of them. No gradient reaches the teacher.

    Args:
        student: queries, keys and values of a block [B,N,3A]; ``heads`` divides A.
        teacher: the same of the teacher's [B,N,3T].
        heads: of the teacher.
    """
    return (relations(student, heads) - relations(teacher.detach(), heads)).square().flatten(1).mean(1).sum()


class Supernet(nn.Module):
    """The largest network of a space, which runs as any smaller one in its own weights.

    ``full`` is the network; ``active`` chooses which one runs, None for all of it. A smaller one changes no running
    statistics: in training it normalises by its batch, otherwise by the leading part of the full ones. With
    ``keeps_qkv`` queries, keys and values of the last block are in ``qkv`` after each run.
    """

    def __init__(self, full: nn.Module, spec_of: Callable[[Choices], ModelSpec], *, keeps_qkv: bool = False) -> None:
        """``spec_of`` gives the spec of any size; that of no choices is what ``full`` was built from."""
        super().__init__()
        self.full, self.spec_of, self.keeps_qkv = full, spec_of, keeps_qkv
        self.active: Choices | None = None
        self.qkv = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        if self.active is None:
            return self._run(self.full, None, images)
        frame, spec = fresh_model(self.spec_of(self.active), seed=0)
        return self._run(frame.train(self.training), self.tensors_of(frame, spec), images)

    def tensors_of(self, network: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
        """Parameters of ``network`` as parts of the full ones, and copies of its buffers, by its own names."""
        own: dict[str, Tensor] = dict(self.full.named_parameters())
        own |= {name: buffer.clone() for name, buffer in self.full.named_buffers()}
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        return borrowed(shapes, _family(spec), own, _family(self.spec_of({})))

    def extract(self, choices: Choices) -> tuple[nn.Module, ModelSpec]:
        """A network of its own with the weights it has in here, eval mode, and its spec."""
        model, spec = fresh_model(self.spec_of(choices), seed=0)
        with torch.no_grad():
            model.load_state_dict(self.tensors_of(model, spec))
        return model, spec

    def _run(self, network: nn.Module, tensors: dict[str, Tensor] | None, images: Tensor) -> Tensor:
        names = [last_qkv(network)] if self.keeps_qkv else []
        with captured(network, names) as seen:
            logits = network(images) if tensors is None else functional_call(network, tensors, (images,))
        for output in seen.values():
            self.qkv = output
        return logits


def last_qkv(network: Any) -> str:
    """Name of the layer that makes queries, keys and values in a transformer's last block."""
    return f"blocks.{len(network.blocks) - 1}.attn.qkv"


class SandwichStep:
    """A step that trains several sizes of a supernet: mean over them of ``inner``, one term for each."""

    def __init__(
        self,
        supernet: Supernet,
        inner: StepFn,
        genes: Genes,
        *,
        count: int,
        seed: int,
        teacher: nn.Module | None = None,
        weight: float = 0.0,
    ) -> None:
        """``teacher`` is a transformer whose last block's relations are learnt with ``weight``; None for none."""
        self.supernet, self.inner, self.genes, self.count, self.seed = supernet, inner, genes, count, seed
        self.teacher = None if teacher is None else copy.deepcopy(teacher).eval().requires_grad_(False)
        self.weight = weight

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of a batch by the name of the network: ``largest``, ``smallest``, ``random_1``, ..."""
        picks = sandwich(self.genes, count=self.count, seed=self.seed, epoch=batch.epoch, step=batch.step)
        target = self._target(batch.images)
        terms: dict[str, Tensor] = {}
        try:
            for name, choices in picks.items():
                self.supernet.active = None if name == "largest" else choices
                total = torch.stack(list(self.inner(model, batch).values())).sum()
                if target is not None:
                    total = total + self.weight * relation_loss(self.supernet.qkv, *target)
                terms[name] = total / len(picks)
        finally:
            self.supernet.active, self.supernet.qkv = None, torch.empty(0)
        return terms

    def _target(self, images: Tensor) -> tuple[Tensor, int] | None:
        """Queries, keys and values of the teacher's last block, and its number of heads."""
        if self.teacher is None:
            return None
        teacher: Any = self.teacher.to(images.device)
        name = last_qkv(teacher)
        with torch.no_grad(), captured(teacher, [name]) as seen:
            teacher(images)
        return seen[name], teacher.blocks[-1].attn.num_heads


def logit_losses(losses: Sequence[AnyLoss]) -> tuple[AnyLoss, ...]:
    """The losses that look at nothing but logits; kd at temperature 2 beside them where none can teach alone."""
    kept = [loss for loss in losses if not (loss.needs.student_features or loss.needs.student_maps)]
    if not any(loss.weight > 0 and not loss.needs.another_term for loss in kept):
        kept.append(Kd(temperature=2.0))
    return tuple(kept)


def _family(spec: ModelSpec) -> Family:
    return cast("Family", spec.model)
