"""The networks to learn from: a seeded sample of the zoo."""

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compression.errors import CompressionError, ShapeError
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, VisionTransformer
from export.latency_model.operators import InputShape, macs_of, operators_of

FAMILIES = ("residual", "plain", "depthwise", "transformer", "residual", "plain", "depthwise", "mixer")
"""Whose networks are drawn, in turn."""
_LARGE = 64  # sides from here on are halved early
_TRIES = 30


def max_macs_of(batch: int) -> float:
    """Largest network of the sample, in multiply-accumulates for an image: a call takes tens of milliseconds."""
    return min(1.5e8, 1.5e9 / batch)


def sample_nets(
    count: int, input_shape: InputShape, *, seed: int | str, max_macs: float
) -> Iterator[tuple[str, nn.Module]]:
    """``count`` networks of the zoo, family by family: (name of the family, model in eval mode), by seed alone.

    Widths spread evenly over orders of magnitude; a third are arbitrary numbers, as pruning leaves them.
    """
    rng = random.Random(f"latency-{seed}")
    for family in itertools.islice(itertools.cycle(FAMILIES), count):
        smallest: tuple[float, nn.Module] | None = None
        for _ in range(_TRIES):
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = _drawn(family, rng, input_shape).build(10, input_shape).eval()
            except ShapeError:  # a patch that doesn't divide the image
                continue
            macs = macs_of(operators_of(model, input_shape))
            if smallest is None or macs < smallest[0]:
                smallest = macs, model
            if macs <= max_macs:
                break
        if smallest is None:
            raise CompressionError(
                f"Image '{input_shape}' has no network of family {family} that takes it, expected one. "
                "Use images of at least 4 x 4."
            )
        yield family, smallest[1]


def _width(rng: random.Random, low: int, high: int) -> int:
    drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    multiple = rng.choice((1, 1, 1, 4, 4, 8, 8, 8, 8, 8))
    return max(multiple, 4, round(drawn / multiple) * multiple)


def _drawn(family: str, rng: random.Random, input_shape: InputShape) -> Any:
    large = max(input_shape[1:]) >= _LARGE
    if family in ("transformer", "mixer"):
        heads = rng.choice((1, 2, 3, 4, 6, 8))
        stem = rng.choice(("conv", "patch"))
        patches = (8, 16, 16, 32) if large else (2, 4, 4, 8)
        common = {
            "width": max(1, round(_width(rng, 24, 192) / heads)) * heads,
            "depth": rng.choice((1, 2, 3, 4, 6)),
            "mlp_ratio": rng.choice((1.0, 1.5, 2.0, 3.0, 4.0)),
            "stem": stem,
            "patch_size": rng.choice(patches if stem == "conv" else (*patches, 7)),
            "stem_width": _width(rng, 8, 48),
        }
        if family == "transformer":
            return VisionTransformer(**common, num_heads=heads)
        return Mixer(**common, token_hidden=_width(rng, 16, 160))
    stages = rng.choice((2, 3, 3, 4))
    widths = [_width(rng, 8, 160) for _ in range(stages)]
    common = {
        "widths": sorted(widths) if rng.random() < 0.7 else widths,
        "depths": [rng.choice((1, 1, 2, 3)) for _ in widths],
        "strides": [2 if large else rng.choice((1, 2)) for _ in widths],
        "stem_width": _width(rng, 8, 64),
        "stem_kernel": rng.choice((3, 3, 5, 7)),
        "stem_stride": 2 if large else rng.choice((1, 2)),
    }
    if family == "depthwise":
        return DepthwiseCnn(**common, kernel=rng.choice((3, 5, 7)), expansion=rng.choice((1.0, 1.5, 2.0, 3.0, 4.0)))
    return (ResidualCnn if family == "residual" else PlainCnn)(**common, kernel=rng.choice((3, 3, 3, 5, 1)))
