"""Seeded, stratified draws and splits of row numbers."""

from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from compression.data.source import Labels
from compression.errors import DataError
from compression.types import Frozen

OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


class HeldOutConfig(Frozen):
    """Shares split off a training set that has a test set of its own."""

    validation: OpenShare = 0.1
    """Share for choosing: early looks, finalists, teacher selection."""
    calibration: OpenShare = 0.05
    """Share for setting the ranges of the quantizer, and for methods that learn a few numbers of their own (``tgeo``,
    ``task_vectors``)."""

    @property
    def shares(self) -> dict[str, float]:
        """Share by split name, without train."""
        return {"validation": self.validation, "calibration": self.calibration}

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        total = sum(self.shares.values())
        if total >= 1.0:
            raise ValueError(f"the shares add up to {total:.3f}, expected less than 1: the rest is the train split")
        return self


class SplitConfig(HeldOutConfig):
    """Shares split off a source that is one set; the rest is the train split."""

    validation: OpenShare = 0.15
    """Share for choosing: early looks, finalists, teacher selection."""
    calibration: OpenShare = 0.1
    """Share for setting the ranges of the quantizer; used for nothing else."""
    test: OpenShare = 0.3
    """Share for the final evidence; not used when the source brings its own test set."""

    @property
    def shares(self) -> dict[str, float]:
        """Share by split name, without train."""
        return {"validation": self.validation, "calibration": self.calibration, "test": self.test}


def generator_for(seed: int, purpose: str) -> np.random.Generator:
    """Return a random generator that depends on the seed and on what it is for."""
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, *purpose.encode()])


def stratified_draw(
    labels: Labels, size: int, *, seed: int, class_names: Sequence[str], origin: str
) -> NDArray[np.int64]:
    """Return ``size`` row numbers in rising order, every class in its share (largest remainders), at least one each.

    Raises:
        DataError: ``size`` is smaller than the number of classes.
    """
    if size >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels, minlength=len(class_names))
    if size < len(class_names):
        raise DataError(
            f"The limit leaves {size} samples for '{origin}', expected at least one for each of the "
            f"{len(class_names)} classes. Raise 'limit'."
        )
    exact = counts * (size / len(labels))
    quotas = np.maximum(np.floor(exact).astype(np.int64), (counts > 0).astype(np.int64))
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    position = 0
    while quotas.sum() < size:
        label = by_remainder[position % len(by_remainder)]
        quotas[label] += int(quotas[label] < counts[label])
        position += 1
    while quotas.sum() > size:
        quotas[np.argmax(quotas)] -= 1
    generator = generator_for(seed, "limit")
    rows = [
        generator.permutation(np.flatnonzero(labels == label))[: quotas[label]] for label in range(len(class_names))
    ]
    return np.sort(np.concatenate(rows)).astype(np.int64)


def stratified_split(
    labels: Labels,
    config: HeldOutConfig,
    *,
    seed: int,
    class_names: Sequence[str],
    origin: str,
    own_test: bool,
) -> dict[str, NDArray[np.int64]]:
    """Return row numbers by split name; every row is in one split, every class in all of them.

    Rows of a split come in a seeded random order, so that any first part of a split is a random sample of it.

    Args:
        labels: labels of all rows, int64 [N].
        config: the shares.
        seed: same seed, same split.
        class_names: names for the messages.
        origin: file or folder for the messages.
        own_test: the source brings a test set: no test split is made.

    Raises:
        DataError: a class has fewer samples than there are splits.
    """
    shares = {name: share for name, share in config.shares.items() if not (own_test and name == "test")}
    names = [*shares, "train"]
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
    generator = generator_for(seed, "split")
    for label, class_name in enumerate(class_names):
        rows = generator.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        if len(rows) < len(names):
            raise DataError(
                f"Class '{class_name}' of '{origin}' has {len(rows)} samples, expected at least {len(names)}: "
                f"one for each of {', '.join(names)}. Add samples, or raise 'limit'."
            )
        sizes = _sizes(len(rows), list(shares.values()))
        for name, part in zip(names, np.split(rows, np.cumsum(sizes)), strict=True):
            parts[name].append(part)
    return {name: generator.permutation(np.concatenate(part)) for name, part in parts.items()}


def _sizes(count: int, shares: list[float]) -> list[int]:
    """Whole numbers near ``count * share``, at least 1 each, that leave at least 1 for train."""
    sizes = [max(1, round(count * share)) for share in shares]
    while sum(sizes) >= count:
        sizes[int(np.argmax(sizes))] -= 1
    return sizes
