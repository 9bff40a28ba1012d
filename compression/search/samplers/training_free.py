"""Aging evolution by a score that needs no training: what it finds best is trained first."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from random import Random
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compression import profile
from compression.card import MethodCard
from compression.errors import CheckpointError, CompressionError
from compression.search.filters.diswot import check_weights, diswot_score
from compression.search.samplers.sampler import Sampler, Situation
from compression.search.space import Choices, Space, Workshop

logger = logging.getLogger(__name__)

Candidate = tuple[str, Choices]
"""(label of a space, choices in it)."""

ATTEMPTS = 20
"""Candidates that are drawn for one place in the population before it is left empty."""
DRAWS = 1000
"""Candidates that are drawn, once the ranking is used up, for one that was not proposed yet."""
RANKING_FILE = "diswot_evolution.json"


def aging_evolution(
    rng: Random,
    *,
    draw: Callable[[Random], Candidate],
    mutate: Callable[[Candidate, Random], Candidate],
    score: Callable[[Candidate], float | None],
    population: int,
    cycles: int,
    tournament: int,
) -> list[Candidate]:
    """All candidates that were scored, best first, equals in the order in which they were found.

    Real et al. 2019 (arXiv:1802.01548). Starts from ``population`` drawn candidates; then, ``cycles`` times, the best
    of ``tournament`` sampled members gets a mutated child, and the oldest member leaves.

    Args:
        rng: the only source of chance.
        draw: a candidate from anywhere.
        mutate: a candidate one step away.
        score: higher is better; None for one that must not be kept. Asked once per candidate.
        population: members.
        cycles: children.
        tournament: members of which the best is the parent.
    """
    scores: dict[str, float | None] = {}
    found: list[tuple[float, Candidate]] = []

    def valid(propose: Callable[[], Candidate]) -> tuple[float, Candidate] | None:
        for _ in range(ATTEMPTS):
            candidate = propose()
            key = _key(*candidate)
            if key not in scores:
                scores[key] = score(candidate)
                if scores[key] is not None:
                    found.append((scores[key] or 0.0, candidate))
            if (value := scores[key]) is not None:
                return value, candidate
        return None

    members = [member for _ in range(population) if (member := valid(lambda: draw(rng))) is not None]
    for _ in range(cycles if members else 0):
        rivals = rng.sample(members, min(tournament, len(members)))
        _, parent = max(rivals, key=lambda member: member[0])
        child = valid(lambda parent=parent: mutate(parent, rng))
        if child is not None:
            members = [*members, child][-max(population, 1) :]
    return [candidate for _, candidate in sorted(found, key=lambda each: -each[0])]


class TrainingFree(Sampler):
    """Evolves candidates by the DisWOT score before the first is trained, then proposes them best first.

    Evolution looks at structures within the budget of MACs only, over all spaces, and happens once per study; the
    outcomes of trials change nothing. When all it scored were proposed, candidates are drawn evenly. The released code
    lets the lowest of a tournament's scores breed; here it is the highest.
    """

    kind: Literal["diswot_evolution"] = "diswot_evolution"
    population: int = Field(default=16, ge=1, le=10_000)
    """Candidates that live at once."""
    cycles: int = Field(default=100, ge=0, le=100_000)
    """Children."""
    tournament: int = Field(default=5, ge=1)
    """Members that are sampled each time; the best one gets the child."""
    semantic: float = Field(default=1.0, ge=0.0)
    """Weight of the semantic part of the score, from the gradients of the classifiers."""
    relation: float = Field(default=1.0, ge=0.0)
    """Weight of the relation part of the score, from the feature maps before the global pooling."""
    batch: int = Field(default=64, ge=2, le=4096)
    """Labelled images of one draw."""
    seeds: int = Field(default=3, ge=1, le=100)
    """Draws of initial weights and images whose mean counts."""

    card: ClassVar[MethodCard] = MethodCard(
        name="DisWOT evolution",
        paper="Dong et al. 2023, DisWOT, arXiv:2303.15678 (score); Real et al. 2019, arXiv:1802.01548 (evolution)",
        summary="Evolves candidates by how alike their untrained networks and the untrained best teacher see a batch, "
        "and has the best of them trained.",
        needs="The best teacher's structure, labelled calibration images, and spaces that do not train to build.",
        cost="Seconds per candidate that evolution looks at, once per study; nothing is trained for it.",
        evidence="The paper reports a search at least 180 times cheaper than one that trains. Not measured on our data "
        "yet.",
    )

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        check_weights(self.semantic, self.relation)
        return self

    def propose(self, situation: Situation) -> Candidate:
        """The best candidate that no row stands for.

        Raises:
            CompressionError: a space trains while it builds, or the score cannot be had.
        """
        proposed = {_key(row.space, row.choices) for row in situation.rows}
        for candidate in self.ranking(situation):
            if _key(*candidate) not in proposed:
                return candidate
        rng = situation.rng()
        candidate = situation.drawn(rng)
        for _ in range(DRAWS):
            if _key(*candidate) not in proposed:
                break
            candidate = situation.drawn(rng)
        return candidate

    def check(self, spaces: Mapping[str, Space], shop: Workshop) -> None:
        del shop
        for label, space in spaces.items():
            if space.trains_while_building:
                raise CompressionError(
                    f"Sampler '{self.kind}' has space '{label}', which trains while it builds, expected spaces that "
                    "build without. Choose another sampler."
                )

    def ranking(self, situation: Situation) -> list[Candidate]:
        """What evolution found, best first: a function of spaces, budget and the study's seed, computed once."""
        self.check(situation.spaces, situation.shop)
        shop = situation.shop
        key, path = self._digest(situation), shop.folder / RANKING_FILE
        place = f"{self.kind}/{key}"
        if place in shop.memory:
            return shop.memory[place]
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("key") == key:
            found = [(str(label), dict(choices)) for label, choices in kept["ranking"]]
        else:
            found = self._evolved(situation)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(path.name + ".part")
            draft.write_text(json.dumps({"key": key, "ranking": found}), encoding="utf-8")
            draft.replace(path)
        shop.memory[place] = found
        return found

    def _evolved(self, situation: Situation) -> list[Candidate]:
        shop = situation.shop

        def score(candidate: Candidate) -> float | None:
            label, choices = candidate
            try:
                model, spec = situation.spaces[label].build(choices, shop)
            except (CompressionError, CheckpointError, ValueError) as error:
                logger.info("%s %s cannot be built: %s", label, choices, error)
                return None
            if situation.max_macs is not None and profile.macs(model, spec.input_shape) > situation.max_macs:
                return None
            return diswot_score(
                spec, shop, semantic=self.semantic, relation=self.relation, batch=self.batch, seeds=self.seeds
            )

        found = aging_evolution(
            Random(int.from_bytes(hashlib.sha256(f"{self.kind}/{shop.seed}".encode()).digest()[:8], "big")),
            draw=situation.drawn,
            mutate=lambda candidate, rng: mutated(candidate, situation, rng),
            score=score,
            population=self.population,
            cycles=self.cycles,
            tournament=self.tournament,
        )
        logger.info("evolution scored %d candidates within the budget, without training", len(found))
        return found

    def _digest(self, situation: Situation) -> str:
        """Changes with everything the ranking depends on, data and teachers aside: those a study keeps."""
        told = [
            self.model_dump(mode="json"),
            {label: space.model_dump(mode="json") for label, space in situation.spaces.items()},
            situation.genes,
            situation.max_macs,
            situation.shop.seed,
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def mutated(candidate: Candidate, situation: Situation, rng: Random) -> Candidate:
    """The candidate with another value of one gene; the space is a gene too, and a new one brings drawn choices."""
    label, choices = candidate
    genes = situation.genes[label]
    options = [gene for gene, values in genes.items() if len(values) > 1]
    others = [each for each in situation.genes if each != label]
    place = rng.randrange(max(1, len(options) + bool(others)))
    if place < len(options):
        gene = options[place]
        return label, choices | {gene: rng.choice([value for value in genes[gene] if value != choices[gene]])}
    if not others:
        return candidate
    label = rng.choice(others)
    return label, {gene: rng.choice(values) for gene, values in situation.genes[label].items()}


def _key(space: str, choices: Choices) -> str:
    """Equal for candidates that ask for the same."""
    return json.dumps([space, choices], sort_keys=True)
