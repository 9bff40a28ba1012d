"""Structural edits: what pruning did to a network, as data, and how to do it again.

An edit names a submodule or a parameter of the network its spec builds and gives its new size, or leaves the
submodule out. Replaying the edits yields a network with the pruned shapes; its weights come from the checkpoint. Only
modules, parameters and plain numbers that already exist can be edited, and a module that is left out becomes an
identity, so a spec from elsewhere cannot add behaviour.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from compression.errors import CheckpointError, ShapeError
from compression.types import Frozen

_Convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BatchNorms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Numbers a ResizeModule edit sets itself.
_SIZES = frozenset({"in_features", "out_features", "in_channels", "out_channels", "num_features", "groups"})


class ResizeModule(Frozen):
    """A convolution, linear layer, batch norm or layer norm gets a new width."""

    kind: Literal["resize"] = "resize"
    module: str
    """Dotted name of the submodule."""
    in_features: PositiveInt
    """Input features or channels; the same as ``out_features`` for a norm."""
    out_features: PositiveInt
    """Output features or channels."""
    groups: PositiveInt | None = None
    """Groups of a convolution; unset elsewhere."""


class ReshapeParameter(Frozen):
    """A parameter or buffer that belongs to no standard layer, e.g. position embeddings, gets a new shape."""

    kind: Literal["reshape_parameter"] = "reshape_parameter"
    parameter: str
    """Dotted name as in the state dict."""
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    """The new shape."""


class SetAttributes(Frozen):
    """Plain numbers a forward pass reads, e.g. ``num_heads`` and ``head_dim`` of an attention block."""

    kind: Literal["set_attributes"] = "set_attributes"
    module: str
    """Dotted name of the submodule; empty for the network itself."""
    values: dict[str, bool | int | float]
    """Attribute name to value; only attributes that exist and already hold a number can be set."""


class SkipModule(Frozen):
    """A submodule is left out: an identity takes its place, and its input is its output."""

    kind: Literal["skip"] = "skip"
    module: Annotated[str, Field(min_length=1)]
    """Dotted name of the submodule; later edits find nothing below it."""


AnyEdit = ResizeModule | ReshapeParameter | SetAttributes | SkipModule


def apply_edits(model: nn.Module, edits: Sequence[AnyEdit]) -> None:
    """Replay ``edits`` on ``model``, in order, in place.

    Resized layers are initialised anew; reshaped parameters keep the part that fits.

    Raises:
        CheckpointError: An edit names something the network does not have, or cannot resize.
    """
    for edit in edits:
        if isinstance(edit, ResizeModule):
            _resize(_submodule(model, edit.module), edit)
        elif isinstance(edit, ReshapeParameter):
            _reshape(model, edit)
        elif isinstance(edit, SkipModule):
            _skip(model, edit)
        else:
            _set_attributes(_submodule(model, edit.module), edit)


def diff_edits(original: nn.Module, pruned: nn.Module) -> tuple[AnyEdit, ...]:
    """The edits that give ``original`` the structure of ``pruned``, skips first; empty when they already agree.

    Raises:
        ShapeError: The two differ in more than sizes, numbers and modules that became an identity (a module was
            added, removed or replaced).
    """
    # Under every name: a module two places share must still be found where only the first of them was left out.
    before = dict(original.named_modules(remove_duplicate=False))
    after = dict(pruned.named_modules(remove_duplicate=False))
    skipped: list[str] = []
    for name, old in before.items():
        if not _below(name, skipped) and _was_skipped(name, old, after.get(name)):
            skipped.append(name)
    # What is below a skipped module is gone from both.
    before = {name: module for name, module in before.items() if not _below(name, skipped)}
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if type(old) is not type(new) and name not in skipped:
            raise ShapeError(
                f"Module '{name}' has type {_type_name(new)}, expected {_type_name(old)} as in the network the spec "
                "builds. Edits describe sizes and modules left out; give a network of changed layers its own spec."
            )
    edits: list[AnyEdit] = [SkipModule(module=name) for name in skipped]
    seen: set[nn.Module] = set()
    for name, old in before.items():
        if name not in skipped and old not in seen:
            seen.add(old)
            edits.extend(_module_edits(name, old, after[name]))
    return tuple(edits)


def _was_skipped(name: str, old: nn.Module, new: nn.Module | None) -> bool:
    """Whether a module of the network, not the network itself, became a bare identity."""
    if not name or new is None or type(new) is not nn.Identity or type(old) is nn.Identity:
        return False
    return not new._modules and not list(_own_tensors(new))


def _below(name: str, skipped: Sequence[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in skipped)


def _module_edits(name: str, old: nn.Module, new: nn.Module) -> Iterator[AnyEdit]:
    old_size, new_size = _size_of(old), _size_of(new)
    if new_size is not None:
        if old_size != new_size:
            in_features, out_features, groups = new_size
            yield ResizeModule(module=name, in_features=in_features, out_features=out_features, groups=groups)
    else:
        old_tensors, new_tensors = dict(_own_tensors(old)), dict(_own_tensors(new))
        if old_tensors.keys() != new_tensors.keys():
            raise ShapeError(
                f"Module '{name}' has parameters {sorted(new_tensors)}, expected {sorted(old_tensors)} as in "
                "the network the spec builds. Edits describe sizes only."
            )
        for key, tensor in new_tensors.items():
            if tensor.shape != old_tensors[key].shape:
                yield ReshapeParameter(parameter=f"{name}.{key}".lstrip("."), shape=tuple(tensor.shape))
    old_numbers, new_numbers = _numbers(old), _numbers(new)
    skipped = _SIZES if new_size is not None else frozenset()
    changed = {
        key: value
        for key, value in new_numbers.items()
        if key not in skipped and key in old_numbers and not _same(value, old_numbers[key])
    }
    if changed:
        yield SetAttributes(module=name, values=changed)


def _size_of(module: nn.Module) -> tuple[int, int, int | None] | None:
    """(in, out, groups) of a layer ResizeModule can describe, read from its tensors; otherwise None."""
    if isinstance(module, nn.Linear):
        return module.weight.shape[1], module.weight.shape[0], None
    if isinstance(module, _Convolutions):
        return module.weight.shape[1] * module.groups, module.weight.shape[0], module.groups
    if isinstance(module, _BatchNorms):
        width = module.num_features
        return width, width, None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        width = module.normalized_shape[0]
        return width, width, None
    return None


def _resize(module: nn.Module, edit: ResizeModule) -> None:
    in_features, out_features = edit.in_features, edit.out_features
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = in_features, out_features
        _renew(module, {"weight": (out_features, in_features), "bias": (out_features,)})
    elif isinstance(module, _Convolutions):
        groups = edit.groups or module.groups
        if in_features % groups or out_features % groups:
            raise CheckpointError(
                f"Edit of module '{edit.module}' has {in_features} input and {out_features} output channels "
                f"in {groups} groups, expected multiples of the groups. Write the checkpoint again."
            )
        module.in_channels, module.out_channels, module.groups = in_features, out_features, groups
        window = tuple(module.weight.shape[2:])
        _renew(module, {"weight": (out_features, in_features // groups, *window), "bias": (out_features,)})
    elif isinstance(module, _BatchNorms):
        module.num_features = out_features
        names = ("weight", "bias", "running_mean", "running_var")
        _renew(module, dict.fromkeys(names, (out_features,)))
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (out_features,)
        _renew(module, {"weight": (out_features,), "bias": (out_features,)})
    else:
        raise CheckpointError(
            f"Edit of module '{edit.module}' has target type {type(module).__name__}, expected a "
            "convolution, linear layer, batch norm or layer norm. Write the checkpoint again."
        )
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


def _renew(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the named parameters and buffers new storage of the given shapes; absent ones stay absent."""
    for name, shape in shapes.items():
        tensor = getattr(module, name, None)
        if tensor is not None:
            _put(module, name, torch.empty(shape, dtype=tensor.dtype, device=tensor.device))


def _reshape(model: nn.Module, edit: ReshapeParameter) -> None:
    path, _, name = edit.parameter.rpartition(".")
    module = _submodule(model, path)
    old = dict(_own_tensors(module)).get(name)
    if old is None:
        raise CheckpointError(
            f"Edit of parameter '{edit.parameter}' has no target in the network its spec builds, expected a "
            "parameter or buffer. Write the checkpoint again with this version."
        )
    if len(edit.shape) != old.ndim:
        raise CheckpointError(
            f"Edit of parameter '{edit.parameter}' has shape {edit.shape}, expected {old.ndim} dimensions as "
            f"in {tuple(old.shape)}. Write the checkpoint again."
        )
    new = torch.zeros(edit.shape, dtype=old.dtype, device=old.device)
    kept = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, edit.shape, strict=True))
    new[kept] = old.detach()[kept]
    _put(module, name, new)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    else:
        module._buffers[name] = tensor


def _skip(model: nn.Module, edit: SkipModule) -> None:
    old = _submodule(model, edit.module)
    path, _, name = edit.module.rpartition(".")
    _submodule(model, path)._modules[name] = nn.Identity().train(old.training)


def _set_attributes(module: nn.Module, edit: SetAttributes) -> None:
    existing = _numbers(module)
    for name, value in edit.values.items():
        if name not in existing:
            raise CheckpointError(
                f"Edit of module '{edit.module}' has attribute '{name}', expected one of the numbers it "
                f"holds: {', '.join(sorted(existing)) or 'none'}. Write the checkpoint again."
            )
        setattr(module, name, value)


def _numbers(module: nn.Module) -> dict[str, bool | int | float]:
    """Public plain numbers among a module's attributes, without the train/eval flag."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) in (bool, int, float) and not name.startswith("_") and name != "training"
    }


def _same(left: float, right: float) -> bool:
    return type(left) is type(right) and (left == right or (left != left and right != right))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as cause:
        raise CheckpointError(
            f"Edit of module '{name}' has no target in the network its spec builds, expected a submodule. "
            "Write the checkpoint again with this version."
        ) from cause


def _type_name(module: nn.Module | None) -> str:
    return "nothing" if module is None else type(module).__name__
