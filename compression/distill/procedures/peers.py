"""Peers: a second network learns beside the student, and on each sample whoever knows it better teaches the other.

Legend: B batch, C classes.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import divergence
from compression.distill.online import Changed, OnlineAugment
from compression.distill.procedures.training import ProcedureFn, Training
from compression.distill.step import DistillationStep
from compression.distill.types import widened
from compression.errors import CompressionError
from compression.features import captured
from compression.train import History
from compression.types import Batch, Frozen
from compression.zoo import AnyModel, VisionTransformer


def directions(student: Tensor, peer: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which samples the peer teaches the student, and which the student teaches the peer, bool [B] each.

    A network teaches a sample when its cross entropy there is the lower one and its first choice is the label. Never
    are both true; both are false where nobody is right, at exact ties, and without a label.

    Args:
        student: logits [B,C].
        peer: logits [B,C].
        labels: int64 [B]; -1 for none.
    """
    wanted = labels.clamp(min=0)
    student, peer = widened(student.detach()), widened(peer.detach())
    ours, theirs = (F.cross_entropy(each, wanted, reduction="none") for each in (student, peer))
    we_are_right, they_are_right = (each.argmax(dim=-1) == labels for each in (student, peer))
    return (theirs < ours) & they_are_right, (ours < theirs) & we_are_right


def selective(student: Tensor, peer: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Return temperature^2 * KL(who teaches || who is taught), mean over the batch, in nats.

    Samples that nobody teaches count as 0. No gradient reaches who teaches. Arguments as for :func:`directions`.
    """
    to_student, to_peer = directions(student, peer, labels)
    ours, theirs = (F.log_softmax(widened(each) / temperature, dim=-1) for each in (student, peer))
    learnt = torch.where(to_student, divergence(theirs.detach(), ours), 0.0)
    taught = torch.where(to_peer, divergence(ours.detach(), theirs), 0.0)
    return (learnt + taught).mean() * temperature**2


def of_labelled(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross entropy of the samples with a label over the size of the batch, in nats."""
    return F.cross_entropy(widened(logits), labels, ignore_index=-1, reduction="sum") / len(labels)


class PeersStep:
    """The configured step, the peer's own learning from labels, and what both teach each other.

    After the bidirectional selective distillation of Zhu et al. 2023 (arXiv:2307.12574) between a convolutional
    network and a transformer, who segment images. There regions and pixels choose their direction; here samples do,
    for a classifier has one prediction a sample. Its exchange of early features is left out: it runs the features of
    one network through the blocks of the other, which ties both to one architecture.
    """

    def __init__(self, step: DistillationStep, peer: nn.Module, *, weight: float, temperature: float) -> None:
        """``step`` is that of the student; from now on it also tells this one what batch the student saw."""
        self.step, self.peer, self.weight, self.temperature = step, peer, weight, temperature
        self.seen = _Seen(step.online)
        step.online = self.seen

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Weighted loss terms of a batch, by name."""
        with captured(model, [""]) as outputs:
            terms = self.step(model, batch)
        images, labels = self.seen.changed.images, self.seen.changed.labels
        student, peer = outputs[""], self.peer(images)
        own, exchanged = of_labelled(peer, labels), selective(student, peer, labels, temperature=self.temperature)
        return terms | {"peer_cross_entropy": own, "peers": self.weight * exchanged}


class _Seen(OnlineAugment):
    """Remembers the batch as the configured augmentation hands it on."""

    def __init__(self, inner: OnlineAugment | None) -> None:
        super().__init__()
        self._inner = (inner,)  # the step has it among its helpers

    def forward(self, batch: Batch, student: nn.Module, teachers: Sequence[nn.Module]) -> Changed:
        (inner,) = self._inner
        self.changed = Changed(batch.images, batch.labels) if inner is None else inner(batch, student, teachers)
        return self.changed


class Peers(Frozen):
    """A second network is trained beside the student and dropped afterwards."""

    kind: Literal["peers"] = "peers"
    peer: AnyModel = VisionTransformer(width=64, depth=2)
    """The second network; one of another kind than the student errs elsewhere."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """Factor of what the two teach each other."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softening of both sides; 1 compares the plain distributions."""

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are needed, beside what they said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Peers that teach each other (selective, both ways)",
        paper="After Zhu et al. 2023, A Good Student is Cooperative and Reliable, arXiv:2307.12574",
        summary="Research: a second network learns the labels beside the student; on each sample the one with the "
        "lower cross entropy teaches the other, if it is right. Samples choose where the paper, on segmentation, lets "
        "regions and pixels choose; its exchange of early features is left out.",
        needs="Labels, beside what the configured losses need.",
        cost="The training of the peer, at every step; nothing afterwards, the peer is dropped.",
        evidence="The paper claims to outperform other online distillation for segmentation; this form for classifiers "
        "is ours. Measured on our data: see `measured`.",
    )

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return self.train_together

    def train_together(self, training: Training) -> History:
        """Train the student on the configured losses and beside the peer.

        Raises:
            CompressionError: the train split has no labels.
        """
        labels = training.dataset.train.labels
        if not bool((labels >= 0).any()):
            raise CompressionError(
                f"Train split of data set '{training.dataset.name}' has 0 labels for {len(labels)} samples, expected "
                "some, because labels decide which of two peers teaches. Set distill.labels to all, or take procedure "
                "'single'."
            )
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            peer = self.peer.build(training.dataset.num_classes, training.dataset.input_shape)
        step = training.step(training.student, epochs=training.config.train.epochs)
        both = PeersStep(step, peer, weight=self.weight, temperature=self.temperature)
        helpers = nn.ModuleList([step.helpers, peer])
        return training.run(step=both, helpers=helpers, self_trained=step.self_trained, backward=step.backward)
