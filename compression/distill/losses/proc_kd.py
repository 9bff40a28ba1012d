"""ProC-KD: prototypes of the teachers' local features first, then a student that is taught to use them.

Legend: K teachers, B batch, C classes, M prototypes, N tokens of a map, D width of the student's last map, Dt of a
teacher's.
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
from compression.features import tokens_of
from compression.types import Frozen, Outputs, TeacherOutputs


def assignments(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return log-probabilities [B,N,M] of prototypes [M,Dt] for tokens [B,N,Dt]: scaled dot-product attention."""
    return F.log_softmax(tokens @ prototypes.T / math.sqrt(prototypes.shape[-1]), dim=-1)


def mean_assignment(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return the logarithm [B,M] of the mean over an image's tokens [B,N,Dt] of their assignments."""
    return torch.logsumexp(assignments(tokens, prototypes), dim=1) - math.log(tokens.shape[1])


def reconstruction(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Return the mean squared error per image [B] of tokens [B,N,Dt] put together from prototypes by assignment."""
    return (assignments(tokens, prototypes).exp() @ prototypes - tokens).square().mean(dim=(1, 2))


class Codebook(nn.Module):
    """Prototypes of one teacher, and what lets the student use them; tokens are brought to mean 0 and variance 1."""

    started: Tensor

    def __init__(self, *, prototypes: int, ours: int, theirs: int, classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(prototypes, theirs))
        self.register_buffer("started", torch.tensor(False))
        self.query = nn.Linear(ours, theirs)
        self.correction = nn.Linear(theirs, classes)
        self.gamma = nn.Parameter(torch.zeros(()))

    def learnt(self, theirs: Tensor) -> Tensor:
        """Return the reconstruction error [B] of the teacher's tokens [B,N,Dt], to train the prototypes.

        The first time in training they are drawn from these tokens, since some of a random start would never be
        assigned; a little noise keeps those drawn twice apart.
        """
        tokens = _normalised(theirs)
        if self.training and not self.started:
            with torch.no_grad():
                drawn = torch.randint(tokens.shape[0] * tokens.shape[1], (len(self.prototypes),))
                noise = torch.randn(self.prototypes.shape) * 0.01
                start = tokens.flatten(0, 1)[drawn.to(tokens.device)] + noise.to(tokens.device)
                self.prototypes.copy_(start)
                self.started.fill_(True)
        return reconstruction(tokens, self.prototypes)

    def used(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma x correction [B,C] and KL(teacher || student) of mean assignments [B], prototypes untrained.

        The correction is a linear layer of what the student's tokens [B,N,D] attend to, on average over an image.
        """
        prototypes = self.prototypes.detach()
        asked = mean_assignment(_normalised(self.query(ours)), prototypes)
        wanted = mean_assignment(_normalised(theirs), prototypes)
        return self.gamma * self.correction(asked.exp() @ prototypes), divergence(wanted, asked)


class PrototypeGuided(Helper):
    """Prototypes of the teachers' last maps, and a student whose last map is to find them, float32 under autocast too.

    Li et al. 2022 (arXiv:2212.13180), after the abstract: the formulas are ours. In the first phase a codebook per
    teacher learns to put its tokens together (mean squared error of tokens of variance 1); the student's terms are 0.
    It lasts ``prototype_share`` of the epochs, rounded up, but leaves at least the last one: a training of one epoch
    has no first phase and keeps random prototypes. In the second phase the codebooks stand still. The student's tokens
    attend to them, which gives a correction of its logits, and the loss is

        cross entropy of logits + sum over teachers of weight x gamma x correction
        + alignment x sum over teachers of weight x KL(teacher's mean assignment || student's)

    ``gamma`` starts at 0, where the first term is the plain cross entropy. Teachers count with their weights per
    sample. No gradient reaches the teachers; of their logits nothing is looked at, so they may know another task.

    Ours: codebooks, attention and correction are dropped at export, where the paper's student keeps them: the student
    must do without the correction, so that the recipe needs a term for its own logits. The correction is of logits
    and not of features, so that no part of the student's network is taken apart.
    """

    def __init__(self, *, prototypes: int, prototype_share: float, alignment: float) -> None:
        super().__init__()
        self.prototypes, self.prototype_share, self.alignment = prototypes, prototype_share, alignment

    def prepare(self, shapes: Shapes) -> None:
        """Make a codebook for each teacher."""
        lasts = [shapes.student_maps[-1], *(maps[-1] for maps in shapes.teacher_maps)]
        self.widths = [shape[0] if len(shape) == 3 else shape[1] for shape in lasts]
        self.codebooks = nn.ModuleList(
            Codebook(prototypes=self.prototypes, ours=self.widths[0], theirs=width, classes=shapes.num_classes)
            for width in self.widths[1:]
        )

    @property
    def books(self) -> list[Codebook]:
        """The codebooks, one per teacher."""
        return [book for book in self.codebooks if isinstance(book, Codebook)]

    @property
    def learning(self) -> bool:
        """Whether it is the first phase, that of the prototypes."""
        epochs = self.progress.epochs
        share = math.ceil(self.prototype_share * epochs - 1e-9)  # 0.07 of 100 is 7 and a bit
        return self.progress.epoch < min(share, epochs - 1)

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, batch mean; in the first phase the student gets a gradient of zeros.

        Args:
            student: logits [B,C], the last of its maps [B,D,H,W] or [B,N,D].
            teachers: the last map of each, weights [K,B]; of the logits [K,B,C] the shape alone is looked at.
            labels: int64 [B].

        Raises:
            ShapeError: the teachers have other classes, or maps of other widths than announced.
        """
        check_classes(student.logits, teachers)
        self._check(student, teachers)
        logits, weights = widened(student.logits), widened(teachers.weights.detach())
        ours = widened(tokens_of(student.maps[-1]))
        theirs = [widened(tokens_of(maps[-1].detach())) for maps in teachers.maps]
        with torch.autocast(logits.device.type, enabled=False):
            if self.learning:
                errors = [book.learnt(tokens) for book, tokens in zip(self.books, theirs, strict=True)]
                return (weights * torch.stack(errors)).sum(dim=0).mean() + logits.sum() * 0.0
            found = [book.used(ours, tokens) for book, tokens in zip(self.books, theirs, strict=True)]
            corrections = torch.stack([correction for correction, _ in found])
            alignment = (weights * torch.stack([gap for _, gap in found])).sum(dim=0).mean()
            task = F.cross_entropy(logits + (weights.unsqueeze(-1) * corrections).sum(dim=0), labels)
            return task + self.alignment * alignment

    def _check(self, student: Outputs, teachers: TeacherOutputs) -> None:
        lasts = [student.maps[-1], *(maps[-1] for maps in teachers.maps)]
        found = [each.shape[1] if each.ndim == 4 else each.shape[2] for each in lasts]
        if found != self.widths:
            raise ShapeError(
                f"Last maps of student and teachers have widths {found}, expected {self.widths}. Use the networks loss "
                "'proc_kd' was prepared for."
            )


class ProcKd(Frozen):
    """Help from prototypes of the teachers' local features, and the use of the same ones."""

    kind: Literal["proc_kd"] = "proc_kd"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum; it holds a cross entropy of its own."""
    alignment: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the divergence between the teacher's use of the prototypes and the student's."""
    prototypes: Annotated[int, Field(gt=1, le=65536)] = 256
    """Size of the codebook of each teacher."""
    prototype_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the epochs, the first ones, in which prototypes are learnt and this term teaches the student nothing;
    0 keeps random ones."""

    needs: ClassVar[Needs] = Needs(
        student_maps=True,
        teacher_maps=True,
        labels=True,
        another_term="its logits get help that the exported student has to do without",
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Prototype-guided distillation (ProC-KD)",
        paper="Li et al. 2022, Prototype-guided Cross-task Knowledge Distillation for Large-scale Models, "
        "arXiv:2212.13180",
        summary="Research: learns prototypes of the teachers' local features, then lets the student's last feature map "
        "ask them for a correction of its logits and asks it to use them as its teachers do. Formulas are ours, and "
        "the prototypes are dropped at export, where the paper keeps them.",
        needs="Live teachers, hard labels, and another term that trains the student's own logits, say cross_entropy "
        "and kd.",
        cost="A forward pass of every teacher per step, and during training a codebook of 256 vectors, attention to it "
        "and two linear layers per teacher; nothing afterwards.",
        evidence="We have seen the paper's abstract alone, and no numbers. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return PrototypeGuided(
            prototypes=self.prototypes, prototype_share=self.prototype_share, alignment=self.alignment
        )


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])
