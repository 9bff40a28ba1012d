"""Any image classifier torchvision can build, without its published weights."""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from compression.errors import CheckpointError
from compression.types import Frozen
from compression.zoo.trial_forward import check_forward, unfit


class TorchvisionModel(Frozen):
    """``torchvision.models.get_model(name, weights=None)``, its first convolution fitted to the images."""

    kind: Literal["torchvision"] = "torchvision"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """Name of a classifier in torchvision, e.g. ``mobilenet_v3_small``."""

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes].

        Raises:
            CheckpointError: torchvision knows no classifier of this name, or cannot build it for this image
                size.
        """
        from torchvision import models

        names = models.list_models(module=models)
        if self.name not in names:
            close = [name for name in names if name.startswith(self.name[:4])][:5]
            raise CheckpointError(
                f"Model '{self.name}' has no entry among torchvision's classifiers, expected a known name"
                f"{' such as ' + ', '.join(close) if close else ''}. "
                "List them with torchvision.models.list_models()."
            )
        channels, height, width = input_shape
        options: dict[str, Any] = {}
        if self.name in {"googlenet", "inception_v3"}:
            options = {"aux_logits": False, "init_weights": True}
        elif self.name.startswith(("vit_", "maxvit")):
            if height != width:
                raise unfit(self.name, input_shape, ValueError("only square ones"))
            options = {"image_size": height} if self.name.startswith("vit_") else {"input_size": (height, width)}
        try:
            model = models.get_model(self.name, weights=None, num_classes=num_classes, **options)
        except (RuntimeError, AssertionError, ValueError) as cause:
            raise unfit(self.name, input_shape, cause) from cause
        if channels != 3:
            _fit_first_convolution(model, channels)
        return check_forward(model, self.name, num_classes=num_classes, input_shape=input_shape)


def _fit_first_convolution(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes ``channels`` input channels."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # pyright: ignore[reportArgumentType]
        old.stride,  # pyright: ignore[reportArgumentType]
        old.padding,  # pyright: ignore[reportArgumentType]
        bias=old.bias is not None,
    )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
