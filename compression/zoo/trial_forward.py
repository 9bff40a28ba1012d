"""One forward pass right after building: a network of a library may be built for images it cannot take."""

import torch
from torch import Tensor, nn

from compression.errors import CheckpointError


def check_forward(model: nn.Module, name: str, *, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """``model`` itself, once it gave logits [1,num_classes] for a blank image [C,H,W].

    Raises:
        CheckpointError: The forward pass fails, or gives something else than such logits.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = model(torch.zeros(1, *input_shape))
    except (RuntimeError, AssertionError, ValueError, IndexError) as cause:
        raise unfit(name, input_shape, cause) from cause
    finally:
        model.train(was_training)
    if not isinstance(found, Tensor) or found.shape != (1, num_classes):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CheckpointError(
            f"Model '{name}' has output {shape} for one image, expected logits {(1, num_classes)}. "
            "Choose an image classifier."
        )
    return model


def unfit(name: str, input_shape: tuple[int, int, int], cause: Exception) -> CheckpointError:
    """The error for a network that cannot take images of this shape."""
    channels, height, width = input_shape
    return CheckpointError(
        f"Model '{name}' has no form for {channels}x{height}x{width} images ({cause}), expected a size it "
        "supports. Choose another model, or resize the images."
    )
