"""How much each stage loses: first guesses from what its layers lose when half their channels go.

Layers differ in how much they bear, and a budget is spent best where it hurts least (Li et al. 2017,
arXiv:1608.08710, prune sensitive layers less by such a look at each alone). The guesses are where a study starts;
its sampler decides from there on by what the trials show.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compression.errors import CompressionError

if TYPE_CHECKING:
    from compression.quantize.sensitivity import Sensitivity

HALF = "half the channels"


def allocations(costs: Sequence[float], ratios: Sequence[float]) -> list[tuple[float, ...]]:
    """A ratio for each stage, the higher the less the stage costs: spread over all ``ratios``, their lower, upper half.

    Stages count by their rank, not their cost, whose scale says nothing of how much more may go; equal costs get equal
    ratios. Empty for one stage or one ratio, where there is nothing to allocate.

    Args:
        costs: Of each stage, higher for more sensitive ones.
        ratios: To choose from, ascending.
    """
    if len(costs) < 2 or len(ratios) < 2:
        return []
    ranks = [
        sum(other > cost for other in costs) + (sum(other == cost for other in costs) - 1) / 2 for cost in costs
    ]  # 0 for the most sensitive
    last = len(ratios) - 1
    found = [
        tuple(ratios[low + round((high - low) * rank / (len(costs) - 1))] for rank in ranks)
        for low, high in ((0, last), (0, last // 2), (last - last // 2, last))
    ]
    return list(dict.fromkeys(found))


def stage_costs(stages: Sequence[Sequence[str]], table: "Sensitivity", parent: str) -> list[float]:
    """The mean KL, in nats, that half the channels cost the layers of each stage.

    Args:
        stages: Of each stage, names of layers, or of blocks whose layers all count.
        table: Of the parent.
        parent: Its name.

    Raises:
        CompressionError: a stage has no layer in the table.
    """
    rows = table.column(HALF)
    costs = []
    for stage, names in enumerate(stages):
        found = [row.kl for layer, row in rows.items() if any(f"{layer}.".startswith(f"{name}.") for name in names)]
        if not found:
            raise CompressionError(
                f"Sensitivity table of '{parent}' has no row '{HALF}' for the layers of stage {stage} "
                f"({', '.join(names)}), expected at least one. Add the format to the sensitivity stage, or set "
                "use_sensitivity to false."
            )
        costs.append(sum(found) / len(found))
    return costs
