"""Checkpoints: a folder with ``spec.json`` and ``weights.safetensors``. Nothing in it can run code.

``spec.json`` also holds the SHA-256 of the weights: a flipped bit in a tensor file loads without a sound.
"""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from compression.errors import ArtifactError, CheckpointError, ShapeError
from compression.models import ModelSpec, build_model, diff_edits
from compression.types import Frozen

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "weights.safetensors"
# Where training scripts usually keep the weights inside a larger dictionary.
_NESTED_UNDER = ("state_dict", "model_state_dict", "model")
# How torch's weights-only reader names what it will not run: an import, or an instruction.
_REFUSED = re.compile(r"unsupported (?:global: )?(global \S+|operand \d+|class \S+)", re.IGNORECASE)


class CheckpointFile(Frozen):
    """What ``spec.json`` holds."""

    format: Literal[1] = 1
    """Version of this layout."""
    weights_sha256: str
    """SHA-256 of the weights file, hexadecimal."""
    spec: ModelSpec
    """How to build the network the weights belong to."""


def save_checkpoint(model: nn.Module, spec: ModelSpec, folder: Path) -> None:
    """Write ``model`` as ``folder/spec.json`` and ``folder/weights.safetensors``; equal models, equal bytes.

    Each file appears whole or not at all. Tensors may lie in any memory format or share memory; they are
    stored contiguous, one copy a name. The model is unchanged.

    Raises:
        CheckpointError: ``spec`` builds a network of another structure, or a parameter is not float32.
        ArtifactError: The folder cannot be written.
    """
    _check_describes(spec, model)
    weights = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    content = tensors_to_bytes(weights)
    header = CheckpointFile(weights_sha256=hashlib.sha256(content).hexdigest(), spec=spec)
    _write_durably(folder / WEIGHTS_FILE, content)
    _write_durably(folder / SPEC_FILE, (header.model_dump_json(indent=2) + "\n").encode())


def load_checkpoint(folder: Path) -> tuple[nn.Module, ModelSpec]:
    """The network of a checkpoint folder, in eval mode with weights equal bit for bit, and its spec.

    torch's global random state is left as it was.

    Raises:
        CheckpointError: A file is missing or damaged, or weights and spec do not fit each other.
    """
    header = _read_header(folder)
    weights = load_weights(folder / WEIGHTS_FILE, sha256=header.weights_sha256)
    with torch.random.fork_rng(devices=[]):
        model = build_model(header.spec)
    load_into(model, weights, name=str(folder))
    return model.eval(), header.spec


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a checkpoint folder, without touching its weights.

    Raises:
        CheckpointError: ``spec.json`` is missing or not a spec.
    """
    return _read_header(folder).spec


def load_weights(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU.

    ``.safetensors`` holds tensors only. ``.pt`` and ``.pth`` are read by torch's weights-only reader, which
    refuses everything but tensors and plain containers; a state dict nested under ``state_dict``,
    ``model_state_dict`` or ``model`` is unwrapped, and the ``module.`` prefix of data-parallel training is
    removed.

    Args:
        path: The file.
        sha256: What its SHA-256 must be, hexadecimal; None to skip the check.

    Raises:
        CheckpointError: The file is missing, has another hash, is damaged, wants to run code, or holds
            something other than a state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"Weights '{path}' has no file there, expected one. Correct the path.")
    content = _read(path)
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise CheckpointError(
            f"Weights '{path}' has SHA-256 {found}, expected {sha256.lower()}. "
            "The file changed or is damaged: fetch it again, or correct the hash if the change was meant."
        )
    if path.suffix == ".safetensors":
        try:
            return tensors_from_bytes(content)
        except SafetensorError as cause:
            raise CheckpointError(
                f"Weights '{path}' has {len(content)} bytes that are not a whole safetensors file ({cause}), "
                "expected header and tensors of matching length. It is cut off or damaged: fetch it again."
            ) from cause
    if path.suffix in {".pt", ".pth"}:
        return _state_dict(_read_weights_only(content, path), path)
    raise CheckpointError(
        f"Weights '{path}' has suffix '{path.suffix}', expected .safetensors, .pt or .pth. "
        "Re-save the weights with safetensors.torch.save_file."
    )


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Copy ``weights`` into ``model``, in place; every name and shape must agree.

    Args:
        model: The network; unchanged if anything does not fit.
        weights: Tensors by name, as ``model.state_dict()`` names them.
        name: What to call the weights in an error.

    Raises:
        CheckpointError: Names are missing or unexpected, shapes differ, or a parameter is not finite.
    """
    wanted = model.state_dict()
    problems = []
    head = _head_name(model)
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in wanted and key in weights and wanted[key].shape[:1] != weights[key].shape[:1]:
            raise CheckpointError(
                f"Weights '{name}' has {weights[key].shape[0]} classes in '{key}', expected "
                f"{wanted[key].shape[0]}. Set the number of classes the weights were trained for, "
                "or give weights for these classes."
            )
    missing = sorted(wanted.keys() - weights.keys())
    unexpected = sorted(weights.keys() - wanted.keys())
    mismatched = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in weights and weights[key].shape != wanted[key].shape
    ]
    for label, keys in (("no", missing), ("unexpected", unexpected), ("other shapes for", mismatched)):
        if keys:
            problems.append(f"{label} {_some(keys)}")
    if problems:
        raise CheckpointError(
            f"Weights '{name}' has {'; '.join(problems)}, expected exactly the {len(wanted)} tensors of the "
            "network its spec builds. Check that model name, input shape and weights belong together."
        )
    broken = [key for key, _ in model.named_parameters() if not bool(torch.isfinite(weights[key]).all())]
    if broken:
        raise CheckpointError(
            f"Weights '{name}' has values that are not finite in {_some(broken)}, expected numbers. "
            "The training run that wrote them diverged: take an earlier checkpoint."
        )
    model.load_state_dict(dict(weights))


def _read_header(folder: Path) -> CheckpointFile:
    path = folder / SPEC_FILE
    if not path.is_file():
        raise CheckpointError(
            f"Checkpoint '{folder}' has no {SPEC_FILE}, expected {SPEC_FILE} and {WEIGHTS_FILE}. "
            "Give the folder a checkpoint was saved to."
        )
    try:
        return CheckpointFile.model_validate_json(_read(path))
    except ValidationError as cause:
        first = cause.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the text"
        raise CheckpointError(
            f"Checkpoint '{folder}' has a {SPEC_FILE} that is not a spec ({place}: {first['msg']}), expected "
            "the fields of format 1. Restore the file, or save the checkpoint again."
        ) from cause


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise CheckpointError(
            f"File '{path}' has an error on reading ({cause.strerror}), expected a readable file. "
            "Check its permissions and the disk."
        ) from cause


def _read_weights_only(content: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as cause:  # a hostile or damaged file can break torch's reader in any way
        refused = _REFUSED.search(str(cause))
        if refused:
            raise CheckpointError(
                f"Weights '{path}' has a pickle that asks for {refused[1]}, expected tensors only; it was "
                "refused and nothing in it ran. Re-save the weights as .safetensors where the file is trusted."
            ) from cause
        raise CheckpointError(
            f"Weights '{path}' has content torch cannot read ({type(cause).__name__}), expected a whole file "
            "written by torch.save. The file is cut off or damaged: fetch it again."
        ) from cause


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        nested = (content[key] for key in _NESTED_UNDER if isinstance(content.get(key), Mapping))
        content = next(nested, content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"Weights '{path}' has a {type(content).__name__}, expected a state dict (name to tensor). "
            "Save model.state_dict()."
        )
    strange = [
        f"{key!r} ({type(value).__name__})"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise CheckpointError(
            f"Weights '{path}' has entries that are no tensors: {_some(strange)}, expected a state dict "
            "(name to tensor). Save model.state_dict()."
        )
    prefixed = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if prefixed else key: value for key, value in content.items()}


def _check_describes(spec: ModelSpec, model: nn.Module) -> None:
    """Refuse a checkpoint that could not be loaded again."""
    with torch.random.fork_rng(devices=[]):
        rebuilt = build_model(spec)
    try:
        differences = diff_edits(rebuilt, model)
    except ShapeError as cause:
        raise CheckpointError(
            f"Spec of '{type(model).__name__}' has another network than the model given ({cause}), expected "
            "a spec that builds it. Pass the spec the model was built from."
        ) from cause
    if differences:
        raise CheckpointError(
            f"Spec of '{type(model).__name__}' has {len(differences)} differences to the model given (first: "
            f"{differences[0]!r}), expected none. "
            "Add diff_edits(built, model) to its edits."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise CheckpointError(
                f"Parameter '{name}' has type {parameter.dtype}, expected torch.float32. "
                "Call model.float() first; other precisions are made at export."
            )


def _head_name(model: nn.Module) -> str:
    """Name of the classifier: the last linear layer, or the last convolution of a net without one."""
    names = {nn.Conv2d: "", nn.Linear: ""}
    for name, module in model.named_modules():
        for kind in names:
            if isinstance(module, kind):
                names[kind] = name
    return names[nn.Linear] or names[nn.Conv2d]


def _some(items: list[str], limit: int = 3) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _write_durably(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: temporary file, fsync, rename, fsync of the folder."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as cause:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"Checkpoint file '{path}' has not been written ({cause.strerror}), expected a writable folder "
            f"with {len(content)} bytes free. Free space or choose another folder."
        ) from cause
