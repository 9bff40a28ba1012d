"""Convolutions as int8 runtimes want them: conv + batch norm (folds into one operator), then ReLU or nothing.

No activation works in place: a captured feature keeps the value it had when it was captured.
"""

from torch import nn


def conv_bn(in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm; [B,in,H,W] -> [B,out,ceil(H/stride),ceil(W/stride)] for odd kernels."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def conv_bn_relu(
    in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm and ReLU; shapes as for :func:`conv_bn`."""
    return conv_bn(in_channels, out_channels, kernel=kernel, stride=stride, groups=groups).append(nn.ReLU())
