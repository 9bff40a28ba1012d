"""DisWOT: how alike a student and its teacher see one batch before either is trained.

Dong, Li and Wei 2023, "DisWOT: Student Architecture Search for Distillation WithOut Training" (arXiv:2303.15678).

Legend: B samples, K classes, C width of the features the classifier sees.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import normalise
from compression.card import MethodCard
from compression.errors import CompressionError, ShapeError
from compression.features import captured, penultimate, stage_names
from compression.models import ModelSpec, build_model
from compression.search.filters.look import Filter
from compression.search.space import Workshop
from compression.search.trials import TrialResult

logger = logging.getLogger(__name__)

SCORES_FILE = "diswot.json"

Parts = tuple[float, float]
"""(semantic score, relation score), each at most 0."""


def gram(rows: Tensor) -> Tensor:
    """Products of all pairs of ``rows`` [N,...], float64 [N,N], each row of length 1; rows of zeros stay zeros."""
    flat = rows.detach().to(torch.float64).flatten(1)
    return F.normalize(flat @ flat.T, dim=1, eps=1e-300)


def agreement(teacher: Tensor, student: Tensor) -> float:
    """``-||G_T - G_S||_F^2 / N^2`` of two Gram matrices [N,N] as ``gram`` gives them: 0 for equal ones, else below.

    Of feature maps before the global pooling, N = B, it is the relation score; of ``classifier_gradient``, N = K, the
    semantic score. Neither changes when features are scaled, nor minds different widths.

    Raises:
        ShapeError: the matrices differ in size.
    """
    if teacher.shape != student.shape:
        raise ShapeError(
            f"Teacher and student have Gram matrices {list(teacher.shape)} and {list(student.shape)}, expected equal "
            "ones. Compare them on the same samples and classes."
        )
    return -float((teacher - student).square().sum()) / len(teacher) ** 2


def classifier_gradient(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """What the backward pass of the mean cross entropy leaves in the weight of a linear classifier, float64 [K,C].

    Args:
        logits: [B,K].
        features: [B,C], what the classifier saw.
        labels: int64 [B].
    """
    surplus = logits.to(torch.float64).softmax(dim=1) - F.one_hot(labels, logits.shape[1])
    return surplus.T @ features.to(torch.float64) / len(labels)


def diswot_score(
    spec: ModelSpec, shop: Workshop, *, semantic: float = 1.0, relation: float = 1.0, batch: int = 64, seeds: int = 3
) -> float | None:
    """How well the structure of ``spec`` will learn from the best teacher's; at most 0, higher is better.

    Both networks are initialised at random from one seed and see one batch of labelled calibration images in training
    mode; the parts are means over ``seeds`` such draws, a function of the structures, the data and ``shop.seed``. They
    are kept in ``shop.folder/diswot.json``. None where the network has no feature map to compare.

    Args:
        spec: of the candidate; weights do not count.
        shop: of the study.
        semantic: weight of what differs in the gradients of the classifiers.
        relation: weight of what differs in how alike the samples of a batch look.
        batch: samples of a batch; all there are, if fewer.
        seeds: initialisations and batches.

    Raises:
        CompressionError: the study has no best teacher, no labelled calibration images, or a teacher that has no
            feature map.
    """
    grams = _teacher_grams(shop, batch, seeds)
    known = _known(shop)
    key = _key(spec, shop, batch, seeds)
    if key not in known:
        known[key] = _parts(spec, shop, grams, batch)
        _write(shop.folder / SCORES_FILE, known)
    found = known[key]
    return None if found is None else semantic * found[0] + relation * found[1]


class Diswot(Filter):
    """Trains candidates whose untrained network sees a batch much as the untrained best teacher does.

    Class by class instead of the paper's channel by channel Gram matrices in the semantic part, so that widths may
    differ; means over several seeds instead of one draw. A candidate that has no feature map is trained unjudged.
    """

    kind: Literal["diswot"] = "diswot"
    semantic: float = Field(default=1.0, ge=0.0)
    """Weight of the semantic part, from the gradients of the classifiers."""
    relation: float = Field(default=1.0, ge=0.0)
    """Weight of the relation part, from the feature maps before the global pooling."""
    batch: int = Field(default=64, ge=2, le=4096)
    """Labelled images of one draw."""
    seeds: int = Field(default=3, ge=1, le=100)
    """Draws of initial weights and images whose mean counts."""

    card: ClassVar[MethodCard] = MethodCard(
        name="DisWOT filter",
        paper="Dong et al. 2023, DisWOT, arXiv:2303.15678",
        summary="Compares the untrained student with the untrained teacher, in how alike they find samples and in the "
        "gradients of their classifiers, and trains only candidates that come close.",
        needs="The best teacher's structure and labelled calibration images.",
        cost="A few forward passes of one batch per candidate; nothing is trained.",
        evidence="The paper reports a search at least 180 times cheaper than one that trains. Measured on "
        "Fashion-MNIST: over 32 students its Kendall tau with trained accuracy is -0.07, where MACs have 0.52.",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        check_weights(self.semantic, self.relation)
        return self

    def check(self, shop: Workshop) -> None:
        _teacher_grams(shop, self.batch, self.seeds)

    def score(
        self, model: nn.Module, spec: ModelSpec, row: TrialResult, rows: Sequence[TrialResult], shop: Workshop
    ) -> float | None:
        del model, row, rows
        return diswot_score(
            spec, shop, semantic=self.semantic, relation=self.relation, batch=self.batch, seeds=self.seeds
        )


def check_weights(semantic: float, relation: float) -> None:
    """Raises ValueError when nothing of the score is left."""
    if semantic == relation == 0.0:
        raise ValueError("semantic and relation are both 0, expected one above. Raise one of them.")


def _teacher_grams(shop: Workshop, batch: int, seeds: int) -> list[tuple[Tensor, Tensor]]:
    """Semantic and relation Gram matrices of the untrained best teacher, one pair a seed."""
    if shop.best_teacher is None:
        raise CompressionError(
            "DisWOT has no best teacher, expected one to compare candidates with. Pass best_teacher, or search "
            "without it."
        )
    place = f"diswot/teacher/{batch}/{seeds}"
    if place not in shop.memory:
        _, spec = shop.parent(shop.best_teacher)
        try:
            shop.memory[place] = [_grams(spec, shop, batch, draw) for draw in range(seeds)]
        except ShapeError as error:
            raise CompressionError(
                f"DisWOT has teacher '{shop.best_teacher}' without a feature map ({error}), expected one before its "
                "classifier. Search without it."
            ) from error
    return shop.memory[place]


def _parts(spec: ModelSpec, shop: Workshop, teacher: Sequence[tuple[Tensor, Tensor]], batch: int) -> Parts | None:
    try:
        student = [_grams(spec, shop, batch, draw) for draw in range(len(teacher))]
    except ShapeError as error:
        logger.info("DisWOT cannot judge a '%s': %s", spec.model.kind, error)
        return None
    pairs = list(zip(teacher, student, strict=True))
    return (
        fmean(agreement(ours[0], theirs[0]) for ours, theirs in pairs),
        fmean(agreement(ours[1], theirs[1]) for ours, theirs in pairs),
    )


def _grams(spec: ModelSpec, shop: Workshop, batch: int, draw: int) -> tuple[Tensor, Tensor]:
    """Gram matrices [K,K] of the classifier's gradient and [B,B] of the last feature map of a fresh network.

    Raises:
        ShapeError: it has no feature map.
    """
    seed = int.from_bytes(hashlib.sha256(f"diswot/{shop.seed}/{draw}".encode()).digest()[:4], "big")
    images, labels = _labelled(shop, batch, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(spec).train()
        last = stage_names(model, images[:2])[-1]
        with captured(model, [last]) as seen:
            logits, features = penultimate(model, images)
    return gram(classifier_gradient(logits, features, labels)), gram(seen[last])


def _labelled(shop: Workshop, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """A draw of normalised calibration images [B,C,H,W] and their labels [B]."""
    split = shop.dataset.calibration
    rows = (split.labels >= 0).nonzero().squeeze(1)
    if len(rows) < 2:
        raise CompressionError(
            f"DisWOT has {len(rows)} labelled calibration images, expected at least 2. Give the calibration split a "
            "larger share, or search without it."
        )
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:batch]]
    return normalise(split.images[chosen], shop.dataset.preprocessing), split.labels[chosen]


def _key(spec: ModelSpec, shop: Workshop, batch: int, seeds: int) -> str:
    _, teacher = shop.parent(str(shop.best_teacher))
    told = [
        spec.model_dump(mode="json"),
        teacher.model_dump(mode="json"),
        shop.dataset.hashes,
        (shop.seed, batch, seeds),
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _known(shop: Workshop) -> dict[str, Parts | None]:
    """What was scored before, by this process or one that was killed."""
    place = "diswot/scores"
    if place not in shop.memory:
        path = shop.folder / SCORES_FILE
        shop.memory[place] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return shop.memory[place]


def _write(path: Path, scores: dict[str, Parts | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(scores, sort_keys=True), encoding="utf-8")
    draft.replace(path)
