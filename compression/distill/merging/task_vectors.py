"""Task vectors with learned scaling: what each member adds to the base, block by block, in doses that are learned.

Legend: J members, K blocks (a block is one parameter tensor), B images of a batch, C classes.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compression.augment import normalise
from compression.card import MethodCard
from compression.data.dataset import Split
from compression.distill.merging.batch_norm import batch_statistics
from compression.distill.merging.types import MergeFn, Merging
from compression.distill.merging.weights import assembled, check_merging, wide_parameters
from compression.errors import CompressionError
from compression.train.batches import shuffled
from compression.types import Frozen

BATCH = 256
"""Images per step, or all of the calibration split if it has fewer."""
LEAST_SLOPE = 1e-5
"""Adam's epsilon: below it a slope counts as rounding error (of a bias in front of a batch norm, which has none)."""


def scaled_sum(
    base: Mapping[str, Tensor], vectors: Sequence[Mapping[str, Tensor]], scales: Tensor
) -> dict[str, Tensor]:
    """Return base_b + sum_j scales_jb * vector_jb for each block b; scales [J,K] in the order of the base's names."""
    return {
        name: value + torch.stack([row[number] * each[name] for row, each in zip(scales, vectors, strict=True)]).sum(0)
        for number, (name, value) in enumerate(base.items())
    }


def learned_scales(merging: Merging, *, steps: int, learning_rate: float) -> Tensor:
    """Return scales [J,K], float32, on the CPU: those with which the sum answers the calibration split best.

    They start at 1 / J, the uniform soup, and follow the gradient of cross-entropy with Adam. The network is in
    inference mode but for batch norm, which uses the statistics of the batch, as re-estimation will.

    Raises:
        CompressionError: the calibration split has fewer than 2 samples, or the loss is not finite.
    """
    split = merging.dataset.calibration
    if len(split.labels) < 2:
        raise CompressionError(
            f"Split 'calibration' has {len(split.labels)} samples, expected at least 2, because task vectors learn "
            "from its labels. Raise data.split.calibration."
        )
    model = copy.deepcopy(merging.base).requires_grad_(False)
    base = dict(model.named_parameters())
    device = next(iter(base.values())).device
    vectors = [
        {name: value.detach().to(device) - base[name] for name, value in member.named_parameters()}
        for member in merging.members
    ]
    scales = torch.full((len(vectors), len(base)), 1 / len(vectors), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([scales], lr=learning_rate, eps=LEAST_SLOPE)
    with torch.enable_grad(), batch_statistics(model):
        for step, rows in enumerate(islice(_batches(split, merging.seed), steps)):
            images = normalise(merging.view(split, rows, step).to(device), merging.dataset.preprocessing)
            logits = functional_call(model, scaled_sum(base, vectors, scales), (images,))
            loss = F.cross_entropy(logits.float(), split.labels[rows].to(device))
            if not bool(loss.isfinite()):
                raise CompressionError(
                    f"Task vectors have a loss of {loss.item()} at step {step}, expected a finite number. "
                    "Lower merge.method.learning_rate."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return scales.detach().cpu()


def _batches(split: Split, seed: int) -> Iterator[Tensor]:
    """Yield row numbers int64 [B] without end; each epoch is a fresh order whose remainder is left out."""
    total = len(split.labels)
    size = min(BATCH, total)
    for epoch in count():
        order = shuffled(total, seed=seed, epoch=epoch)
        for start in range(0, total - size + 1, size):
            yield order[start : start + size]


def task_vectors(merging: Merging, *, steps: int, learning_rate: float) -> nn.Module:
    """Return the base plus each member's difference from it, every block of which is scaled by a learned number.

    Zhang et al. 2024, aTLAS (arXiv:2407.02880), section 3.

    Raises:
        ShapeError: the models differ in names or shapes.
        CompressionError: there are no members, weights are quantized or not finite, the calibration split has fewer
            than 2 samples, or the loss became non-finite.
    """
    check_merging(merging)
    scales = learned_scales(merging, steps=steps, learning_rate=learning_rate).double()
    base = wide_parameters(merging.base)
    vectors = [
        {name: value - base[name] for name, value in wide_parameters(member).items()} for member in merging.members
    ]
    return assembled(merging, scaled_sum(base, vectors, scales))


class TaskVectors(Frozen):
    """Differences from the base, with one learned factor per member and parameter tensor.

    The paper starts at factors of 0, the base; here they start at 1 / members, the uniform soup, and are not decayed.
    """

    kind: Literal["task_vectors"] = "task_vectors"
    steps: Annotated[int, Field(gt=0)] = 100
    """Optimiser steps that the factors learn for, each on up to 256 calibration images."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """How far a factor may move in a step (Adam)."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Task vectors with learned scaling (aTLAS)",
        paper="Zhang et al. 2024, Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, "
        "arXiv:2407.02880",
        summary="Adds to the base what each member has learnt, every parameter tensor in a dose of its own; the few "
        "doses are learned from labels.",
        needs="Models of one architecture, their common ancestor, and the labels of the calibration split.",
        cost="`steps` training steps on the calibration split, with all members in memory.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> MergeFn:
        """Return the merge."""
        return partial(task_vectors, steps=self.steps, learning_rate=self.learning_rate)
