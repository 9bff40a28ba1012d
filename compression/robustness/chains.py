"""Chains of changes for training images, kept apart from the corruptions that robustness is measured with.

The mixing is that of AugMix (Hendrycks et al. 2020, arXiv:1912.02781): ``m x + (1 - m) sum_i w_i chain_i(x)`` with m
uniform and w uniform on the simplex. A chain is one to three of six changes: rotation, two shears, zoom, fewer grey
levels, inverted highlights. No noise, blur, contrast, patch or shift is among them: those are for the test.

Ours: what a chain draws of rotation, shear and zoom is one resampling, and grey levels and highlights come after it.

Legend: B batch, C channels, H height, W width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from compression.augment import uniform_numbers

ROTATION, SHEAR, ZOOM = math.radians(30), 0.3, 0.3
"""Largest change of each at strength 10."""
_CHANGES = ("rotate", "shear_x", "shear_y", "zoom", "posterise", "solarise")
_LONGEST = 3
_PER_CHAIN = 1 + 2 * _LONGEST


def mixed_chains(images: Tensor, words: NDArray[np.uint64], *, strength: int, width: int) -> Tensor:
    """Return each image [B,C,H,W] mixed with ``width`` changed copies of itself, same type and range.

    Args:
        images: raw images, uint8 or float32; not modified.
        words: one random word per image, uint64 [B]; all that is random depends on it alone.
        strength: 1 to 10; every change draws a tenth to the whole of it.
        width: number of chains.
    """
    drawn = uniform_numbers(words, 1 + width + width * _PER_CHAIN)
    kept, shares, rest = drawn[:, 0], -np.log(drawn[:, 1 : 1 + width]), drawn[:, 1 + width :]
    shares *= ((1 - kept) / shares.sum(axis=1))[:, None]
    source = images.float()
    mixed = _per_image(kept, source) * source
    for number in range(width):
        chain = rest[:, number * _PER_CHAIN : (number + 1) * _PER_CHAIN]
        mixed += _per_image(shares[:, number], source) * _changed(source, chain, strength)
    return mixed if images.dtype.is_floating_point else mixed.round().to(images.dtype)


def _changed(images: Tensor, drawn: NDArray[np.float64], strength: int) -> Tensor:
    """Images after one chain; ``drawn`` [B,7] decides its length, its changes and how much of each."""
    length = 1 + (drawn[:, 0] * _LONGEST).astype(np.int64)
    matrices = np.tile(np.eye(2), (len(images), 1, 1))
    levels, inverted = np.zeros(len(images)), np.zeros(len(images))
    for step in range(_LONGEST):
        kind = (drawn[:, 1 + 2 * step] * len(_CHANGES)).astype(np.int64)
        kind[step >= length] = -1
        signed = 2 * drawn[:, 2 + 2 * step] - 1
        amount = (0.1 + 0.9 * np.abs(signed)) * strength / 10
        matrices = _times(matrices, _matrices(kind, amount * np.sign(signed)))
        levels = np.where(kind == 4, 2.0 ** (4 - np.floor(3 * amount)), levels)
        inverted = np.where(kind == 5, amount, inverted)
    return _toned(_warped(images, matrices), levels, inverted)


def _matrices(kind: NDArray[np.int64], amount: NDArray[np.float64]) -> NDArray[np.float64]:
    """What takes a place in the new image to one in the old, [B,2,2] on (x, y); identity for changes of tone."""
    made = np.tile(np.eye(2), (len(kind), 1, 1))
    turn, shear, zoom = kind == 0, SHEAR * amount, kind == 3
    sine, cosine = np.sin(ROTATION * amount), np.cos(ROTATION * amount)
    turned = np.stack([np.stack([cosine, -sine], 1), np.stack([sine, cosine], 1)], 1)
    made[turn] = turned[turn]
    made[:, 0, 1] += np.where(kind == 1, shear, 0)
    made[:, 1, 0] += np.where(kind == 2, shear, 0)
    made[zoom] *= (1 + ZOOM * amount[zoom])[:, None, None]
    return made


def _times(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrix products [B,2,2], written out: the bits don't depend on the batch."""
    return (left[:, :, :, None] * right[:, None, :, :]).sum(axis=2)


def _warped(images: Tensor, matrices: NDArray[np.float64]) -> Tensor:
    """Resample images bilinearly about their centre; zeros come in."""
    height, width = images.shape[2:]
    y = (torch.arange(height, device=images.device) - (height - 1) / 2).view(1, -1, 1)
    x = (torch.arange(width, device=images.device) - (width - 1) / 2).view(1, 1, -1)
    (xx, xy), (yx, yy) = torch.from_numpy(matrices).to(images.device, torch.float32).permute(1, 2, 0)[..., None, None]
    grid = torch.stack([(xx * x + xy * y) * (2 / width), (yx * x + yy * y) * (2 / height)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _toned(images: Tensor, levels: NDArray[np.float64], inverted: NDArray[np.float64]) -> Tensor:
    """Round to ``levels`` grey levels where not 0, then invert the brightest ``inverted`` part of the range."""
    brightest = images.flatten(1).amax(dim=1).view(-1, 1, 1, 1)
    steps = _per_image(levels, images)
    size = brightest / steps.clamp(min=2)
    images = torch.where((steps > 0) & (brightest > 0), (images / size.clamp(min=1e-30)).floor() * size, images)
    part = _per_image(inverted, images)
    return torch.where((part > 0) & (brightest > 0) & (images > brightest * (1 - part)), brightest - images, images)


def _per_image(values: NDArray[np.float64], images: Tensor) -> Tensor:
    return torch.from_numpy(values).to(images.device, torch.float32).view(-1, 1, 1, 1)
