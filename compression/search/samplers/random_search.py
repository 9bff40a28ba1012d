"""Random search: the arm that tells what any cleverer sampler is worth."""

from typing import Any, ClassVar, Literal

from compression.card import MethodCard
from compression.search.samplers.sampler import Sampler


class RandomSearch(Sampler):
    """Every candidate is drawn evenly, whatever the outcomes."""

    kind: Literal["random"] = "random"

    card: ClassVar[MethodCard] = MethodCard(
        name="Random search",
        paper="Bergstra and Bengio 2012, Random Search for Hyper-Parameter Optimization, JMLR 13",
        summary="Draws candidates evenly; the control arm of every other sampler.",
        needs="Nothing.",
        cost="Nothing.",
        evidence="Measured on Fashion-MNIST: see docs/benchmarks.md, search.",
    )

    def optuna(self, seed: int) -> Any:
        import optuna

        return optuna.samplers.RandomSampler(seed=seed)
