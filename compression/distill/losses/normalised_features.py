"""Normalised features: stages of the student follow the teachers', each measured by the size of the teacher's.

Legend: K teachers, B batch, D width of a student's map, Dt of a teacher's, H and W its height and width, N positions,
P pairs of stages.
"""

from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.errors import ShapeError
from compression.features import image_of, tokens_of
from compression.types import Frozen, Outputs, TeacherOutputs

EPSILON = 1e-6
"""Keeps the quotient finite where a teacher's map is 0."""

MapShape = tuple[int, ...]
"""Of a map without its batch: [D,H,W] or [N,D]."""

Item = TypeVar("Item")


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps as tokens [B,N,D] and [B,N,Dt] of the same positions.

    Tokens against an image of as many positions are compared row by row. Otherwise both are images, and on each side
    the larger one is averaged down to the smaller (adaptive average pooling).

    Raises:
        ShapeError: tokens would have to be pooled and do not make a square.
    """
    if student.ndim == teacher.ndim == 4:
        same = student.shape[2:] == teacher.shape[2:]
    else:
        same = tokens_of(student).shape[1] == tokens_of(teacher).shape[1]
    if not same:
        student, teacher = image_of(student), image_of(teacher)
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    return tokens_of(student), tokens_of(teacher)


def square_distance(student: Tensor, teacher: Tensor, mean_square: Tensor) -> Tensor:
    """Return mean((student - teacher)^2) / (mean_square + 1e-6) per sample, [B].

    The maps are [B,N,Dt]; ``mean_square`` is that of the teacher's, a scalar.
    """
    return (student - teacher).square().mean(dim=(1, 2)) / (mean_square + EPSILON)


class StageDistances(Helper):
    """The loss of the student's stages against the teachers', in float32 under autocast too.

    Zhang et al. 2024 (arXiv:2404.11098), who prune the layers of a U-Net and weigh its feature losses by the norms of
    the teacher's maps, lest the largest stage drown the others; the exact weight is ours. A stage counts 1 where the
    student's map is 0, and as much as before when both maps are scaled. Teachers count with their weights per sample.
    No gradient reaches the teachers. The logits of the student are not looked at, so that its classifier learns from
    the other terms.

    Ours beyond students of the teacher's own shapes: stages are paired from the last one backwards, so that the first
    ones of the network with more of them are left out; positions are brought together by ``matched``; and where a
    teacher is wider or narrower, the student's map passes through a linear layer of that teacher and stage.
    """

    def __init__(self, *, running: bool) -> None:
        super().__init__()
        self.running = running

    def prepare(self, shapes: Shapes) -> None:
        """Make the linear layers, and room for running means.

        Raises:
            ShapeError: there are no maps, or two that are paired cannot be brought to the same positions.
        """
        if not shapes.student_maps or not shapes.teacher_maps or not all(shapes.teacher_maps):
            raise ShapeError(
                f"Loss 'normalised_features' has {len(shapes.student_maps)} maps of the student and "
                f"{[len(maps) for maps in shapes.teacher_maps]} of its teachers, expected at least 1 of each network. "
                "Take networks with stages, or a loss that compares logits."
            )
        self.student_maps, self.teacher_maps = shapes.student_maps, shapes.teacher_maps
        self.projectors = nn.ModuleList(
            nn.ModuleList(_projector(ours, theirs) for ours, theirs in _from_the_end(shapes.student_maps, maps))
            for maps in shapes.teacher_maps
        )
        if self.running:
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
            for number, maps in enumerate(shapes.teacher_maps):
                pairs = min(len(shapes.student_maps), len(maps))
                self.register_buffer(f"mean_squares_{number}", torch.zeros(pairs))

    def mean_squares(self, number: int) -> Tensor:
        """Running means [P] of a teacher's mean squares, first pair first."""
        return self.get_buffer(f"mean_squares_{number}")

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, mean over the batch and over pairs of stages.

        Args:
            student: maps, each [B,D,H,W] or [B,N,D].
            teachers: maps, K tuples of them; weights [K,B].
            labels: unused.

        Raises:
            ShapeError: the maps have other shapes than announced.
        """
        del labels
        self._check(student, teachers)
        learns = self.running and self.training and self.progress.epoch == 0
        if learns:
            self.get_buffer("batches").add_(1)
        with torch.autocast(student.logits.device.type, enabled=False):
            losses = [
                self._distances(number, _from_the_end(student.maps, maps), learns=learns)
                for number, maps in enumerate(teachers.maps)
            ]
        return (widened(teachers.weights.detach()) * torch.stack(losses)).sum(dim=0).mean()

    def _distances(self, number: int, maps: list[tuple[Tensor, Tensor]], *, learns: bool) -> Tensor:
        """Distances [B] of one teacher, mean over pairs."""
        pairs = [matched(widened(ours), widened(theirs.detach())) for ours, theirs in maps]
        sizes = torch.stack([theirs.square().mean() for _, theirs in pairs])
        if self.running:
            sizes = self._running(number, sizes, learns=learns)
        projectors = self.projectors[number]
        assert isinstance(projectors, nn.ModuleList)
        distances = [
            square_distance(projector(ours), theirs, size)
            for projector, (ours, theirs), size in zip(projectors, pairs, sizes, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)

    def _running(self, number: int, sizes: Tensor, *, learns: bool) -> Tensor:
        """The running means with this batch; the batch's own ``sizes`` [P] before the first one has been seen."""
        means, batches = self.mean_squares(number), self.get_buffer("batches")
        if learns:
            means += (sizes - means) / batches
        return torch.where(batches > 0, means, sizes)

    def _check(self, student: Outputs, teachers: TeacherOutputs) -> None:
        found = (_shapes(student.maps), tuple(_shapes(maps) for maps in teachers.maps))
        wanted = (self.student_maps, self.teacher_maps)
        if found != wanted:
            raise ShapeError(
                f"Maps of student and teachers have shapes {found}, expected {wanted}. Use the networks and the image "
                "size the loss was prepared for."
            )


def _from_the_end(student: tuple[Item, ...], teacher: tuple[Item, ...]) -> list[tuple[Item, Item]]:
    """Pairs in order: last with last, as many as the shorter tuple has."""
    count = min(len(student), len(teacher))
    return list(zip(student[-count:], teacher[-count:], strict=True))


def _projector(student: MapShape, teacher: MapShape) -> nn.Module:
    """From the student's width to the teacher's, on tokens; nothing where they are the same."""
    ours, theirs = matched(*(torch.empty(1, *shape, device="meta") for shape in (student, teacher)))
    width, wanted = ours.shape[2], theirs.shape[2]
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)


def _shapes(maps: tuple[Tensor, ...]) -> tuple[MapShape, ...]:
    return tuple(tuple(each.shape[1:]) for each in maps)


class NormalisedFeatures(Frozen):
    """Distance of the student's stages from the teachers', relative to the size of the teachers' maps."""

    kind: Literal["normalised_features"] = "normalised_features"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum; the term is about 1 at a student that knows nothing."""
    running: bool = False
    """Measure by the mean over the batches of the first epoch, kept from then on, instead of by each batch; steadier
    when batches are small."""

    needs: ClassVar[Needs] = Needs(
        student_maps=True, teacher_maps=True, another_term="it shapes features and trains no classifier"
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Normalised feature distillation (LAPTOP-Diff)",
        paper="Zhang et al. 2024, LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion "
        "Models, arXiv:2404.11098",
        summary="Pulls the outputs of the student's stages to the teachers', each measured by the size of the "
        "teacher's, so that no stage drowns the others. Made for students that are their teacher with layers taken "
        "out; others are matched by pooling and linear layers.",
        needs="Live teachers, outputs of the stages of all networks, and another term that trains the student's "
        "classifier, say kd. No labels.",
        cost="A forward pass of every teacher in every step, and during training a linear layer per stage of another "
        "width.",
        evidence="For diffusion models at half size the paper reports a PickScore 4.0 % lower where other ways to "
        "prune and distil lose at least 8.2 %. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return StageDistances(running=self.running)
