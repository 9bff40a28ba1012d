"""Rank teachers by how much their features still tell within a class."""

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.select.nll import ScoreFn
from compression.types import Frozen

DISTANCE_FLOOR = 1e-9


def tmi_score(features: Tensor, logits: Tensor, labels: Tensor, *, neighbours: int, max_per_class: int) -> float:
    """Class-conditional entropy of the features per dimension, in nats; higher is better.

    After TMI ("Transferability via Measuring Intra-class feature variance"): sum over classes of P(c) times the
    Kozachenko-Leonenko entropy -psi(k) + psi(n_c) + (D/n_c) sum_i ln(2 rho_i), rho_i the max-norm distance to the
    k-th neighbour. We differ: features [N,D] are centred and divided by their global root mean square, distances are
    floored at 1e-9 instead of 1, and the result is divided by D, since the plain score grows with the width. Classes
    with k samples or fewer are left out, and the shares of the others renormalised.
    """
    from scipy.special import digamma

    values = features.double().numpy()
    values = values - values.mean(axis=0, keepdims=True)
    values = values / max(float(np.sqrt(np.mean(values**2))), DISTANCE_FLOOR)
    width = values.shape[1]
    total, weight = 0.0, 0
    for label in np.unique(labels.numpy()):
        rows = values[labels.numpy() == label][:max_per_class]
        count = len(rows)
        if count <= neighbours:
            continue
        distances = np.sort(_max_norm_distances(rows), axis=1)[:, neighbours]
        entropy = (
            -digamma(neighbours) + digamma(count) + width * np.mean(np.log(2 * np.maximum(distances, DISTANCE_FLOOR)))
        )
        total += count * float(entropy)
        weight += count
    return total / max(weight, 1) / width


def _max_norm_distances(rows: np.ndarray) -> np.ndarray:
    """Largest coordinate difference of every pair, [n,n]; zero on the diagonal."""
    distances = np.zeros((len(rows), len(rows)))
    for column in rows.T:
        np.maximum(distances, np.abs(column[:, None] - column[None, :]), out=distances)
    return distances


class Tmi(Frozen):
    """Intra-class feature entropy, normalised by width."""

    kind: Literal["tmi"] = "tmi"
    neighbours: Annotated[int, Field(ge=1, le=50)] = 3
    """k of the nearest-neighbour entropy estimate."""
    max_per_class: Annotated[int, Field(ge=10)] = 300
    """Samples per class that are looked at; cost grows with the square."""

    card: ClassVar[MethodCard] = MethodCard(
        name="TMI, width-normalised",
        paper="Xu and Kang 2023, Fast and Accurate Transferability Measurement by Evaluating Intra-class "
        "Feature Variance, arXiv:2308.05986",
        summary="Teachers whose features still vary within a class transfer better than collapsed ones.",
        needs="Penultimate features on labelled validation data.",
        cost="One forward pass and pairwise distances within each class.",
        evidence="Predicts fine-tuning transfer in the paper; its ranking of distilled students "
        "is not measured here yet.",
    )

    def build(self) -> ScoreFn:
        """The score as a function."""
        from functools import partial

        return partial(tmi_score, neighbours=self.neighbours, max_per_class=self.max_per_class)
