"""What a panel says about one batch, as one distribution per sample; losses that follow a distribution start here.

Legend: K teachers, B batch, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compression.distill.types import widened
from compression.errors import ShapeError
from compression.types import TeacherOutputs


def mixture(student_logits: Tensor, teachers: TeacherOutputs, temperature: float = 1.0) -> Tensor:
    """Return the weighted mixture of the softened teacher distributions, [B,C]; no gradient reaches the teachers.

    Half precision is widened to float32 first.

    Args:
        student_logits: [B,C]; only their shape is looked at.
        teachers: logits [K,B,C], weights [K,B].
        temperature: above 1 flattens every teacher before they are mixed.

    Raises:
        ShapeError: the teachers have another number of samples or classes than the student.
    """
    return _detached(student_logits, teachers).probs(temperature)


def log_mixture(student_logits: Tensor, teachers: TeacherOutputs, temperature: float = 1.0) -> Tensor:
    """Return the logarithm of ``mixture``, [B,C]; finite also where the probability itself rounds to 0."""
    panel = _detached(student_logits, teachers)
    log_softened = F.log_softmax(panel.logits / temperature, dim=-1)
    return torch.logsumexp(panel.weights.log().unsqueeze(-1) + log_softened, dim=0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row, [B], in nats, from log-probabilities [B,C] that must be finite."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def check_classes(student_logits: Tensor, teachers: TeacherOutputs) -> None:
    """Check that teacher logits are [K,B,C] with the student's B and C.

    Raises:
        ShapeError: they are not.
    """
    if teachers.logits.shape[1:] != student_logits.shape:
        raise ShapeError(
            f"Teacher logits have shape {list(teachers.logits.shape)}, expected [teachers, batch, classes] "
            f"with {list(student_logits.shape)} as the student's. Use teachers of the same classes."
        )


def check_features(features: Tensor, teachers: TeacherOutputs, widths: Sequence[int]) -> None:
    """Check that teacher features are K of [B, its width], with the B of the student's ``features`` [B,D].

    Raises:
        ShapeError: they are not.
    """
    found = [list(each.shape) for each in teachers.features]
    wanted = [[len(features), width] for width in widths]
    if found != wanted:
        raise ShapeError(
            f"Teacher features have shapes {found}, expected {wanted}. Use the teachers the loss was prepared for."
        )


def _detached(student_logits: Tensor, teachers: TeacherOutputs) -> TeacherOutputs:
    check_classes(student_logits, teachers)
    return TeacherOutputs(logits=widened(teachers.logits.detach()), weights=widened(teachers.weights.detach()))
