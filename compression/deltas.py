"""Sparse deltas: what a fine-tuning changed of a network, small enough to ship, and added up with others.

After the composable sparse fine-tuning of Ansell et al. 2022 (arXiv:2110.07560), whose training is in
``compression/distill/procedures/sparse_finetuning.py``. A delta belongs to one network, its base, down to the last
bit. It holds the few entries of weights that changed, and whole what is trained fully: the classifier, norms with
their scale and shift, and buffers such as the statistics of batch norm.

The difference of two float32 numbers is often no float32 number. So a delta holds the new values and not differences,
which are taken where deltas are added up: one delta gives its tuned network bit for bit, and what
:func:`apply_delta` returns gives the base back bit for bit.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from compression.edits import diff_edits
from compression.errors import ArtifactError, CheckpointError, ShapeError

HEADER, FORMAT = "stillhouse_delta", 1
SUFFIX = ".safetensors"

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_INT32 = 2**31


@dataclass(frozen=True)
class Delta:
    """Changes of one network, on the CPU."""

    base_sha256: str
    """Of the network it belongs to, see :func:`weights_sha256`."""
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a parameter -> int64 [K], ascending, K >= 1: places in the flattened tensor."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Same names -> [K], of the parameter's type: what stands there after the change."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a parameter or buffer -> what takes its place."""

    @property
    def count(self) -> int:
        """Entries of sparse tensors; those of whole ones do not count."""
        return sum(each.numel() for each in self.indices.values())

    @cached_property
    def sha256(self) -> str:
        """Changes with everything in it."""
        return _hash(self._tensors(), self.base_sha256)

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"indices": self.indices, "values": self.values, "whole": self.whole}
        return {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a sparse fine-tuning changes in few places, by name: floats outside classifier and norms.

    The classifier is the last linear layer, or the last convolution of a network without one.
    """
    classifiers: dict[type, nn.Module] = {}
    whole: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, _NORMS):
            whole.append(module)
        for kind in (nn.Linear, nn.Conv2d):
            if isinstance(module, kind):
                classifiers[kind] = module
    if classifiers:
        whole.append(classifiers.get(nn.Linear) or classifiers[nn.Conv2d])
    left_out = {id(parameter) for module in whole for parameter in module.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and id(parameter) not in left_out
    }


def largest_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks, bool and of the tensors' shapes, of the ``count`` largest ``|after - before|`` over all tensors together.

    Of equal ones the first; all of them where there are no more than ``count``.
    """
    if not before:
        return {}
    changes = torch.cat([(after[name].detach() - each.detach()).abs().flatten() for name, each in before.items()])
    chosen = torch.zeros(len(changes), dtype=torch.bool, device=changes.device)
    chosen[changes.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([each.numel() for each in before.values()])
    return {name: part.reshape(each.shape) for (name, each), part in zip(before.items(), parts, strict=True)}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256, hexadecimal, of the names, types, shapes and bits of all parameters and persistent buffers."""
    return _hash(model.state_dict())


def delta_of(base: nn.Module, tuned: nn.Module, *, keep: int | None = None) -> Delta:
    """What leads from ``base`` to ``tuned``; both stay as they are.

    Args:
        base: the network that the delta will be applied to.
        tuned: a network of the same structure.
        keep: at most this many entries of sparse tensors, those that changed most; None keeps every changed one, so
            that the delta gives exactly ``tuned``.

    Raises:
        CheckpointError: the two differ in structure, or hold values that are not finite.
        ValueError: ``keep`` is negative.
    """
    if keep is not None and keep < 0:
        raise ValueError(f"keep has {keep}, expected 0 or more. Leave it out to keep every changed entry.")
    _check_structure(base, tuned)
    before, after = _state(base), _state(tuned)
    sparse = [name for name in maskable(base) if name in before]
    changed = {name: _differs(before[name], after[name]) for name in sparse}
    if keep is not None:
        old, new = ({name: state[name] for name in sparse} for state in (before, after))
        masks = largest_changes(old, new, keep)
        changed = {name: mask & masks[name] for name, mask in changed.items()}
    places = {name: mask.flatten().nonzero().squeeze(-1) for name, mask in changed.items() if bool(mask.any())}
    tied = _aliases(base, sparse)
    return Delta(
        base_sha256=_hash(before),
        indices=places,
        values={name: after[name].flatten()[each] for name, each in places.items()},
        whole={
            name: after[name].clone()
            for name, value in before.items()
            if name not in tied and not torch.equal(_bits(value), _bits(after[name]))
        },
    )


def compose(base: nn.Module, deltas: Sequence[Delta]) -> Delta:
    """One delta for all of them: theta0 + the sum of what each changes, theta0 the weights of ``base``.

    An entry that one delta changes gets that delta's value bit for bit; where several do, differences are added up in
    float64 and rounded once. The order of the deltas makes no difference. Tensors that deltas hold whole are added up
    alike, the classifier too; but a running variance does not fall below the lowest of those it is made of, and of
    integers, such as counters, the largest stays. Statistics of batch norm of a sum are a guess: where there is
    data, re-estimate them, see ``compression/distill/merging/batch_norm.py``.

    Raises:
        CheckpointError: a delta belongs to another network.
    """
    before = _state(base)
    found = _hash(before)
    for delta in deltas:
        _check_fits(delta, before, found)
    ordered = sorted(deltas, key=lambda delta: delta.sha256)
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, value in before.items():
        sparse = [(delta.indices[name], delta.values[name]) for delta in ordered if name in delta.indices]
        if sparse:
            indices[name], values[name] = _sum_of_entries(value.flatten(), sparse)
        replaced = [delta.whole[name] for delta in ordered if name in delta.whole]
        if replaced:
            whole[name] = _sum_of_whole(name, value, replaced)
    return Delta(base_sha256=found, indices=indices, values=values, whole=whole)


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta) -> Delta:
    """Change ``model`` in place, and return the way back: a delta that restores every bit of what it was.

    Raises:
        CheckpointError: the delta belongs to another network; ``model`` is unchanged.
    """
    state, before = model.state_dict(), _state(model)
    _check_fits(delta, before, _hash(before))
    values = {name: before[name].flatten()[places] for name, places in delta.indices.items()}
    whole = {name: before[name].clone() for name in delta.whole}
    for name, places in delta.indices.items():
        new = before[name].flatten().clone()
        new[places] = delta.values[name]
        state[name].copy_(new.reshape(before[name].shape))
    for name, value in delta.whole.items():
        state[name].copy_(value)
    return Delta(base_sha256=weights_sha256(model), indices=dict(delta.indices), values=values, whole=whole)


def save_delta(delta: Delta, path: Path) -> int:
    """Write a delta as one safetensors file and return its size in bytes; equal deltas, equal bytes.

    The file appears whole or not at all. Its JSON header holds the SHA-256 of the base and of the content; indices are
    int32 where they fit.

    Raises:
        CheckpointError: ``path`` does not end in ``.safetensors``.
        ArtifactError: the file cannot be written.
    """
    if path.suffix != SUFFIX:
        raise CheckpointError(f"Delta '{path}' has suffix '{path.suffix}', expected {SUFFIX}. Rename it.")
    tensors = {name: _packed(name, tensor) for name, tensor in delta._tensors().items()}
    header = {"format": FORMAT, "base_sha256": delta.base_sha256, "content_sha256": delta.sha256}
    # One entry: safetensors writes several in any order.
    content = tensors_to_bytes(tensors, metadata={HEADER: json.dumps(header)})
    draft: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        draft = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as cause:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise ArtifactError(
            f"Delta '{path}' has not been written ({cause.strerror}), expected a writable folder with {len(content)} "
            "bytes free. Free space or choose another folder."
        ) from cause
    return len(content)


def load_delta(path: Path) -> Delta:
    """The delta of a file, on the CPU; nothing in the file can run code.

    Raises:
        CheckpointError: there is no such file, it holds no delta, or a bit of it changed.
    """
    if not path.is_file():
        raise CheckpointError(f"Delta '{path}' has no file there, expected one. Correct the path.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(
            f"Delta '{path}' has bytes that are not a whole safetensors file ({cause}), expected header and tensors of "
            "matching length. It is cut off or damaged: fetch it again."
        ) from cause
    try:
        header = json.loads(text)
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(
            f"Delta '{path}' has the header {text[:80]}, expected one of format {FORMAT}. Give a file that "
            "stillhouse delta make wrote, or fetch it again."
        )
    parts: dict[str, dict[str, Tensor]] = {"indices": {}, "values": {}, "whole": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor.long() if part == "indices" else tensor
    delta = Delta(str(header.get("base_sha256")), parts["indices"], parts["values"], parts["whole"])
    if len(parts) > 3 or delta.sha256 != header.get("content_sha256"):
        raise CheckpointError(
            f"Delta '{path}' has content with SHA-256 {delta.sha256}, expected {header.get('content_sha256')}. "
            "The file changed or is damaged: fetch it again."
        )
    return delta


def _check_structure(base: nn.Module, tuned: nn.Module) -> None:
    wanted, found = base.state_dict(), tuned.state_dict()
    try:
        differences = [repr(edit) for edit in diff_edits(base, tuned)]
    except ShapeError as cause:
        differences = [str(cause)]
    differences += [
        f"'{name}' is {found[name].dtype} instead of {value.dtype}"
        for name, value in wanted.items()
        if name in found and found[name].dtype != value.dtype
    ]
    if differences or wanted.keys() != found.keys():
        raise CheckpointError(
            f"Tuned network '{type(tuned).__name__}' has another structure than its base "
            f"({differences[0] if differences else 'other names'}), expected the same. "
            "Give the checkpoint that the tuned one started from."
        )
    for title, state in (("Base", wanted), ("Tuned", found)):
        for name, value in state.items():
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{title} network has values that are not finite in '{name}', expected numbers. The training run "
                    "that wrote them diverged: take an earlier checkpoint."
                )


def _check_fits(delta: Delta, state: Mapping[str, Tensor], found: str) -> None:
    """The hash says it all of a file that nobody made up; the rest keeps what was made up from doing harm."""
    if delta.base_sha256 != found:
        raise CheckpointError(
            f"Delta '{delta.sha256[:12]}' has a base with SHA-256 {delta.base_sha256[:12]}..., expected that of the "
            f"network given, {found[:12]}.... Give the network it was made from; deltas of one base are composed and "
            "applied together, not one after another."
        )
    for name, places in delta.indices.items():
        values, target = delta.values.get(name), state.get(name)
        fits = (
            values is not None
            and target is not None
            and places.ndim == values.ndim == 1
            and len(places) == len(values) > 0
            and values.dtype == target.dtype
            and bool((places.diff() > 0).all())
            and 0 <= int(places[0]) <= int(places[-1]) < target.numel()
        )
        if not fits:
            raise _misfit(name)
    for name, value in delta.whole.items():
        if name not in state or value.shape != state[name].shape or value.dtype != state[name].dtype:
            raise _misfit(name)
    for name in delta.values.keys() - delta.indices.keys() | (delta.whole.keys() & delta.indices.keys()):
        raise _misfit(name)


def _misfit(name: str) -> CheckpointError:
    return CheckpointError(
        f"Delta has entries of '{name}' that do not fit the network given, expected ascending places inside it, a "
        "value for each, and its type. Make the delta again."
    )


def _sum_of_entries(before: Tensor, changes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Places that any of ``changes`` touches, and what stands there after all of them."""
    touched = torch.zeros(len(before), dtype=torch.int64)
    total, only = torch.zeros(len(before), dtype=torch.float64), before.clone()
    for places, values in changes:
        touched[places] += 1
        total[places] += values.double() - before[places].double()
        only[places] = values
    indices = touched.nonzero().squeeze(-1)
    summed = (before.double() + total).to(before.dtype)
    return indices, torch.where(touched == 1, only, summed)[indices]


def _sum_of_whole(name: str, before: Tensor, changes: Sequence[Tensor]) -> Tensor:
    if len(changes) == 1:
        return changes[0].clone()
    if not before.is_floating_point():
        return torch.stack(list(changes)).amax(dim=0)
    summed = before.double() + sum((each.double() - before.double() for each in changes), torch.zeros(()))
    if name.rpartition(".")[2] == "running_var":
        summed = summed.maximum(torch.stack([before, *changes]).amin(dim=0).double())
    return summed.to(before.dtype)


def _aliases(model: nn.Module, names: Sequence[str]) -> set[str]:
    """All names of the named parameters: a shared one has several."""
    ids = {id(model.get_parameter(name)) for name in names}
    return {name for name, each in model.named_parameters(remove_duplicate=False) if id(each) in ids}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """On the CPU and contiguous; where it is so already, of the same memory as the model."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _differs(before: Tensor, after: Tensor) -> Tensor:
    """Where two tensors of finite floats have other bits, bool."""
    return (before != after) | (before.signbit() != after.signbit())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _packed(name: str, tensor: Tensor) -> Tensor:
    small = name.startswith("indices/") and bool((tensor < _INT32).all())
    return (tensor.to(torch.int32) if small else tensor).contiguous()


def _hash(tensors: Mapping[str, Tensor], start: str = "") -> str:
    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_bits(tensor).numpy().tobytes())
    return digest.hexdigest()
