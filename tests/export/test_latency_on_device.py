"""What a device measured, against what is predicted here: points that last, a factor, predictions for the device."""

import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError
from torch import nn

from compression.search.space import LatencyModel, Operator
from compression.zoo import PlainCnn
from export.latency_model import (
    DeviceLatency,
    DevicePoint,
    FittedLatency,
    OnnxRuntimeClock,
    Timing,
    add_points,
    build_latency_model,
    factor_of,
    kept_latency_model,
    operators_in_blocks,
    operators_of,
    points_of,
)
from tests.export.test_latency_model import SHAPE, Abacus

OTHER = (1, 16, 16)
NETS = 12


class Sized(Abacus):
    """One for images of another size."""

    def __init__(self, shape: tuple[int, int, int], facts: dict[str, str]) -> None:
        super().__init__(facts)
        self.shape = shape

    def measure(self, model: nn.Module, *, kernels: bool = False) -> Timing:
        return Timing(self.ms(operators_of(model, self.shape, block=self.block)) / 2.0, 2.0)


def here() -> dict[str, str]:
    """Facts that a table of this machine is kept under."""
    return dict(OnnxRuntimeClock(SHAPE, batch=1).facts)


def net(width: int) -> nn.Module:
    return PlainCnn(widths=(width, width), depths=(1, 1), strides=(1, 2), stem_width=16).build(3, SHAPE).eval()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> FittedLatency:
    folder = tmp_path_factory.mktemp("tables")
    return build_latency_model(SHAPE, batch=1, folder=folder, nets=NETS, clock=Abacus())


def point(width: int = 32, **changes: object) -> DevicePoint:
    fields = {
        **{"device": "lab-1", "model": "digits", "seq": 1, "model_sha256": f"{width:064d}", "variant": "cpu"},
        **{"runtime": "onnxruntime", "precision": "float32", "input_shape": SHAPE, "p50_ms": 1.0},
        "operators": operators_in_blocks(net(width), SHAPE),
    }
    return DevicePoint.model_validate(fields | changes)


def measured(fitted: FittedLatency, width: int, times: float, **changes: object) -> DevicePoint:
    """A point of a device that takes so many times as long as is predicted here."""
    return point(width, p50_ms=times * fitted.predict_ms(net(width), SHAPE), **changes)


def test_the_factor_of_a_device_is_how_many_times_as_long_it_takes(fitted: FittedLatency) -> None:
    points = [measured(fitted, width, times) for width, times in ((16, 3.0), (32, 2.8), (64, 40.0))]
    found = factor_of(points, lambda shape, batch: fitted if (shape, batch) == (SHAPE, 1) else None)
    assert found is not None
    assert found.factor == pytest.approx(3.0), "the median: one odd model does not move it"
    assert (found.low, found.high) == (pytest.approx(2.8), pytest.approx(40.0))
    assert (found.models, found.unpredicted) == (3, ())


def test_the_form_that_a_device_reported_last_decides(fitted: FittedLatency) -> None:
    points = [measured(fitted, 16, 3.0), measured(fitted, 32, 3.0), measured(fitted, 32, 1.5, precision="int8")]
    found = factor_of(points, lambda shape, batch: fitted)
    assert found is not None
    assert (found.factor, found.models, found.precision) == (pytest.approx(1.5), 1, "int8")


def test_points_without_a_table_wait_until_there_is_one(fitted: FittedLatency, tmp_path: Path) -> None:
    def table_for(shape: tuple[int, int, int], batch: int) -> FittedLatency | None:
        return fitted if shape == SHAPE else kept_latency_model(shape, batch=batch, folder=tmp_path, nets=NETS)

    far = point(16, input_shape=OTHER, operators=operators_in_blocks(net(16), OTHER))
    assert factor_of([far], table_for) is None
    both = factor_of([measured(fitted, 32, 2.0), far], table_for)
    assert both is not None
    assert (both.models, both.unpredicted) == (1, (OTHER,))
    build_latency_model(OTHER, batch=1, folder=tmp_path, nets=NETS, clock=Sized(OTHER, here()))
    both = factor_of([measured(fitted, 32, 2.0), far], table_for)
    assert both is not None
    assert (both.models, both.unpredicted) == (2, ())


def test_only_a_table_of_this_machine_size_batch_and_number_of_networks_is_read(tmp_path: Path) -> None:
    built = build_latency_model(SHAPE, batch=1, folder=tmp_path, nets=NETS, clock=Abacus(here()))
    assert kept_latency_model(SHAPE, batch=1, folder=tmp_path, nets=NETS) == built
    assert kept_latency_model(SHAPE, batch=2, folder=tmp_path, nets=NETS) is None
    assert kept_latency_model(OTHER, batch=1, folder=tmp_path, nets=NETS) is None
    assert kept_latency_model(SHAPE, batch=1, folder=tmp_path, nets=NETS + 1) is None
    build_latency_model(OTHER, batch=1, folder=tmp_path, nets=NETS, clock=Sized(OTHER, {"processor": "another"}))
    assert kept_latency_model(OTHER, batch=1, folder=tmp_path, nets=NETS) is None, "that is another machine's"


@pytest.mark.parametrize("block", [1, 8, 16])
def test_a_point_is_predicted_as_the_network_itself_on_every_kind_of_processor(tmp_path: Path, block: int) -> None:
    clock = Abacus()
    clock.block = block
    fitted = build_latency_model(SHAPE, batch=1, folder=tmp_path, nets=NETS, clock=clock)
    kept = DevicePoint.model_validate_json(point(24).model_dump_json())
    assert kept.predicted_ms(lambda shape, batch: fitted) == fitted.predict_ms(net(24), SHAPE)


def test_seen_from_a_device_all_times_are_longer_by_its_factor(fitted: FittedLatency) -> None:
    there = DeviceLatency(fitted, 3.0)
    seen: LatencyModel = there
    operators = fitted.table.rows[0].operators
    assert seen.batch == 1
    assert seen.predict_ms(net(24), SHAPE) == pytest.approx(3.0 * fitted.predict_ms(net(24), SHAPE))
    bag = [Operator(*row) for row in operators]
    assert seen.operators_ms(bag) == pytest.approx([3.0 * each for each in fitted.operators_ms(bag)])


def test_points_are_kept_once_and_the_newer_bundle_counts(tmp_path: Path) -> None:
    first, second = point(16), point(32)
    assert add_points(tmp_path, [first, second, point(16, device="lab-2")]) == 3
    assert add_points(tmp_path, [first, second]) == 0
    assert points_of(tmp_path, "lab-1") == (first, second)
    again = point(16, seq=4, p50_ms=2.0)
    assert add_points(tmp_path, [again]) == 1
    assert points_of(tmp_path, "lab-1") == (second, again), "the newest is the last"
    assert add_points(tmp_path, [first]) == 0, "an older bundle that is fed later"
    assert add_points(tmp_path, [point(16, variant="cpu-int8", precision="int8")]) == 1
    assert len(points_of(tmp_path, "lab-1")) == 3
    assert points_of(tmp_path, "lab-2") == (point(16, device="lab-2"),)
    assert points_of(tmp_path, "lab-3") == ()


def test_a_damaged_line_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_points(tmp_path, [point(16), point(32), point(64)])
    (path,) = tmp_path.rglob("lab-1.jsonl")
    lines = path.read_text().splitlines()
    other_format = json.dumps(json.loads(lines[2]) | {"format": 99})
    path.write_text("\n".join([lines[0], lines[1][:100], other_format]) + "\n")
    with caplog.at_level(logging.WARNING):
        assert points_of(tmp_path, "lab-1") == (point(16),)
    assert "line 2 of 'lab-1.jsonl'" in caplog.text


def test_a_write_that_is_cut_short_leaves_the_points_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_points(tmp_path, [point(16)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            add_points(tmp_path, [point(32)])
    assert points_of(tmp_path, "lab-1") == (point(16),)
    assert [path.name for path in (tmp_path / "devices").iterdir()] == ["lab-1.jsonl"]


@pytest.mark.parametrize(
    "wrong", [{"p50_ms": 0.0}, {"p50_ms": float("nan")}, {"p50_ms": float("inf")}, {"device": "../lab"}, {"seq": 0}]
)
def test_a_point_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        point(16, **wrong)
