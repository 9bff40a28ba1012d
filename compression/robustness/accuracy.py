"""How much accuracy is left under corruptions, and whether compression took more of it than of the clean one.

Legend: N images, R conditions (corruption and severity).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compression.augment import sample_words
from compression.card import MethodCard
from compression.data.dataset import Split
from compression.errors import ShapeError
from compression.metrics import PredictFn, predict
from compression.robustness.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from compression.statistics import Interval
from compression.types import Frozen, Preprocessing

Severity = Annotated[int, Field(ge=1, le=5)]

BATCH_SIZE = 128
"""Images corrupted at a time."""
SPAN = 2.0
"""Most that one image can add to a difference of two gaps."""


class RobustnessConfig(Frozen):
    """Accuracy on corrupted test images, of every file."""

    kind: Literal["corruptions"] = "corruptions"
    corruptions: Annotated[tuple[Corruption, ...], Field(min_length=1)] = CORRUPTIONS
    """Which kinds."""
    severities: Annotated[tuple[Severity, ...], Field(min_length=1)] = SEVERITIES
    """How strong, 1 (hardly visible) to 5."""
    images: Annotated[int, Field(ge=50)] | None = 1000
    """Test images that are corrupted, chosen by the seed; None takes all."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Accuracy under corruptions",
        paper="Hendrycks and Dietterich 2019, arXiv:1903.12261; kinds and strengths are ours",
        summary="Noise, blur, contrast, occlusion and shift in five strengths, the same for every file; reports the "
        "mean accuracy, the gap to the clean one, and how much wider the gap is than the reference's.",
        needs="Test images of 8 x 8 pixels or more.",
        cost="One pass over the images per corruption and severity, for every file.",
        evidence="Measured in every run. On digits compression cost no more on corrupted images than on clean ones.",
    )

    @field_validator("corruptions", "severities")
    @classmethod
    def _each_once(cls, chosen: tuple) -> tuple:
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"has {', '.join(map(str, chosen))}, expected each once. Remove the repeated one.")
        return chosen


class Condition(Frozen):
    """Accuracy under one corruption."""

    corruption: Corruption
    severity: Severity
    accuracy: float
    """Share of correct answers, 0..1."""


class Robustness(Frozen):
    """What is left of one model's accuracy under corruptions."""

    clean_accuracy: float
    """On the same images uncorrupted, 0..1."""
    conditions: tuple[Condition, ...]
    """Every corruption at every severity."""
    corrupted_accuracy: float
    """Mean over all conditions, 0..1."""
    robust_gap: float
    """Clean minus corrupted accuracy."""
    num_images: int
    gap_increase: Interval | None = None
    """This model's gap minus the reference's, see :func:`gap_increase`; None for the reference itself."""


@dataclass(frozen=True)
class Answers:
    """Which answers of one model were right."""

    clean: Tensor
    """[N], bool."""
    corrupted: Tensor
    """[R,N], bool, the same images in the same order."""


def conditions(config: RobustnessConfig) -> list[tuple[Corruption, int]]:
    """The rows of :class:`Answers`: corruption and severity, severities of one corruption together."""
    return [(corruption, severity) for corruption in config.corruptions for severity in config.severities]


def corruption_answers(
    models: Mapping[str, PredictFn | nn.Module],
    split: Split,
    preprocessing: Preprocessing,
    config: RobustnessConfig,
    seed: int,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:
    """Ask every model about the same corrupted images, each made once.

    Args:
        models: by name; normalised images [B,C,H,W] -> logits [B,classes].
        split: images and labels; of it ``config.images`` are taken.
        preprocessing: of the models.
        config: which corruptions.
        seed: of the choice of images and of the corruptions.
        on_progress: gets (conditions done, conditions in all).

    Raises:
        ShapeError: there are no images, they are too small, or a model does not return [B,classes].
    """
    split = chosen_images(split, config.images, seed)
    wanted: list[tuple[Corruption, int]] = [(config.corruptions[0], 0), *conditions(config)]
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    for done, (corruption, severity) in enumerate(wanted, start=1):
        parts: dict[str, list[Tensor]] = {name: [] for name in models}
        for start in range(0, max(1, len(split.ids)), BATCH_SIZE):
            images, labels, ids = (each[start : start + BATCH_SIZE] for each in (split.images, split.labels, split.ids))
            changed = corrupt(
                images, ids, corruption=corruption, severity=severity, seed=seed, scale=preprocessing.scale
            )
            some = Split(images=changed, labels=labels, ids=ids)
            for name, model in models.items():
                parts[name].append(predict(model, some, preprocessing).argmax(dim=1) == labels)
        for name, part in parts.items():
            rows[name].append(torch.cat(part))
        if on_progress is not None:
            on_progress(done, len(wanted))
    return {name: Answers(clean=row[0], corrupted=torch.stack(row[1:])) for name, row in rows.items()}


def robustness_of(
    answers: Answers, config: RobustnessConfig, *, reference: Answers | None = None, seed: int = 0
) -> Robustness:
    """The numbers behind ``answers``; with a ``reference`` also the paired interval of the gap's increase."""
    accuracies = answers.corrupted.double().mean(dim=1).tolist()
    clean, corrupted = float(answers.clean.double().mean()), float(answers.corrupted.double().mean())
    return Robustness(
        clean_accuracy=clean,
        conditions=tuple(
            Condition(corruption=corruption, severity=severity, accuracy=accuracy)
            for (corruption, severity), accuracy in zip(conditions(config), accuracies, strict=True)
        ),
        corrupted_accuracy=corrupted,
        robust_gap=clean - corrupted,
        num_images=len(answers.clean),
        gap_increase=None if reference is None else gap_increase(reference, answers, seed=seed),
    )


def corruption_accuracy(
    predict: PredictFn | nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    config: RobustnessConfig,
    seed: int,
    *,
    reference: Answers | None = None,
) -> Robustness:
    """Accuracy of one model per corruption and severity; see :func:`corruption_answers`."""
    answers = corruption_answers({"model": predict}, split, preprocessing, config, seed)["model"]
    return robustness_of(answers, config, reference=reference, seed=seed)


def gap_increase(reference: Answers, candidate: Answers, *, seed: int, level: float = 0.95) -> Interval:
    """The accuracy lost under corruption beyond what was lost on clean images, with a paired interval.

    (corrupted drop) - (clean drop) of the candidate against the reference, which is the same as the candidate's robust
    gap minus the reference's. Above 0: compression cost more where images are bad than where they are good.

    Raises:
        ShapeError: the two were asked about other images or conditions.
    """
    if reference.clean.shape != candidate.clean.shape or reference.corrupted.shape != candidate.corrupted.shape:
        raise ShapeError(
            f"Answers have shapes {list(reference.corrupted.shape)} and {list(candidate.corrupted.shape)}, expected "
            "two equal [conditions, images]. Ask both models about the same images and corruptions."
        )
    return paired_mean(_gaps(candidate) - _gaps(reference), seed=seed, level=level, span=SPAN)


def paired_mean(
    differences: Tensor, *, seed: int, level: float = 0.95, resamples: int = 2000, span: float = 1.0
) -> Interval:
    """Mean of [N] per-sample differences with a percentile bootstrap over samples (Efron and Tibshirani 1993).

    Differences of shares take few values, so a resample is a multinomial draw of their counts. Where all samples are
    alike the bootstrap has no width; the bounds are then ``span``, the most a sample can differ, times the rule of
    three's.

    Raises:
        ShapeError: there are no samples.
    """
    if differences.ndim != 1 or len(differences) == 0:
        raise ShapeError(f"Differences have shape {list(differences.shape)}, expected [N] with N of at least 1.")
    size = len(differences)
    values, counts = np.unique(differences.double().numpy().round(9), return_counts=True)
    estimate = float(differences.double().mean())
    if len(values) == 1:
        bound = -float(np.log(1 - level)) / size * span
        return Interval(estimate=estimate, low=estimate - bound, high=estimate + bound, level=level)
    draws = np.random.default_rng(seed).multinomial(size, counts / size, size=resamples) @ values / size
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=estimate, low=float(low), high=float(high), level=level)


def chosen_images(split: Split, count: int | None, seed: int) -> Split:
    """``count`` samples of the split, in its order: a function of seed and ids, whatever order they stand in."""
    if count is None or count >= len(split.ids):
        return split
    order = np.argsort(sample_words(split.ids, view=0, seed=seed), kind="stable")
    rows = torch.from_numpy(np.sort(order[:count]))
    return Split(images=split.images[rows], labels=split.labels[rows], ids=split.ids[rows])


def _gaps(answers: Answers) -> Tensor:
    """Per image: 1 if right when clean, minus the share of conditions under which it is right, float64 [N]."""
    return answers.clean.double() - answers.corrupted.double().mean(dim=0)
