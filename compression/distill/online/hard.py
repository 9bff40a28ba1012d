"""HARD: a learned spatial transform turns images to where student and teachers disagree.

Legend: K teachers, B batch, C classes, M changed rows.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import divergence
from compression.distill.online.base import Changed, OnlineAugment
from compression.errors import CompressionError
from compression.features import frozen
from compression.types import Batch, Frozen

NUMBERS = 4
"""Of a transform: rotation, shift to the side, shift down, scale; each in -1..1, in units of its limit."""
LOCATION_LIMIT, LOG_SPREAD_LIMITS = 3.0, (-4.0, 1.0)
"""Within which the distribution may move: neither a point nor so wide that only the limits come up."""
DECAYS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam (Kingma and Ba 2014, arXiv:1412.6980)."""


def transformed(images: Tensor, numbers: Tensor, *, rotation_degrees: float, shift: float, scale: float) -> Tensor:
    """Return the images [B,C,H,W] turned, moved and scaled; edges are drawn out over what comes in.

    Differentiable in ``numbers``. A row of zeros returns its image bit for bit: resampling would round.

    Args:
        images: [B,C,H,W].
        numbers: [B,4], each in -1..1.
        rotation_degrees: turn at 1.
        shift: move at 1, as a share of the image's side.
        scale: the image is ``1 + scale`` times as large at 1, and ``1 - scale`` at -1.
    """
    angle = numbers[:, 0] * math.radians(rotation_degrees)
    height, width = images.shape[-2:]
    size = 1 + scale * numbers[:, 3]
    cos, sin = angle.cos() / size, angle.sin() / size
    # From places in the result to places in the image, in units of half a side: shares count twice.
    to_side = torch.stack([cos, -sin * (height / width), -2 * shift * numbers[:, 1]], dim=-1)
    down = torch.stack([sin * (width / height), cos, -2 * shift * numbers[:, 2]], dim=-1)
    grid = F.affine_grid(torch.stack([to_side, down], dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
    still = (numbers == 0).all(dim=1).view(-1, 1, 1, 1)
    return torch.where(still, images, moved)


def drawn(distribution: Tensor, noise: Tensor) -> Tensor:
    """Return tanh(location + exp(log spread) * noise), in -1..1, for ``distribution`` [2,4] and noise [B,4]."""
    return torch.tanh(distribution[0] + distribution[1].exp() * noise)


def log_mixture_of(teachers: Sequence[nn.Module], images: Tensor) -> Tensor:
    """Log-probabilities [B,C], float32, of the equal mixture of the teachers."""
    each = torch.stack([F.log_softmax(teacher(images).float(), dim=-1) for teacher in teachers])
    return torch.logsumexp(each, dim=0) - math.log(len(teachers))


class SpatialAugmentor(OnlineAugment):
    """Shows some rows of each batch as transformed by numbers drawn from a distribution that is learnt.

    Nix, Burg and Sinz 2023 (arXiv:2305.14890); from the abstract, the loop is ours. The distribution ascends
    D - mu * KL(teachers on the clean image || teachers on the transformed one), where D is KL(teachers || student)
    on the transformed image: it looks for images that the student gets wrong and the teachers still recognise.
    Teachers count equally. Each number is a squashed Gaussian, so the limits hold whatever is learnt.

    D also says whose turn it is. Under ``lower`` the distribution learns until D is over ``upper``, then it rests; the
    student learns in every step, as its optimiser is not ours to stop. Both look at the images in inference mode, in
    float32, and get no gradient; the Adam of the distribution keeps its moments in buffers, which are part of
    checkpoints.
    """

    distribution: nn.Parameter
    first: Tensor
    second: Tensor
    steps: Tensor
    learning: Tensor

    def __init__(
        self,
        *,
        share: float,
        learning_rate: float,
        keep_label: float,
        lower: float,
        upper: float,
        rotation_degrees: float,
        shift: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.share, self.learning_rate, self.keep_label = share, learning_rate, keep_label
        self.lower, self.upper = lower, upper
        self.rotation_degrees, self.shift, self.scale = rotation_degrees, shift, scale
        start = torch.zeros(2, NUMBERS)
        start[1] = math.log(0.5)
        self.distribution = nn.Parameter(start)
        self.register_buffer("first", torch.zeros_like(start))
        self.register_buffer("second", torch.zeros_like(start))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("learning", torch.zeros((), dtype=torch.bool))

    def self_trained(self) -> list[nn.Parameter]:
        """The distribution of transforms."""
        return [self.distribution]

    def changed(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return images [M,C,H,W] under the transforms that ``noise`` [M,4] makes of the distribution."""
        return transformed(
            images,
            drawn(self.distribution, noise),
            rotation_degrees=self.rotation_degrees,
            shift=self.shift,
            scale=self.scale,
        )

    def disagreement(
        self, images: Tensor, noise: Tensor, student: nn.Module, teachers: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """Return D, the mean over images [M,C,H,W] in nats, and what the teachers say, log-probabilities [M,C]."""
        shown = self.changed(images, noise)
        theirs = log_mixture_of(teachers, shown)
        return divergence(theirs, F.log_softmax(student(shown).float(), dim=-1)).mean(), theirs

    def objective(
        self, images: Tensor, noise: Tensor, student: nn.Module, teachers: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """Return what the distribution ascends, and D."""
        disagreement, theirs = self.disagreement(images, noise, student, teachers)
        with torch.no_grad():
            clean = log_mixture_of(teachers, images)
        return disagreement - self.keep_label * divergence(clean, theirs).mean(), disagreement

    def forward(self, batch: Batch, student: nn.Module, teachers: Sequence[nn.Module]) -> Changed:
        """Let the distribution learn if it is its turn, and return the batch with ``share`` of its rows transformed.

        Labels stay: the limits are to keep an image what it is.

        Raises:
            CompressionError: there are no teachers.
        """
        if not teachers:
            raise CompressionError(
                "Augmentation 'hard' has 0 teachers, expected at least 1. Give the models, not what they said."
            )
        size, device = len(batch.labels), batch.images.device
        rows = torch.randperm(size)[: math.floor(self.share * size + 1e-9 * size)].to(device)
        noise = torch.randn(len(rows), NUMBERS).to(device)
        if len(rows) == 0:
            return Changed(batch.images, batch.labels)
        images = batch.images[rows]
        with _at_rest([_bare(student), *teachers]) as (looked_at, *asked):
            disagreement = self._learnt(images, noise, looked_at, asked)
        self.learning.copy_(disagreement <= self.upper if self.learning else disagreement < self.lower)
        shown = batch.images.clone()
        with torch.no_grad():
            shown[rows] = self.changed(images, noise).to(shown.dtype)
        return Changed(shown, batch.labels)

    def _learnt(self, images: Tensor, noise: Tensor, student: nn.Module, teachers: Sequence[nn.Module]) -> Tensor:
        """D before the step that is taken if it is the distribution's turn."""
        if not self.learning:
            with torch.no_grad():
                return self.disagreement(images, noise, student, teachers)[0]
        with torch.enable_grad():
            objective, disagreement = self.objective(images, noise, student, teachers)
        self._ascend(torch.autograd.grad(objective, self.distribution)[0])
        return disagreement.detach()

    @torch.no_grad()
    def _ascend(self, gradient: Tensor) -> None:
        self.steps += 1
        count = int(self.steps)
        self.first.lerp_(gradient, 1 - DECAYS[0])
        self.second.lerp_(gradient.square(), 1 - DECAYS[1])
        mean = self.first / (1 - DECAYS[0] ** count)
        length = (self.second / (1 - DECAYS[1] ** count)).sqrt() + EPSILON
        self.distribution.add_(self.learning_rate * mean / length)
        self.distribution[0].clamp_(-LOCATION_LIMIT, LOCATION_LIMIT)
        self.distribution[1].clamp_(*LOG_SPREAD_LIMITS)


@contextmanager
def _at_rest(models: Sequence[nn.Module]) -> Iterator[Sequence[nn.Module]]:
    """All in inference mode and without gradients to their parameters; afterwards each as it was."""
    with ExitStack() as stack:
        yield [stack.enter_context(frozen(model)) for model in models]


def _bare(model: nn.Module) -> nn.Module:
    """The model without the trainer's wrapper, which wants to run every backward pass itself."""
    from lightning_fabric import is_wrapped

    return model.module if is_wrapped(model) else model  # type: ignore[return-value]


class Hard(Frozen):
    """Some images of each batch are turned, moved and scaled to where the student is wrong."""

    kind: Literal["hard"] = "hard"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of each batch that is transformed, rounded down; the rest stays clean."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Of the distribution of transforms."""
    keep_label: Annotated[float, Field(ge=0)] = 1.0
    """How much the distribution is held to images of which the teachers say the same as of the clean one (mu)."""
    lower: Annotated[float, Field(ge=0)] = 0.1
    """Disagreement, in nats, under which the distribution begins to learn."""
    upper: Annotated[float, Field(gt=0)] = 0.5
    """Disagreement, in nats, over which it rests again."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 30.0
    """Largest turn either way."""
    shift: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest move, as a share of the image's side."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest change of size: 0.2 gives 0.8 to 1.2."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Hard augmentations (HARD)",
        paper="Nix, Burg, Sinz 2023, HARD: Hard Augmentations for Robust Distillation, arXiv:2305.14890",
        summary="Learns which small turns, moves and changes of scale make the student disagree with teachers that "
        "still recognise the image, and shows half of each batch like that. The loop is ours; the authors released "
        "no code.",
        needs="The teachers themselves, and images whose class such transforms do not change.",
        cost="Two to three times the forward and backward passes of a step with live teachers.",
        evidence="Measured on our data: see `measured`.",
    )

    @model_validator(mode="after")
    def _range(self) -> "Hard":
        if self.lower >= self.upper:
            raise ValueError(f"hard has lower {self.lower} and upper {self.upper}, expected less. Lower lower.")
        return self

    def build(self) -> OnlineAugment:
        """Return the augmentation."""
        return SpatialAugmentor(
            share=self.share,
            learning_rate=self.learning_rate,
            keep_label=self.keep_label,
            lower=self.lower,
            upper=self.upper,
            rotation_degrees=self.rotation_degrees,
            shift=self.shift,
            scale=self.scale,
        )
