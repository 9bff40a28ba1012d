"""At which layer two forms of one model part: their intermediate values side by side, on the same inputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compression.errors import ShapeError
from compression.types import Frozen
from export.intermediates import Form, Inputs, Point, Values, batches

CHUNK = 16
"""Inputs looked at together: what is kept in memory at once."""
LARGEST = 1e6
"""Relative error of values that are not finite, or should be 0 and are not."""

Way = Literal["layer name", "node name", "tensor name", "order of the layers"]


class LayerError(Frozen):
    """How far one layer's values are from the reference's."""

    layer: str
    """Path of the layer in the torch module, or the node's name in a file of another tool."""
    order: int
    """Place in execution order, from 0."""
    relative_error: float
    """``||a - b|| / ||a||`` over all inputs, a the reference."""
    input_error: float
    """The largest relative error among the layers it reads; 0 behind the model's input."""
    own_share: float
    """Share of the squared error that is new here, 0..1: ``1 - input_error^2 / relative_error^2``. Independent
    errors add up as squares."""
    sqnr_db: float | None
    """Signal to error ratio, ``10 log10(||a||^2 / ||a - b||^2)``; none when there is no error."""
    cosine: float
    """Cosine between both, 1 for the same direction."""
    max_abs: float
    """Largest difference of a value."""
    clipped: float | None = None
    """Share of the candidate's integers at the end of their range; none for a float layer."""
    candidate_layer: str | None = None
    """The layer's name in the candidate, where it is another one."""

    @property
    def added(self) -> float:
        """The relative error that is new here."""
        return self.relative_error * math.sqrt(self.own_share)


class Attribution(Frozen):
    """Where the error of one hop comes from."""

    reference: str
    candidate: str
    matched_by: Way
    """How layers of the one were found in the other."""
    matched: int
    """Convolutions and linear layers found in both."""
    reference_layers: int
    """Convolutions and linear layers of the reference."""
    candidate_layers: int
    num_samples: int
    limit: float
    """A layer that adds more relative error than this diverges."""
    first: str | None
    """The first layer that diverges, in execution order; none if the error only builds up."""
    worst: str | None
    """The layer where the error grows most; none if nothing differs."""
    layers: tuple[LayerError, ...]
    """Every point found in both, in execution order."""
    runtime_max_abs: float | None = None
    """Largest change of an output by the runtime's own optimisation of the candidate; none for a torch form."""
    runtime_flips: float | None = None
    """Share of inputs whose largest output moves to another place by it."""

    def layer(self, name: str | None) -> LayerError | None:
        """The row of a layer."""
        return next((row for row in self.layers if row.layer == name), None)

    def words(self) -> str:
        """Where the error starts, or is largest, in words; empty if there is none."""
        row = self.layer(self.first or self.worst)
        if row is None:
            return ""
        verb = "the error starts at" if self.first else "most of it is new at"
        return f"{verb} '{row.layer}' (relative error {row.relative_error:.2g}, {row.input_error:.2g} before)"


@dataclass
class _Sums:
    """What is kept of one layer over all batches."""

    error: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    clipped: list[float] = field(default_factory=list)

    def add(self, a: NDArray, b: NDArray) -> None:
        first, second = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
        difference = first - second
        self.error += float(difference @ difference)
        self.reference += float(first @ first)
        self.candidate += float(second @ second)
        self.product += float(first @ second)
        largest = float(np.abs(difference).max(initial=0.0))
        self.largest = max(self.largest, largest if math.isfinite(largest) else LARGEST)

    @property
    def relative(self) -> float:
        if self.error == 0:
            return 0.0
        if not math.isfinite(self.error) or self.reference == 0:
            return LARGEST
        return min(math.sqrt(self.error / self.reference), LARGEST)


@dataclass
class _Hop:
    """Two forms side by side, batch after batch."""

    reference: Form
    candidate: Form
    limit: float
    way: Way = "layer name"
    pairs: list[tuple[Point, Point]] = field(default_factory=list)
    sums: dict[str, _Sums] = field(default_factory=dict)
    moved: float = 0.0
    flips: int = 0

    def add(self, a: Values, b: Values, samples: int) -> None:
        if not self.pairs:
            self.way, self.pairs = match(self.reference, self.candidate, a, b)
            self.sums = {left.name: _Sums() for left, _ in self.pairs}
        for left, right in self.pairs:
            self.sums[left.name].add(a.at[left.name], b.at[right.name])
            if right.name in b.clipped:
                self.sums[left.name].clipped.append(b.clipped[right.name] * samples)
        change, flipped = _by_runtime(b)
        self.moved, self.flips = max(self.moved, change), self.flips + flipped

    def result(self, samples: int, *, has_runtime: bool) -> Attribution:
        points = {point.name: point for point in self.reference.points}
        rows = _rows(self.pairs, self.sums, samples, points)
        worst = max(rows, key=lambda row: row.added, default=None)
        return Attribution(
            reference=self.reference.name,
            candidate=self.candidate.name,
            matched_by=self.way,
            matched=sum(left.is_layer and right.is_layer for left, right in self.pairs),
            reference_layers=sum(point.is_layer for point in self.reference.points),
            candidate_layers=sum(point.is_layer for point in self.candidate.points),
            num_samples=samples,
            limit=self.limit,
            first=next((row.layer for row in rows if row.added > self.limit), None),
            worst=worst.layer if worst and worst.added > 0 else None,
            layers=tuple(rows),
            runtime_max_abs=self.moved if has_runtime else None,
            runtime_flips=self.flips / samples if has_runtime else None,
        )


def attribute(reference: Form, candidate: Form, inputs: Inputs, *, limit: float, chunk: int = CHUNK) -> Attribution:
    """Compare two forms of one model layer by layer; see :func:`attribute_hops`."""
    return attribute_hops([(reference, candidate, limit)], inputs, chunk=chunk)[0]


def attribute_hops(
    hops: Sequence[tuple[Form, Form, float]], inputs: Inputs, *, chunk: int = CHUNK
) -> list[Attribution]:
    """Compare pairs of forms of one model layer by layer; a form that stands in several pairs runs once.

    Args:
        hops: (reference, candidate, limit): a layer that adds more relative error than the limit diverges.
        inputs: One array per input of the model, in the reference's order, samples first; 64 to 256 samples tell
            enough.
        chunk: Samples run at once; memory grows with it, results don't depend on it but for rounding.

    Raises:
        ShapeError: there are no inputs, or nothing of the one form is found in the other.
        ExportError: a form can't be run.
    """
    if not inputs or not len(inputs[0]):
        raise ShapeError("Attribution has 0 inputs, expected at least 1. Give it some images.")
    compared = [_Hop(reference, candidate, limit) for reference, candidate, limit in hops]
    forms = {id(form): form for hop in compared for form in (hop.reference, hop.candidate)}
    values: dict[int, Values] = {}
    for batch in batches(inputs, chunk):
        values = {key: form.run(batch) for key, form in forms.items()}
        for hop in compared:
            hop.add(values[id(hop.reference)], values[id(hop.candidate)], len(batch[0]))
    return [hop.result(len(inputs[0]), has_runtime=values[id(hop.candidate)].optimised is not None) for hop in compared]


def match(reference: Form, candidate: Form, a: Values, b: Values) -> tuple[Way, list[tuple[Point, Point]]]:
    """Which points of two forms are the same, in the reference's order, and how that was found.

    By name if that finds half of the layers of the form with fewer; else by the names of tensors; else by the
    order of the layers with outputs of the same size. ``a`` and ``b`` are both forms' values of one batch.

    Raises:
        ShapeError: nothing fits.
    """
    torch_involved = a.optimised is None or b.optimised is None
    paths = reference.paths and candidate.paths
    names: Way = "layer name" if torch_involved or paths else "node name"
    enough = 0.5 * min(sum(point.is_layer for point in form.points) for form in (reference, candidate))
    ways: tuple[tuple[Way, str], ...] = ((names, "name"), ("tensor name", "made"))
    for way, key in ways[: 1 if torch_involved else 2]:
        there = {getattr(point, key): point for point in candidate.points}
        pairs = [
            (point, there[name])
            for point in reference.points
            if (name := getattr(point, key)) in there and _fit(point, there[name], a, b)
        ]
        layers = sum(left.is_layer and right.is_layer for left, right in pairs)
        if pairs and layers >= max(enough, 1 if enough else 0):
            return way, pairs
    pairs = _in_order(reference, candidate, a, b)
    if not pairs:
        raise ShapeError(
            f"Files '{reference.name}' and '{candidate.name}' have no layer in common, expected two forms of one model."
            " Compare a file with the model it was made from."
        )
    return "order of the layers", pairs


def _fit(left: Point, right: Point, a: Values, b: Values) -> bool:
    if left.name not in a.at or right.name not in b.at:
        return False
    return a.at[left.name].size == b.at[right.name].size  # the same name: shapes may differ by a reshape


def _size(value: NDArray) -> tuple[int, ...]:
    """Shape of one sample without sizes of 1: a pooled [C, 1, 1] is a [C]."""
    return (len(value) if value.ndim else 0, *(size for size in value.shape[1:] if size != 1))


def _in_order(reference: Form, candidate: Form, a: Values, b: Values) -> list[tuple[Point, Point]]:
    sides = [
        [point for point in form.points if point.is_layer and point.name in values.at]
        for form, values in ((reference, a), (candidate, b))
    ]
    sizes = [[_size(values.at[point.name]) for point in side] for side, values in zip(sides, (a, b), strict=True)]
    blocks = SequenceMatcher(None, *sizes, autojunk=False).get_matching_blocks()
    pairs = [(sides[0][block.a + step], sides[1][block.b + step]) for block in blocks for step in range(block.size)]
    inputs = [next((point for point in form.points if point.name == "input"), None) for form in (reference, candidate)]
    if pairs and inputs[0] and inputs[1] and _fit(inputs[0], inputs[1], a, b):
        pairs.insert(0, (inputs[0], inputs[1]))
    return pairs


def _rows(
    pairs: Sequence[tuple[Point, Point]], sums: Mapping[str, _Sums], samples: int, points: Mapping[str, Point]
) -> list[LayerError]:
    rows: list[LayerError] = []
    for order, (left, right) in enumerate(pairs):
        found = sums[left.name]
        before = max((sums[name].relative for name in _found_above(left, sums, points)), default=0.0)
        relative = found.relative
        norms = math.sqrt(found.reference * found.candidate)
        rows.append(
            LayerError(
                layer=left.name,
                order=order,
                relative_error=relative,
                input_error=before,
                own_share=max(0.0, 1.0 - (before / relative) ** 2) if relative else 0.0,
                sqnr_db=-20 * math.log10(relative) if relative else None,
                cosine=found.product / norms if norms and math.isfinite(norms) else float(not relative),
                max_abs=found.largest,
                clipped=sum(found.clipped) / samples if found.clipped else None,
                candidate_layer=right.name if right.name != left.name else None,
            )
        )
    return rows


def _found_above(point: Point, sums: Mapping[str, _Sums], points: Mapping[str, Point]) -> set[str]:
    """The nearest points above one that both forms have."""
    found: set[str] = set()
    waiting, seen = list(point.sources), set(point.sources)
    while waiting:
        name = waiting.pop()
        if name in sums:
            found.add(name)
            continue
        fresh = set(points[name].sources) - seen if name in points else set()
        seen |= fresh
        waiting += fresh
    return found


def _by_runtime(values: Values) -> tuple[float, int]:
    """Largest change of an output by the runtime's optimisation, and the number of answers it changed."""
    moved, flips = 0.0, 0
    for plain, optimised in zip(values.outputs, values.optimised or (), strict=False):
        change = float(np.abs(plain - optimised).max(initial=0.0))
        moved = max(moved, change if math.isfinite(change) else LARGEST)
        if plain.ndim == 2 and plain.shape[1] > 1:
            flips = max(flips, int((plain.argmax(1) != optimised.argmax(1)).sum()))
    return moved, flips
