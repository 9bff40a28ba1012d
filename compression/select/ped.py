"""Rank teachers by the evidence of a linear model on features whose overlapping classes were pushed apart.

Legend: N samples, D features, C classes.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.select.nll import ScoreFn
from compression.types import Frozen

STD_FLOOR = 1e-3
"""Added to the deviation of every feature, as in the authors' code."""
STOP_SHARE = 0.5
"""Of the first move; classes rest once they move less."""
EVIDENCE_FLOOR = 1e-9
EVIDENCE_TOLERANCE = 1e-6
EVIDENCE_STEPS = 500


def push_apart(
    features: np.ndarray, labels: np.ndarray, *, reach: float, time_step: float, stiffness: float, max_steps: int
) -> np.ndarray:
    """Return features [N,D] in which overlapping classes have moved away from each other, each as a rigid body.

    Feature update of PED, "potential energy decline" (Li et al. 2023, arXiv:2308.15074). Features are standardised
    and back; the authors use mean and deviation of the same model's features on a general set, we those of the
    features at hand, for want of such a set. A class has a centre and a radius, the root of its summed variances.
    Two classes overlap by F = max(0, reach * (r_i + r_j) - |mu_i - mu_j|), and class i moves along
    unit(mu_i - mu_j) by min(time_step^2 * stiffness * F / 2, F), summed over j. Steps end after ``max_steps``, or when
    the move has fallen to half the first one. Without overlap, and for classes with one centre, nothing moves.

    Args:
        features: [N,D], float64.
        labels: integers [N].
        reach: radii up to which a class is felt.
        time_step: of the motion; enters squared.
        stiffness: force per overlap.
        max_steps: largest number of moves.
    """
    names, index = np.unique(labels, return_inverse=True)
    scale = features.std(axis=0) + STD_FLOOR
    standard = (features - features.mean(axis=0)) / scale
    groups = [standard[index == number] for number in range(len(names))]
    start = np.stack([rows.mean(axis=0) for rows in groups])
    radii = np.array([np.sqrt(rows.var(axis=0).sum()) for rows in groups])
    centres, first = start.copy(), 0.0
    for step in range(max_steps):
        moves = np.stack(
            [_push(number, centres, radii, reach, 0.5 * time_step**2 * stiffness) for number in range(len(names))]
        )
        size = float(np.linalg.norm(moves))
        first = first if step else size
        if size <= STOP_SHARE * first:
            break
        centres += moves
    return features + ((centres - start) * scale)[index]


def _push(number: int, centres: np.ndarray, radii: np.ndarray, reach: float, gain: float) -> np.ndarray:
    """Move of one class [D] in standardised units; one class at a time keeps memory at C times D."""
    away = centres[number] - centres
    distance = np.sqrt((away**2).sum(axis=1))
    overlap = np.maximum(0.0, reach * (radii[number] + radii) - distance)
    length = np.minimum(gain * overlap, overlap)
    share = np.divide(length, distance, out=np.zeros_like(length), where=distance > 0)
    return share @ away


def log_evidence(features: np.ndarray, labels: np.ndarray) -> float:
    """Return LogME, the log evidence per sample of a Bayesian linear model, in nats, mean over classes.

    You et al. 2021 (arXiv:2102.11005). Each class is a 0/1 target [N] of its own, weights have prior precision alpha
    and noise has precision beta. With the singular values s of the features and the target z in their basis, one step
    of the fixed point is gamma = sum s^2 / (alpha / beta + s^2), alpha = gamma / |m|^2, beta = (N - gamma) / residual,
    m the posterior mean. Classes without samples are left out.

    Args:
        features: [N,D], float64.
        labels: integers [N].
    """
    basis, singular, _ = np.linalg.svd(features, full_matrices=False)
    squares = singular**2
    scores = []
    for label in np.unique(labels):
        target = (labels == label).astype(np.float64)
        inside = (basis.T @ target) ** 2
        outside = max(0.0, float(target.sum() - inside.sum()))
        scores.append(_class_evidence(squares, inside, outside, *features.shape))
    return float(np.mean(scores))


def _class_evidence(squares: np.ndarray, inside: np.ndarray, outside: float, count: int, width: int) -> float:
    """Largest log evidence per sample of one target: ``inside`` [R] its squared parts along the singular vectors."""
    alpha = beta = 1.0
    for _ in range(EVIDENCE_STEPS):
        ratio = alpha / beta
        length, residual = _posterior(squares, inside, outside, ratio)
        gamma = float((squares / (ratio + squares)).sum())
        alpha = max(gamma, EVIDENCE_FLOOR) / max(length, EVIDENCE_FLOOR)
        beta = max(count - gamma, EVIDENCE_FLOOR) / max(residual, EVIDENCE_FLOOR)
        if abs(alpha / beta - ratio) <= EVIDENCE_TOLERANCE * ratio:
            break
    length, residual = _posterior(squares, inside, outside, alpha / beta)
    determinant = float(np.log(alpha + beta * squares).sum()) + (width - len(squares)) * np.log(alpha)
    fit = count * np.log(beta / (2 * np.pi)) + width * np.log(alpha) - beta * residual - alpha * length
    return float(fit - determinant) / (2 * count)


def _posterior(squares: np.ndarray, inside: np.ndarray, outside: float, ratio: float) -> tuple[float, float]:
    """Squared length of the posterior mean, and squared residual of its fit."""
    total = ratio + squares
    return float((squares * inside / total**2).sum()), float((inside * (ratio / total) ** 2).sum()) + outside


def ped_score(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    reach: float,
    time_step: float,
    stiffness: float,
    max_steps: int,
    max_per_class: int,
) -> float:
    """Return LogME of the pushed features, in nats per sample; higher is better.

    Args:
        features: [N,D].
        logits: unused.
        labels: int64 [N].
        reach: see :func:`push_apart`, as the next three.
        time_step: of the motion.
        stiffness: force per overlap.
        max_steps: largest number of moves.
        max_per_class: the first samples of each class that are looked at.
    """
    del logits
    classes = labels.numpy()
    rows = np.sort(np.concatenate([np.flatnonzero(classes == label)[:max_per_class] for label in np.unique(classes)]))
    values, classes = features.double().numpy()[rows], classes[rows]
    pushed = push_apart(values, classes, reach=reach, time_step=time_step, stiffness=stiffness, max_steps=max_steps)
    return log_evidence(pushed, classes)


class Ped(Frozen):
    """Evidence of a linear model, after overlapping classes were pushed apart."""

    kind: Literal["ped"] = "ped"
    reach: Annotated[float, Field(gt=0, le=10)] = 0.6
    """Radii up to which a class is felt; the authors take 0.3 or 0.6."""
    time_step: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Of the motion; its square scales each move."""
    stiffness: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Force per overlap."""
    max_steps: Annotated[int, Field(ge=0, le=100)] = 6
    """Largest number of moves; 0 is plain LogME."""
    max_per_class: Annotated[int, Field(ge=2)] = 300
    """Samples per class that are looked at."""

    card: ClassVar[MethodCard] = MethodCard(
        name="PED before LogME",
        paper="Li et al. 2023, Exploring Model Transferability through the Lens of Potential Energy, "
        "arXiv:2308.15074; You et al. 2021, LogME, arXiv:2102.11005",
        summary="Pushes overlapping classes apart as rigid bodies, a picture of what fine-tuning will do, then asks "
        "how well a Bayesian linear model explains the labels.",
        needs="Penultimate features on labelled validation data. Features are standardised by their own mean and "
        "deviation, where the authors have a general image set.",
        cost="One forward pass, then one singular value decomposition of the features.",
        evidence="The authors' figures: rank correlation with fine-tuning from 0.22 to 0.51 on Aircraft, but other "
        "scores lose by it on some sets. It predicts fine-tuning, not distillation. On our data "
        "students of good and bad teachers differed by less than chance, so no ranking could be judged.",
    )

    def build(self) -> ScoreFn:
        """The score as a function."""
        return partial(
            ped_score,
            reach=self.reach,
            time_step=self.time_step,
            stiffness=self.stiffness,
            max_steps=self.max_steps,
            max_per_class=self.max_per_class,
        )
