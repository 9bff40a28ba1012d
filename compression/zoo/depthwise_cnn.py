"""Depthwise residual network: the block of ConvNeXt (Liu et al. 2022, arXiv:2201.03545) made for int8.

Where it differs from the paper: batch norm after every convolution instead of one layer norm a block, so that
all of it folds into convolutions; ReLU instead of GELU; and a ReLU after the residual add, so that every
tensor between blocks is non-negative and fits an unsigned 8-bit range without a zero point.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from compression.zoo.convolution import conv_bn, conv_bn_relu
from compression.zoo.stages import OddKernel, Stages


class DepthwiseCnn(Stages):
    """Stem, stages of depthwise blocks, a convolution where width or size changes, linear head."""

    kind: Literal["depthwise_cnn"] = "depthwise_cnn"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64)
    """Channels of each stage."""
    depths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3)
    """Depthwise blocks in each stage."""
    strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2)
    """Stride at the entry of each stage."""
    kernel: OddKernel = 5
    """Kernel size of the depthwise convolutions, pixels."""
    stem_width: PositiveInt = 32
    """Channels after the stem."""
    stem_stride: PositiveInt = 2
    """Stride of the stem; 2 quarters the cost of everything after it."""
    expansion: Annotated[float, Field(ge=1, le=8)] = 3.0
    """Width inside a block, as a multiple of the stage's width."""

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
        return DepthwiseNet(self, num_classes, input_shape[0])


class DepthwiseBlock(nn.Module):
    """relu(x + project(expand(depthwise(x)))), all at one width and size."""

    def __init__(self, channels: int, *, kernel: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = conv_bn(channels, channels, kernel=kernel, groups=channels)
        self.expand = conv_bn_relu(channels, hidden, kernel=1)
        self.project = conv_bn(hidden, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.project(self.expand(self.depthwise(x))) + x)


class DepthwiseNet(nn.Module):
    """The module behind :class:`DepthwiseCnn`."""

    def __init__(self, config: DepthwiseCnn, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = conv_bn_relu(in_channels, config.stem_width, kernel=config.stem_kernel, stride=config.stem_stride)
        blocks: list[nn.Module] = []
        for before, after, stride in config.block_plan():
            if stride != 1 or before != after:
                blocks.append(conv_bn_relu(before, after, kernel=3, stride=stride))
            hidden = round(after * config.expansion)
            blocks.append(DepthwiseBlock(after, kernel=config.kernel, hidden=hidden))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(config.widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
