"""Talking models: student and teachers say their features as messages, and understand each other's.

Legend: K teachers, B batch, C classes, D width of the student's penultimate features, Dt of a teacher's, M width of a
message.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import check_classes, check_features
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.types import Frozen, Outputs, TeacherOutputs


def standardised(values: Tensor) -> Tensor:
    """Return each row of [B,W] with mean 0 and variance 1; a constant row becomes 0."""
    return F.layer_norm(values, values.shape[-1:])


def distance(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared distance per sample [B], a mean over the width: 2 for unrelated standardised rows [B,W]."""
    return (left - right).square().mean(dim=-1)


class Talk(Helper):
    """The distances between what is meant and what is understood, in float32 under autocast too.

    Zhao et al. 2023 (arXiv:2310.03188), one round. Encoders turn features into messages, decoders turn messages into
    features, all of them linear. With h the features and E, D the coders of the student (s) and of a teacher (t),
    the terms per sample are ``interaction`` * |D_s(E_t(h_t)) - h_s|^2, ``message`` * |E_t(h_t) - E_s(h_s)|^2 and
    ``state`` * (|D_s(E_s(h_s)) - h_s|^2 + |D_t(E_t(h_t)) - h_t|^2). Teachers count with their weights per sample. No
    gradient reaches the teachers; the logits of the student are not looked at.

    Ours, since the paper's details were not at hand: each teacher has its own coders and the student one pair for
    all of them, so that there is one language. Features and messages are standardised per sample and distances are
    means over the width, so that each is about 1 to 2 at the start whatever the widths and scales, and no coder gains
    by whispering. The task loss is another term of the recipe.
    """

    def __init__(self, *, message_width: int, interaction: float, message: float, state: float) -> None:
        super().__init__()
        self.message_width = message_width
        self.interaction, self.message, self.state = interaction, message, state

    def prepare(self, shapes: Shapes) -> None:
        """Make an encoder and a decoder for the student and for each teacher."""
        self.widths = shapes.teacher_widths
        self.encoder = nn.Linear(shapes.student_width, self.message_width)
        self.decoder = nn.Linear(self.message_width, shapes.student_width)
        self.teacher_encoders = nn.ModuleList(nn.Linear(width, self.message_width) for width in self.widths)
        self.teacher_decoders = nn.ModuleList(nn.Linear(self.message_width, width) for width in self.widths)

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, batch mean.

        Args:
            student: penultimate features [B,D]; of its logits [B,C] the shape alone is looked at.
            teachers: features, K of [B,Dt], weights [K,B]; of its logits [K,B,C] the shape alone is looked at.
            labels: unused.

        Raises:
            ShapeError: the teachers have other classes or widths than announced.
        """
        del labels
        check_classes(student.logits, teachers)
        features = widened(student.features["penultimate"])
        check_features(features, teachers, self.widths)
        weights = widened(teachers.weights.detach())
        with torch.autocast(features.device.type, enabled=False):
            ours = standardised(features)
            said = standardised(self.encoder(ours))
            own_state = distance(self.decoder(said), ours)
            losses = []
            coders = zip(self.teacher_encoders, self.teacher_decoders, teachers.features, strict=True)
            for encoder, decoder, their_features in coders:
                theirs = standardised(widened(their_features.detach()))
                heard = standardised(encoder(theirs))
                losses.append(
                    self.interaction * distance(self.decoder(heard), ours)
                    + self.message * distance(heard, said)
                    + self.state * (own_state + distance(decoder(heard), theirs))
                )
        return (weights * torch.stack(losses)).sum(dim=0).mean()


class Talking(Frozen):
    """Distance between the student's features and what it understands of the teachers' messages."""

    kind: Literal["talking"] = "talking"
    weight: Annotated[float, Field(ge=0)] = 0.5
    """Factor of this term in the sum."""
    message_width: Annotated[int, Field(ge=2, le=4096)] = 64
    """Numbers in a message; fewer than the features make it a summary."""
    interaction: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance between the student's features and what it understands of a teacher's message."""
    message: Annotated[float, Field(ge=0)] = 0.5
    """Factor of the distance between the messages of teacher and student."""
    state: Annotated[float, Field(ge=0)] = 0.5
    """Factor of the distances between each side's features and what it understands of its own message."""

    needs: ClassVar[Needs] = Needs(
        student_features=True, teacher_features=True, another_term="it shapes features and trains no classifier"
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Talking models",
        paper="Zhao et al. 2023, Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive "
        "Communication, arXiv:2310.03188",
        summary="Research: trained encoders and decoders let the student compare its features with what it "
        "understands of each teacher's, in one shared space of messages. Matches features of any widths. The coders "
        "are dropped at export.",
        needs="Stored penultimate features of every teacher, and another term that trains the student's classifier, "
        "say cross_entropy.",
        cost="Stored features, and two linear layers for the student and for each teacher during training; nothing "
        "afterwards.",
        evidence="The paper's ablation shows a small effect of the message and state terms. "
        "Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return Talk(
            message_width=self.message_width, interaction=self.interaction, message=self.message, state=self.state
        )
