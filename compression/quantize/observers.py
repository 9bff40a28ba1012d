"""Ranges of activations from the magnitudes that calibration images give: percentile, entropy, squared error.

A range is the largest magnitude that the integers cover; what lies above is clipped. Symmetric throughout, so only
magnitudes count. Exact zeros are kept apart: every range represents them, and behind a ReLU they are so many that a
divergence would see little else.

Legend: N bins of one width, from 0 on; bin i holds magnitudes in [i * width, (i + 1) * width).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.errors import CompressionError
from compression.quantize.number_format import NumberFormat

BINS = 2048
LEVELS = 128
"""Magnitudes of a signed byte, 0 included."""
CANDIDATES = 240
"""Ranges that are compared, evenly spaced."""

_FEWEST_BINS = LEVELS
"""Of a range that the divergence may choose: one per level."""
_NARROWEST = 2.0**-40
"""Bin, far under every step: float32 divides by it."""


@dataclass(frozen=True)
class Histogram:
    """Magnitudes that were seen, all on the CPU."""

    counts: Tensor
    """float64 [N]; without the exact zeros."""
    width: float
    """Of a bin, in units of the values."""
    zeros: float
    largest: float
    """Largest magnitude; 0 when only zeros were seen."""

    @property
    def edges(self) -> Tensor:
        """Bounds of the bins, float64 [N+1]."""
        return torch.arange(len(self.counts) + 1, dtype=torch.float64) * self.width


class Magnitudes:
    """Counts magnitudes over batches of unknown range, exactly: where a batch exceeds the range, bins merge in pairs.

    Between half of the bins and all of them are in use. Memory does not grow with the number of batches.
    """

    def __init__(self, bins: int = BINS) -> None:
        """Start empty; ``bins`` is even."""
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.width = self.largest = self.zeros = 0.0

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Count the magnitudes of a tensor of any shape, on any device.

        Raises:
            CompressionError: some values are not finite.
        """
        magnitudes = values.detach().float().abs().flatten()
        magnitudes, total = magnitudes[magnitudes != 0], magnitudes.numel()
        self.zeros += total - magnitudes.numel()
        if not magnitudes.numel():
            return
        largest = float(magnitudes.max())
        if not torch.isfinite(magnitudes).all():
            raise CompressionError(
                "An activation has values that are not finite on the calibration images, expected numbers. "
                "The float model overflows there: check its weights."
            )
        self._cover(largest)
        places = (magnitudes / self.width).int().clamp_(max=len(self.counts) - 1)
        self.counts += torch.bincount(places, minlength=len(self.counts)).cpu().double()

    def _cover(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        if self.width == 0.0:
            self.width = max(largest / len(self.counts), _NARROWEST)
        while self.width * len(self.counts) < largest:
            pairs = self.counts.reshape(-1, 2).sum(dim=1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.width *= 2

    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(self.counts.clone(), self.width, self.zeros, self.largest)


def percentile_range(seen: Histogram, percentile: float) -> float:
    """The magnitude that ``percentile`` % of all values, zeros among them, do not exceed: to a bin, rounded up.

    100 gives the largest magnitude (Wu et al. 2020, arXiv:2004.09602, section 3.3).
    """
    if percentile >= 100 or seen.largest == 0:
        return seen.largest
    below = seen.zeros + seen.counts.cumsum(0)
    wanted = percentile / 100 * float(below[-1])
    place = int(torch.searchsorted(below, torch.tensor(wanted, dtype=below.dtype)))
    return min(seen.largest, (place + 1) * seen.width)


def entropy_range(seen: Histogram, levels: int = LEVELS) -> float:
    """The range whose rounded histogram diverges least from the clipped one; of equals the widest.

    Migacz 2017, "8-bit inference with TensorRT" (GTC). For each range: the clipped histogram has what lies above in its
    last bin; the rounded one has ``levels`` equal groups of bins, the mass of each spread over those that are not
    empty. Both get half a sample per bin, so that empty bins have a logarithm. The talk counts zeros too.
    """
    bins = len(seen.counts)
    if seen.largest == 0:
        return 0.0
    used = min(bins, int(seen.largest / seen.width) + 1)
    best, chosen = float("inf"), used
    stride = max(1, (used - _FEWEST_BINS) // CANDIDATES)
    for count in range(used, min(used, _FEWEST_BINS) - 1, -stride):
        divergence = _divergence(seen.counts, count, levels)
        if divergence < best:
            best, chosen = divergence, count
    return min(seen.largest, chosen * seen.width)


def squared_error_range(seen: Histogram, levels: int = LEVELS) -> float:
    """The range with the least squared error of rounding and clipping; see :func:`squared_errors`.

    Ranges are compared at even shares of the largest magnitude, which is one of them; of equals the widest wins.
    """
    if seen.largest == 0:
        return 0.0
    shares = torch.arange(CANDIDATES, 0, -1, dtype=torch.float64) / CANDIDATES
    ranges = shares * seen.largest
    return float(ranges[squared_errors(seen, ranges, levels).argmin()])


def squared_errors(seen: Histogram, ranges: Tensor, levels: int = LEVELS) -> Tensor:
    """Squared error summed over all values, for each of ``ranges`` [R]; exact for values that are even in each bin.

    The step of a range is its ``levels - 1/2``-th part, as of a symmetric byte from -128 to 127.
    """
    steps = ranges.double()[:, None] / (levels - 0.5)
    places = seen.edges / steps  # [R, N+1]
    nearest = places.round().clamp(max=levels - 1)
    # Integral of the squared distance to the nearest integer (the last one for what is clipped), from 0 on.
    integral = nearest / 12 + (places - nearest) ** 3 / 3
    mean = integral.diff(dim=1) / places.diff(dim=1)
    return ((mean * steps**2) * seen.counts).sum(dim=1)


def find_range(seen: Histogram, number_format: NumberFormat) -> float:
    """The range that ``calibration`` asks for; its extremes for ``min_max``."""
    match number_format.calibration:
        case "percentile":
            return percentile_range(seen, number_format.percentile)
        case "entropy":
            return entropy_range(seen)
        case "mse":
            return squared_error_range(seen)
        case _:
            return seen.largest


def _divergence(counts: Tensor, kept: int, levels: int) -> float:
    """KL(clipped || rounded) in nats, of the first ``kept`` bins."""
    inside = counts[:kept]
    group = torch.arange(kept) * levels // kept
    filled = (inside > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, inside)
    places = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, filled)
    rounded = (mass / places.clamp(min=1))[group] * filled + 0.5
    clipped = inside + 0.5
    clipped[-1] += counts[kept:].sum()
    clipped, rounded = clipped / clipped.sum(), rounded / rounded.sum()
    return float((clipped * (clipped / rounded).log()).sum())
