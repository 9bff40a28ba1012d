"""Auxiliary branches: heads on the student's earlier stages that learn the task too, and are left behind.

Legend: K teachers, B batch, C classes, D width of a map, H and W its height and width, N tokens.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.losses.kd import kd
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.errors import ShapeError
from compression.types import Frozen, Outputs, TeacherOutputs

HIDDEN = 64
"""Width inside a branch."""


def image_head(width: int, num_classes: int) -> nn.Sequential:
    """Return a branch [B,D,H,W] -> logits [B,C]: two convolutions, mean over the image, linear layer."""
    return nn.Sequential(
        nn.Conv2d(width, HIDDEN, 1),
        nn.ReLU(),
        nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(HIDDEN, num_classes),
    )


class TokenHead(nn.Module):
    """A branch [B,N,D] -> logits [B,C]: an MLP on every token, mean over tokens, linear layer."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU())
        self.head = nn.Linear(HIDDEN, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mlp(tokens).mean(dim=1))


class Branches(Helper):
    """The mean over branches of the task's loss: cross entropy with the labels and kd from the panel, half each.

    The principle of programmable gradient information (Wang et al. 2024, YOLOv9, arXiv:2402.13616, whose small models
    use heads on several levels alone): early layers get gradients that did not pass the late ones. In float32 under
    autocast too.

    Ours: for classifiers; every stage but the last has a branch, which is two convolutions (an MLP on tokens) without
    batch norm, so that a batch may be of one sample.
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def prepare(self, shapes: Shapes) -> None:
        """Make the branches.

        Raises:
            ShapeError: the student has one stage alone.
        """
        self.maps = shapes.student_maps[:-1]
        if not self.maps:
            raise ShapeError(
                f"Loss 'auxiliary' has {len(shapes.student_maps)} stages of the student, expected at least 2, because "
                "the last one has the student's own head. Remove the loss, or take a deeper student."
            )
        self.branches = nn.ModuleList(
            image_head(shape[0], shapes.num_classes) if len(shape) == 3 else TokenHead(shape[1], shapes.num_classes)
            for shape in self.maps
        )

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss of the branches, batch mean; the student's own logits are not looked at.

        Args:
            student: maps, each [B,D,H,W] or [B,N,D].
            teachers: logits [K,B,C], weights [K,B].
            labels: int64 [B] or distributions [B,C].

        Raises:
            ShapeError: the teachers have another number of classes than the student, or its maps have other shapes
                than announced.
        """
        losses = [
            0.5 * F.cross_entropy(logits, labels)
            + 0.5 * kd(Outputs(logits), teachers, labels, temperature=self.temperature)
            for logits in self.branch_logits(student)
        ]
        return torch.stack(losses).mean()

    def branch_logits(self, student: Outputs) -> list[Tensor]:
        """What each branch says, [B,C], first stage first."""
        found = [list(each.shape[1:]) for each in student.maps[:-1]]
        wanted = [list(shape) for shape in self.maps]
        if found != wanted:
            raise ShapeError(
                f"Maps of the student have shapes {found}, expected {wanted}. Use the student and the image size the "
                "loss was prepared for."
            )
        with torch.autocast(student.logits.device.type, enabled=False):
            return [branch(widened(each)) for branch, each in zip(self.branches, student.maps[:-1], strict=True)]


class Auxiliary(Frozen):
    """Heads on the student's earlier stages learn the task beside it."""

    kind: Literal["auxiliary"] = "auxiliary"
    weight: Annotated[float, Field(ge=0)] = 0.25
    """Factor of this term in the sum."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softening of both sides of kd."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Auxiliary branches (after YOLOv9's PGI)",
        paper="Wang et al. 2024, YOLOv9: Learning What You Want to Learn Using Programmable Gradient Information, "
        "arXiv:2402.13616; deep supervision: Lee et al. 2015, arXiv:1409.5185",
        summary="Small heads on every stage but the last learn labels and teachers, so that early layers get a "
        "gradient of their own. They are dropped at export: the shipped graph is the student alone.",
        needs="Labels, teacher logits, outputs of the student's stages.",
        cost="Two small convolutions per stage during training; nothing in the shipped file.",
        evidence="Not measured on our data yet.",
    )
    needs: ClassVar[Needs] = Needs(
        student_maps=True,
        labels=True,
        soft_labels=True,
        another_term="it trains all stages but the last",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return Branches(temperature=self.temperature)
