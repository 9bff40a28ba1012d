"""Rounding to INT8 in the forward pass, with gradients straight through."""

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import FakeQuantize


class SymmetricFakeQuantize(FakeQuantize):
    """A fake-quantizer with zero point 0, for one scale per tensor or per channel.

    Gives bit for bit what torchao's ``FakeQuantize`` gives, at a third of its CPU time. Torchao's fused
    variant is no substitute: it trains ReLU outputs on an affine grid (zero point -128, half the step),
    which convert then replaces by the symmetric one.
    """

    def __init__(self, *args: Any, follows: bool = True, **kwargs: Any) -> None:
        """Everything but ``follows`` as torchao has it; ``follows``: whether the range moves while training."""
        super().__init__(*args, **kwargs)
        self.follows = follows
        self.observing = True
        self.rounding = True

    def adapt(self, enabled: bool) -> None:
        """Let training change the range, or not; one that is fixed stays as it is."""
        self.enable_observer(enabled and self.follows)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let the range follow what passes through, or not."""
        super().enable_observer(enabled)
        self.observing = enabled  # reading the buffer would wait for the GPU at every call

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round what passes through, or let it pass."""
        super().enable_fake_quant(enabled)
        self.rounding = enabled

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - torchao's name
        """``X`` rounded to the grid, in its own shape and type."""
        observer = self.activation_post_process
        if self.observing:
            observer(X.detach())
            self._follow(observer)
        return self._rounded(X) if self.rounding else X

    @torch.no_grad()
    def set_range(self, largest: float) -> None:
        """Cover magnitudes up to ``largest``, for one scale per tensor."""
        observer: Any = self.activation_post_process
        observer.min_val.fill_(-largest)
        observer.max_val.fill_(largest)
        self._follow(observer)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """The range of each channel times ``factor`` [C], which may be negative: its integers at most change sign."""
        observer: Any = self.activation_post_process
        ends = torch.stack([observer.min_val * factor, observer.max_val * factor])
        observer.min_val.copy_(ends.amin(dim=0))
        observer.max_val.copy_(ends.amax(dim=0))
        self._follow(observer)

    def _rounded(self, x: Tensor) -> Tensor:
        observer: Any = self.activation_post_process
        axis = self.ch_axis if self.is_per_channel else None
        return _Round.apply(x, self.scale, observer.quant_min, observer.quant_max, axis)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _follow(self, observer: Any) -> None:
        """Take the scale from the observed extremes: half the range covers the larger of the two."""
        largest = torch.maximum(-observer.min_val, observer.max_val).clamp(min=0).reshape(-1)
        half = (observer.quant_max - observer.quant_min) / 2
        scale = torch.maximum(largest / half, observer.eps)
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(scale.shape).zero_()
        self.scale.copy_(scale)


def along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """``scale`` in a shape that multiplies ``x``: along ``axis``, or one for all."""
    if axis is not None:
        return scale.reshape([-1 if dimension == axis else 1 for dimension in range(x.dim())])
    return scale.reshape(()) if x.device.type == "cpu" else scale  # a scalar operand is the fast path


class _Round(torch.autograd.Function):
    """``clamp(round_half_even(x / scale), low, high) * scale``; the gradient is 1 inside, 0 outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, axis: int | None) -> Tensor:
        scale = along(scale, x, axis)
        ctx.save_for_backward(x, (low - 0.5) * scale, (high + 0.5) * scale)
        rounded = x.float() * (1.0 / scale)
        return rounded.round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        x, low, high = ctx.saved_tensors
        if low.dim() == 0:  # one pass instead of four
            passed = torch.ops.aten.hardtanh_backward(gradient, x, low.item(), high.item())
        else:
            passed = gradient * ((x > low) & (x < high))
        return passed, None, None, None, None
