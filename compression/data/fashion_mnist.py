"""Fashion-MNIST: 70 000 grey images of clothes, 28 x 28, 10 classes (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747)."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from compression.data.idx import idx_path, read_idx
from compression.data.source import DataConfig, Pool, ReadFn, Source, checked_images, checked_labels
from compression.data.splits import HeldOutConfig
from compression.errors import DataError

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_STEMS = {"train": "train", "test": "t10k"}


class FashionMnist(DataConfig):
    """The four IDX files, as the Debian package dataset-fashion-mnist installs them."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    root: Path = Path("/usr/share/datasets/fashion-mnist")
    """Folder of the four IDX files, gzipped or not."""
    split: HeldOutConfig = HeldOutConfig(validation=0.05, calibration=1 / 60)
    """Shares of the 60 000 training images (by default 3000 and 1000); the 10 000 others are the test split."""

    def build(self) -> ReadFn:
        """Return the function that reads the source."""
        return partial(_read, self)

    def check(self) -> None:
        """Check that the four files exist.

        Raises:
            DataError: names the missing ones and says how to get them.
        """
        stems = [f"{stem}-{what}" for stem in _STEMS.values() for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        missing = [stem for stem in stems if idx_path(self.root, stem) is None]
        if missing:
            raise DataError(
                f"Folder '{self.root}' has no {', '.join(missing)} (plain or .gz), expected the four IDX files of "
                "Fashion-MNIST. Install Debian's package dataset-fashion-mnist (apt-get install "
                "dataset-fashion-mnist), or set data.root to the folder that has them."
            )


def _read(config: FashionMnist, seed: int) -> Source:
    config.check()
    train = _pool(config.root, "train", first_id=0)
    test = _pool(config.root, "test", first_id=len(train.labels))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"Images of '{test.origin}' have shape {list(test.images.shape[1:])}, expected "
            f"{list(train.images.shape[1:])} as in '{train.origin}'. Take all four files from one data set."
        )
    return Source("fashion_mnist", CLASS_NAMES, train=train, test=test, scale=255.0)


def _pool(root: Path, name: str, *, first_id: int) -> Pool:
    images_path = idx_path(root, f"{_STEMS[name]}-images-idx3-ubyte")
    labels_path = idx_path(root, f"{_STEMS[name]}-labels-idx1-ubyte")
    assert images_path is not None
    assert labels_path is not None
    labels = checked_labels(read_idx(labels_path, ndim=1), num_classes=len(CLASS_NAMES), origin=str(labels_path))
    images = checked_images(read_idx(images_path, ndim=3), num_labels=len(labels), origin=str(images_path))
    ids = np.arange(first_id, first_id + len(labels), dtype=np.int64)
    return Pool(images=images, labels=labels, ids=ids, origin=str(images_path))
