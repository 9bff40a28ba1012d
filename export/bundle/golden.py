"""Golden data: inputs with the answers ONNX Runtime gave here, by which a device tells that a variant works there."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import BundleError
from export.bundle.content import archive, measure
from export.bundle.statement import Statement, Tolerance
from export.profiles import open_as_meant

REAL = 8
"""Real images, at least."""
SEED = 0
RELATIVE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2, "int8": 5e-2, "int4": 5e-2, "fp8": 0.1}
"""Precision -> how far an answer may be off, as a share of it and of the usual largest logit. Other kernels round
integers differently now and then, which later layers carry on."""
OF_ANOTHER_FORM = 0.25
"""The same where an engine can only be compared with the answers of another form of the model."""


def golden_inputs(images: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The inputs [N + 3, C, H, W] float32: the given ones as the model sees them, then zeros, ones and noise.

    Raises:
        BundleError: there are too few images, or they are of another shape or not finite.
    """
    if images.ndim != 4 or images.shape[1:] != shape or len(images) < REAL or not np.isfinite(images).all():
        raise BundleError(
            f"Golden images have shape {list(images.shape)}, expected {REAL} or more finite ones of {list(shape)},"
            " normalised as the model sees them. Give others with --golden."
        )
    noise = np.random.default_rng(SEED).standard_normal(shape)
    made_up = np.stack([np.zeros(shape), np.ones(shape), noise])
    return np.concatenate([images, made_up]).astype(np.float32)


def answers(graph: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [N, classes] float32 of an ONNX file by ONNX Runtime, one image after the other as a device runs them.

    Raises:
        BundleError: a logit is not finite.
    """
    session = open_as_meant(graph)
    found = np.concatenate([session.run(image[None]) for image in inputs])
    if not np.isfinite(found).all():
        raise BundleError(f"Graph '{graph.name}' has answers that are not finite. Run `stillhouse parity` on it.")
    return found


def tolerance(outputs: NDArray[np.float32], precision: str, *, same_form: bool = True) -> Tolerance:
    """How far a device's answers may be off from these."""
    share = (
        max(value for name, value in RELATIVE.items() if precision.startswith(name)) if same_form else OF_ANOTHER_FORM
    )
    scale = float(np.median(np.abs(outputs).max(axis=1)))
    return Tolerance(rtol=share, atol=float(f"{share * max(scale, 1e-3):.3g}"))


def dump_golden(inputs: NDArray[np.float32], outputs: Mapping[str, NDArray[np.float32]]) -> bytes:
    """``golden.npz``; equal arrays give equal bytes.

    Args:
        inputs: [N, C, H, W].
        outputs: Id of a variant -> [N, classes].
    """
    arrays = {"inputs": inputs, **{f"outputs-{name}": values for name, values in outputs.items()}}
    return b"".join(archive(measure({f"{name}.npy": _npy(values) for name, values in arrays.items()})))


def read_golden(data: bytes, statement: Statement) -> dict[str, NDArray[np.float32]]:
    """The arrays of ``golden.npz``: ``inputs``, and ``outputs-<id>`` of each variant.

    Raises:
        BundleError: one is absent, too many, or of another shape or type than the statement says.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise BundleError(f"Golden data has no arrays that can be read ({error}). Build the bundle again.") from error
    count = len(arrays.get("inputs", ()))
    expected = {"inputs": (count, *statement.input.shape[1:])}
    expected |= {f"outputs-{variant.id}": (count, statement.output.shape[1]) for variant in statement.variants}
    found = {name: values.shape for name, values in arrays.items() if values.dtype == np.float32}
    if found != expected or not count or set(arrays) != set(found):
        raise BundleError(f"Golden data has float32 arrays {found}, expected {expected}. Build the bundle again.")
    return arrays


def _npy(values: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return file.getvalue()
