"""A dataset as every stage sees it: four splits of tensors, their hashes, and how an image becomes an input."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from compression.data.source import Pool, ReadFn, Source
from compression.data.splits import HeldOutConfig, stratified_draw, stratified_split
from compression.errors import DataError
from compression.types import Preprocessing

SPLITS = ("train", "validation", "calibration", "test")
MIN_STD = 1e-3
FORMAT = 1


@dataclass(frozen=True)
class Split:
    """Samples for one purpose."""

    images: Tensor
    """[N,C,H,W], uint8 or float32, raw; may be memory-mapped."""
    labels: Tensor
    """[N], int64."""
    ids: Tensor
    """[N], int64, unique over the whole dataset."""


@dataclass(frozen=True)
class Dataset:
    """Four splits that share no sample. Only the final evaluation looks at ``test``."""

    name: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    """Taken from the train split."""
    train: Split
    validation: Split
    calibration: Split
    test: Split
    hashes: dict[str, str]
    """SHA-256 over images, labels and ids, by split name."""
    warnings: tuple[str, ...] = ()
    pool: Split | None = None
    """Images without labels (all -1), from which students can learn what teachers say about them."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.images.shape[1:]
        return int(channels), int(height), int(width)


def with_pool(dataset: Dataset) -> Dataset:
    """The dataset with its unlabelled images, if it has any, as part of the train split."""
    train, pool = dataset.train, dataset.pool
    if pool is None:
        return dataset
    both = Split(
        images=torch.cat([train.images, pool.images]),
        labels=torch.cat([train.labels, pool.labels]),
        ids=torch.cat([train.ids, pool.ids]),
    )
    return replace(dataset, train=both, pool=None)


def without_labels(dataset: Dataset) -> Dataset:
    """The dataset as it would be if nobody had labelled the train split: its labels are -1."""
    train = replace(dataset.train, labels=torch.full_like(dataset.train.labels, -1))
    return replace(dataset, train=train)


class DataSource(Protocol):
    """What every config of a data source offers."""

    @property
    def limit(self) -> int | None: ...

    @property
    def on_leak(self) -> str: ...

    @property
    def split(self) -> HeldOutConfig: ...

    def build(self) -> ReadFn: ...

    def check(self) -> None: ...


def check_source(config: DataSource) -> None:
    """Look whether the source is there, without reading it.

    Raises:
        DataError: it is not; the message says how to get it.
    """
    config.check()


def load_dataset(config: DataSource, *, seed: int, unlabelled: DataSource | None = None) -> Dataset:
    """Read, validate and split a source; same source, config and seed give the same dataset.

    All images of ``unlabelled`` become the pool; its labels are not looked at, its ids follow those of the source.

    Raises:
        DataError: absent or corrupt files, labels out of range, empty classes, too few samples, leakage when
            ``on_leak`` is ``fail``.
    """
    source = config.build()(seed)
    _refuse_empty_classes(source)
    rows = _split_rows(source, config, seed)
    parts = {name: _take(pool, chosen) for name, (pool, chosen) in rows.items()}
    warnings = (*source.warnings, *_leaks(parts, config, source))
    hashes = {name: _digest(part) for name, part in parts.items()}
    pool = None
    if unlabelled is not None:
        pool = _pool(unlabelled, seed, like=parts["train"], first_id=1 + max(int(p.ids.max()) for p in parts.values()))
        hashes["pool"] = _digest(pool)
    return Dataset(
        name=source.name,
        class_names=source.class_names,
        preprocessing=_preprocessing(parts["train"], source.scale),
        hashes=hashes,
        warnings=warnings,
        pool=pool,
        **parts,
    )


def _pool(config: DataSource, seed: int, *, like: Split, first_id: int) -> Split:
    source = config.build()(seed)
    images = [torch.from_numpy(each.images) for each in (source.train, source.test) if each is not None]
    wanted, wanted_type = like.images.shape[1:], like.images.dtype
    for each in images:
        if each.shape[1:] != wanted or each.dtype != wanted_type:
            raise DataError(
                f"Unlabelled images of '{source.train.origin}' have shape {list(each.shape[1:])} and type "
                f"{each.dtype}, expected {list(wanted)} and {wanted_type} as the labelled ones. Convert them, or "
                "correct unlabelled."
            )
    every = torch.cat(images)
    if config.limit is not None:
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        every = every[order[: config.limit].sort().values]
    return Split(
        images=every,
        labels=torch.full((len(every),), -1, dtype=torch.int64),
        ids=torch.arange(first_id, first_id + len(every)),
    )


def _split_rows(source: Source, config: DataSource, seed: int) -> dict[str, tuple[Pool, np.ndarray]]:
    names, origin = source.class_names, source.train.origin
    own_test = source.test is not None
    train_rows = np.arange(len(source.train.labels))
    test_rows = np.arange(len(source.test.labels)) if source.test is not None else train_rows[:0]
    if config.limit is not None:
        total = len(train_rows) + len(test_rows)
        wanted = min(config.limit, total)
        for_test = round(wanted * len(test_rows) / total)
        train_rows = stratified_draw(
            source.train.labels, wanted - for_test, seed=seed, class_names=names, origin=origin
        )
        if source.test is not None:
            test_rows = stratified_draw(
                source.test.labels, for_test, seed=seed, class_names=names, origin=source.test.origin
            )
    parts = stratified_split(
        source.train.labels[train_rows],
        config.split,
        seed=seed,
        class_names=names,
        origin=origin,
        own_test=own_test,
    )
    rows = {name: (source.train, train_rows[part]) for name, part in parts.items()}
    if source.test is not None:
        rows["test"] = (source.test, test_rows)
    return rows


def _take(pool: Pool, rows: np.ndarray) -> Split:
    return Split(
        images=torch.from_numpy(np.ascontiguousarray(pool.images[rows])),
        labels=torch.from_numpy(np.ascontiguousarray(pool.labels[rows])),
        ids=torch.from_numpy(np.ascontiguousarray(pool.ids[rows])),
    )


def _refuse_empty_classes(source: Source) -> None:
    for pool in (source.train, source.test):
        if pool is None:
            continue
        counts = np.bincount(pool.labels, minlength=len(source.class_names))
        empty = [source.class_names[label] for label in np.flatnonzero(counts == 0)]
        if empty:
            shown = ", ".join(f"{name}: {count}" for name, count in zip(source.class_names, counts, strict=True))
            raise DataError(
                f"Class '{empty[0]}' of '{pool.origin}' has 0 samples, expected at least one ({shown[:400]}). "
                "Add samples, or leave the class out."
            )


def _leaks(parts: dict[str, Split], config: DataSource, source: Source) -> list[str]:
    seen = {_row_digest(row) for row in parts["train"].images.numpy()}
    found = []
    for name in ("validation", "calibration", "test"):
        count = sum(_row_digest(row) in seen for row in parts[name].images.numpy())
        if count:
            found.append(
                f"{count} of {len(parts[name].labels)} {name} images of '{source.name}' are in the train split too."
            )
    if found and config.on_leak == "fail":
        raise DataError(" ".join(found) + " Remove the duplicates, or set data.on_leak to warn.")
    return found


def _row_digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _preprocessing(train: Split, scale: float) -> Preprocessing:
    images = train.images.numpy()
    mean, std = [], []
    for channel in range(images.shape[1]):
        values = images[:, channel].astype(np.float64) / scale
        mean.append(round(float(values.mean()), 6))
        std.append(max(round(float(values.std()), 6), MIN_STD))
    return Preprocessing(scale=scale, mean=tuple(mean), std=tuple(std))


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    for values in (split.images, split.labels, split.ids):
        array = values.numpy()
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Write ``dataset.json`` and three .npy files per split; equal datasets give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*SPLITS, "pool"):
        split: Split | None = getattr(dataset, name)
        if split is None:
            continue
        for part in ("images", "labels", "ids"):
            np.save(folder / f"{name}.{part}.npy", getattr(split, part).numpy())
    facts = {
        "format": FORMAT,
        "name": dataset.name,
        "class_names": list(dataset.class_names),
        "preprocessing": dataset.preprocessing.model_dump(mode="json"),
        "hashes": dataset.hashes,
        "warnings": list(dataset.warnings),
    }
    (folder / "dataset.json").write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")


def open_dataset(folder: Path) -> Dataset:
    """The dataset that ``save_dataset`` wrote; images are memory-mapped.

    Raises:
        DataError: the folder does not hold one.
    """
    try:
        facts = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        has_pool = (folder / "pool.ids.npy").exists()
        parts = {name: _open_split(folder, name) for name in (*SPLITS, *(["pool"] if has_pool else []))}
    except (OSError, ValueError) as error:
        raise DataError(
            f"Folder '{folder}' has no readable dataset ({error}), expected one that was saved here."
        ) from error
    return Dataset(
        name=facts["name"],
        class_names=tuple(facts["class_names"]),
        preprocessing=Preprocessing.model_validate(facts["preprocessing"]),
        hashes=facts["hashes"],
        warnings=tuple(facts["warnings"]),
        **parts,
    )


def _open_split(folder: Path, name: str) -> Split:
    # Copy-on-write: torch wants writable memory, the file stays as it is.
    images = np.load(folder / f"{name}.images.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(folder / f"{name}.labels.npy", allow_pickle=False)
    ids = np.load(folder / f"{name}.ids.npy", allow_pickle=False)
    return Split(images=torch.from_numpy(images), labels=torch.from_numpy(labels), ids=torch.from_numpy(ids))
