"""Running statistics of batch norm for weights that were not trained but computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression.augment import AnyAugment, NoAugment, normalise
from compression.augment import augment as augmented
from compression.data.dataset import Dataset
from compression.train.batches import shuffled

BATCH = 256
"""Images per forward pass; of a remainder no statistics are taken."""


def reestimate_batch_norm(
    model: nn.Module, dataset: Dataset, *, images: int = 2048, augment: AnyAugment | None = None, seed: int = 0
) -> None:
    """Replace the running statistics of ``model`` by those of train images; nothing happens without batch norm.

    Mean and variance are averages over batches in which every batch norm uses the statistics of the batch, as in
    training; everything else is in inference mode. Modes, weights, the count of batches and the random state are left
    alone.

    Args:
        model: changed in place.
        dataset: its train split is looked at.
        images: how many, the same every time; all of the split if it has fewer.
        augment: changes the images, as in training; plain ones when None.
        seed: of their views.
    """
    norms = [norm for norm in _norms(model) if norm.track_running_stats]
    if not norms:
        return
    kept = [
        (norm, norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    rows = shuffled(len(dataset.train.labels), seed=0, epoch=0)[:images]
    device = next(chain(model.parameters(), model.buffers())).device
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
        with batch_statistics(model), torch.no_grad():
            size = min(BATCH, len(rows))
            for start in range(0, len(rows) - size + 1, size):
                chosen = rows[start : start + size]
                raw, ids = dataset.train.images[chosen].to(device), dataset.train.ids[chosen]
                raw = augmented(raw, ids, view=0, seed=seed, config=augment or NoAugment())
                model(normalise(raw, dataset.preprocessing).contiguous(memory_format=torch.channels_last))
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """Batch norm in training mode, everything else in inference mode; afterwards every mode is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for norm in _norms(model):
            norm.training = True
        yield model
    finally:
        for module, training in modes:
            module.training = training


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
