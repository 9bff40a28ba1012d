"""One student, one training."""

from typing import ClassVar, Literal

from compression.card import MethodCard
from compression.distill.procedures.training import ProcedureFn, Training
from compression.train import History
from compression.types import Frozen


def single(training: Training) -> History:
    """Train the student on the configured losses from the first epoch to the last."""
    return training.run()


class Single(Frozen):
    """One student learns from the panel in one go."""

    kind: Literal["single"] = "single"

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are needed, beside what they said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Single training",
        paper="Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531",
        summary="The ordinary course: the student is trained on the weighted sum of all losses, once.",
        needs="A panel.",
        cost="The reference.",
        evidence="All results measured on our data were trained like this unless they say otherwise.",
    )

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return single
