"""What every sampler promises: the next candidate, as a function of the seed and the outcomes so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from compression.card import MethodCard
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.trials import TrialResult
from compression.types import Frozen


@dataclass(frozen=True)
class Situation:
    """Where a study stands when the next candidate is due."""

    spaces: Mapping[str, Space]
    """By label."""
    genes: Mapping[str, Genes]
    """What may be chosen in each space."""
    rows: Sequence[TrialResult]
    """Every proposal that has an outcome, by number: trained, over budget, duplicate, filtered or failed."""
    number: int
    """Of the proposal that is due."""
    seed: int
    """Of the study and this number; draw random numbers from nothing else."""
    shop: Workshop
    max_macs: int | None = None
    """Budget that candidates must keep, for samplers that look before they propose."""

    def rng(self) -> Random:
        """Fresh random numbers: the same for each call."""
        return Random(self.seed)

    def drawn(self, rng: Random) -> tuple[str, Choices]:
        """A candidate drawn evenly: first the space, then each of its genes."""
        label = rng.choice(list(self.genes))
        return label, {gene: rng.choice(values) for gene, values in self.genes[label].items()}


class Sampler(Frozen):
    """Base of every sampler. It keeps no state: a study that was killed and goes on proposes what it would have."""

    card: ClassVar[MethodCard]

    @property
    def warm_up(self) -> int:
        """How many candidates are drawn before it learns from outcomes."""
        return 0

    def check(self, spaces: Mapping[str, Space], shop: Workshop) -> None:
        """Nothing, when it can propose for these spaces, by label.

        Raises:
            CompressionError: it cannot.
        """
        del spaces, shop

    def optuna(self, seed: int) -> Any | None:
        """The sampler of Optuna that proposes; None when ``propose`` does."""
        del seed
        return None

    def propose(self, situation: Situation) -> tuple[str, Choices]:
        """The label of a space and the choices in it; asked only when ``optuna`` is None."""
        raise NotImplementedError(type(self).__name__)
