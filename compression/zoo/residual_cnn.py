"""Residual network of basic blocks (He et al. 2015, arXiv:1512.03385), sized for small images."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from compression.zoo.convolution import conv_bn, conv_bn_relu
from compression.zoo.stages import Stages


class ResidualCnn(Stages):
    """Stem, stages of two-convolution residual blocks, mean over the image, linear head."""

    kind: Literal["residual_cnn"] = "residual_cnn"

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
        return ResidualNet(self, num_classes, input_shape[0])


class ResidualBlock(nn.Module):
    """relu(f(x) + x); the skip path gets a 1x1 convolution where width or size changes."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(in_channels, out_channels, kernel=kernel, stride=stride)
        self.second = conv_bn(out_channels, out_channels, kernel=kernel)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, out_channels, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """The module behind :class:`ResidualCnn`."""

    def __init__(self, config: ResidualCnn, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = conv_bn_relu(in_channels, config.stem_width, kernel=config.stem_kernel, stride=config.stem_stride)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, kernel=config.kernel, stride=stride)
                for before, after, stride in config.block_plan()
            )
        )
        self.head = nn.Linear(config.widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))
