"""The same few numbers at every stage: accuracy, nll, calibration errors, brier and the worst class.

Legend: N samples, C classes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import normalise
from compression.data.dataset import Split
from compression.errors import CompressionError, ShapeError
from compression.types import Frozen, Preprocessing

PredictFn = Callable[[Tensor], Tensor]
"""Normalised images [B,C,H,W] -> logits [B,C]; an nn.Module or, say, an inference session."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]

ECE_BINS = 15


class Metrics(Frozen):
    """How good logits are on labelled samples."""

    accuracy: Share
    """Share of samples whose largest logit is at the label."""
    nll: float
    """Mean negative log-likelihood of the label, in nats."""
    ece: Share
    """Expected calibration error, 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599)."""
    brier: float
    """Mean squared distance of the probabilities to the one-hot label, summed over classes: 0..2."""
    worst_class_accuracy: Share
    """Accuracy on the class where it is lowest, among the classes that occur."""
    num_samples: int
    """Number of samples behind these numbers."""
    ece_adaptive: Share | None = None
    """The same error in 15 bins of equally many samples; none where an older result did not measure it."""
    ece_classwise: Share | None = None
    """The error of every class probability, mean over classes; none where an older result did not measure it."""


def metrics_of(logits: Tensor, labels: Tensor) -> Metrics:
    """Return the metrics of logits [N,C] against labels int64 [N]; computed in float64.

    Raises:
        ShapeError: shapes do not fit, or there are no samples.
        CompressionError: some logits are not finite.
    """
    logits, labels = checked(logits, labels)
    probs = logits.softmax(dim=1)
    one_hot = F.one_hot(labels, logits.shape[1])
    gaps = [count * abs(confidence - accuracy) for confidence, accuracy, count in reliability(logits, labels)]
    return Metrics(
        accuracy=float((logits.argmax(dim=1) == labels).double().mean()),
        nll=float(F.cross_entropy(logits, labels)),
        ece=min(1.0, math.fsum(gaps) / len(labels)),
        brier=float((probs - one_hot).square().sum(dim=1).mean()),
        worst_class_accuracy=min(share for share in per_class_accuracy(logits, labels) if share is not None),
        num_samples=len(labels),
        ece_adaptive=adaptive_ece(logits, labels),
        ece_classwise=classwise_ece(logits, labels),
    )


def adaptive_ece(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Calibration error of the confidence in bins of equally many samples, 0..1.

    Equal-mass bins after Nguyen and O'Connor 2015 (arXiv:1508.05154) and Nixon et al. 2019 (arXiv:1904.01685): where
    nearly all samples are confident, equal-width bins put them all into one. Samples of equal confidence share a bin,
    the one of the first of them, so that the order of samples changes nothing.
    """
    logits, labels = checked(logits, labels)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    _, group, sizes = confidence.unique(return_inverse=True, return_counts=True)
    rank = (sizes.cumsum(0) - sizes)[group]
    bin_of = rank * bins // len(labels)
    gap = torch.bincount(bin_of, weights=confidence - (predicted == labels).double(), minlength=bins)
    return min(1.0, float(gap.abs().sum()) / len(labels))


def classwise_ece(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Calibration error of the probability of each class in bins of equal width, mean over classes, 0..1.

    The static calibration error of Nixon et al. 2019 (arXiv:1904.01685): it sees the probabilities of classes that
    were not predicted too, which the ECE does not.
    """
    logits, labels = checked(logits, labels)
    probs = logits.softmax(dim=1)
    num_classes = probs.shape[1]
    bin_of = (probs * bins).ceil().clamp(1, bins).long() - 1
    cell = bin_of + bins * torch.arange(num_classes)
    gap = probs - F.one_hot(labels, num_classes)
    sums = torch.bincount(cell.flatten(), weights=gap.flatten(), minlength=bins * num_classes)
    return min(1.0, float(sums.abs().sum()) / (len(labels) * num_classes))


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float | None]:
    """Accuracy on each class, in the order of the logits; none for a class that does not occur."""
    logits, labels = checked(logits, labels)
    num_classes = logits.shape[1]
    counts = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[logits.argmax(dim=1) == labels], minlength=num_classes)
    return [int(r) / int(n) if n else None for r, n in zip(right, counts, strict=True)]


def reliability(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, count) per non-empty bin of confidence, lowest bin first.

    Bins are (i/bins, (i+1)/bins], so that the weighted gaps are the ECE of :func:`metrics_of`.
    """
    logits, labels = checked(logits, labels)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    correct = (predicted == labels).double()
    bin_of = (confidence * bins).ceil().clamp(1, bins).long() - 1
    count = torch.bincount(bin_of, minlength=bins)
    confidence_sum = torch.bincount(bin_of, weights=confidence, minlength=bins)
    correct_sum = torch.bincount(bin_of, weights=correct, minlength=bins)
    return [
        (float(confidence_sum[i] / count[i]), float(correct_sum[i] / count[i]), int(count[i]))
        for i in range(bins)
        if count[i] > 0
    ]


def predict(
    model: nn.Module | PredictFn, split: Split, preprocessing: Preprocessing, *, batch_size: int = 512
) -> Tensor:
    """Return the logits of a split, float32 [N,C], on the CPU: no augmentation, no gradient.

    A module is put into eval mode for the call and given back in the modes it came in. Batches are always cut
    in the same places, so equal calls give equal bits on one machine and thread count.

    Raises:
        ShapeError: the split is empty, or the model does not return [B,C].
    """
    if len(split.labels) == 0:
        raise ShapeError("The split has 0 samples, expected at least 1. Give it a larger share.")
    parts: list[Tensor] = []
    with evaluating(model) as device, torch.inference_mode():
        for start in range(0, len(split.labels), batch_size):
            images = normalise(split.images[start : start + batch_size].to(device), preprocessing)
            if isinstance(model, nn.Module):
                images = images.contiguous(memory_format=torch.channels_last)
            logits = model(images)
            if logits.ndim != 2 or len(logits) != len(images):
                raise ShapeError(
                    f"The model's output has shape {list(logits.shape)}, expected [{len(images)}, classes]. "
                    "Wrap the model so that it returns logits alone."
                )
            parts.append(logits.to("cpu", torch.float32))
    with torch.inference_mode(False):
        return torch.cat(parts).clone()


def evaluate(
    model: nn.Module | PredictFn, split: Split, preprocessing: Preprocessing, *, batch_size: int = 512
) -> Metrics:
    """Return the metrics of a model, or of any function from normalised images to logits, on a split."""
    return metrics_of(predict(model, split, preprocessing, batch_size=batch_size), split.labels)


@contextmanager
def evaluating(model: nn.Module | PredictFn) -> Iterator[torch.device]:
    """Eval mode inside the block, and the device to feed; afterwards every submodule is in its old mode.

    Graphs made by torch.export have no modes to switch (they raise NotImplementedError): they run as they are.
    """
    if not isinstance(model, nn.Module):
        yield torch.device("cpu")
        return
    tensor = next(chain(model.parameters(), model.buffers()), None)
    modes = [(module, module.training) for module in model.modules()]
    was_training, switched = model.training, True
    try:
        model.eval()
    except NotImplementedError:
        switched = False
    try:
        yield torch.device("cpu") if tensor is None else tensor.device
    finally:
        if switched:
            model.train(was_training)
            for module, mode in modes:
                module.training = mode


def checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as float64 [N,C] and labels as int64 [N], on the CPU.

    Raises:
        ShapeError: shapes do not fit, or there are no samples.
        CompressionError: some logits are not finite, or some labels are no class.
    """
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or len(labels) == 0:
        raise ShapeError(
            f"Logits and labels have shapes {list(logits.shape)} and {list(labels.shape)}, expected [N, C] and [N] "
            "with N of at least 1. Pass the logits of the same split as the labels."
        )
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise CompressionError(
            f"Logits have {int((~finite).sum())} of {len(logits)} rows that are not finite (first: row {first}), "
            "expected finite numbers. The model diverged or overflowed: lower the learning rate, or use float32."
        )
    logits, labels = logits.detach().to("cpu", torch.float64), labels.detach().to("cpu", torch.int64)
    foreign = (labels < 0) | (labels >= logits.shape[1])
    if bool(foreign.any()):
        raise CompressionError(
            f"Labels have {int(foreign.sum())} of {len(labels)} values outside 0..{logits.shape[1] - 1} (first: "
            f"{int(labels[foreign][0])}), expected a class of the logits. Measure on a split that has labels."
        )
    return logits, labels
