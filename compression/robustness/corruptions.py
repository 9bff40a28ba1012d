"""Five corruptions of images, each in five strengths: what a camera in the field does to them.

After the benchmark of Hendrycks and Dietterich 2019 (arXiv:1903.12261): common corruptions, graded from barely visible
to barely readable, on images that no model was trained on. Kinds and parameters are ours, scaled to the image, so that
8 x 8 digits and 224 x 224 photographs are disturbed alike; numbers are not comparable with ImageNet-C.

Severity 1 to 5 of each, with ``side`` the shorter side in pixels and ``scale`` the largest raw value:

- ``noise``: Gaussian, standard deviation 0.05, 0.1, 0.15, 0.2, 0.3 of ``scale``, alone per pixel and channel;
- ``blur``: Gaussian, standard deviation 0.4, 0.6, 0.8, 1.0, 1.3 pixels times the root of ``side / 8``, edges repeated;
- ``contrast``: differences to the image's mean times 0.7, 0.5, 0.35, 0.2, 0.1;
- ``occlusion``: a patch of half of ``scale``, 1/8, 2/8, 3/8, 4/8, 5/8 of height and width, somewhere in the image;
- ``shift``: 6, 12, 18, 24, 30 % of ``side`` in all, at least 1 to 5 pixels, over both axes; zeros come in.

Legend: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from compression.augment import sample_words, uniform_numbers
from compression.errors import CompressionError, ShapeError

Corruption = Literal["noise", "blur", "contrast", "occlusion", "shift"]

CORRUPTIONS: tuple[Corruption, ...] = ("noise", "blur", "contrast", "occlusion", "shift")
SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 8

NOISE = (0.05, 0.1, 0.15, 0.2, 0.3)
BLUR = (0.4, 0.6, 0.8, 1.0, 1.3)
CONTRAST = (0.7, 0.5, 0.35, 0.2, 0.1)
OCCLUSION = (0.125, 0.25, 0.375, 0.5, 0.625)
SHIFT = 0.06

_FIRST_VIEW = 1 << 40
"""Random words of corruptions are those of views that no training reaches."""


def corrupt(
    images: Tensor, ids: Tensor, *, corruption: Corruption, severity: int, seed: int, scale: float = 255.0
) -> Tensor:
    """Return the images under one corruption: same shape and type, a function of (seed, id, corruption, severity).

    What is random is drawn once per (seed, id, corruption): a higher severity is more of the same noise, the same
    patch grown, the same way further. Severity 0 returns the images themselves, bit for bit. Values stay between 0 and
    ``scale``, or between the image's own extremes where those lie outside. The images given are not modified.

    Args:
        images: raw images as stored, uint8 or float32, [B,C,H,W], H and W at least 8.
        ids: sample ids, int64, [B].
        corruption: one of ``CORRUPTIONS``.
        severity: 0 to 5.
        seed: of everything random.
        scale: largest raw value, :class:`~compression.types.Preprocessing` has it.

    Raises:
        ShapeError: the images are smaller than 8 x 8, or ids and images are not of one length.
        CompressionError: there is no such severity or corruption.
    """
    if corruption not in _APPLY:
        raise CompressionError(f"Corruption '{corruption}' is unknown, expected one of {', '.join(CORRUPTIONS)}.")
    if severity not in (0, *SEVERITIES):
        raise CompressionError(f"Corruption '{corruption}' has severity {severity}, expected 0 to 5. Correct it.")
    if images.ndim != 4 or len(images) != len(ids) or min(images.shape[2:]) < MIN_SIDE:
        raise ShapeError(
            f"Images have shape {list(images.shape)} with {len(ids)} ids, expected [B,C,H,W] with an id each, at "
            f"least {MIN_SIDE} x {MIN_SIDE} pixels: smaller ones leave nothing to see after a corruption."
        )
    if severity == 0 or len(images) == 0:
        return images
    words = sample_words(ids, view=_FIRST_VIEW + CORRUPTIONS.index(corruption), seed=seed)
    return _APPLY[corruption](images, words, severity, scale)


def patch_size(severity: int, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels of what ``occlusion`` covers in an image [height, width]."""
    share = OCCLUSION[severity - 1]
    return max(1, round(share * height)), max(1, round(share * width))


def shift_size(severity: int, height: int, width: int) -> tuple[int, int]:
    """Pixels that ``shift`` moves an image [height, width] along one axis and along the other, larger one first."""
    total = max(severity, round(SHIFT * severity * min(height, width)))
    return total - total // 2, total // 2


def shifted(images: Tensor, dy: NDArray[np.int64], dx: NDArray[np.int64]) -> Tensor:
    """Move image i of [B,C,H,W] down by ``dy[i]`` and right by ``dx[i]`` pixels, either way; zeros come in."""
    height, width = images.shape[2:]
    rows = torch.arange(height).view(1, -1) - torch.from_numpy(dy).view(-1, 1)
    columns = torch.arange(width).view(1, -1) - torch.from_numpy(dx).view(-1, 1)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    samples = torch.arange(len(images)).view(-1, 1, 1)
    moved = images[samples, :, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)]
    return moved.permute(0, 3, 1, 2).contiguous() * inside.unsqueeze(1).to(images.dtype)


def _noise(images: Tensor, words: NDArray[np.uint64], severity: int, scale: float) -> Tensor:
    drawn = np.stack(
        [np.random.Generator(np.random.Philox(key=word)).standard_normal(images[0].numel()) for word in words]
    )
    noise = torch.from_numpy(drawn.astype(np.float32)).view(images.shape)
    return _back(images.float() + NOISE[severity - 1] * scale * noise, images, scale)


def _blur(images: Tensor, words: NDArray[np.uint64], severity: int, scale: float) -> Tensor:
    spread = BLUR[severity - 1] * math.sqrt(min(images.shape[2:]) / MIN_SIDE)
    radius = math.ceil(3 * spread)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-places.square() / (2 * spread**2))
    taps = (taps / taps.sum()).tolist()
    blurred = images.float()
    for axis in (2, 3):  # sums of whole planes: the bits don't depend on the batch, as a convolution's may
        edges = [radius if axis == 3 else 0] * 2 + [radius if axis == 2 else 0] * 2
        padded, total = F.pad(blurred, edges, mode="replicate"), torch.zeros_like(blurred)
        for offset, tap in enumerate(taps):
            total += tap * padded.narrow(axis, offset, blurred.shape[axis])
        blurred = total
    return _back(blurred, images, scale)


def _contrast(images: Tensor, words: NDArray[np.uint64], severity: int, scale: float) -> Tensor:
    mean = images.double().flatten(1).mean(dim=1).view(-1, 1, 1, 1).float()
    return _back(mean + CONTRAST[severity - 1] * (images.float() - mean), images, scale)


def _occlusion(images: Tensor, words: NDArray[np.uint64], severity: int, scale: float) -> Tensor:
    height, width = images.shape[2:]
    tall, wide = patch_size(severity, height, width)
    place = uniform_numbers(words, 2)
    top = torch.from_numpy((place[:, 0] * (height - tall + 1)).astype(np.int64)).view(-1, 1)
    left = torch.from_numpy((place[:, 1] * (width - wide + 1)).astype(np.int64)).view(-1, 1)
    rows, columns = torch.arange(height).view(1, -1), torch.arange(width).view(1, -1)
    in_rows, in_columns = (rows >= top) & (rows < top + tall), (columns >= left) & (columns < left + wide)
    covered = (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
    grey = torch.tensor(scale / 2).round() if images.dtype == torch.uint8 else torch.tensor(scale / 2)
    return torch.where(covered, grey.to(images.dtype), images)


def _shift(images: Tensor, words: NDArray[np.uint64], severity: int, scale: float) -> Tensor:
    far, near = shift_size(severity, *images.shape[2:])
    drawn = uniform_numbers(words, 3) < 0.5
    signs = np.where(drawn[:, :2], -1, 1)
    dy, dx = np.where(drawn[:, 2], far, near), np.where(drawn[:, 2], near, far)
    return shifted(images, dy * signs[:, 0], dx * signs[:, 1])


def _back(values: Tensor, images: Tensor, scale: float) -> Tensor:
    """Float values [B,C,H,W] in the range and type of the images they come from."""
    own = images.float().flatten(1)
    low = own.amin(dim=1).clamp(max=0.0).view(-1, 1, 1, 1)
    high = own.amax(dim=1).clamp(min=scale).view(-1, 1, 1, 1)
    values = values.maximum(low).minimum(high)
    return values if images.dtype.is_floating_point else values.round().to(images.dtype)


_APPLY: dict[str, Callable[[Tensor, NDArray[np.uint64], int, float], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "occlusion": _occlusion,
    "shift": _shift,
}
