"""Ranges from magnitudes: what each way of calibrating promises, on data whose answer is known."""

import pytest
import torch
from torch import Tensor

from compression.errors import CompressionError
from compression.quantize import NumberFormat, prepare_qat
from compression.quantize.observers import (
    BINS,
    Histogram,
    Magnitudes,
    entropy_range,
    find_range,
    percentile_range,
    squared_error_range,
    squared_errors,
)
from compression.zoo import DepthwiseCnn

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (1, 8, 8)
RANGES = {
    "percentile": lambda seen: percentile_range(seen, 99.99),
    "entropy": entropy_range,
    "mse": squared_error_range,
}


def histogram(*batches: Tensor) -> Histogram:
    magnitudes = Magnitudes()
    for batch in batches:
        magnitudes.add(batch)
    return magnitudes.histogram()


def normal(count: int = 100_000, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def with_outlier() -> Tensor:
    values = normal()
    values[7] = -60.0
    return values


def error(values: Tensor, largest: float) -> float:
    """Squared error of rounding to a signed byte whose range is ``largest``, computed on the values themselves."""
    step = largest / 127.5
    return float(((values.double() / step).round().clamp(-128, 127) * step - values).square().sum())


# --- counting -----------------------------------------------------------------------------------------


def test_counting_in_batches_of_growing_range_loses_nothing():
    values = normal() * torch.logspace(-3, 3, 100_000)
    batches = values.split(9_000)
    seen = histogram(*batches, torch.zeros(5))
    assert float(seen.counts.sum()) == len(values)
    assert seen.zeros == 5
    assert seen.largest == pytest.approx(float(values.abs().max()))
    assert seen.largest <= BINS * seen.width < 2 * seen.largest
    below = seen.counts.cumsum(0)
    for place in (0, 10, 500, BINS - 1):
        edge = (place + 1) * seen.width
        assert abs(float(below[place]) - int((values.abs() < edge).sum())) <= 2  # float32 at the edges


def test_the_order_of_batches_changes_no_range():
    batches = [normal(5_000, seed) * scale for seed, scale in enumerate((1.0, 2.0, 4.0))]
    forth, back = histogram(*batches), histogram(*reversed(batches))
    for way in RANGES.values():
        assert way(forth) == pytest.approx(way(back), rel=0.05)


def test_values_that_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CompressionError, match="not finite"):
            histogram(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("way", RANGES)
def test_zeros_alone_give_an_empty_range(way):
    assert RANGES[way](histogram(torch.zeros(10))) == 0.0


# --- ranges -------------------------------------------------------------------------------------------


def test_percentile_100_is_the_largest_magnitude_of_all_batches():
    batches = [normal(1_000, seed) for seed in range(4)]
    assert percentile_range(histogram(*batches), 100.0) == float(torch.cat(batches).abs().max())


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9])
def test_percentile_is_the_quantile_to_a_bin(percentile):
    values = torch.cat([normal(), torch.zeros(30_000)])
    seen = histogram(values)
    exact = float(values.abs().quantile(percentile / 100, interpolation="higher"))
    assert exact - seen.width <= percentile_range(seen, percentile) <= exact + 2 * seen.width


@pytest.mark.parametrize("values", [normal(), normal().relu(), with_outlier(), torch.rand(50_000) ** 8, normal(50)])
def test_squared_error_is_never_above_that_of_the_extremes(values):
    seen = histogram(values)
    found = squared_error_range(seen)
    assert found <= seen.largest
    assert error(values, found) <= 1.01 * error(values, seen.largest)


def test_squared_errors_are_those_of_the_values():
    values = normal().abs()
    seen = histogram(values)
    ranges = torch.tensor([1.0, 2.5, 4.0, seen.largest], dtype=torch.float64)
    exact = [error(values, float(each)) for each in ranges]
    assert squared_errors(seen, ranges).tolist() == pytest.approx(exact, rel=0.01)


def test_the_least_squared_error_is_found():
    values = with_outlier()
    found = error(values, squared_error_range(histogram(values)))
    assert found <= 1.02 * min(error(values, float(each)) for each in torch.linspace(1, 60, 150))


@pytest.mark.parametrize("way", ["entropy", "mse"])
def test_values_that_are_bytes_already_keep_their_range(way):
    values = (torch.arange(25_500) % 255 - 127) * 0.1
    assert RANGES[way](histogram(values)) == pytest.approx(12.7)


@pytest.mark.parametrize("way", RANGES)
def test_one_far_outlier_is_clipped(way):
    assert RANGES[way](histogram(with_outlier())) < 45.0
    assert find_range(histogram(with_outlier()), NumberFormat()) == 60.0


def test_exact_zeros_change_no_entropy_and_no_squared_error():
    dense, sparse = normal(), torch.cat([normal(), torch.zeros(500_000)])
    for way in ("entropy", "mse"):
        assert RANGES[way](histogram(dense)) == RANGES[way](histogram(sparse))


# --- in a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["percentile", "entropy", "mse"])
def test_ranges_found_hold_through_training_while_weights_go_on(calibration):
    torch.manual_seed(0)
    model = DepthwiseCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8).build(4, SHAPE)
    images = torch.randn(96, *SHAPE)
    plain, searched = (
        prepare_qat(model, SHAPE, images, NumberFormat(calibration=each)) for each in ("min_max", calibration)
    )
    first = next(quantizer for quantizer in searched.quantizers() if not quantizer.is_per_channel)
    expected = find_range(histogram(*images.split(64)), NumberFormat(calibration=calibration))
    assert first.scale.item() * 127.5 == pytest.approx(expected)
    assert torch.equal(first.scale, first.calculate_qparams()[0])
    weights = [quantizer.scale for quantizer in searched.quantizers() if quantizer.is_per_channel]
    assert all(
        torch.equal(*pair)
        for pair in zip(weights, [q.scale for q in plain.quantizers() if q.is_per_channel], strict=True)
    )
    activations = [quantizer.scale.clone() for quantizer in searched.quantizers() if not quantizer.is_per_channel]
    before = [scale.clone() for scale in weights]
    searched.train()
    with torch.no_grad():
        for parameter in searched.parameters():
            parameter.mul_(1.5)
    searched(images[:32] * 3)
    after = [quantizer.scale for quantizer in searched.quantizers() if not quantizer.is_per_channel]
    assert all(torch.equal(*pair) for pair in zip(activations, after, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(before, weights, strict=True))
