"""Looking inside a network without changing it: outputs of submodules, penultimate features, freezing."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from compression.errors import ShapeError

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
