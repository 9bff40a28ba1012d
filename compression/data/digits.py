"""The 1797 handwritten digits that ship inside scikit-learn: 8 x 8 pixels, 17 grey levels."""

from functools import partial
from typing import Literal

import numpy as np

from compression.data.source import DataConfig, Pool, ReadFn, Source, checked_images, checked_labels
from compression.data.splits import SplitConfig


class Digits(DataConfig):
    """Real data that needs no download; whole pipelines run on it in minutes."""

    kind: Literal["digits"] = "digits"
    split: SplitConfig = SplitConfig()

    def build(self) -> ReadFn:
        """Return the function that reads the source."""
        return partial(_read, self)

    def check(self) -> None:
        """Nothing to check: the data comes with scikit-learn."""


def _read(config: Digits, seed: int) -> Source:
    from sklearn.datasets import load_digits

    features, target = load_digits(return_X_y=True)
    images = np.asarray(features).reshape(-1, 8, 8).astype(np.uint8)
    labels = checked_labels(np.asarray(target), num_classes=10, origin="digits")
    pool = Pool(
        images=checked_images(images, num_labels=len(labels), origin="digits"),
        labels=labels,
        ids=np.arange(len(labels), dtype=np.int64),
        origin="digits",
    )
    return Source("digits", tuple(str(i) for i in range(10)), train=pool, test=None, scale=16.0)
