"""Gradient alignment: a term's gradient loses what runs against the gradient of the others.

Yang et al. 2024 (arXiv:2411.08937) for two heads on one backbone; the projection is that of Yu et al. 2020,
"Gradient Surgery for Multi-Task Learning" (arXiv:2001.06782), one way only.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn


def without_conflict(guide: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return ``other`` without its part against ``guide``, tensor for tensor.

    With both as one long vector, g and o: o if g.o >= 0, else o - (g.o / |g|^2) g, which has no part along g.
    """
    inner = sum(((g.double() * o.double()).sum() for g, o in zip(guide, other, strict=True)), torch.tensor(0.0))
    length = sum((g.double().square().sum() for g in guide), torch.tensor(0.0))
    if inner >= 0 or length == 0:
        return list(other)
    factor = inner / length
    return [(o - factor * g.double()).to(o.dtype) for g, o in zip(guide, other, strict=True)]


class AlignedBackward:
    """A backward pass for each group of terms; the aligned terms' gradient gives way to that of the others.

    The projection takes the parameters that both groups reach (the backbone): heads that one of them alone trains
    keep their gradient as it is. It costs a second backward pass.
    """

    def __init__(self, parameters: Callable[[], Sequence[nn.Parameter]], aligned: Collection[str]) -> None:
        """``parameters`` of student and helpers, asked for at every step; ``aligned`` are names of terms."""
        self.parameters, self.aligned = parameters, frozenset(aligned)

    def __call__(self, terms: dict[str, Tensor], backward: Callable[..., None]) -> None:
        """Leave the sum of both gradients in the parameters."""
        guides = [term for name, term in terms.items() if name not in self.aligned]
        others = [term for name, term in terms.items() if name in self.aligned]
        if not guides or not others:
            backward(sum((guides or others)[1:], (guides or others)[0]))
            return
        parameters = self.parameters()
        backward(sum(guides[1:], guides[0]), retain_graph=True)
        guide = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        backward(sum(others[1:], others[0]))
        other = [parameter.grad for parameter in parameters]
        shared = [(g, o) for g, o in zip(guide, other, strict=True) if g is not None and o is not None]
        projected = iter(without_conflict([g for g, _ in shared], [o for _, o in shared]))
        for parameter, g, o in zip(parameters, guide, other, strict=True):
            if g is not None and o is not None:
                parameter.grad = g + next(projected)
            else:
                parameter.grad = g if o is None else o
