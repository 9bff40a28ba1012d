"""DP4TL: only the classes that the images of another task look like.

Legend: N images of the target task or of the split, C source classes, D width of penultimate features, Q classes kept.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from compression.augment import normalise
from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.types import Helper, TeacherLogits
from compression.errors import CompressionError, ShapeError
from compression.features import frozen, penultimate
from compression.train.batches import Sampler, shuffled
from compression.types import Frozen

logger = logging.getLogger(__name__)

CHUNK = 512
"""Images that the surrogate sees at a time, and rows of distances in memory."""

Mapping = Literal["label", "feature"]


def label_votes(probs: Tensor) -> Tensor:
    """Return how many of the rows of ``probs`` [N,C] have their largest entry at each class, int64 [C]."""
    return torch.bincount(probs.argmax(dim=1), minlength=probs.shape[1])


def feature_votes(features: Tensor, means: Tensor) -> Tensor:
    """Return how many of ``features`` [N,D] lie nearest to each of the class means [C,D], int64 [C].

    A mean of NaN is that of a class without samples, and nobody's nearest.
    """
    votes = torch.zeros(len(means), dtype=torch.int64)
    for rows in features.double().split(CHUNK):
        distance = torch.cdist(rows, means.double(), compute_mode="donot_use_mm_for_euclid_dist")
        votes += torch.bincount(distance.nan_to_num(nan=torch.inf).argmin(dim=1), minlength=len(means))
    return votes


def label_mapping(probs: Tensor) -> Tensor:
    """Return all source classes, int64 [C], in the order in which they are kept.

    Zhang et al. 2023 (arXiv:2310.08782), label mapping: the class that a classifier of the source predicts for most
    images of the target comes first. Ties, above all those of classes that are never predicted, go to the larger
    mean probability.

    Args:
        probs: [N,C], the source classifier's on target images.
    """
    return _ordered(label_votes(probs), probs)


def feature_mapping(features: Tensor, means: Tensor, probs: Tensor) -> Tensor:
    """Return all source classes, int64 [C], in the order in which they are kept.

    Zhang et al. 2023 (arXiv:2310.08782), feature mapping: the class whose mean feature is the nearest to most images of
    the target comes first. Each image votes for a class; the authors' script writes to the place of the image. Ties
    go to the larger mean probability.

    Args:
        features: [N,D], penultimate, of target images.
        means: [C,D], of the source classes; NaN for a class without samples.
        probs: [N,C], the source classifier's on target images.
    """
    return _ordered(feature_votes(features, means), probs)


def _ordered(votes: Tensor, probs: Tensor) -> Tensor:
    likely = probs.double().mean(dim=0).argsort(descending=True, stable=True)
    return likely[votes[likely].argsort(descending=True, stable=True)]


def read_target(path: Path, input_shape: tuple[int, int, int]) -> Tensor:
    """Return the raw images [N,C,H,W] of an .npz file's array ``images``, [N,H,W] or [N,C,H,W].

    Raises:
        CompressionError: there is no such array, or it has no images or no numbers.
        ShapeError: images of another size than ``input_shape`` (channels, height, width).
    """
    try:
        images = np.load(path, allow_pickle=False)["images"]
    except (OSError, ValueError, KeyError, IndexError, EOFError, BadZipFile) as error:
        raise CompressionError(
            f"Target '{path}' has no array 'images' that reads ({error}), expected an .npz file with one. "
            "Save it with numpy.savez(path, images=...)."
        ) from error
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1:] != input_shape:
        raise ShapeError(
            f"Target '{path}' has images of shape {list(images.shape)}, expected N of {list(input_shape)} as the "
            "data's. Resize them."
        )
    if len(images) == 0 or images.dtype.kind not in "uif":
        raise CompressionError(
            f"Target '{path}' has {len(images)} images of type {images.dtype}, expected at least 1 of numbers. "
            "Save raw pixel values, on the scale of the data's."
        )
    return torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))


class ClassSubsetSampler(Helper):
    """All samples of the Q classes that the target's images look like most; shuffled anew in each epoch.

    Zhang et al. 2023 (arXiv:2310.08782). Their surrogate is a small classifier trained for the purpose; ours is the
    first teacher of the panel. The student keeps an output for every class, and is measured on all of them.
    """

    kept: Tensor

    def __init__(self, *, mapping: Mapping, keep_classes: int, target: Path) -> None:
        super().__init__()
        self.mapping, self.keep_classes, self.target = mapping, keep_classes, target
        self.register_buffer("kept", torch.full((keep_classes,), -1, dtype=torch.int64))
        self._size = 0

    @property
    def name(self) -> str:
        """Kind, fields, and the classes found."""
        return f"dp4tl:{self.mapping}:{self.keep_classes}:{','.join(map(str, sorted(self.kept.tolist())))}"

    def look(self, panel: Sequence[TeacherLogits], teachers: Sequence[nn.Module], dataset: Dataset) -> None:
        """Choose the classes; ``panel`` is not looked at. Mode and gradients of the teacher are given back.

        Raises:
            CompressionError: no live teacher, no usable target, more classes to keep than there are, or none of them
                has a sample.
            ShapeError: the target's images have another size than the data's.
        """
        del panel
        if not teachers:
            raise CompressionError(
                "Sampler 'dp4tl' has 0 live teachers, expected at least 1, whose predictions choose the classes. "
                "Give the models, or take another sampler."
            )
        if self.keep_classes > dataset.num_classes:
            raise CompressionError(
                f"Sampler 'dp4tl' has keep_classes {self.keep_classes}, expected at most {dataset.num_classes}, the "
                f"classes of data set '{dataset.name}'. Lower sampler.keep_classes."
            )
        order = self._order(teachers[0], read_target(self.target, dataset.input_shape), dataset)
        self.kept.copy_(order[: self.keep_classes])
        self._size = int(self._mask(dataset.train.labels).sum())
        if self._size == 0:
            raise CompressionError(
                f"Sampler 'dp4tl' has 0 labelled samples in the {self.keep_classes} classes it keeps, expected some. "
                "Raise sampler.keep_classes, or give labels."
            )
        names = ", ".join(dataset.class_names[each] for each in self.kept.tolist())
        logger.info("Kept %d of %d samples, of classes %s.", self._size, len(dataset.train.labels), names)

    def _order(self, surrogate: nn.Module, target: Tensor, dataset: Dataset) -> Tensor:
        found = [(logits.softmax(dim=1), features) for logits, features in _seen(surrogate, target, dataset)]
        probs = torch.cat([each for each, _ in found])
        if self.mapping == "label":
            return label_mapping(probs)
        return feature_mapping(torch.cat([each for _, each in found]), class_means(surrogate, dataset), probs)

    def size(self, n: int) -> int:
        """Return the number of samples of the kept classes.

        Raises:
            CompressionError: nothing has been looked at yet.
        """
        del n
        if self._size == 0:
            raise CompressionError("Sampler 'dp4tl' has chosen 0 classes, expected some. Call its look first.")
        return self._size

    def indices(self, epoch: int, labels: Tensor, seed: int) -> Tensor:
        """Return the samples of the kept classes, int64 [size], in the order of the epoch."""
        rows = self._mask(labels).nonzero().squeeze(1)
        return rows[shuffled(len(rows), seed=seed, epoch=epoch)]

    def _mask(self, labels: Tensor) -> Tensor:
        return torch.isin(labels, self.kept.to(labels.device))


def class_means(model: nn.Module, dataset: Dataset) -> Tensor:
    """Return the mean penultimate feature [C,D], float64, of each class of the plain train split; NaN where none."""
    labels, sums = dataset.train.labels, None
    labelled = labels >= 0
    for chosen, (_, features) in zip(
        torch.arange(len(labels)).split(CHUNK), _seen(model, dataset.train.images, dataset), strict=True
    ):
        if sums is None:
            sums = torch.zeros(dataset.num_classes, features.shape[1], dtype=torch.float64)
        mask = labelled[chosen]
        sums.index_add_(0, labels[chosen][mask], features[mask].double())
    assert sums is not None
    return sums / torch.bincount(labels[labelled], minlength=dataset.num_classes).unsqueeze(-1)


def _seen(model: nn.Module, images: Tensor, dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B,C] and penultimate features [B,D] of raw images, chunk by chunk, float32 on the CPU."""
    device = next(model.parameters(), torch.zeros(0)).device
    for raw in images.split(CHUNK):
        inputs = normalise(raw.to(device), dataset.preprocessing).contiguous(memory_format=torch.channels_last)
        with frozen(model), torch.no_grad():
            logits, features = penultimate(model, inputs)
        yield logits.float().cpu(), features.cpu()


class ClassSubset(Frozen):
    """The classes that the images of a target task look like."""

    kind: Literal["dp4tl"] = "dp4tl"
    mapping: Mapping = "label"
    """What an image of the target votes with: ``label`` the class predicted for it, ``feature`` the nearest class
    mean."""
    keep_classes: Annotated[int, Field(gt=0)] = 5
    """How many classes are kept, with all their samples; not to be tuned on the target's test data."""
    target: Path | None = None
    """An .npz file whose array ``images`` holds raw images of the target task, [N,H,W] or [N,C,H,W], of the data's size
    and scale. It must be given."""

    needs_teachers: ClassVar[bool] = True
    """Whether the teachers themselves are asked which samples to show."""
    adaptive: ClassVar[bool] = False
    """Whether the choice looks at the student or at what the teachers said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Class subset for a target task (DP4TL)",
        paper="Zhang et al. 2023, Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer "
        "Learning, arXiv:2310.08782",
        summary="Asks the first teacher what the images of another task look like and keeps the classes named most "
        "often. For a student that will be tuned for that task: on the classes left out it learns nothing.",
        needs="Unlabelled images of the target task, labels, and the first teacher itself.",
        cost="One pass of the teacher over the target's images, with `feature` one over the train split too; then an "
        "epoch takes the kept classes' share of the steps.",
        evidence="The paper reports that 40 to 80 % of ImageNet's classes can go without loss downstream, and "
        "pre-training 2 to 5 times as fast. Not measured on our data yet.",
    )

    def build(self) -> Sampler:
        """Return the sampler, which must ``look`` before it is used.

        Raises:
            CompressionError: no target is given.
        """
        if self.target is None:
            raise CompressionError(
                "Sampler 'dp4tl' has no target, expected an .npz file with images of the target task. "
                "Set sampler.target."
            )
        return ClassSubsetSampler(mapping=self.mapping, keep_classes=self.keep_classes, target=self.target)
