"""Any image classifier timm can build, without its published weights."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from compression.errors import CheckpointError
from compression.types import Frozen
from compression.zoo.trial_forward import check_forward, unfit


class TimmModel(Frozen):
    """``timm.create_model(name, pretrained=False)``; weights come from a file, never from the network."""

    kind: Literal["timm"] = "timm"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]
    """Name in timm's registry, e.g. ``resnet18``; addresses such as ``hf-hub:...`` are refused."""

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes].

        Raises:
            CheckpointError: timm knows no model of this name, or cannot build it for this image size.
        """
        import timm

        channels, height, width = input_shape
        if not timm.is_model(self.name):
            close = timm.list_models(f"*{self.name.split('_')[0].split('.')[0]}*")[:5]
            raise CheckpointError(
                f"Model '{self.name}' has no entry in timm {timm.__version__}, expected a registered name"
                f"{' such as ' + ', '.join(close) if close else ''}. List them with timm.list_models()."
            )
        options = {"pretrained": False, "num_classes": num_classes, "in_chans": channels}
        try:
            model = timm.create_model(self.name, **options, img_size=(height, width))
        except TypeError as cause:  # convolutional families take no image size
            if "img_size" not in str(cause):
                raise
            model = timm.create_model(self.name, **options)
        except (AssertionError, ValueError, RuntimeError) as cause:
            raise unfit(self.name, input_shape, cause) from cause
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if isinstance(patch, tuple) and len(patch) == 2 and (height % patch[0] or width % patch[1]):
            # Some of timm's transformers would look at the top left corner only, without a word.
            cause = ValueError(f"its patches are {patch[0]}x{patch[1]} pixels")
            raise unfit(self.name, input_shape, cause)
        return check_forward(model, self.name, num_classes=num_classes, input_shape=input_shape)
