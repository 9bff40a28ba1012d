"""Teacher outputs on disk, so that a panel is run once and not at every step.

Augmented views are pure functions of (seed, view, sample id); stored logits are looked up by the same names.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compression.augment import AnyAugment, augment, clean_part, normalise
from compression.data.dataset import Dataset, Split, with_pool
from compression.errors import CompressionError
from compression.features import frozen, penultimate
from compression.types import UNKNOWN, Frozen

BATCH_SIZE = 256
"""Fixed, so that every process cuts the samples in the same places and gets the same bits."""
FORMAT = 1


class OutputsSpec(Frozen):
    """Which outputs are stored."""

    views: Annotated[int, Field(ge=0)]
    """Augmented views of the train split; 0 stores the validation split alone."""
    seed: int
    """Of the views."""
    augment: AnyAugment
    """Of the views; of an augmentation that changes some of them its clean part, which is what teachers look at."""
    features: bool = False
    """Store penultimate features of every view too; losses that compare features need them."""
    classes: tuple[str, ...] | None = None
    """Names of the classes that the teacher knows; the logits of all others are stored as ``UNKNOWN``."""

    @field_validator("augment")
    @classmethod
    def _clean(cls, augment: AnyAugment) -> AnyAugment:
        return clean_part(augment)


def write_teacher_outputs(
    model: nn.Module,
    dataset: Dataset,
    spec: OutputsSpec,
    folder: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store a teacher's float16 outputs.

    ``logits.npy`` [views, N_train, C] on augmented views in order of the train split, with ``spec.features`` also
    ``view_features.npy`` [views, N_train, D]; ``validation.npy`` [N_val, C] and ``features.npy`` [N_val, D]
    (penultimate) on plain validation images, ``ids.npy`` [N_train], ``outputs.json``. The train split includes the
    unlabelled pool, if there is one. Equal teacher, data and spec give equal bytes, whichever process writes them (same
    machine and threads).

    Raises:
        CompressionError: an output is not finite, or too large for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset = with_pool(dataset)
    train, validation = dataset.train, dataset.validation
    unknown = _unknown(spec, dataset)
    size, classes = len(train.labels), dataset.num_classes
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with frozen(model), torch.no_grad():
        logits, features = [], []
        for start in range(0, len(validation.labels), BATCH_SIZE):
            some_logits, some_features = penultimate(
                model, _inputs(validation.images[start : start + BATCH_SIZE], dataset)
            )
            logits.append(_half(some_logits.masked_fill(unknown, UNKNOWN)))
            features.append(_half(some_features))
        width = features[0].shape[1] if spec.features else None
        stores = [_memmap(folder / "logits.npy", (spec.views, size, classes))]
        if width is not None:
            stores.append(_memmap(folder / "view_features.npy", (spec.views, size, width)))
        for view in range(spec.views):
            for start in range(0, size, BATCH_SIZE):
                stop = min(start + BATCH_SIZE, size)
                raw = augment(
                    train.images[start:stop],
                    train.ids[start:stop],
                    view=view,
                    seed=spec.seed,
                    config=spec.augment,
                )
                images = _inputs(raw, dataset)
                some_logits, *some_features = (model(images),) if width is None else penultimate(model, images)
                outputs = (some_logits.masked_fill(unknown, UNKNOWN), *some_features)
                for store, values in zip(stores, outputs, strict=True):
                    store[view, start:stop] = _half(values)
                if on_progress is not None:
                    on_progress(view * size + stop, spec.views * size)
        for store in stores:
            store.flush()
    _write_rest(folder, dataset, spec, np.concatenate(logits), np.concatenate(features))


def write_given_outputs(path: Path, dataset: Dataset, spec: OutputsSpec, folder: Path) -> None:
    """Store what a black box has said, in the form of :func:`write_teacher_outputs`, every view alike.

    It was asked about plain images, so a view gets what was said of its image; log-probabilities take the place of
    logits and, for scores that look at them, of features.

    Args:
        path: see :func:`read_given_outputs`.
        dataset: train, validation and pool must all be covered.
        spec: without ``features`` of views.
        folder: where to write.

    Raises:
        CompressionError: the file is unreadable or does not cover the data; see :func:`read_given_outputs`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset = with_pool(dataset)
    ids, logits = read_given_outputs(path, num_classes=dataset.num_classes)
    logits = np.where(_unknown(spec, dataset).numpy(), UNKNOWN, logits).astype(np.float16)
    order = np.argsort(ids)

    def of(split: Split, name: str) -> np.ndarray:
        places = np.searchsorted(ids, split.ids.numpy(), sorter=order).clip(max=len(ids) - 1)
        rows = order[places]
        missing = split.ids.numpy()[ids[rows] != split.ids.numpy()]
        if len(missing):
            raise CompressionError(
                f"Outputs file '{path}' has no row for {len(missing)} of {len(split.ids)} {name} samples, the first "
                f"with id {missing[0]}, expected all. `stillhouse samples RECIPE` writes the images with their ids."
            )
        return logits[rows]

    store = _memmap(folder / "logits.npy", (spec.views, len(dataset.train.ids), dataset.num_classes))
    store[:] = of(dataset.train, "train")
    store.flush()
    validation = of(dataset.validation, "validation")
    _write_rest(folder, dataset, spec, validation, validation)


def read_given_outputs(path: Path, *, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int64 [M] and log-probabilities float32 [M,C], not below -30, from a black box's ``.npz`` file.

    The file has ``ids`` [M] and ``probabilities`` [M,C], rows summing to 1 within a hundredth.

    Raises:
        CompressionError: it is missing or unreadable, or an array is not as described.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, probabilities = file["ids"], file["probabilities"]
    except (OSError, ValueError, KeyError) as error:
        raise CompressionError(
            f"Outputs file '{path}' cannot be read ({error}), expected a .npz with ids [M] and probabilities [M,C]. "
            "Correct the path, or write it again with numpy.savez."
        ) from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(set(ids.tolist())) != len(ids):
        raise CompressionError(
            f"Outputs file '{path}' has ids of shape {list(ids.shape)} and type {ids.dtype}, expected distinct whole "
            "numbers [M]. Take them from `stillhouse samples RECIPE`."
        )
    if probabilities.shape != (len(ids), num_classes) or probabilities.dtype.kind != "f":
        raise CompressionError(
            f"Outputs file '{path}' has probabilities of shape {list(probabilities.shape)} and type "
            f"{probabilities.dtype}, expected floats [{len(ids)}, {num_classes}]. One row per id, one column per class."
        )
    sums = probabilities.astype(np.float64).sum(1)
    wrong = ~((probabilities >= 0).all(1) & (np.abs(sums - 1) <= 0.01))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise CompressionError(
            f"Outputs file '{path}' has a row {row} that is no distribution (sum {sums[row]:.4g}), expected numbers "
            "not below 0 that sum to 1. Store probabilities, not logits."
        )
    tiny = math.exp(-30)
    return ids.astype(np.int64), np.log(np.maximum(probabilities, tiny)).astype(np.float32)


def _unknown(spec: OutputsSpec, dataset: Dataset) -> Tensor:
    """Whether the teacher does not know the class, bool [C]."""
    names = spec.classes
    return torch.tensor([names is not None and name not in names for name in dataset.class_names])


def _write_rest(
    folder: Path, dataset: Dataset, spec: OutputsSpec, validation: np.ndarray, features: np.ndarray
) -> None:
    np.save(folder / "validation.npy", validation)
    np.save(folder / "features.npy", features)
    np.save(folder / "ids.npy", dataset.train.ids.numpy())
    facts = {
        "format": FORMAT,
        "spec": spec.model_dump(mode="json"),
        "data": dataset.hashes,
        "class_names": list(dataset.class_names),
    }
    (folder / "outputs.json").write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")


def _memmap(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def _inputs(raw: Tensor, dataset: Dataset) -> Tensor:
    return normalise(raw, dataset.preprocessing).contiguous(memory_format=torch.channels_last)


def _half(values: Tensor) -> np.ndarray:
    half = values.to("cpu", torch.float16)
    if not torch.isfinite(half).all():
        raise CompressionError(
            f"Teacher outputs have values up to {values.abs().max().item():.3g}, expected finite ones below 65504 "
            "(float16). The teacher is broken; look at its weights and preprocessing."
        )
    return half.numpy()


class StoredOutputs:
    """What ``write_teacher_outputs`` stored, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
        self.spec = OutputsSpec.model_validate(facts["spec"])
        self.class_names = tuple(facts["class_names"])
        mode: Literal["r"] | None = "r" if self.spec.views else None
        self._logits = np.load(folder / "logits.npy", mmap_mode=mode)
        self._features = np.load(folder / "view_features.npy", mmap_mode=mode) if self.spec.features else None
        self.validation_logits = torch.from_numpy(np.load(folder / "validation.npy")).float()
        """[N_val, C], float32."""
        self.validation_features = torch.from_numpy(np.load(folder / "features.npy")).float()
        """[N_val, D], float32."""
        ids = np.load(folder / "ids.npy")
        self._rows = np.full(int(ids.max(initial=-1)) + 1, -1, dtype=np.int64)
        self._rows[ids] = np.arange(len(ids))

    @classmethod
    def open(cls, folder: Path) -> "StoredOutputs":
        """The outputs in ``folder``.

        Raises:
            CompressionError: there are none that read.
        """
        try:
            return cls(folder)
        except (OSError, ValueError, KeyError) as error:
            raise CompressionError(
                f"Folder '{folder}' has no readable teacher outputs ({error}), expected some that were written here."
            ) from error

    def logits(self, ids: Tensor, view: int) -> Tensor:
        """Float32 logits [B,C] of samples ``ids`` [B] in augmented view ``view``.

        Raises:
            CompressionError: that view or one of the samples was not stored.
        """
        return torch.from_numpy(self._logits[view, self._places(ids, view)].astype(np.float32))

    def features(self, ids: Tensor, view: int) -> Tensor:
        """Float32 penultimate features [B,D] of samples ``ids`` [B] in augmented view ``view``.

        Raises:
            CompressionError: features, that view, or one of the samples were not stored.
        """
        if self._features is None:
            raise CompressionError(
                "Teacher outputs have no features of their views, expected some. Store them again with features: true."
            )
        return torch.from_numpy(self._features[view, self._places(ids, view)].astype(np.float32))

    def _places(self, ids: Tensor, view: int) -> np.ndarray:
        """Rows of the samples in the stored arrays."""
        if not 0 <= view < self.spec.views:
            raise CompressionError(
                f"Teacher outputs have {self.spec.views} views, expected view {view} among them. Raise distill.views."
            )
        wanted = ids.numpy()
        known = (wanted >= 0) & (wanted < len(self._rows))
        rows = self._rows[np.where(known, wanted, 0)] if len(self._rows) else np.full(len(wanted), -1)
        missing = ~known | (rows < 0)
        if missing.any():
            raise CompressionError(
                f"Teacher outputs have no sample {int(wanted[missing][0])}, expected all samples of the batch. "
                "They were stored for other data."
            )
        return rows
