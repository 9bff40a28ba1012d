"""No online augmentation: teachers are looked up."""

from typing import ClassVar, Literal

from compression.card import MethodCard
from compression.distill.online.base import OnlineAugment
from compression.types import Frozen


class Off(Frozen):
    """Nothing but the keyed views."""

    kind: Literal["off"] = "off"

    card: ClassVar[MethodCard] = MethodCard(
        name="No online augmentation",
        paper="None to cite.",
        summary="Images are the keyed views of the recipe's augmentation, and what teachers say about them is looked "
        "up.",
        needs="Nothing.",
        cost="None.",
        evidence="All results measured on our data were trained like this unless they say otherwise.",
    )

    def build(self) -> OnlineAugment | None:
        """Return None."""
        return None
