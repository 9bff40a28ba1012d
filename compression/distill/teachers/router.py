"""A small gate, trained beside the student, chooses the teachers of each sample.

Legend: K teachers, B batch, C classes.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.distill.mixture import check_classes, divergence
from compression.distill.types import CombineFn, Helper, Shapes, widened
from compression.errors import CompressionError, ShapeError
from compression.types import Frozen, Outputs, TeacherOutputs, known


def gate_inputs(logits: Tensor, student: Tensor) -> Tensor:
    """Return what the gate looks at, [B,C+2K], without gradient.

    The student's logits, their mean taken off, then every teacher's largest probability, then every teacher's entropy
    in nats.

    Args:
        logits: of the teachers, [K,B,C].
        student: logits [B,C].
    """
    ours = widened(student.detach())
    log_probs = widened(logits.detach()).log_softmax(dim=-1)
    surest = log_probs.amax(dim=-1).exp()
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return torch.cat([ours - ours.mean(dim=-1, keepdim=True), surest.T, entropy.T], dim=-1)


def routed(gate: Tensor, *, top_k: int) -> Tensor:
    """Return weights [K,B]: the ``top_k`` largest probabilities of ``gate`` [B,K], those tied with the last too, over
    their sum."""
    least = gate.topk(min(top_k, gate.shape[-1]), dim=-1).values[:, -1:]
    kept = gate * (gate >= least)
    return (kept / kept.sum(dim=-1, keepdim=True)).T


def imitation(log_gate: Tensor, costs: Tensor) -> Tensor:
    """Return the gate's mean cost: sum over teachers of gate * ``costs``, batch mean; both are [B,K]."""
    return (log_gate.exp() * costs.detach()).sum(dim=-1).mean()


def imbalance(log_gate: Tensor) -> Tensor:
    """Return KL(uniform || batch mean of the gate) in nats, from ``log_gate`` [B,K]; 0 where all get the same."""
    batch, num_teachers = log_gate.shape
    log_mean = torch.logsumexp(log_gate, dim=0) - math.log(batch)
    return (-math.log(num_teachers) - log_mean).mean().clamp(min=0)


def misjudgement(log_gate: Tensor, logits: Tensor, labels: Tensor, *, sharpness: float) -> Tensor:
    """Return the cross entropy of the gate against softmax over teachers of -(their cost of the label) / ``sharpness``.

    The cost is the teacher's cross entropy. Batch mean, in nats; a sample without a label, or with one that no teacher
    knows, counts 0.

    Args:
        log_gate: [B,K].
        logits: of the teachers, [K,B,C].
        labels: int64 [B]; -1 where there is none.
        sharpness: in nats; a teacher worse by this much counts 1/e of the better one.
    """
    places = labels.clamp(min=0).view(1, -1, 1).expand(len(logits), -1, 1)
    usable = (labels >= 0) & known(logits).gather(-1, places).squeeze(-1).any(dim=0)
    right = widened(logits.detach()).log_softmax(dim=-1).gather(-1, places).squeeze(-1).T
    costs = -((right / sharpness).softmax(dim=-1) * log_gate).sum(dim=-1)
    return (costs * usable).mean()


class RouterGate(Helper):
    """A linear gate that weighs the teachers per sample, in float32 under autocast too, and the terms that train it.

    Li et al. 2025 (arXiv:2507.07015), the routing alone: there are no masked copies of teachers. The losses get the
    ``top_k`` largest gate probabilities, renormalised, without gradient. The gate learns by terms of its own:

    ``gate_kd``, sum over all K teachers of gate * KL(teacher || student) at ``temperature``, the divergences held
    fixed: the gradient that the gate gets from a distillation loss it is multiplied into. In the authors' code the
    gate is not multiplied in, and learns nothing from distillation; renormalised top-1 weights are constantly 1 and
    would give nothing either. This term prefers the teachers that are easy to imitate.

    ``gate_labels`` (ours) prefers those that are right. ``gate_balance`` is 0 where on the batch's average all
    teachers get the same, and grows without bound as one of them gets nothing: watch it for collapse.

    Also ours: one linear layer where the authors have two with nothing between them, which can express the same; it
    starts at zero, hence with all teachers alike, and sees the student's logits without gradient, so that the
    terms of the gate do not pull at the student. Not part of it: the authors' decay of the terms' weights.
    """

    def __init__(
        self,
        *,
        top_k: int,
        temperature: float,
        kd_weight: float,
        balance_weight: float,
        label_weight: float,
        sharpness: float,
    ) -> None:
        super().__init__()
        self.top_k, self.temperature, self.sharpness = top_k, temperature, sharpness
        self.kd_weight, self.balance_weight, self.label_weight = kd_weight, balance_weight, label_weight

    def prepare(self, shapes: Shapes) -> None:
        """Make the gate.

        Raises:
            CompressionError: the number of teachers is not announced.
        """
        if shapes.num_teachers < 1:
            raise CompressionError(
                f"Combination 'router' has {shapes.num_teachers} teachers announced, expected at least 1. "
                "Give Shapes.num_teachers."
            )
        self.gate = nn.Linear(shapes.num_classes + 2 * shapes.num_teachers, shapes.num_teachers)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def log_probs(self, logits: Tensor, student: Tensor) -> Tensor:
        """Return the logarithm of the gate's probabilities [B,K].

        Raises:
            ShapeError: there are other teachers or classes than the gate was made for.
        """
        num_teachers, _, classes = logits.shape
        wanted = self.gate.out_features
        if num_teachers != wanted or classes + 2 * num_teachers != self.gate.in_features:
            raise ShapeError(
                f"Teacher logits have {num_teachers} teachers and {classes} classes, expected the {wanted} teachers "
                f"and {self.gate.in_features - 2 * wanted} classes that the gate of combination 'router' was made for. "
                "Prepare the step again for this panel."
            )
        inputs = gate_inputs(logits, student)
        with torch.autocast(inputs.device.type, enabled=False):
            return self.gate(inputs.to(self.gate.weight.dtype)).log_softmax(dim=-1)

    @torch.no_grad()
    def forward(self, logits: Tensor, labels: Tensor, student: Tensor) -> Tensor:
        """Return weights [K,B], without gradient.

        Args:
            logits: of the teachers, [K,B,C].
            labels: unused.
            student: logits [B,C].

        Raises:
            ShapeError: there are other teachers or classes than the gate was made for.
        """
        del labels
        return routed(self.log_probs(logits, student).exp(), top_k=self.top_k)

    def terms(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms that train the gate; none of them has a gradient to student or teachers.

        Args:
            student: logits [B,C].
            teachers: logits [K,B,C]; its weights are not looked at.
            labels: int64 [B]; -1 where there is none.

        Raises:
            ShapeError: there are other teachers or classes than the gate was made for.
        """
        check_classes(student.logits, teachers)
        logits = widened(teachers.logits.detach())
        log_gate = self.log_probs(logits, student.logits)
        log_student = (widened(student.logits.detach()) / self.temperature).log_softmax(dim=-1)
        log_teachers = (logits / self.temperature).log_softmax(dim=-1)
        costs = divergence(log_teachers, log_student).T * self.temperature**2
        return {
            "gate_kd": self.kd_weight * imitation(log_gate, costs.clamp(min=0)),
            "gate_balance": self.balance_weight * imbalance(log_gate),
            "gate_labels": self.label_weight * misjudgement(log_gate, logits, labels, sharpness=self.sharpness),
        }


class Router(Frozen):
    """Teachers chosen per sample by a gate that is trained beside the student."""

    kind: Literal["router"] = "router"
    top_k: Annotated[int, Field(ge=1)] = 1
    """Teachers that a sample is taught by, at most all; those tied with the last of them teach too."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 4.0
    """Softening of the divergences the gate weighs; the losses have temperatures of their own."""
    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term that prefers teachers who are easy to imitate."""
    balance_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term that keeps every teacher in use."""
    label_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term that prefers teachers who are right; ours."""
    sharpness: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Nats of cross entropy in which that preference falls to 1/e; ours."""

    adds_snapshot: ClassVar[bool] = False
    """Whether a frozen copy of the student as it was before training joins the teachers."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Instance router (after MST-Distill)",
        paper="Li et al. 2025, MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation, "
        "arXiv:2507.07015",
        summary="A linear gate looks at the student's logits and at how sure the teachers are, and picks the teachers "
        "of each sample. It learns which are easy to imitate, which are right where there is a label, and to keep all "
        "in use. The gate is dropped at export; without the paper's masked teachers.",
        needs="At least two teachers; without labels the gate only learns whom the student imitates easily.",
        cost="One small linear layer and one divergence per teacher and step, nothing afterwards.",
        evidence="The paper reports gains on five multimodal data sets, in its abstract. "
        "Measured on our data: see `measured`.",
    )

    def build(self) -> CombineFn:
        """Return the function that weighs teachers; it is a helper."""
        return RouterGate(
            top_k=self.top_k,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            balance_weight=self.balance_weight,
            label_weight=self.label_weight,
            sharpness=self.sharpness,
        )
