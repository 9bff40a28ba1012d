"""Four classes that a small network learns in a fraction of a second."""

import torch

from compression.data.dataset import Dataset, Split
from compression.types import Preprocessing

CLASSES = ("a", "b", "c", "d")


def blobs(count: int, first_id: int) -> Split:
    """Images 8 by 8 of noise with one bright row, whose place tells the class."""
    generator = torch.Generator().manual_seed(first_id)
    labels = torch.arange(count) % len(CLASSES)
    images = torch.randint(0, 140, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), 0, labels * 2] += 90
    return Split(images=images, labels=labels, ids=torch.arange(first_id, first_id + count))


def tiny_dataset(*, train: int = 64, validation: int = 32) -> Dataset:
    """Splits with ids from 0, 1000, 2000 and 3000 on; sample i of a split is of class i modulo 4."""
    return Dataset(
        name="blobs",
        class_names=CLASSES,
        preprocessing=Preprocessing(scale=255.0, mean=(0.3,), std=(0.2,)),
        train=blobs(train, 0),
        validation=blobs(validation, 1000),
        calibration=blobs(8, 2000),
        test=blobs(8, 3000),
        hashes={"train": "blobs"},
    )
