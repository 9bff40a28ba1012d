"""Teacher outputs on disk, so that a panel is run once and not at every step.

Augmented views are pure functions of (seed, view, sample id); stored logits are looked up by the same names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from compression.augment import AnyAugment, augment, normalise
from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.features import frozen, penultimate
from compression.types import Frozen

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
    """Of the views."""
    features: bool = False
    """Store penultimate features of every view too; losses that compare features need them."""


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
    (penultimate) on plain validation images, ``ids.npy`` [N_train], ``outputs.json``.
    Equal teacher, data and spec give equal bytes, whichever process writes them (same machine and threads).

    Raises:
        CompressionError: an output is not finite, or too large for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = dataset.train, dataset.validation
    size, classes = len(train.labels), dataset.num_classes
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with frozen(model), torch.no_grad():
        logits, features = [], []
        for start in range(0, len(validation.labels), BATCH_SIZE):
            some_logits, some_features = penultimate(
                model, _inputs(validation.images[start : start + BATCH_SIZE], dataset)
            )
            logits.append(_half(some_logits))
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
                outputs = (model(images),) if width is None else penultimate(model, images)
                for store, values in zip(stores, outputs, strict=True):
                    store[view, start:stop] = _half(values)
                if on_progress is not None:
                    on_progress(view * size + stop, spec.views * size)
        for store in stores:
            store.flush()
    np.save(folder / "validation.npy", np.concatenate(logits))
    np.save(folder / "features.npy", np.concatenate(features))
    np.save(folder / "ids.npy", train.ids.numpy())
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
