"""Where a study starts, by what earlier ones found."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression.search.space import Choices, Genes, Space, Workshop
from compression.types import Frozen


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


class Priors(Frozen):
    """To be written."""

    def look(self, genes: Mapping[str, Genes], spaces: Mapping[str, Space], shop: Workshop) -> Prior | None:
        """What ``shop.past`` says about these spaces; None when it says nothing."""
        raise NotImplementedError


AnyPriors = Priors
"""What a recipe may name under ``search.priors``."""
