"""Looking inside a network without changing it: outputs of submodules, penultimate features, freezing."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from compression.errors import ShapeError
from compression.types import Outputs

MOST_STAGES = 4
"""Of a network that keeps one resolution, say a transformer."""

_Classifiers = (nn.Linear, nn.Conv2d)


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named submodules while the block runs; the latest call wins.

    Raises:
        ShapeError: A name is no submodule of ``model``; raised before anything runs.
    """
    features: dict[str, Tensor] = {}
    modules = {name: _submodule(model, name) for name in names}
    with ExitStack() as stack:
        for name, module in modules.items():

            def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                features[name] = output

            stack.callback(module.register_forward_hook(keep).remove)
        yield features


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no gradients inside the block; afterwards every mode and flag is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def stage_names(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Names of the modules whose outputs are a network's feature maps, first stage first.

    Looked at are the children of the network and, of those that are mere sequences, their children. Of each run of
    outputs of one resolution the last counts, as in a pyramid of features; images of one pixel, which a global mean
    leaves, do not. Where the network ends in tokens, at most four of the last run of them count, evenly spaced, the
    last among them. Images are taken to have their channels in front of height and width.

    Raises:
        ShapeError: the network has no module with such an output.
    """
    names = children_of(model)
    with frozen(model), torch.no_grad(), captured(model, names) as seen:
        model(images)
    ordered = [name for name in names if isinstance(seen.get(name), Tensor) and _has_positions(seen[name])]
    if not ordered:
        raise ShapeError(
            f"Model '{type(model).__name__}' has no child module whose output is an image or a sequence of tokens, "
            "expected one at least. Use losses that compare logits."
        )
    runs: list[list[str]] = []
    for name in ordered:
        if runs and _resolution(seen[runs[-1][-1]]) == _resolution(seen[name]):
            runs[-1].append(name)
        else:
            runs.append([name])
    last = runs[-1]
    if seen[last[-1]].ndim == 4:
        return tuple(run[-1] for run in runs)
    count = min(MOST_STAGES, len(last))
    return tuple(last[round((number + 1) * len(last) / count) - 1] for number in range(count))


def looked_at(model: nn.Module, images: Tensor, *, features: bool = False, stages: Sequence[str] = ()) -> Outputs:
    """Logits of one forward pass, and with it penultimate features and the outputs of named modules where asked for."""
    with captured(model, stages) as seen:
        if features:
            logits, found = penultimate(model, images)
            return Outputs(logits, {"penultimate": found}, tuple(seen[name] for name in stages))
        logits = model(images)
    return Outputs(logits, maps=tuple(seen[name] for name in stages))


def tokens_of(feature_map: Tensor) -> Tensor:
    """A map as tokens [B,N,D]; images [B,D,H,W] are read row by row."""
    return feature_map.flatten(2).transpose(1, 2) if feature_map.ndim == 4 else feature_map


def image_of(feature_map: Tensor) -> Tensor:
    """A map as an image [B,D,H,W]; tokens must make a square.

    Raises:
        ShapeError: they do not.
    """
    if feature_map.ndim == 4:
        return feature_map
    batch, count, width = feature_map.shape
    side = math.isqrt(count)
    if side * side != count:
        raise ShapeError(f"Feature map has {count} tokens, expected a square number. Use losses that compare logits.")
    return feature_map.transpose(1, 2).reshape(batch, width, side, side)


def children_of(model: nn.Module) -> list[str]:
    names: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(child):
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            names.append(name)
    return names


def _has_positions(output: Tensor) -> bool:
    return output.ndim == 3 or (output.ndim == 4 and output.shape[2:] != (1, 1))


def _resolution(feature_map: Tensor) -> tuple[int, ...]:
    return tuple(feature_map.shape[2:]) if feature_map.ndim == 4 else (feature_map.shape[1],)


def penultimate(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B,C] and the features [B,D] the classifier saw, in one forward pass.

    The classifier is the last linear layer or convolution that ran; features with positions left (tokens, or
    an image) are averaged over them. Mode and gradients are the caller's choice.

    Raises:
        ShapeError: No linear layer or convolution produced the logits (an exported graph, for one).
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [(module, inputs[0])] if output.shape[0] == images.shape[0] else seen

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _Classifiers):
                stack.callback(module.register_forward_hook(keep).remove)
        logits = model(images)
    if not seen:
        raise ShapeError(
            f"Model '{type(model).__name__}' has no linear layer or convolution, expected one that gives its "
            "logits. Take features from the network before it is exported."
        )
    module, inputs = seen[0]
    width = module.in_features if isinstance(module, nn.Linear) else inputs.shape[1]
    if isinstance(module, nn.Linear):
        features = inputs.reshape(inputs.shape[0], -1, width).mean(1) if inputs.ndim > 2 else inputs
    else:
        features = inputs.flatten(2).mean(2)
    if features.ndim != 2 or logits.ndim != 2:
        raise ShapeError(
            f"Model '{type(model).__name__}' has outputs {tuple(logits.shape)}, expected logits "
            "[batch, classes]. Give a classifier."
        )
    return logits, features.to(torch.float32)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as cause:
        raise ShapeError(
            f"Model '{type(model).__name__}' has no submodule '{name}', expected one of its named_modules(). "
            "Correct the name."
        ) from cause
