"""Plain stack of convolutions (after VGG, Simonyan and Zisserman 2014, arXiv:1409.1556), strided, no pooling.

No residual add and no branch: the graph an int8 runtime fuses most easily.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from compression.zoo.convolution import conv_bn_relu
from compression.zoo.stages import Stages


class PlainCnn(Stages):
    """Stem, stages of conv + batch norm + ReLU, mean over the image, linear head."""

    kind: Literal["plain_cnn"] = "plain_cnn"
    depths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 2)
    """Convolutions in each stage."""
    strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2, 2, 1)
    """Stride of the first convolution of each stage."""

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
        return PlainNet(self, num_classes, input_shape[0])


class PlainNet(nn.Module):
    """The module behind :class:`PlainCnn`."""

    def __init__(self, config: PlainCnn, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = conv_bn_relu(in_channels, config.stem_width, kernel=config.stem_kernel, stride=config.stem_stride)
        self.blocks = nn.Sequential(
            *(
                conv_bn_relu(before, after, kernel=config.kernel, stride=stride)
                for before, after, stride in config.block_plan()
            )
        )
        self.head = nn.Linear(config.widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
