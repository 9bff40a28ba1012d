"""Two ONNX files, of any tool, on the same inputs: do they answer alike, and at which layer do they part?"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compression.errors import ExportError, InputError, ShapeError
from compression.types import Frozen
from export.attribution import CHUNK, Attribution, attribute
from export.intermediates import batches, by_name
from export.onnx_form import OnnxForm, numpy_type
from export.parity import LIMITS, Hop, broken_limits, compare

INTEGER_OPERATORS = ("QuantizeLinear", "DequantizeLinear", "QLinear", "MatMulInteger", "ConvInteger", "QGemm")
RELATIVE = 0.1
"""Largest relative error of an output that is no table of scores, where the hop has no limit of its own."""
RANDOM_INTEGERS = 10
"""Random int32 and int64 inputs are below this: small enough for any vocabulary."""


class OutputParity(Frozen):
    """How far one output of the second file is from the first file's."""

    output: str
    other: str
    """Its name in the second file."""
    shape: tuple[int, ...]
    """Samples first."""
    relative_error: float
    """``||a - b|| / ||a||``."""
    max_abs: float
    mean_abs: float
    flips: float | None = None
    """Share of samples whose largest score moved; none where the output is no table of scores [N, classes]."""
    kl: float | None = None
    """Divergence of the softmax of both, nats."""
    accuracy: float | None = None
    """Share of the labels the first file meets; none without labels."""
    other_accuracy: float | None = None
    exceeded: tuple[str, ...] = ()
    """Limits this output breaks, in words."""


class FileParity(Frozen):
    """Two files compared."""

    a: str
    b: str
    hop: Hop
    """Which limits were taken: by whether the files hold integers or float16."""
    num_samples: int
    random_inputs: bool
    outputs: tuple[OutputParity, ...]
    attribution: Attribution | None
    notes: tuple[str, ...] = ()

    @property
    def exceeded(self) -> tuple[str, ...]:
        """All broken limits, in words."""
        limits = LIMITS[self.hop]
        broken = [f"output '{row.output}': {words}" for row in self.outputs for words in row.exceeded]
        row = self.attribution.layer(self.attribution.first) if self.attribution and limits.layer_decides else None
        if row is not None:
            broken.append(
                f"layer '{row.layer}' adds a relative error of {row.added:.2g}, at most {limits.layer:g} may be"
            )
        return tuple(broken)


def compare_files(
    a: Path,
    b: Path,
    *,
    inputs: Mapping[str, NDArray] | None = None,
    labels: NDArray | None = None,
    samples: int = 64,
    seed: int = 0,
) -> FileParity:
    """Compare two ONNX files output by output and layer by layer.

    Args:
        a: The file that is right.
        b: The file in question.
        inputs: Arrays by input name, samples first; with other names they are taken in order. None: random ones,
            standard normal for floats, uniform for integers.
        labels: [N] int64, the right class of every sample.
        samples: How many random inputs.
        seed: Of the random inputs.

    Raises:
        InputError: a file is no ONNX graph or can't be run, the two take different inputs, a size can't be guessed,
            or the given arrays don't fit.
    """
    try:
        first, second = OnnxForm(a), OnnxForm(b)
        sides = (first.shipped.get_inputs(), second.shipped.get_inputs())
    except ExportError as error:
        raise InputError(str(error)) from error
    pairs = _paired(sides[0], sides[1], a.name, b.name)
    second.inputs = [there.name for _, there in pairs]
    shapes = [_merged(here, there, a.name, b.name) for here, there in pairs]
    types = [numpy_type(here.type) for here, _ in pairs]
    size = _batch_size(shapes)
    names = [here.name for here, _ in pairs]
    if inputs is None:
        arrays = _random(names, shapes, types, size, samples, seed)
    else:
        arrays = _fitting(inputs, names, shapes, types, size)
    try:
        found = [[form.answers(batch) for batch in batches(arrays, size)] for form in (first, second)]
    except Exception as error:
        raise InputError(f"Files '{a.name}' and '{b.name}' can't take these inputs: {error}.") from error
    hop = _hop(first, second)
    outputs = _outputs(first.outputs, second.outputs, found[0], found[1], labels, hop)
    notes: list[str] = []
    attribution = None
    try:
        attribution = attribute(first, second, arrays, limit=LIMITS[hop].layer, chunk=size)
    except (ExportError, ShapeError) as error:
        notes.append(f"Layers were not compared. {error}")
    if inputs is None:
        notes.append("The inputs are random. Real ones say more: --inputs FILE.npz.")
    return FileParity(
        a=a.name,
        b=b.name,
        hop=hop,
        num_samples=len(arrays[0]),
        random_inputs=inputs is None,
        outputs=tuple(outputs),
        attribution=attribution,
        notes=tuple(notes),
    )


def _paired(here: Sequence[Any], there: Sequence[Any], a: str, b: str) -> list[tuple[Any, Any]]:
    """Inputs of both files that belong together: of the same name, else in order."""
    if len(here) != len(there) or not here:
        raise InputError(
            f"Files '{a}' and '{b}' have {len(here)} and {len(there)} inputs, expected the same number above 0."
            " Compare two forms of one model."
        )
    by_names = {each.name: each for each in there}
    same = set(by_names) == {each.name for each in here}
    pairs = [(each, by_names[each.name] if same else there[place]) for place, each in enumerate(here)]
    for left, right in pairs:
        kinds = {numpy_type(each.type).kind for each in (left, right)}
        if left.type != right.type and kinds not in ({"f"}, {"i"}):
            raise InputError(
                f"Input '{left.name}' has type {left.type} in '{a}' and {right.type} in '{b}', expected one type."
                " Put the conversion into one of the files."
            )
    return pairs


def _merged(left: Any, right: Any, a: str, b: str) -> list[int | None]:
    """Sizes both files accept; None where both leave it open."""
    here, there = ([size if isinstance(size, int) else None for size in each.shape] for each in (left, right))
    if len(here) != len(there) or any(x != y for x, y in zip(here, there, strict=True) if x and y):
        raise InputError(
            f"Input '{left.name}' has shape {left.shape} in '{a}' and {right.shape} in '{b}', expected one shape."
            " Compare two forms of one model, with the same layout and batch size."
        )
    return [x or y for x, y in zip(here, there, strict=True)]


def _batch_size(shapes: Sequence[Sequence[int | None]]) -> int:
    """Samples per call: as many as the files insist on, else a chunk."""
    leading = {shape[0] if shape else 1 for shape in shapes}
    if leading == {None}:
        return CHUNK
    fixed = [size for size in leading if size is not None]
    return max(fixed) if len(leading) == 1 else 2**31  # some inputs are no samples: everything in one call


def _random(
    names: Sequence[str],
    shapes: Sequence[Sequence[int | None]],
    types: Sequence[np.dtype],
    size: int,
    samples: int,
    seed: int,
) -> list[NDArray]:
    generator = np.random.default_rng(seed)
    arrays: list[NDArray] = []
    count = samples if size in (CHUNK, 2**31) else -(-samples // size) * size
    for name, shape, dtype in zip(names, shapes, types, strict=True):
        if any(each is None for each in shape[1:]):
            shown = ", ".join("?" if each is None else str(each) for each in shape)
            raise InputError(
                f"Input '{name}' has shape [{shown}], expected known sizes behind the first. Give arrays with --inputs."
            )
        sizes = [int(each) for each in shape[1:] if each is not None]
        lead = [shape[0] if size == 2**31 and shape[0] else count] if shape else []
        arrays.append(_drawn(generator, tuple(lead + sizes), dtype))
    return arrays


def _drawn(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = (limits.min, limits.max + 1) if limits.bits == 8 else (0, RANDOM_INTEGERS)
    return generator.integers(low, high, shape).astype(dtype)


def _fitting(
    inputs: Mapping[str, NDArray],
    names: Sequence[str],
    shapes: Sequence[Sequence[int | None]],
    types: Sequence[np.dtype],
    size: int,
) -> list[NDArray]:
    if len(inputs) != len(names):
        raise InputError(f"Inputs have {len(inputs)} arrays, expected {len(names)}: {', '.join(names)}.")
    arrays = by_name(inputs, names)
    for name, array, shape, dtype in zip(names, arrays, shapes, types, strict=True):
        fits = array.ndim == len(shape) and all(
            known is None or known == found
            for place, (known, found) in enumerate(zip(shape, array.shape, strict=True))
            if place or size == 2**31
        )
        if not fits or not array.size:
            shown = ", ".join("any" if each is None else str(each) for each in shape)
            raise InputError(f"Array for input '{name}' has shape {list(array.shape)}, expected [{shown}].")
        if array.dtype.kind != dtype.kind and not (array.dtype.kind in "ui" and dtype.kind in "ui"):
            raise InputError(f"Array for input '{name}' has type {array.dtype}, expected {dtype}. Convert it first.")
    usable = len(arrays[0]) // size * size if size not in (CHUNK, 2**31) else len(arrays[0])
    if not usable:
        raise InputError(f"Inputs have {len(arrays[0])} samples, expected at least {size}: the files' batch size.")
    return list(arrays) if size == 2**31 else [array[:usable] for array in arrays]


def _hop(first: OnnxForm, second: OnnxForm) -> Hop:
    integers = [
        any(node.op_type.startswith(INTEGER_OPERATORS) for node in form.proto.graph.node) for form in (first, second)
    ]
    if all(integers):
        return "int8-u8"
    if any(integers):
        return "after-training"
    halves = any(tensor.data_type in (10, 16) for form in (first, second) for tensor in form.proto.graph.initializer)
    return "float16" if halves else "float32"


def _outputs(
    names: Sequence[str],
    others: Sequence[str],
    a: Sequence[Sequence[NDArray]],
    b: Sequence[Sequence[NDArray]],
    labels: NDArray | None,
    hop: Hop,
) -> Iterator[OutputParity]:
    if len(names) != len(others):
        raise InputError(
            f"The files have {len(names)} and {len(others)} outputs, expected the same number."
            " Compare two forms of one model."
        )
    for place, name in enumerate(names):
        other = name if set(names) == set(others) else others[place]
        left, right = (
            np.concatenate([np.atleast_1d(each[position]) for each in side])
            for side, position in ((a, place), (b, list(others).index(other)))
        )
        if left.shape != right.shape:
            raise InputError(
                f"Output '{name}' has shape {list(left.shape)} and '{other}' {list(right.shape)}, expected one shape."
                " Compare two forms of one model."
            )
        yield _output(name, other, left, right, labels, hop)


def _output(name: str, other: str, left: NDArray, right: NDArray, labels: NDArray | None, hop: Hop) -> OutputParity:
    limits = LIMITS[hop]
    difference = left.astype(np.float64) - right
    norm = float(np.linalg.norm(left.astype(np.float64)))
    with np.errstate(invalid="ignore"):
        error = float(np.linalg.norm(difference))
    relative = (error / norm if norm else float(error > 0)) if np.isfinite(error) else 1e6
    row = OutputParity(
        output=name,
        other=other,
        shape=left.shape,
        relative_error=relative,
        max_abs=float(np.abs(difference).max()) if np.isfinite(error) else 1e6,
        mean_abs=float(np.abs(difference).mean()) if np.isfinite(error) else 1e6,
    )
    if left.ndim != 2 or left.shape[1] < 2:
        allowed = limits.relative or RELATIVE
        words = (f"relative error {relative:.2g}, at most {allowed:g} may be",) if relative > allowed else ()
        return row.model_copy(update={"exceeded": words})
    if labels is not None and labels.shape[:1] != left.shape[:1]:
        raise InputError(f"Labels have shape {list(labels.shape)}, expected [{len(left)}], one for each sample.")
    if not np.isfinite(error):
        return row.model_copy(update={"exceeded": ("it has values that are not finite",)})
    reference, candidate = torch.from_numpy(left), torch.from_numpy(right)
    right_answers = reference.argmax(1) if labels is None else torch.as_tensor(labels.astype(np.int64))
    parity = compare(reference, candidate, right_answers)
    judged = parity if labels is not None else parity.model_copy(update={"top1": parity.reference_top1})
    largest = float(np.abs(left).max())
    broken = broken_limits(judged, limits, largest_logit=largest, floor=None, attribution=None)
    accuracies = {"accuracy": parity.reference_top1, "other_accuracy": parity.top1} if labels is not None else {}
    return row.model_copy(update={"flips": parity.flips, "kl": parity.kl, "exceeded": broken, **accuracies})
