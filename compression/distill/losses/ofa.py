"""OFA-KD: soft targets in which the true class may count for more, for the student and for branches on its stages.

Legend: K teachers, B batch, C classes, S stages of the student, D width of a map, H and W its height and width,
N tokens.
"""

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import mixture
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.errors import ShapeError
from compression.features import image_of, tokens_of
from compression.types import Frozen, Outputs, TeacherOutputs
from compression.zoo.vision_transformer import TransformerBlock

GRID = 7
"""Side of the square of tokens that a branch works on, about."""
HEADS = 4
"""Attention heads of a branch, where they divide the width."""
MLP_RATIO = 4
"""Width inside the MLP of a branch's block, as a multiple of the token's."""


def enhanced(probs: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """Return (p + onehot)^epsilon - onehot of probabilities [B,C]; with epsilon above 1 its rows do not sum to 1.

    Labels are int64 [B], or distributions [B,C] whose largest class counts. With epsilon 1 the result is p, and they
    are not looked at.
    """
    if epsilon == 1:
        return probs
    if labels.ndim == 2:
        labels = labels.argmax(dim=-1)
    target = F.one_hot(labels, probs.shape[-1]).to(probs.dtype)
    return (probs + target) ** epsilon - target


def against(target: Tensor, logits: Tensor, *, temperature: float) -> Tensor:
    """Return the cross entropy of softened ``logits`` against ``target``, both [B,C], batch mean."""
    return -(target * F.log_softmax(widened(logits) / temperature, dim=-1)).sum(dim=-1).mean()


def ofa(student: Outputs, teachers: TeacherOutputs, labels: Tensor, *, temperature: float, epsilon: float) -> Tensor:
    """Return the cross entropy of the student against the teachers' enhanced targets, batch mean.

    Hao et al. 2023 (arXiv:2310.19444), the loss on logits alone; ``OfaBranches`` has the rest. The exponent also
    lowers the probabilities of the other classes, as in the authors' code. There is no factor temperature^2. With
    epsilon 1 it is the cross entropy with soft labels, in nats: kd at this temperature, over temperature^2, plus the
    teachers' entropy. With several teachers the probabilities are the weighted mixture of theirs, before the
    exponent.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], weights [K,B].
        labels: int64 [B] or distributions [B,C], the classes to enhance; unused with epsilon 1.
        temperature: above 1 flattens both sides.
        epsilon: exponent; above 1 the true class counts for more and every other one for less.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    target = enhanced(mixture(student.logits, teachers, temperature), labels, epsilon=epsilon)
    return against(target, student.logits, temperature=temperature)


def separable(width: int, wider: int) -> nn.Sequential:
    """Two separable convolutions, the first of stride 2; [B,width,H,W] -> [B,wider,ceil(H/2),ceil(W/2)]."""
    layers: list[nn.Module] = []
    for stride, after in ((2, width), (1, wider)):
        layers += [
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.Conv2d(width, after, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def image_branch(width: int, last: int, blocks: int, num_classes: int) -> nn.Sequential:
    """Return a branch [B,width,H,W] -> logits [B,C].

    Each of ``blocks`` separable ones halves the image and doubles the width, up to ``last``, which the final one
    gives; with none of them there is a convolution 1x1. Then the mean over the image, and a linear layer.
    """
    layers: list[nn.Module] = []
    for number in range(blocks):
        wider = last if number == blocks - 1 else min(2 * width, last)
        layers.append(separable(width, wider))
        width = wider
    if not layers:
        layers.append(nn.Conv2d(width, last, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes))


class TokenBranch(nn.Module):
    """A branch [B,N,D] -> logits [B,C]: merged tokens, pre-norm attention blocks, mean over tokens, linear layer.

    Tokens that make a square of side 11 or more are merged, the square of them that leaves a side of about 7 into
    one, by a strided convolution. Others (with a class token, say) stay as they are.
    """

    def __init__(self, tokens: int, width: int, blocks: int, num_classes: int) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        self.merged = max(1, round(side / GRID)) if side * side == tokens else 1
        if self.merged > 1:
            missing = -side % self.merged
            self.merge = nn.Sequential(
                nn.ZeroPad2d((0, missing, 0, missing)), nn.Conv2d(width, width, self.merged, self.merged)
            )
        heads = math.gcd(HEADS, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, MLP_RATIO * width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.merged > 1:
            tokens = tokens_of(self.merge(image_of(tokens)))
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


class OfaBranches(Helper):
    """The loss of the student's logits, and with it that of a branch on each of its stages, in float32.

    Hao et al. 2023 (arXiv:2310.19444). A branch turns the output of a stage into logits of its own, so that stages
    of networks unlike the teachers can be taught without comparing features: every branch has the student's own
    target, from the teachers' logits alone. Of S stages, stage k has S - k separable blocks on images, and as many
    attention blocks on tokens, but one at least. Branches are left behind with the helper.

    Ours: convolutions end at the width of the student's last stage, where the authors take the teacher's if that is
    larger, since stored logits do not tell it; a token branch keeps the width of its stage, and never reads a class
    token by itself.
    """

    def __init__(self, *, temperature: float, epsilon: float, branches: float) -> None:
        super().__init__()
        self.temperature, self.epsilon, self.weight = temperature, epsilon, branches

    def prepare(self, shapes: Shapes) -> None:
        """Make the branches.

        Raises:
            ShapeError: the student shows no stages.
        """
        maps = shapes.student_maps
        if not maps:
            raise ShapeError(
                "Loss 'ofa' has 0 maps of the student, expected at least 1 for its branches. Set branches to 0."
            )
        self.maps, last = maps, _width(maps[-1])
        self.branches = nn.ModuleList(
            image_branch(shape[0], last, len(maps) - number, shapes.num_classes)
            if len(shape) == 3
            else TokenBranch(shape[0], shape[1], max(1, len(maps) - number), shapes.num_classes)
            for number, shape in enumerate(maps, start=1)
        )

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss on the logits plus ``branches`` times the sum of that on every branch.

        Args:
            student: logits [B,C], maps, each [B,D,H,W] or [B,N,D].
            teachers: logits [K,B,C], weights [K,B].
            labels: int64 [B] or distributions [B,C], the classes to enhance; unused with epsilon 1.

        Raises:
            ShapeError: the teachers have another number of classes than the student, its maps have other shapes than
                announced, or one sample trains a branch that normalises over the batch.
        """
        target = enhanced(mixture(student.logits, teachers, self.temperature), labels, epsilon=self.epsilon)
        loss = against(target, student.logits, temperature=self.temperature)
        for logits in self.branch_logits(student):
            loss = loss + self.weight * against(target, logits, temperature=self.temperature)
        return loss

    def branch_logits(self, student: Outputs) -> list[Tensor]:
        """What each branch says, [B,C], first stage first."""
        self._check(student)
        with torch.autocast(student.logits.device.type, enabled=False):
            return [branch(widened(each)) for branch, each in zip(self.branches, student.maps, strict=True)]

    def _check(self, student: Outputs) -> None:
        found = [list(each.shape[1:]) for each in student.maps]
        wanted = [list(shape) for shape in self.maps]
        if found != wanted:
            raise ShapeError(
                f"Maps of the student have shapes {found}, expected {wanted}. Use the student and the image size the "
                "loss was prepared for."
            )
        if self.training and len(student.logits) < 2 and any(len(shape) == 3 for shape in self.maps[:-1]):
            raise ShapeError(
                "Batch has 1 sample, expected at least 2, because the branches of loss 'ofa' normalise over the "
                "batch. Raise train.batch_size."
            )


def _width(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else shape[1]


class Ofa(Frozen):
    """Cross entropy against the teachers' distribution with the true class enhanced."""

    kind: Literal["ofa"] = "ofa"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softening of both sides; gradients shrink with its square."""
    epsilon: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Exponent of the true class; 1 keeps the teachers' distribution. Values under different ones do not compare."""
    branches: Annotated[float, Field(ge=0)] = 0.0
    """Weight of each branch on a stage of the student, relative to its logits; 0 does without, the paper takes 1."""

    card: ClassVar[MethodCard] = MethodCard(
        name="One-for-all distillation (OFA-KD)",
        paper="Hao et al. 2023, One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge "
        "Distillation, arXiv:2310.19444",
        summary="Cross entropy against the teachers' distribution, in which an exponent lets the true class speak "
        "louder the surer the teachers are. Made for teachers of another architecture. With `branches`, small "
        "networks on the student's stages learn the same target and are dropped at export.",
        needs="Teacher logits on the same views; hard labels with `epsilon` above 1, outputs of the student's stages "
        "with `branches`.",
        cost="That of kd: one softmax and a power. With `branches`, a few layers per stage during training.",
        evidence="The paper reports up to 8.0 points on CIFAR-100 and 0.7 on ImageNet between unlike architectures, "
        "with its branches. Measured on our data: see `measured`.",
    )

    @property
    def needs(self) -> Needs:
        """Stages where there are branches, labels where the true class is enhanced."""
        enhances = self.epsilon != 1
        return Needs(student_maps=self.branches > 0, labels=enhances, soft_labels=enhances)

    def logits_only(self) -> "Ofa":
        """This without branches, for networks that cannot be looked into."""
        return self.model_copy(update={"branches": 0.0})

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        if self.branches == 0:
            return partial(ofa, temperature=self.temperature, epsilon=self.epsilon)
        return OfaBranches(temperature=self.temperature, epsilon=self.epsilon, branches=self.branches)
