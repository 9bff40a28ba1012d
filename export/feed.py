"""Inputs for a session of any ONNX file: names, sizes and types as the graph declares them.

Standard library and numpy only: the benchmark's own processes import this, see ``export.timing``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Shapes = Mapping[str, Sequence[int]]
"""Input -> its sizes."""

FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
BYTES = {"tensor(uint8)": "uint8", "tensor(int8)": "int8"}
COUNTS = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(int16)": "int16", "tensor(bool)": "bool"}
COUNTS |= {"tensor(uint64)": "uint64", "tensor(uint32)": "uint32", "tensor(uint16)": "uint16"}


def fixed_batch(inputs: Sequence[tuple[str, Sequence[Any]]]) -> int | None:
    """The batch size a graph is fixed to, None when it is open.

    ``inputs`` are (name, sizes); an open size is a name or None. The batch is open if the first axis of any
    input is; otherwise the first input that has axes fixes it.
    """
    first = [sizes[0] for _, sizes in inputs if len(sizes)]
    if not first or not all(isinstance(size, int) for size in first):
        return None
    return first[0]


def input_shapes(
    inputs: Sequence[tuple[str, Sequence[Any]]], batch: int, shapes: Shapes | None = None
) -> dict[str, tuple[int, ...]]:
    """The sizes every input gets: an open first axis is the batch, other open ones come from ``shapes``.

    A size that ``shapes`` gives for one input also holds for open sizes of the same name in the others.

    Args:
        inputs: (name, sizes) as the graph declares them; an open size is a name or None.
        batch: Images per call; takes the place of the first size in ``shapes``.
        shapes: Input -> all its sizes.

    Raises:
        ValueError: The graph has another fixed batch size, or sizes are missing or do not fit.
    """
    fixed = fixed_batch(inputs)
    if fixed is not None and fixed != batch:
        name = next(name for name, sizes in inputs if len(sizes))
        raise ValueError(f"Input '{name}' has the fixed batch size {fixed}, expected {batch}.")
    given = shapes or {}
    known: dict[str, int] = {}
    for name, sizes in inputs:
        wanted = given.get(name)
        if wanted is None:
            continue
        fits = len(wanted) == len(sizes) and all(
            not isinstance(size, int) or size == want for size, want in list(zip(sizes, wanted, strict=True))[1:]
        )
        if not fits:
            raise ValueError(
                f"Input '{name}' has the sizes {_shown(sizes)}, expected {_shown(wanted)} as asked for. "
                "Correct the sizes."
            )
        known |= {size: want for size, want in list(zip(sizes, wanted, strict=True))[1:] if isinstance(size, str)}
    found = {}
    for name, sizes in inputs:
        wanted = given.get(name)
        filled = [
            size
            if isinstance(size, int)
            else batch
            if axis == 0
            else wanted[axis]
            if wanted is not None
            else known.get(size, size)
            for axis, size in enumerate(sizes)
        ]
        if not all(isinstance(size, int) for size in filled):
            sizes_wanted = "x".join(str(size) if isinstance(size, int) else "?" for size in filled)
            raise ValueError(
                f"Input '{name}' has the open sizes {_shown(sizes)}, expected numbers. "
                f"Give them: --shape {name}={sizes_wanted}."
            )
        found[name] = tuple(filled)
    return found


def _shown(sizes: Sequence[Any]) -> str:
    return "x".join("?" if size is None else str(size) for size in sizes) or "of a scalar"


def inputs_of(session: Any) -> list[tuple[str, Sequence[Any]]]:
    """(name, sizes) of every input of a session."""
    return [(spec.name, spec.shape) for spec in session.get_inputs()]


def feed_of(session: Any, batch: int, seed: int, shapes: Shapes | None = None) -> dict[str, Any]:
    """Inputs for a session: standard-normal numbers, any byte for bytes, and 0 or 1 for other integers.

    Integers are often token numbers or masks, so only 0 and 1 are sure to be allowed. See ``input_shapes``.

    Raises:
        ValueError: An input has a type that numpy lacks, or sizes are missing or do not fit.
    """
    import numpy as np

    sizes = input_shapes(inputs_of(session), batch, shapes)
    rng = np.random.default_rng(seed)
    feed = {}
    for spec in session.get_inputs():
        shape = sizes[spec.name]
        if spec.type in FLOATS:
            feed[spec.name] = np.asarray(rng.standard_normal(shape, dtype=np.float32), dtype=FLOATS[spec.type])
        elif spec.type in BYTES:
            limits = np.iinfo(BYTES[spec.type])
            feed[spec.name] = rng.integers(limits.min, limits.max + 1, shape).astype(BYTES[spec.type])
        elif spec.type in COUNTS:
            feed[spec.name] = rng.integers(0, 2, shape).astype(COUNTS[spec.type])
        else:
            known = sorted({**FLOATS, **BYTES, **COUNTS})
            raise ValueError(f"Input '{spec.name}' has type {spec.type}, expected one of {known}.")
    return feed
