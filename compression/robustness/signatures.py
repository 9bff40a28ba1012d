"""Robust weight signatures: robustness as a small patch of weights that is added to a deployed network, or taken off.

Cai, Zhang and Wang 2023, ICML, arXiv:2302.12480; from the paper's formulas, the code is ours. Three networks of one
start: theta_p before fine-tuning, theta_s fine-tuned on clean images, theta_c on corrupted ones. Per layer, flattened,

    a = theta_s - theta_p,   t = theta_c - theta_p,   signature = t - a (a . t) / (a . a),

what the corruption taught beyond what the task did. The patched network is ``theta_s + alpha * signature`` in the
shallowest layers, and their batch norm moves by ``alpha`` towards the network of the corruption, all the way at 1.

A layer's vector is its weight and its bias. Where a is 0 the signature is t. Ours: differences are kept in float64 so
that the right angle survives; batch norm is kept as a difference too, so that a patch can be taken off again, and only
that of patched layers is touched, because statistics of the corruption's network ruin deeper layers of another one (the
authors copy all of them); signatures are not quantized.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compression.deltas import Delta, save_delta, weights_sha256
from compression.errors import CheckpointError, CompressionError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Signature:
    """What to add to a network, float64, by name in its state."""

    layers: Mapping[str, Tensor]
    """Weights and biases of the shallowest layers: at a right angle to the clean fine-tuning, layer by layer."""
    norms: Mapping[str, Tensor]
    """Scales, shifts and statistics of their batch norm: the corruption's network minus the clean one."""

    @property
    def changes(self) -> dict[str, Tensor]:
        """Both together."""
        return {**self.layers, **self.norms}


def signature(pretrained: nn.Module, clean: nn.Module, corrupted: nn.Module, *, keep_layers: int = 7) -> Signature:
    """The signature of one corruption; the three networks stay as they are.

    Args:
        pretrained: what the two others started from.
        clean: fine-tuned on clean images; the network that will be patched.
        corrupted: fine-tuned on corrupted images.
        keep_layers: the first so many convolutions and linear layers, in the order in which the network names them,
            with the batch norm between them and the next.

    Raises:
        CheckpointError: the three differ in structure.
        CompressionError: ``keep_layers`` is less than 1.
    """
    if keep_layers < 1:
        raise CompressionError(f"Signature has keep_layers {keep_layers}, expected 1 or more. Raise it.")
    start, end, shifted = (_floats(model) for model in (pretrained, clean, corrupted))
    for title, state in (("Clean", end), ("Corrupted", shifted)):
        _check_same(title, start, state)
    layers: dict[str, Tensor] = {}
    for names in _layers(clean)[:keep_layers]:
        direction = torch.cat([(end[name] - start[name]).flatten() for name in names])
        change = torch.cat([(shifted[name] - start[name]).flatten() for name in names])
        parts = without_direction(change, direction).split([start[name].numel() for name in names])
        layers |= {name: part.reshape(start[name].shape) for name, part in zip(names, parts, strict=True)}
    return Signature(layers=layers, norms={name: shifted[name] - end[name] for name in _norms(clean, keep_layers)})


def without_direction(change: Tensor, direction: Tensor) -> Tensor:
    """The part of ``change`` [P] at a right angle to ``direction`` [P]; all of it where the direction is 0."""
    length = direction.dot(direction)
    return change - direction * (direction.dot(change) / length) if length > 0 else change


def mean_signature(signatures: Sequence[Signature]) -> Signature:
    """One patch for several corruptions of one network.

    Raises:
        CompressionError: there are none, or they are of other layers.
    """
    if not signatures or any(each.changes.keys() != signatures[0].changes.keys() for each in signatures):
        raise CompressionError(
            f"Mean of {len(signatures)} signatures has layers that differ or none, expected some of the same network "
            "and keep_layers. Make them alike."
        )

    def mean(part: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([each[name] for each in part]).mean(dim=0) for name in part[0]}

    return Signature(mean([each.layers for each in signatures]), mean([each.norms for each in signatures]))


def patch(state: Mapping[str, Tensor], signature: Signature, alpha: float = 1.0) -> dict[str, Tensor]:
    """Return a network's state plus ``alpha`` times the signature, rounded once; ``state`` stays as it is.

    ``alpha`` 0 gives the state bit for bit, minus the alpha of before takes a patch off again.

    Raises:
        CheckpointError: the state is of another network.
        CompressionError: a running variance of batch norm would not be positive.
    """
    if alpha == 0:
        return dict(state)
    _check_same("Patched", signature.changes, {name: state[name] for name in signature.changes if name in state})
    changed = dict(state)
    for name, change in signature.changes.items():
        value = state[name].double() + alpha * change.to(state[name].device)
        if name.endswith("running_var") and not bool((value > 0).all()):
            raise CompressionError(
                f"Patch with alpha {alpha} has a variance of {value.min():.3g} in '{name}', expected more than 0. "
                "Lower alpha; up to 1 is always safe."
            )
        changed[name] = value.to(state[name].dtype)
    return changed


def signature_delta(model: nn.Module, signature: Signature, alpha: float = 1.0) -> Delta:
    """The patch as a delta of ``model``, which stays as it is: ``stillhouse delta apply`` puts it in before export.

    Deltas of several signatures on one network add up; see :func:`compression.deltas.compose`.
    """
    before = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    after = patch(before, signature, alpha)
    changed = {name: after[name] for name in signature.changes if not torch.equal(before[name], after[name])}
    return Delta(base_sha256=weights_sha256(model), whole=changed)


def patched(model: nn.Module, signature: Signature, alpha: float = 1.0) -> nn.Module:
    """A copy of ``model`` with the patch in it."""
    result = copy.deepcopy(model)
    result.load_state_dict(patch(model.state_dict(), signature, alpha))
    return result


def write_patch(
    pretrained: Path,
    clean: Path,
    corrupted: Sequence[Path],
    out: Path,
    *,
    alpha: float = 0.5,
    keep_layers: int = 7,
) -> int:
    """Make the patch of checkpoint folders, write it as a delta of ``clean``, and return its size in bytes.

    Args:
        pretrained: start of all the others.
        clean: fine-tuned on clean images.
        corrupted: fine-tuned on one corruption each; the mean of their signatures is written.
        out: the ``.safetensors`` file.
        alpha: strength; part of the file. The paper's is 1, which cost more clean accuracy on digits.
        keep_layers: see :func:`signature`.

    Raises:
        CheckpointError: a checkpoint does not load, or the networks differ in structure.
        CompressionError: nothing in ``corrupted``, or the patch does not fit.
        ArtifactError: ``out`` cannot be written.
    """
    from compression.checkpoint import load_checkpoint

    start, model = load_checkpoint(pretrained)[0], load_checkpoint(clean)[0]
    found = [signature(start, model, load_checkpoint(path)[0], keep_layers=keep_layers) for path in corrupted]
    return save_delta(signature_delta(model, mean_signature(found), alpha), out)


def _layers(model: nn.Module) -> list[list[str]]:
    """Names of weight and bias of every convolution and linear layer."""
    return [
        [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)]
        for prefix, module in model.named_modules()
        if isinstance(module, _LAYERS)
    ]


def _norms(model: nn.Module, keep_layers: int) -> list[str]:
    """Names of the floats of every batch norm that stands before layer ``keep_layers`` (from 0)."""
    names: list[str] = []
    for prefix, module in model.named_modules():
        keep_layers -= isinstance(module, _LAYERS)
        if keep_layers < 0:
            break
        if isinstance(module, _BATCH_NORMS):
            floats = (name for name, value in module.state_dict().items() if value.is_floating_point())
            names += [f"{prefix}.{name}" if prefix else name for name in floats]
    return names


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().double() for name, value in model.state_dict().items() if value.is_floating_point()
    }


def _check_same(title: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [list(part[name].shape) if name in part else "nothing" for part in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{title} network has {shapes[0]} in '{name}', expected {shapes[1]}. Signatures need networks of one "
                "structure and one start: give the checkpoints that belong together."
            )
