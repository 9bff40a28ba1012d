"""Datasets: four sources, seeded stratified splits, hashes, and a memory-mapped form on disk."""

from compression.data.arrays import Arrays
from compression.data.dataset import (
    Dataset,
    Split,
    check_source,
    load_dataset,
    open_dataset,
    save_dataset,
    with_pool,
    without_labels,
)
from compression.data.digits import Digits
from compression.data.fashion_mnist import FashionMnist
from compression.data.image_folder import ImageFolder

AnyData = Digits | FashionMnist | ImageFolder | Arrays
"""What a recipe may name under ``data``."""

__all__ = [
    "AnyData",
    "Arrays",
    "Dataset",
    "Digits",
    "FashionMnist",
    "ImageFolder",
    "Split",
    "check_source",
    "load_dataset",
    "open_dataset",
    "save_dataset",
    "with_pool",
    "without_labels",
]
