"""The latency model of this machine, seen from a device: how many times as long the device takes.

A point is one network that a device has tried: its operators, and the p50 of one image that the device measured. What
the network takes here is not kept: it is predicted when it is asked for, so that a table that is measured later, or on
another machine, counts for all points. ``<folder>/devices/<device>.jsonl`` holds the points of a device, one a line,
each model and variant once.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError
from torch import nn

from compression.search.space import Operator
from compression.types import Frozen, Slug
from export.bundle.durable import write_durably
from export.latency_model.build import NETS
from export.latency_model.clocks import OnnxRuntimeClock
from export.latency_model.fit import FittedLatency
from export.latency_model.operators import InputShape, operators_of
from export.latency_model.table import FORMAT, OperatorRow, fingerprint, kept, row_of

LOGGER = logging.getLogger(__name__)

BLOCKS = (1, 8, 16)
"""Channels that processors compute at once: operators are kept for each, since a table may be of another processor."""

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TableFor = Callable[[InputShape, int], FittedLatency | None]
"""Image size and batch -> the latency model of this machine, if it was measured."""


class DevicePoint(Frozen):
    """What a device measured of one network."""

    format: int = FORMAT
    """Of the operators; points of another one do not count."""
    device: Slug
    facts: dict[str, Any] = {}
    """Of the device, when it reported."""
    model: str
    """Name of the bundle."""
    seq: PositiveInt
    """Number of the bundle."""
    model_sha256: str
    """Of the file that the device's runtime loaded."""
    variant: str
    runtime: str
    precision: str
    input_shape: InputShape
    batch: PositiveInt = 1
    operators: dict[int, tuple[OperatorRow, ...]]
    """Block -> the operators of the network in float32, whatever its precision on the device."""
    p50_ms: Milliseconds

    @property
    def place(self) -> tuple[str, str, str]:
        """Equal for two points of which the newer one counts."""
        return self.device, self.model_sha256, self.variant

    def predicted_ms(self, table_for: TableFor) -> float | None:
        """What one call of the network takes here; None where that image size was not measured."""
        fitted = table_for(self.input_shape, self.batch)
        if fitted is None or fitted.table.block not in self.operators:
            return None
        return fitted.total_ms([Operator(*row) for row in self.operators[fitted.table.block]])


class DeviceFactor(Frozen):
    """How many times as long as predicted here a device takes, in the form of model that it reported last."""

    device: str
    runtime: str
    precision: str
    factor: float
    """The median over its models."""
    low: float
    """The smallest one."""
    high: float
    """The largest one."""
    models: int
    """How many it rests on."""
    unpredicted: tuple[InputShape, ...] = ()
    """Image sizes of further models, for which this machine has no table."""


@dataclass(frozen=True)
class DeviceLatency:
    """A ``LatencyModel`` in the milliseconds of a device."""

    fitted: FittedLatency
    factor: float

    @property
    def batch(self) -> int:
        """Images per call."""
        return self.fitted.batch

    def predict_ms(self, model: nn.Module, input_shape: InputShape) -> float:
        """Milliseconds of one call there."""
        return self.factor * self.fitted.predict_ms(model, input_shape)

    def operators_ms(self, operators: Sequence[Operator]) -> list[float]:
        """Milliseconds of each operator there."""
        return [self.factor * each for each in self.fitted.operators_ms(operators)]


def operators_in_blocks(model: nn.Module, input_shape: InputShape) -> dict[int, tuple[OperatorRow, ...]]:
    """The operators of a network as each kind of processor runs them."""
    return {block: tuple(map(row_of, operators_of(model, input_shape, block=block))) for block in BLOCKS}


def points_of(folder: Path, device: str) -> tuple[DevicePoint, ...]:
    """The points of a device, those that were added last at the end; a damaged line is left out, which the log says."""
    path = _file(folder, device)
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            point = DevicePoint.model_validate_json(line)
        except ValidationError as error:
            LOGGER.warning("line %d of '%s' is left out: %s", number, path.name, str(error).splitlines()[0])
            continue
        if point.format == FORMAT:
            found.append(point)
    return tuple(found)


def _file(folder: Path, device: str) -> Path:
    return folder / "devices" / f"{device}.jsonl"


def add_points(folder: Path, points: Iterable[DevicePoint]) -> int:
    """Keep points, on the disk when the call returns; how many were not known.

    Of two of one model and variant the bundle of the higher number counts. One process at a time may add.
    """
    wanted: dict[str, list[DevicePoint]] = {}
    for point in points:
        wanted.setdefault(point.device, []).append(point)
    changed = 0
    for device, new in wanted.items():
        there = {point.place: point for point in points_of(folder, device)}
        before = changed
        for point in new:
            old = there.get(point.place)
            if old == point or (old is not None and old.model == point.model and old.seq > point.seq):
                continue
            there.pop(point.place, None)
            there[point.place] = point
            changed += 1
        if changed > before:
            text = "".join(point.model_dump_json() + "\n" for point in there.values())
            write_durably(_file(folder, device), text.encode(), replace=True)
    return changed


def factor_of(points: Sequence[DevicePoint], table_for: TableFor) -> DeviceFactor | None:
    """The factor of a device by its points; None when this machine can predict none of them."""
    if not points:
        return None
    last = points[-1]
    alike = [each for each in points if (each.runtime, each.precision) == (last.runtime, last.precision)]
    predicted = [(each, each.predicted_ms(table_for)) for each in alike]
    ratios = [each.p50_ms / ms for each, ms in predicted if ms]
    if not ratios:
        return None
    return DeviceFactor(
        device=last.device,
        runtime=last.runtime,
        precision=last.precision,
        factor=float(f"{median(ratios):.4g}"),
        low=min(ratios),
        high=max(ratios),
        models=len(ratios),
        unpredicted=tuple(dict.fromkeys(each.input_shape for each, ms in predicted if not ms)),
    )


def kept_latency_model(
    input_shape: InputShape, *, batch: int, folder: Path, nets: int = NETS, seed: int = 0
) -> FittedLatency | None:
    """What ``build_latency_model`` would read; None where it would measure, which takes a minute."""
    facts = dict(OnnxRuntimeClock(input_shape, batch=batch).facts)
    path = folder / f"{fingerprint(facts)}-b{batch}-{'x'.join(map(str, input_shape))}.json"
    wanted = {"facts": facts, "format": FORMAT, "input_shape": input_shape, "batch": batch, "seed": seed}
    table = kept(path, wanted, nets)
    return None if table is None else FittedLatency(table)
