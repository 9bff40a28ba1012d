"""Learned step sizes: the width of every quantizer's steps is trained with the weights.

Esser et al. 2020, arXiv:1902.08153 (LSQ). With ``v = x / s`` the output is ``s * round(clamp(v, low, high))``, and its
derivative by the step is ``round(v) - v`` inside the range, ``low`` or ``high`` outside. Two things differ from the
paper. What is trained is the logarithm of the step, so that a step is positive and one update of Adam changes it by a
share of itself, whatever its size (Jain et al. 2020, arXiv:1903.08066, who train thresholds that way). And steps start
where calibration puts them; those of weights at the paper's ``2 mean|x| / sqrt(high)`` where that rounds the channel
with less error. With 8 bits it never does (it covers four times the range of normal weights), with 2 bits nearly always
(the calibrated step rounds most weights to zero).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from compression.quantize.rounding import SymmetricFakeQuantize, along


def learned_round(x: Tensor, step: Tensor, low: int, high: int, *, axis: int | None, share: float) -> Tensor:
    """``x`` rounded to multiples of ``step`` from ``low`` to ``high``, in its own shape and type.

    The gradient by ``x`` is 1 where ``low <= x / step <= high``, else 0; that by ``step`` is the one of the module's
    text, summed over the values that share a step, times ``share``.

    Args:
        x: Any shape.
        step: Positive; [1], or one per index of ``axis``.
        low: Least integer, negative.
        high: Greatest integer.
        axis: Dimension with a step each; None for one step.
        share: Factor of the gradient by ``step``, see :func:`gradient_share`.
    """
    return _LearnedRound.apply(x, step, low, high, axis, share)  # pyright: ignore[reportReturnType]


def gradient_share(values: int, high: int) -> float:
    """``1 / sqrt(values * high)``: brings updates of steps and of weights to one order (section 2.2 of the paper).

    ``values`` counts the weights that share a step, or the activations of one sample that do.
    """
    return 1.0 / math.sqrt(max(1, values) * high)


class LearnedFakeQuantize(SymmetricFakeQuantize):
    """A fake-quantizer whose step is trained, from calibration to the freeze."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_step = nn.Parameter(torch.zeros(1))
        self.learning = False

    @torch.no_grad()
    def start(self, weight: Tensor | None = None) -> None:
        """Take the calibrated scale as first step; of ``weight`` [C,...], per channel, the better of two."""
        if weight is not None:
            high: Any = self.activation_post_process.quant_max
            floor: Any = self.activation_post_process.eps
            papers = (2 * weight.abs().flatten(1).mean(dim=1) / math.sqrt(high)).clamp(min=float(floor))
            better = self._squared_errors(weight, papers) < self._squared_errors(weight, self.scale)
            self.scale.copy_(torch.where(better, papers, self.scale))
        self.log_step.data = self.scale.log()

    def _squared_errors(self, weight: Tensor, step: Tensor) -> Tensor:
        observer: Any = self.activation_post_process
        rounded = learned_round(weight, step, observer.quant_min, observer.quant_max, axis=0, share=1.0)
        return (rounded - weight).square().flatten(1).sum(dim=1)

    def adapt(self, enabled: bool) -> None:
        """Let training change the step, or not; ``scale`` is the step of then on."""
        self.enable_observer(False)
        if self.learning and not enabled:
            self.scale.copy_(self.log_step.detach().exp())
        self.learning = enabled

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, which is 0, as conversion asks for them."""
        return self.scale.clone(), torch.zeros_like(self.zero_point)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """The step of each channel times the magnitude of ``factor`` [C]."""
        floor: Any = self.activation_post_process.eps
        self.scale.mul_(factor.abs()).clamp_(min=float(floor))
        self.log_step.data = self.scale.log()

    def _rounded(self, x: Tensor) -> Tensor:
        if not self.learning:
            return super()._rounded(x)
        observer: Any = self.activation_post_process
        axis = self.ch_axis if self.is_per_channel else None
        values = x.numel() // len(self.log_step if axis is not None else x)
        return learned_round(
            x,
            self.log_step.exp(),
            observer.quant_min,
            observer.quant_max,
            axis=axis,
            share=gradient_share(values, observer.quant_max),
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = state_dict.get(f"{prefix}log_step")
        if stored is not None:  # before calibration there is one step, of whatever size
            self.log_step.data = torch.zeros_like(stored, device=self.log_step.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _LearnedRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, axis: int | None, share: float) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high, ctx.axis, ctx.share = low, high, axis, share
        scale = along(step, x, axis)
        rounded = x.float() * (1.0 / scale)
        return rounded.round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (gradient,) = gradients
        x, step = ctx.saved_tensors
        places = x.float() * (1.0 / along(step, x, ctx.axis))
        inside = (places >= ctx.low) & (places <= ctx.high)
        slope = places.round().clamp_(ctx.low, ctx.high).sub_(places * inside).mul_(gradient)
        others = [dimension for dimension in range(x.dim()) if dimension != ctx.axis]
        by_step = slope.sum(dim=others) if others else slope
        return gradient * inside, by_step.reshape(step.shape) * ctx.share, None, None, None, None
