"""Masks: which weights of a network may be other than zero.

N:M means that of every M consecutive weights along the inputs of a layer at most N are not zero. Inputs are what the
layer sums over: the second dimension of ``[out, in]`` and ``[out, in / groups, height, width]`` alike.

Legend: G groups of M weights; masks are bool, True where a weight stays.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compression.errors import CompressionError, ShapeError

logger = logging.getLogger(__name__)

Masks = dict[str, Tensor]
"""Name of a weight, as the state dict has it -> bool, of its shape."""

FEWEST_INPUTS = 4
"""Layers that sum over fewer (the first convolution, depthwise ones) stay dense: little to gain, much to lose."""
FEWEST_ZEROS = 1 / 8
"""Share of exact zeros from which on a trained weight counts as sparse; 7:8, the densest pattern, has as many."""

Layer = nn.Conv1d | nn.Conv2d | nn.Linear
"""What can be made sparse: its weight, nothing else of it."""


def grouped(weight: Tensor, m: int) -> Tensor:
    """The weights of a layer [O,I,...] as groups [G,M] of consecutive inputs.

    Raises:
        ShapeError: the number of inputs is no multiple of ``m``.
    """
    if weight.ndim < 2 or weight.shape[1] % m:
        raise ShapeError(
            f"Weight has shape {list(weight.shape)}, expected a multiple of {m} inputs in dimension 1. Leave it dense."
        )
    return weight.movedim(1, -1).reshape(-1, m)


def ungrouped(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """Groups [G,M] as a weight of ``shape`` [O,I,...] again; the inverse of :func:`grouped`."""
    outputs, inputs, *window = shape
    return groups.reshape(outputs, *window, inputs).movedim(-1, 1)


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask, of the weight's shape, that keeps the ``n`` largest of each group; of equal ones the first."""
    order = grouped(weight.detach(), m).abs().argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=weight.device).scatter_(1, order[:, :n], True)
    return ungrouped(kept, weight.shape)


def largest(values: Tensor, count: int) -> Tensor:
    """The mask, of the shape of ``values``, of the ``count`` largest; of equal ones the first."""
    order = values.detach().flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=values.device)
    kept[order[:count]] = True
    return kept.reshape(values.shape)


def follows(weight: Tensor, n: int, m: int) -> bool:
    """Whether a weight [O,I,...] is N:M sparse; False where the groups do not come out even."""
    if weight.ndim < 2 or weight.shape[1] % m:
        return False
    return bool(((grouped(weight.detach(), m) != 0).sum(dim=1) <= n).all())


def candidates(n: int, m: int) -> Tensor:
    """Every mask of a group with ``n`` ones: float32 [C,M], C = m! / (n! (m - n)!), in lexical order."""
    rows = [[float(place in chosen) for place in range(m)] for chosen in itertools.combinations(range(m), n)]
    return torch.tensor(rows)


def layers_of(model: nn.Module, *, multiple_of: int = 1, skip: Sequence[str] = ()) -> dict[str, Layer]:
    """Convolutions and linear layers that can be made sparse, by the name of their weight.

    Left dense are layers with fewer than ``FEWEST_INPUTS`` inputs, or with a number of inputs that is no multiple of
    ``multiple_of``, and modules named in ``skip`` with all they hold.

    Raises:
        CompressionError: ``skip`` names no module, or no layer is left.
    """
    modules = dict(model.named_modules())
    for name in skip:
        if name not in modules:
            raise CompressionError(
                f"Sparsifier's skip has '{name}', expected the name of a module of the student, say "
                f"{', '.join(each for each, _ in _weighted(model)) or 'none'}. Correct it."
            )
    chosen: dict[str, Layer] = {}
    for name, module in _weighted(model):
        inputs = module.weight.shape[1]
        if any(name == each or name.startswith(f"{each}.") for each in skip):
            logger.info("Layer '%s' stays dense: it is skipped.", name)
        elif inputs < FEWEST_INPUTS or inputs % multiple_of:
            logger.info("Layer '%s' stays dense: it sums over %d inputs.", name, inputs)
        else:
            chosen[_weight_name(name)] = module
    if not chosen:
        raise CompressionError(
            f"Model '{type(model).__name__}' has 0 layers to make sparse, expected at least 1 with {FEWEST_INPUTS} "
            f"inputs or more, a multiple of {multiple_of}. Leave the sparsify stage out, or skip fewer layers."
        )
    return chosen


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, the weights that ``masks`` do not keep; others keep their bits."""
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        weight.masked_fill_(~mask.to(weight.device), 0.0)


def masks_of_zeros(model: nn.Module) -> Masks:
    """Masks of the weights that are sparse already, so that further training can keep their zeros; often none.

    A weight that is zero throughout is no pattern, and is left out.
    """
    found: Masks = {}
    for name, module in _weighted(model):
        mask = module.weight.detach() != 0
        zeros = int((~mask).sum())
        if FEWEST_ZEROS * mask.numel() <= zeros < mask.numel():
            found[_weight_name(name)] = mask
    return found


def share_of_zeros(model: nn.Module) -> float:
    """Exact zeros among the weights of convolutions and linear layers, 0..1; 0 when there are none."""
    weights = [module.weight.detach() for _, module in _weighted(model)]
    return sum(int((each == 0).sum()) for each in weights) / max(1, sum(each.numel() for each in weights))


def _weighted(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            yield name, module


def _weight_name(module: str) -> str:
    return f"{module}.weight" if module else "weight"
