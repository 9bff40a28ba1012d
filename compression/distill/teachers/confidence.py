"""On each sample only the teacher that is surest of it counts.

Legend: K teachers, B batch, C classes.
"""

from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compression.card import MethodCard
from compression.distill.types import CombineFn
from compression.types import Frozen


def confidence(logits: Tensor, labels: Tensor, student: Tensor | None = None, *, by_label: bool) -> Tensor:
    """Return weights [K,B]: all on the most confident teacher of a sample, shared equally among exact ties.

    After the data partition of Roth et al. 2023, "Fantastic Gains and Where to Find Them" (arXiv:2310.17653),
    which picks per sample between one teacher and the frozen initial student. Here the choice is among K
    teachers; in ``partition`` the initial student is one of them.

    Args:
        logits: [K,B,C].
        labels: int64 [B]; used when ``by_label``, where they are not -1.
        student: unused.
        by_label: confidence is the probability of the label; otherwise of the teacher's own first choice.
    """
    del student
    log_probs = logits.detach().float().log_softmax(dim=-1)
    score = log_probs.amax(dim=-1)
    if by_label:
        index = labels.clamp(min=0).view(1, -1, 1).expand(len(log_probs), -1, 1)
        score = torch.where(labels >= 0, log_probs.gather(-1, index).squeeze(-1), score)
    surest = (score == score.amax(dim=0, keepdim=True)).to(log_probs.dtype)
    return surest / surest.sum(dim=0, keepdim=True)


class Confidence(Frozen):
    """The most confident teacher of each sample."""

    kind: Literal["confidence"] = "confidence"
    labels: bool = True
    """Confidence in the true label; off, in the teacher's own first choice (works without labels)."""

    adds_snapshot: ClassVar[bool] = False
    """Whether a frozen copy of the student as it was before training joins the teachers."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Confidence partition",
        paper="Roth et al. 2023, Fantastic Gains and Where to Find Them, arXiv:2310.17653",
        summary="Splits the samples among the teachers: each is taught by whoever is surest of it, so that a "
        "weak teacher speaks only where it knows better.",
        needs="At least two teachers of comparable calibration; labels where there are any, unless `labels: false`.",
        cost="One softmax over stored logits per step.",
        evidence="The paper reports the best transfer of all its variants, and unlabelled about as good as "
        "labelled. Measured on our data: see `measured`.",
    )

    def build(self) -> CombineFn:
        """Return the function that weighs teachers."""
        return partial(confidence, by_label=self.labels)
