"""Where a study starts, by what earlier ones found.

After AutoTransfer (Cao et al. 2023, arXiv:2303.07669): the choices that were good on the most similar tasks.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compression.card import MethodCard
from compression.search.bank import PastTask, PastTrial
from compression.search.front import dominates
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.task_embedding import data_hash, embedding_of
from compression.types import Frozen

LEAST_DISTANCE = 1e-3
"""Nearer tasks count as this near, that of the study itself among them."""


@dataclass(frozen=True)
class Prior:
    """What earlier studies say about the genes of this one."""

    best: Sequence[tuple[str, Choices]]
    """Candidates to try first: label of the space, and choices that this study has too."""
    weights: Mapping[str, Mapping[Any, float]]
    """How good each value of each choice was: ``space`` and ``<label>.<gene>`` -> value -> share, summing to 1."""

    def drawn(self, *, seed: int) -> tuple[str, Choices]:
        """A candidate drawn by the weights, as a function of the seed."""
        rng = random.Random(seed)
        chosen = {name: rng.choices(list(each), list(each.values()))[0] for name, each in self.weights.items()}
        label = chosen["space"]
        prefix = f"{label}."
        return label, {name.removeprefix(prefix): value for name, value in chosen.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Neighbour:
    """A past task that is like this one."""

    weight: float
    """1 / distance; shares of all neighbours sum to 1."""
    best: Sequence[tuple[str, Choices]]
    """Its best trials, best first, in terms of this study's genes; a gene without a counterpart is left out."""


class Priors(Frozen):
    """Starts with the best trials of the most similar tasks and draws the first generation as they chose.

    A past trial counts where this study has a space of its label with the same genes. Numbers that are not on offer
    become the nearest one that is; words that are not are left out. Best are the trials that fewest others of their
    study dominate in accuracy, latency and size, the more accurate first. A task without an embedding counts only when
    its data is that of this study. Differs from the paper: distances are those of the embeddings themselves, without
    the learned projection, and what is never seen keeps a share.
    """

    kind: Literal["past_runs"] = "past_runs"
    tasks: Annotated[int, Field(ge=1)] = 3
    """How many of the most similar tasks count."""
    best: Annotated[int, Field(ge=1)] = 16
    """How many of the best trials of each."""
    enqueue: Annotated[int, Field(ge=0)] = 8
    """How many of them are tried first, those of the most similar task in front."""
    mix: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.8
    """Share of what was good in the weights; the rest is even."""

    wants_past: ClassVar[bool] = True
    """Whether the trials of earlier studies are of use."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Design priors from past runs (AutoTransfer)",
        paper="Cao et al. 2023, AutoTransfer, arXiv:2303.07669",
        summary="Tries what was best on the most similar earlier tasks first, and draws the sampler's first generation "
        "by how often their best trials chose each value; tasks are compared by what random networks would have to "
        "change to learn them.",
        needs="Earlier studies with spaces of the same labels and genes.",
        cost="Seconds for the embedding of the task, once.",
        evidence="The paper reports about a tenth of the architectures explored, on graph tasks. Not measured on our "
        "data yet.",
    )

    def look(self, genes: Mapping[str, Genes], spaces: Mapping[str, Space], shop: Workshop) -> Prior | None:
        """What ``shop.past`` says about these spaces; None when it says nothing."""
        del spaces
        usable = [past for past in shop.past if _same_genes(past, genes)]
        if not usable:
            return None
        neighbours = self._neighbours(usable, genes, shop)
        if not any(neighbour.best for neighbour in neighbours):
            return None
        return Prior(_first(neighbours, genes, self.enqueue), weights_of(neighbours, genes, mix=self.mix))

    def _neighbours(self, usable: Sequence[PastTrial], genes: Mapping[str, Genes], shop: Workshop) -> list[Neighbour]:
        here = data_hash(shop.dataset)
        by_task: dict[str, list[PastTrial]] = {}
        for past in usable:
            by_task.setdefault(past.task.data_hash, []).append(past)
        elsewhere = any(past.task.embedding and past.task.data_hash != here for past in usable)
        embedding = embedding_of(shop.dataset, seed=shop.seed, folder=shop.folder) if elsewhere else ()
        distances = {
            name: min(_distance(past.task, here, embedding) for past in each) for name, each in by_task.items()
        }
        nearest = sorted(
            (name for name in by_task if distances[name] < math.inf), key=lambda name: (distances[name], name)
        )
        nearest = nearest[: self.tasks]
        shares = [1.0 / max(distances[name], LEAST_DISTANCE) for name in nearest]
        return [
            Neighbour(
                share / sum(shares),
                [(past.space, offered(past.choices, genes[past.space])) for past in ranked(by_task[name])[: self.best]],
            )
            for name, share in zip(nearest, shares, strict=True)
        ]


AnyPriors = Priors
"""What a recipe may name under ``search.priors``."""


def ranked(trials: Sequence[PastTrial]) -> list[PastTrial]:
    """Best first: by how many trials of their own study dominate them, then by accuracy."""
    points = {past.place: _point(past) for past in trials}

    def rank(past: PastTrial) -> tuple[int, float, tuple[str, int]]:
        rivals = (points[other.place] for other in trials if other.study == past.study)
        return sum(dominates(rival, points[past.place]) for rival in rivals), -past.accuracy, past.place

    return sorted(trials, key=rank)


def _point(past: PastTrial) -> tuple[float, ...]:
    """To be minimised; what was not measured counts as 0."""
    return 1.0 - past.accuracy, past.latency_p50_ms or 0.0, float(past.size_bytes or 0)


def offered(choices: Choices, genes: Genes) -> Choices:
    """Past choices in terms of ``genes``: the value itself, the nearest number, or no entry for another word."""
    found: Choices = {}
    for gene, values in genes.items():
        value = choices[gene]
        same = [each for each in values if each == value and _is_number(each) == _is_number(value)]
        numbers = [each for each in values if _is_number(each)]
        if same:
            found[gene] = same[0]
        elif _is_number(value) and numbers:
            found[gene] = min(numbers, key=lambda each: abs(each - value))
    return found


def weights_of(
    neighbours: Sequence[Neighbour], genes: Mapping[str, Genes], *, mix: float
) -> dict[str, dict[Any, float]]:
    """``space`` and ``<label>.<gene>`` -> value -> share, summing to 1.

    ``mix`` times how often the best trials of the neighbours chose a value, averaged by the neighbours' weights, plus
    an even share of the rest; even where no neighbour says anything.
    """
    spaces = [(each.weight, [label for label, _ in each.best]) for each in neighbours]
    weights = {"space": _mixed(spaces, tuple(genes), mix)}
    for label, each_gene in genes.items():
        for gene, values in each_gene.items():
            chosen = [
                (each.weight, [choices[gene] for of, choices in each.best if of == label and gene in choices])
                for each in neighbours
            ]
            weights[f"{label}.{gene}"] = _mixed(chosen, values, mix)
    return weights


def _mixed(chosen: Sequence[tuple[float, Sequence[Any]]], values: Sequence[Any], mix: float) -> dict[Any, float]:
    """Share of each value in what was chosen, a weight and its choices after another, mixed with an even share."""
    total = sum(weight for weight, each in chosen if each)
    if not total:
        mix = 0.0
    shares = dict.fromkeys(values, (1.0 - mix) / len(values))
    for weight, each in chosen:
        for value in each:
            shares[value] += mix * weight / (total * len(each))
    return shares


def _first(neighbours: Sequence[Neighbour], genes: Mapping[str, Genes], count: int) -> list[tuple[str, Choices]]:
    """Up to ``count`` distinct candidates with a value for every gene, nearest task and best trial first."""
    found: list[tuple[str, Choices]] = []
    for each in neighbours:
        for label, choices in each.best:
            if choices.keys() == genes[label].keys() and (label, choices) not in found:
                found.append((label, choices))
    return found[:count]


def _distance(task: PastTask, here: str, embedding: tuple[float, ...]) -> float:
    """0 for the data of this study, else that of the embeddings, infinite where one is missing."""
    if task.data_hash == here:
        return 0.0
    if not embedding or len(task.embedding) != len(embedding):
        return math.inf
    return math.dist(task.embedding, embedding)


def _same_genes(past: PastTrial, genes: Mapping[str, Genes]) -> bool:
    return past.space in genes and past.choices.keys() == genes[past.space].keys()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
