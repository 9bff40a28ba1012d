"""Fisher-weighted merging: each weight is the mean over the members, weighted by how much their answers hang on it.

Legend: J members, N images, B of them at a time, C classes, R label draws per image, P weights in all.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from compression.augment import normalise
from compression.card import MethodCard
from compression.distill.merging.types import MergeFn, Merging
from compression.distill.merging.weights import assembled, check_merging, weighted_mean, wide_parameters
from compression.features import frozen
from compression.train.batches import shuffled
from compression.types import Frozen, Preprocessing

FLOOR = 1e-6
"""Least weight of a member at any of its numbers, after the Fisher was brought to unit length."""
MOST_GRADIENTS = 2**24
"""Numbers of per-image gradients in memory at a time, at least one image's."""
MOST_IMAGES = 64
"""Images at a time."""


def diagonal_fisher(
    model: nn.Module, images: Tensor, preprocessing: Preprocessing, *, exact_classes: int, seed: int
) -> dict[str, Tensor]:
    """Return E_x E_{y ~ p(.|x)} (d log p(y|x) / d weight)^2 by name of parameter, float64, on the CPU.

    y follows the model's own distribution, never the label (with labels it would be the empirical Fisher). Up to
    ``exact_classes`` classes the inner mean is exact; beyond, it is over that many labels per image, drawn with
    numbers that depend on the seed alone, so that equal models get equal values. Modes and gradients of the model
    are given back.

    Args:
        model: run in inference mode.
        images: raw [N,C,H,W].
        preprocessing: makes them inputs.
        exact_classes: most backward passes per image.
        seed: of the drawn labels.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    device = next(iter(parameters.values())).device
    uniforms = torch.rand(len(images), exact_classes, generator=torch.Generator().manual_seed(seed))
    totals = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in parameters.items()}
    size = max(1, min(MOST_IMAGES, MOST_GRADIENTS // sum(value.numel() for value in parameters.values())))

    def squares(image: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        def log_probs_of(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, values, (image.unsqueeze(0),))[0].float().log_softmax(dim=-1)

        log_probs, pull, *_ = vjp(log_probs_of, parameters)
        summed = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for row in _cotangents(log_probs.detach(), uniform):
            for name, gradient in pull(row)[0].items():
                summed[name] = summed[name] + gradient.square()
        return summed

    with frozen(model), sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no rule for vmap
        for start in range(0, len(images), size):
            inputs = normalise(images[start : start + size].to(device), preprocessing)
            found = vmap(squares)(inputs, uniforms[start : start + size].to(device))
            for name, value in found.items():
                totals[name] += value.detach().sum(dim=0).to("cpu", torch.float64)
    return {name: total / len(images) for name, total in totals.items()}


def _cotangents(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Rows [R,C] for which sum_r (row_r . d log_probs / d weight)^2 is the mean over labels.

    Of log_probs [C] and numbers from 0 to 1 [R]: all classes by the root of their probability if there are at most R,
    otherwise R draws.
    """
    probs, classes, draws = log_probs.exp(), len(log_probs), len(uniform)
    if classes <= draws:
        return torch.diag(probs.sqrt())
    labels = (uniform.unsqueeze(1) > probs.cumsum(dim=0)).sum(dim=1).clamp(max=classes - 1)
    return torch.eye(classes, device=log_probs.device)[labels] / math.sqrt(draws)


def importance(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the Fisher at unit L2 norm, all P numbers together, and nowhere below ``FLOOR``.

    The norm makes members comparable whose confidence differs; the floor keeps a weight on which no answer hangs at
    the plain mean.
    """
    norm = math.sqrt(sum(float(value.square().sum()) for value in fisher.values()))
    return {name: (value / (norm or 1.0)).clamp(min=FLOOR) for name, value in fisher.items()}


def fisher_merge(merging: Merging, *, samples: int, exact_classes: int) -> nn.Module:
    """Return sum_j F_j w_j / sum_j F_j for each weight, with F the ``importance`` of member j.

    Matena and Raffel 2022 (arXiv:2111.09832), section 3, members alike. Every member sees the same train images.

    Raises:
        ShapeError: the models differ in names or shapes.
        CompressionError: there are no members, or weights are quantized or not finite.
    """
    check_merging(merging)
    train = merging.dataset.train
    images = merging.view(train, shuffled(len(train.labels), seed=merging.seed, epoch=0)[:samples], 0)
    weights = [
        importance(
            diagonal_fisher(
                member, images, merging.dataset.preprocessing, exact_classes=exact_classes, seed=merging.seed
            )
        )
        for member in merging.members
    ]
    members = [wide_parameters(member) for member in merging.members]
    return assembled(
        merging,
        {
            name: weighted_mean([member[name] for member in members], [weight[name] for weight in weights])
            for name in members[0]
        },
    )


class FisherMerge(Frozen):
    """Members weighted, number by number, by their diagonal Fisher information.

    The paper also searches factors for whole members on held-out data and leaves the classifiers apart, since its
    members solve different tasks. Here they solve one: factors are 1, and everything is merged.
    """

    kind: Literal["fisher"] = "fisher"
    samples: Annotated[int, Field(gt=0)] = 1000
    """Train images behind the Fisher information; all of them if the split has fewer."""
    exact_classes: Annotated[int, Field(gt=0)] = 16
    """Up to so many classes the mean over a model's own answers is exact; with more, so many are drawn per image."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Fisher-weighted merging",
        paper="Matena, Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832",
        summary="Averages the weights of models of one ancestor; at each number the member counts most whose answers "
        "depend on it most.",
        needs="Models of one architecture and one ancestor, and train images; no labels.",
        cost="For each member and image one forward pass and a backward pass per class, at most `exact_classes`: "
        "about 20 seconds per member for 1000 images, 10 classes and 300 000 weights on one CPU core.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> MergeFn:
        """Return the merge."""
        return partial(fisher_merge, samples=self.samples, exact_classes=self.exact_classes)
