"""Weights of several models as numbers: checked, averaged, and put into a copy of the base.

Legend: J members.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compression.distill.merging.batch_norm import reestimate_batch_norm
from compression.distill.merging.types import Merging
from compression.errors import CompressionError, ShapeError


def weighted_mean(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return sum_j w_j v_j / sum_j w_j for each number; the weights of a number must not all be 0.

    Args:
        values: J tensors of one shape.
        weights: J tensors that broadcast against it, not negative.
    """
    weighted = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return torch.as_tensor(weighted / sum(weights))


def mean(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of J tensors of one shape; of equal float32 numbers, held as float64, exactly these."""
    return torch.as_tensor(sum(values) / len(values))


def wide_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, float64, on the CPU; shared ones once."""
    return {name: _wide(parameter) for name, parameter in model.named_parameters()}


def check_merging(merging: Merging) -> None:
    """Refuse models that do not fit together, or whose weights cannot be averaged.

    Raises:
        ShapeError: a member has parameters or buffers of other names or shapes than the base.
        CompressionError: there are no members, nothing to average, or weights are quantized or not finite.
    """
    if not merging.members:
        raise CompressionError("Merge has 0 members, expected at least 1. Train some branches.")
    named = {"Base": merging.base, **{f"Member {number}": model for number, model in enumerate(merging.members)}}
    for label, model in named.items():
        _refuse_quantized(label, model)
    if not any(True for _ in merging.base.parameters()):
        raise CompressionError("Base has 0 parameters, expected at least 1. Merge networks, not exported graphs.")
    wanted = _layout(merging.base)
    for label, model in named.items():
        found = _layout(model)
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise ShapeError(
                    f"{label} has {found.get(name, 'nothing')} at '{name}', expected {wanted.get(name, 'nothing')} as "
                    "in the base. Merge models of one architecture, before or after pruning alike; distil others."
                )
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise CompressionError(
                    f"{label} has numbers in '{name}' that are not finite, expected finite weights. "
                    "Its training diverged: lower its learning rate."
                )


def assembled(merging: Merging, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the base with ``parameters``, which are by name and of any floating type.

    Floating-point buffers are the mean over the members, integer ones stay the base's, and batch norm statistics are
    re-estimated, because no mean of statistics belongs to merged weights.
    """
    result = copy.deepcopy(merging.base)
    states = [member.state_dict() for member in merging.members]
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(parameters[name].to(parameter.dtype))
        for name, buffer in result.named_buffers():
            if buffer.is_floating_point() and name in states[0]:
                buffer.copy_(mean([_wide(state[name]) for state in states]).to(buffer.dtype))
    reestimate_batch_norm(result, merging.dataset, augment=merging.augment, seed=merging.seed)
    return result


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _refuse_quantized(label: str, model: nn.Module) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            found = type(value).__name__
        elif value.is_quantized or value.dtype == torch.int8 or (name in parameters and not value.is_floating_point()):
            found = str(value.dtype).removeprefix("torch.")
        else:
            continue
        raise CompressionError(
            f"{label} has values of type {found} in '{name}', expected floating point. Merge before quantization."
        )


def _layout(model: nn.Module) -> dict[str, str]:
    """What is at each name of the state dict, in words."""
    own = dict(model.named_parameters())
    shared = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: f"{'a parameter' if name in own else 'a shared parameter' if name in shared else 'a buffer'} of shape "
        f"{list(value.shape)}"
        for name, value in model.state_dict().items()
    }
