"""``stillhouse samples``: the images of a recipe with their ids, for asking a black box about them."""

from pathlib import Path

import numpy as np

from compression.data import Dataset, check_source, load_dataset
from compression.data.dataset import SPLITS
from compression.errors import InputError
from flows.recipe import Recipe


def write_samples(recipe: Recipe, path: Path) -> dict[str, int]:
    """Write ``ids`` int64 [N], ``images`` [N,C,H,W] as they are in the source and ``split`` [N] to a .npz file.

    Labels are not in it. Returns the number of images of each split; the black box must be asked about train,
    validation and pool at least.

    Raises:
        InputError: the file exists already, or the data is absent.
    """
    if path.exists():
        raise InputError(f"Samples file '{path}' exists already. Choose another name, or delete it.")
    for source in (recipe.data, recipe.unlabelled):
        if source is not None:
            check_source(source)
    dataset: Dataset = load_dataset(recipe.data, seed=recipe.seed, unlabelled=recipe.unlabelled)
    parts = {name: getattr(dataset, name) for name in (*SPLITS, "pool") if getattr(dataset, name) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(
            file,
            ids=np.concatenate([part.ids.numpy() for part in parts.values()]),
            images=np.concatenate([part.images.numpy() for part in parts.values()]),
            split=np.concatenate([np.full(len(part.ids), name) for name, part in parts.items()]),
        )
    return {name: len(part.ids) for name, part in parts.items()}
