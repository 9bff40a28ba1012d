"""A plain stack of convolutions in which every image closes the channels it needs least.

After the dynamic pruning of Elkerdawy et al. 2022, "Fire Together Wire Together" (arXiv:2110.08232).

Legend: B batch, C channels of a layer, H and W of its images.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from compression.errors import ShapeError
from compression.features import frozen
from compression.zoo.convolution import conv_bn_relu
from compression.zoo.stages import Stages

OPEN = 2.0
"""Logit of every gate at the start: all open, yet near enough to the threshold to learn."""


class GatedCnn(Stages):
    """Research: a plain network whose convolutions after the stem have a gate for each channel and image.

    No runtime of ours gains time: ONNX Runtime and TensorRT compute every channel and multiply the closed ones by 0,
    and a gain would take kernels that skip them. It shows how many channels images need.

    A small linear layer looks at the largest value of each channel that comes in and says which channels that go out
    are worth computing. It learns that from the network itself: the truth of an image is the smallest set of channels
    with a share ``mass`` of the sum of all channels' largest values (see :func:`truth`). Its binary cross entropy,
    mean over batch and channels, is added to whatever loss trains the network as a gradient alone, with factor 1:
    no loss changes its value, and no weight outside the gates its gradient. The task reaches the gates through a
    straight-through estimate.

    Where ours differs from the paper: gates look at their layer's output after batch norm and ReLU and cut it there;
    they start open, so that the network starts out as its plain form; there is no first training without gates.

    Limits: under ``16-mixed`` the injected gradient is not scaled with the loss and all but vanishes, so take
    ``bf16-mixed``; where a loss aligns gradients, each of the two backward passes injects it. In quantization-aware
    training the gates' weights stay as they are, since only the network in inference mode is captured. Pruning refuses
    the network: its tracer does not see through the thresholds. Scale it instead.
    """

    kind: Literal["gated_cnn"] = "gated_cnn"
    depths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 2)
    """Convolutions in each stage."""
    strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2, 2, 1)
    """Stride of the first convolution of each stage."""
    mass: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a layer's activation that the open channels of an image hold, as a gate is taught; 1 keeps every
    channel that is not 0 throughout. Research: closed channels save no time in ONNX Runtime or TensorRT."""

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
        return GatedNet(self, num_classes, input_shape[0])


def truth(outputs: Tensor, mass: float) -> Tensor:
    """Which channels of each image are worth computing, bool [B,C].

    With h_c = max over space of |O_c|: the k largest h, k the smallest number for which they sum up to at least
    ``mass`` times the sum of all. Of equal channels the first. No channel where all are 0; with ``mass`` 1 exactly
    those that are not.

    Args:
        outputs: of a layer, [B,C,H,W].
        mass: in (0, 1].
    """
    heights = outputs.detach().abs().amax((2, 3)).double()
    if mass >= 1:
        return heights > 0  # a sum would lose channels too small to change it
    ordered, order = heights.sort(dim=1, descending=True, stable=True)
    sums = ordered.cumsum(dim=1)
    before = F.pad(sums[:, :-1], (1, 0))
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, before < mass * sums[:, -1:])


class _Injected(torch.autograd.Function):
    """Gives its first argument; going back, the second gets gradient 1 whatever the loss makes of the first."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradients[0], torch.ones(shape, dtype=dtype, device=device)


def inject(values: Tensor, loss: Tensor) -> Tensor:
    """``values``, unchanged; whoever goes back through them also goes back from ``loss``, a scalar, with factor 1."""
    injected = _Injected.apply(values, loss)
    assert isinstance(injected, Tensor)
    return injected


class GatedBlock(nn.Module):
    """Convolution, batch norm, ReLU, and a gate per channel that looks at what came in."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int, mass: float) -> None:
        super().__init__()
        self.layers = conv_bn_relu(in_channels, out_channels, kernel=kernel, stride=stride)
        self.predictor = nn.Linear(in_channels, out_channels)
        nn.init.zeros_(self.predictor.weight)
        nn.init.constant_(self.predictor.bias, OPEN)
        self.mass = mass

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layers(x)
        peaks = x.amax((2, 3))
        if not self.training:
            return outputs * (self.predictor(peaks) > 0).to(outputs.dtype)[:, :, None, None]
        logits = self.predictor(peaks.detach())
        soft = logits.sigmoid()
        gates = (logits > 0).to(soft.dtype) + (soft - soft.detach())
        gated = outputs * gates[:, :, None, None]
        if not torch.is_grad_enabled():
            return gated
        return inject(gated, self.loss(logits, outputs))

    def loss(self, logits: Tensor, outputs: Tensor) -> Tensor:
        """Binary cross entropy of the gates [B,C] to the truth of ``outputs`` [B,C,H,W], mean, in nats."""
        return F.binary_cross_entropy_with_logits(logits.float(), truth(outputs, self.mass).float())


class GatedNet(nn.Module):
    """The module behind :class:`GatedCnn`."""

    def __init__(self, config: GatedCnn, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = conv_bn_relu(in_channels, config.stem_width, kernel=config.stem_kernel, stride=config.stem_stride)
        self.blocks = nn.Sequential(
            *(
                GatedBlock(before, after, kernel=config.kernel, stride=stride, mass=config.mass)
                for before, after, stride in config.block_plan()
            )
        )
        self.head = nn.Linear(config.widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def expected_kept(model: nn.Module, images: Tensor) -> list[float]:
    """Mean share of channels, 0..1 a layer, that gates will be taught to keep: all of them open, as before training.

    A layer's multiply-accumulates scale with its own share times that of the layer before.

    Args:
        model: a network of :class:`GatedCnn`; its modes are given back.
        images: normalised, [B,C,H,W].

    Raises:
        ShapeError: the network has no gates.
    """
    net = _gated(model)
    shares = []
    with frozen(net), torch.no_grad():
        x = net.stem(images)
        for block in net.blocks:
            assert isinstance(block, GatedBlock)
            x = block.layers(x)
            shares.append(float(truth(x, block.mass).double().mean()))
    return shares


def predicted_kept(model: nn.Module, images: Tensor) -> list[float]:
    """Mean share of channels, 0..1 a layer, that the gates keep in inference; arguments as for :func:`expected_kept`.

    Raises:
        ShapeError: the network has no gates.
    """
    net = _gated(model)
    shares = []
    with frozen(net), torch.no_grad():
        x = net.stem(images)
        for block in net.blocks:
            assert isinstance(block, GatedBlock)
            shares.append(float((block.predictor(x.amax((2, 3))) > 0).double().mean()))
            x = block(x)
    return shares


def _gated(model: nn.Module) -> GatedNet:
    if not isinstance(model, GatedNet):
        raise ShapeError(
            f"Model '{type(model).__name__}' has no gates, expected a network of kind 'gated_cnn'. Build one of those."
        )
    return model
