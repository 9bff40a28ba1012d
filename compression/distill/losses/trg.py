"""TRG: patches of a batch are nodes of a graph, and the student's graph follows the teachers'.

Legend: K teachers, B batch, C classes, G tokens of an image on the common grid, n nodes, D width of the student's last
map, Dt of a teacher's.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import check_classes, divergence
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.errors import ShapeError
from compression.features import image_of, tokens_of
from compression.types import Frozen, Outputs, TeacherOutputs


def squared_distances(nodes: Tensor) -> Tensor:
    """Return the squared distances [n,n] of nodes [n,D], exactly 0 from a node to itself."""
    centred = nodes - nodes.mean(dim=0)  # products of far-off vectors would cancel
    norms = centred.square().sum(dim=-1)
    distances = (norms.unsqueeze(1) + norms - 2 * centred @ centred.T).clamp(min=0)
    return distances.masked_fill(_itself(distances), 0.0)


def spread(distances: Tensor) -> Tensor:
    """Return the median of the distances [n,n] between different nodes, without gradient; 1 where all are 0.

    It is at least a hundredth of their mean: of many patches alike, say of an empty background, the median is 0.
    """
    apart = distances.detach()[~_itself(distances)]
    if len(apart) == 0 or not bool(apart.any()):
        return distances.new_ones(())
    return torch.maximum(apart.median(), apart.mean() / 100)


def affinities(distances: Tensor, *, neighbours: int, scale: Tensor) -> Tensor:
    """Return exp(-distance / (2 scale)) [n,n] where row i is among the nearest ``neighbours`` of column j, else 0.

    A node is no neighbour of its own; of others equally far all count, so that the order of nodes does not matter.
    """
    others = distances.detach().masked_fill(_itself(distances), float("inf"))
    count = min(neighbours, len(distances) - 1)
    if count < 1:
        return torch.zeros_like(distances)
    near = others <= others.kthvalue(count, dim=0).values
    return torch.exp(-distances / (2 * scale)) * near


def local_term(student: Tensor, teacher: Tensor, *, neighbours: int) -> Tensor:
    """Return KL(teacher || student) between softmaxes of rows of their affinities, per node [n], in nats.

    Nodes are [n,D] and [n,Dt], each side with its own neighbours and spread. The softmax is over all n, zeros
    included, so that a node without neighbours has a distribution too.
    """
    rows = []
    for nodes in (teacher, student):
        distances = squared_distances(nodes)
        graph = affinities(distances, neighbours=neighbours, scale=spread(distances))
        rows.append(F.log_softmax(graph, dim=-1))
    return divergence(rows[0], rows[1])


def global_term(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return InfoNCE per node [n], in nats: a student's node [n,P] is to find the teacher's [n,P] by its cosine."""
    cosines = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T
    targets = torch.arange(len(cosines), device=cosines.device)
    return F.cross_entropy(cosines / temperature, targets, reduction="none")


def inner_term(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of softmax(F F^T / sqrt(width)) per image [B].

    Tokens F are [B,G,D] and [B,G,Dt]; only the positions of one image meet.
    """
    context = [(each @ each.transpose(1, 2) / math.sqrt(each.shape[-1])).softmax(dim=-1) for each in (student, teacher)]
    return (context[0] - context[1]).square().mean(dim=(1, 2))


class TokenGraph(Helper):
    """alpha inner + beta local + gamma global over the last maps of student and teachers, float32 under autocast too.

    Zhang, Liu and He 2023 (arXiv:2306.12442), after summaries of the paper: the constants, the spread of the
    affinities and the width of the projections are ours. Maps are averaged onto one grid, the coarsest of student,
    teachers and ``grid`` x ``grid``; its cells are the tokens. Nodes of the graph are tokens of the whole batch, at
    most ``nodes`` of them, drawn anew each step from the random state of the process and the same on either side.
    Each teacher has projections of its own, one of the student's nodes and one of its own, for the global term.

    Ours: the local and global terms are means over nodes, not sums, so that their weights do not depend on the number
    of nodes; the divergence is from teacher to student; teachers count with their weights, each node with those of
    its image. With a grid of one cell the inner term is 0. Under data parallelism the graph is that of one rank.
    No gradient reaches the teachers. The logits are not looked at; the paper's own logit term is ``kd``.
    """

    def __init__(
        self,
        *,
        alpha: float,
        beta: float,
        gamma: float,
        grid: int,
        nodes: int,
        neighbours: int,
        projection: int,
        first_temperature: float,
        last_temperature: float,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.most, self.nodes, self.neighbours, self.projection = grid, nodes, neighbours, projection
        self.first_temperature, self.last_temperature = first_temperature, last_temperature

    def prepare(self, shapes: Shapes) -> None:
        """Choose the common grid and make the projections.

        Raises:
            ShapeError: a last map is of tokens that make no square.
        """
        lasts = [shapes.student_maps[-1], *(maps[-1] for maps in shapes.teacher_maps)]
        images = [image_of(torch.empty(1, *shape)).shape[1:] for shape in lasts]
        self.grid = (min(self.most, *(image[1] for image in images)), min(self.most, *(image[2] for image in images)))
        self.widths = [image[0] for image in images]
        self.ours = nn.ModuleList(nn.Linear(self.widths[0], self.projection) for _ in self.widths[1:])
        self.theirs = nn.ModuleList(nn.Linear(width, self.projection) for width in self.widths[1:])

    @property
    def temperature(self) -> float:
        """Of the global term: half a cosine from the first epoch's to the last epoch's."""
        done = self.progress.epoch / max(1, self.progress.epochs - 1)
        fall = (1 + math.cos(math.pi * done)) / 2
        return self.last_temperature + (self.first_temperature - self.last_temperature) * fall

    def tokens(self, last: Tensor) -> Tensor:
        """Return a map [B,D,H,W] or [B,N,D] on the common grid, as tokens [B,G,D]."""
        return tokens_of(F.adaptive_avg_pool2d(image_of(widened(last)), self.grid))

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, batch mean.

        Args:
            student: the last of its maps [B,D,H,W] or [B,N,D]; of its logits [B,C] the shape alone is looked at.
            teachers: the last map of each, weights [K,B]; of its logits [K,B,C] the shape alone is looked at.
            labels: unused.

        Raises:
            ShapeError: the teachers have other classes, or maps of other widths than announced.
        """
        del labels
        check_classes(student.logits, teachers)
        self._check(student, teachers)
        weights = widened(teachers.weights.detach())
        with torch.autocast(weights.device.type, enabled=False):
            ours = self.tokens(student.maps[-1])
            chosen = self._draw(ours.shape[0] * ours.shape[1]).to(ours.device)
            image = chosen // ours.shape[1]
            terms = []
            for weight, maps, left, right in zip(weights, teachers.maps, self.ours, self.theirs, strict=True):
                theirs = self.tokens(maps[-1].detach())
                a, b = ours.flatten(0, 1)[chosen], theirs.flatten(0, 1)[chosen]
                of_node = self.beta * local_term(a, b, neighbours=self.neighbours)
                of_node = of_node + self.gamma * global_term(left(a), right(b), temperature=self.temperature)
                of_image = self.alpha * inner_term(ours, theirs)
                terms.append((weight * of_image).mean() + (weight[image] * of_node).mean())
            return torch.stack(terms).sum()

    def _draw(self, count: int) -> Tensor:
        return torch.arange(count) if count <= self.nodes else torch.randperm(count)[: self.nodes]

    def _check(self, student: Outputs, teachers: TeacherOutputs) -> None:
        lasts = [student.maps[-1], *(maps[-1] for maps in teachers.maps)]
        found = [each.shape[1] if each.ndim == 4 else each.shape[2] for each in lasts]
        if found != self.widths:
            raise ShapeError(
                f"Last maps of student and teachers have widths {found}, expected {self.widths}. Use the networks loss "
                "'trg' was prepared for."
            )


class Trg(Frozen):
    """Distance of the student's graph of patches from the teachers'."""

    kind: Literal["trg"] = "trg"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the inner term: how the patches of one image resemble each other."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the local term: which patches of the batch are neighbours."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the global term: a patch is to be told from all others."""
    grid: Annotated[int, Field(gt=0, le=64)] = 4
    """Most rows and columns of patches per image; coarser where a map is."""
    nodes: Annotated[int, Field(gt=1, le=4096)] = 256
    """Most patches of a batch in the graph, drawn at random; time and memory grow with its square."""
    neighbours: Annotated[int, Field(gt=0, le=4096)] = 16
    """Nearest patches to which each one is tied."""
    projection: Annotated[int, Field(gt=0, le=4096)] = 128
    """Width in which the global term compares student and teacher."""
    first_temperature: Annotated[float, Field(ge=1e-2, le=100)] = 0.5
    """Softening of the global term in the first epoch."""
    last_temperature: Annotated[float, Field(ge=1e-2, le=100)] = 0.1
    """The same in the last epoch; in between it follows half a cosine. The falling temperature raises the loss."""

    needs: ClassVar[Needs] = Needs(
        student_maps=True, teacher_maps=True, another_term="it shapes feature maps and trains no classifier"
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Token-level relationship graph (TRG)",
        paper="Zhang, Liu and He 2023, Knowledge Distillation via Token-level Relationship Graph, arXiv:2306.12442",
        summary="Research: ties the patches of a whole batch into a graph of nearest neighbours and asks the student's "
        "last feature map for the teachers' graph, for their patches one by one, and for the likeness of patches "
        "within an image. An addition to kd; constants are ours.",
        needs="Live teachers, whose last feature map has positions left, and another term that trains the student's "
        "classifier, say cross_entropy and kd; no labels.",
        cost="A forward pass of every teacher per step, distances of all pairs of at most 256 patches, and two linear "
        "layers per teacher during training; nothing afterwards.",
        evidence="The paper reports better results than kd and earlier relational losses on CIFAR-100 and ImageNet, "
        "balanced and long-tailed; we have seen no numbers. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return TokenGraph(**self.model_dump(exclude={"kind", "weight"}))


def _itself(distances: Tensor) -> Tensor:
    return torch.eye(len(distances), dtype=torch.bool, device=distances.device)
