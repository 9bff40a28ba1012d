"""What every data source gives before it is split, and the checks all of them pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compression.errors import DataError
from compression.types import Frozen

Images: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
"""[N,C,H,W], uint8 or float32."""
Labels: TypeAlias = NDArray[np.int64]
"""[N]"""


class DataConfig(Frozen):
    """The fields every data source has."""

    limit: Annotated[int, Field(gt=0)] | None = None
    """Use only this many samples, over all splits: a seeded draw with every class in its share. None: all."""
    on_leak: Literal["warn", "fail"] = "warn"
    """What to do when the very same image is in the train split and in another one."""


@dataclass(frozen=True)
class Pool:
    """Samples as they came from disk, in source order."""

    images: Images
    labels: Labels
    ids: Labels
    """Row numbers in the source, unique over all pools of it."""
    origin: str
    """The file or folder, for messages."""


@dataclass(frozen=True)
class Source:
    """One or two pools: with ``test`` the source brings its own test set, without it one is split off."""

    name: str
    class_names: tuple[str, ...]
    train: Pool
    test: Pool | None
    scale: float
    """Largest raw value: the divisor of the preprocessing."""
    warnings: tuple[str, ...] = ()


ReadFn = Callable[[int], Source]
"""Seed -> source. The seed matters only where reading everything would be wasteful (``limit``)."""


def checked_labels(labels: np.ndarray, *, num_classes: int, origin: str) -> Labels:
    """Return the labels as int64 [N].

    Raises:
        DataError: a label is not a whole number of 0..num_classes-1; names the first row, its value, the file.
    """
    expected = f"expected whole numbers from 0 to {num_classes - 1}"
    way_out = "Correct the file, or name all the classes (class_names)."
    if labels.ndim != 1:
        raise DataError(f"Labels of '{origin}' have shape {list(labels.shape)}, expected [N]. Store one per image.")
    if labels.dtype.kind not in "iufb":
        raise DataError(f"Labels of '{origin}' have type {labels.dtype}, {expected}. {way_out}")
    if labels.dtype.kind == "f":
        bad = np.flatnonzero(~(np.isfinite(labels) & (labels == np.floor(labels))))
        if len(bad):
            raise DataError(
                f"Label of row {bad[0]} in '{origin}' has the value {labels[bad[0]]}, {expected} "
                f"({len(bad)} such rows). {way_out}"
            )
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise DataError(
            f"Label of row {bad[0]} in '{origin}' has the value {labels[bad[0]]}, {expected} "
            f"({len(bad)} such rows). {way_out}"
        )
    return labels.astype(np.int64)


def checked_images(images: np.ndarray, *, num_labels: int, origin: str) -> Images:
    """Return the images as [N,C,H,W], uint8 or float32; [N,H,W] gets one channel.

    Raises:
        DataError: another type or rank, another count than labels, an empty image, or values not finite.
    """
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"Images of '{origin}' have type {images.dtype}, expected uint8 or float32. "
            "Convert them with .astype() before saving."
        )
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(
            f"Images of '{origin}' have shape {list(images.shape)}, expected [N, H, W] or [N, C, H, W]. "
            "Put the channels in front of height and width."
        )
    if images.shape[1] > 16 and images.shape[3] in (1, 3, 4):
        raise DataError(
            f"Images of '{origin}' have shape {list(images.shape)}, which looks like [N, H, W, C]; "
            "expected [N, C, H, W]. Transpose them with .transpose(0, 3, 1, 2)."
        )
    if len(images) != num_labels:
        raise DataError(
            f"Source '{origin}' has {len(images)} images and {num_labels} labels, expected equal counts. "
            "Check how the arrays were written."
        )
    if images.dtype == np.float32:
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            rows = np.flatnonzero(~finite)
            raise DataError(
                f"Image of row {rows[0]} in '{origin}' has values that are not finite ({len(rows)} such rows), "
                "expected finite numbers. Remove or repair these rows."
            )
    return np.ascontiguousarray(images)


def check_classes(labels: Labels, class_names: tuple[str, ...], *, origin: str) -> None:
    """Check that every class has samples.

    Raises:
        DataError: there are no samples, or one class has none; names it and gives the counts of all.
    """
    if len(labels) == 0:
        raise DataError(f"Source '{origin}' has 0 samples, expected at least one per class. Check the path.")
    counts = np.bincount(labels, minlength=len(class_names))
    if (counts == 0).any():
        empty = ", ".join(f"'{class_names[i]}'" for i in np.flatnonzero(counts == 0)[:10])
        table = ", ".join(f"{name}: {count}" for name, count in zip(class_names[:50], counts[:50], strict=True))
        raise DataError(
            f"Source '{origin}' has no sample of {empty}, expected samples of every class (counts: {table}). "
            "Add samples, or leave the class out."
        )
