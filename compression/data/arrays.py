"""A NumPy file (.npz) of images and labels."""

import zipfile
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from compression.data.source import DataConfig, Pool, ReadFn, Source, checked_images, checked_labels
from compression.data.splits import SplitConfig
from compression.errors import DataError

_FORM = "an .npz with 'images' ([N, H, W] or [N, C, H, W], uint8 or float32) and 'labels' ([N], whole numbers)"
_WAY_OUT = "Write one with numpy.savez(path, images=..., labels=...), and set data.path to it."


class Arrays(DataConfig):
    """Images and labels in one .npz, and optionally ``class_names``."""

    kind: Literal["arrays"] = "arrays"
    path: Path
    """The .npz file."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes; None: from class_names, or else the largest label + 1."""
    split: SplitConfig = SplitConfig()

    def build(self) -> ReadFn:
        """Return the function that reads the source."""
        return partial(_read, self)

    def check(self) -> None:
        """Check that the file exists and holds the two arrays.

        Raises:
            DataError: it does not.
        """
        if not self.path.is_file():
            raise DataError(f"File '{self.path}' does not exist, expected {_FORM}. {_WAY_OUT}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = {Path(name).stem for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"File '{self.path}' is no readable archive ({error}), expected {_FORM}. {_WAY_OUT}"
            ) from error
        missing = {"images", "labels"} - names
        if missing:
            raise DataError(
                f"File '{self.path}' has {sorted(names)} but not {sorted(missing)}, expected {_FORM}. {_WAY_OUT}"
            )


def _read(config: Arrays, seed: int) -> Source:
    config.check()
    origin = str(config.path)
    try:
        with np.load(config.path, allow_pickle=False) as archive:
            raw_images, raw_labels = archive["images"], archive["labels"]
            given = archive.get("class_names")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"File '{origin}' cannot be read ({error}), expected {_FORM}. {_WAY_OUT}") from error
    if raw_labels.ndim == 0 or len(raw_labels) == 0:
        raise DataError(f"File '{origin}' has 0 labels, expected {_FORM}. {_WAY_OUT}")
    class_names = _class_names(config, given, raw_labels)
    labels = checked_labels(raw_labels, num_classes=len(class_names), origin=origin)
    images = checked_images(raw_images, num_labels=len(labels), origin=origin)
    pool = Pool(images=images, labels=labels, ids=np.arange(len(labels), dtype=np.int64), origin=origin)
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    return Source(config.path.stem, class_names, train=pool, test=None, scale=scale)


def _class_names(config: Arrays, given: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
    if given is not None:
        names = tuple(str(name) for name in given.reshape(-1))
        if config.num_classes not in (None, len(names)):
            raise DataError(
                f"File '{config.path}' has {len(names)} class names, expected {config.num_classes} (num_classes). "
                "Leave num_classes out, or correct it."
            )
    else:
        numeric = labels.dtype.kind in "iufb"
        finite = labels[np.isfinite(labels)] if labels.dtype.kind == "f" else labels
        largest = int(finite.max()) if numeric and finite.size else 0
        if config.num_classes is None and largest >= 10 * len(labels):
            raise DataError(
                f"File '{config.path}' has a label of {largest} among {len(labels)} samples, "
                "expected labels from 0 on. Number the classes 0, 1, 2, ..., or set num_classes."
            )
        names = tuple(str(i) for i in range(config.num_classes or max(largest + 1, 2)))
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(
            f"File '{config.path}' has the class names {list(names)[:20]}, expected two or more different ones. "
            "Correct class_names."
        )
    return names
