"""The few types every layer shares."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints
from torch import Tensor

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
"""A name that may be part of a path: lower case, digits and dashes."""


class Frozen(BaseModel):
    """Base of every config and handle: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Preprocessing(Frozen):
    """How a raw image becomes a model input: ``(image / scale - mean) / std`` per channel."""

    scale: float
    """Largest raw value, e.g. 255 for bytes."""
    mean: tuple[float, ...]
    """One number per channel, after division by ``scale``."""
    std: tuple[float, ...]
    """One number per channel, after division by ``scale``."""


class TensorSpec(Frozen):
    """Name, shape and type of a tensor; -1 is a dynamic size."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


UNKNOWN = -3e4
"""Logit of a class that a teacher does not know; finite in float16, and its probability rounds to 0."""


def known(logits: Tensor) -> Tensor:
    """Whether the teacher knows the class, bool, of the shape of ``logits``."""
    return logits > UNKNOWN / 2


@dataclass(frozen=True)
class Outputs:
    """What one model gave for one batch; the only thing losses see.

    ``logits`` is [batch, classes]; ``features`` maps logical names (``penultimate``) to tensors; ``maps`` are the
    outputs of the stages, first stage first, images [batch, width, height, width of image] or tokens
    [batch, tokens, width]. Features and maps are there when a loss needs them.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    maps: tuple[Tensor, ...] = ()

    def rows(self, chosen: Tensor) -> "Outputs":
        """The outputs for some samples of the batch, by position int64 or mask bool."""
        return Outputs(
            logits=self.logits[chosen],
            features={name: each[chosen] for name, each in self.features.items()},
            maps=tuple(each[chosen] for each in self.maps),
        )


@dataclass(frozen=True)
class TeacherOutputs:
    """What a panel of K teachers gave for one batch, and how much each counts per sample.

    ``logits`` is [teachers, batch, classes], float32, no gradient; ``weights`` is [teachers, batch],
    non-negative, and sums to 1 over teachers; ``features`` holds the penultimate features of each teacher,
    [batch, its width], and ``maps`` the outputs of its stages, when a loss needs them; ``ids`` int64 [batch] are the
    samples. A class that a teacher does not know has the logit ``UNKNOWN``.
    """

    logits: Tensor
    weights: Tensor
    features: tuple[Tensor, ...] = ()
    maps: tuple[tuple[Tensor, ...], ...] = ()
    ids: Tensor | None = None

    def probs(self, temperature: float = 1.0) -> Tensor:
        """Mixture of the softened teacher distributions, [batch, classes]."""
        softened = (self.logits / temperature).softmax(dim=-1)
        return (self.weights.unsqueeze(-1) * softened).sum(dim=0)

    def rows(self, chosen: Tensor) -> "TeacherOutputs":
        """The outputs for some samples of the batch, by position int64 or mask bool."""
        return TeacherOutputs(
            logits=self.logits[:, chosen],
            weights=self.weights[:, chosen],
            features=tuple(each[chosen] for each in self.features),
            maps=tuple(tuple(each[chosen] for each in stages) for stages in self.maps),
            ids=None if self.ids is None else self.ids[chosen.to(self.ids.device)],
        )


@dataclass(frozen=True)
class Batch:
    """One training batch: normalised images [B,C,H,W], labels [B] (int64), sample ids [B] (int64).

    A label of -1 must not be learnt from: the sample has none, or its image was mixed with another one.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    view: int
    """Which augmented view of the samples this is; with the ids it keys cached teacher outputs."""
    epoch: int
    step: int
