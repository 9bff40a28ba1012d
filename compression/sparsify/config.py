"""What every sparsifier promises."""

from abc import abstractmethod
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from compression.card import MethodCard
from compression.sparsify.session import Session
from compression.train import History, TrainConfig
from compression.types import Frozen


class Sparsifier(Frozen):
    """Base of every sparsifier: zeros in the weights of a student whose structure stays as it is."""

    train: TrainConfig = TrainConfig(epochs=4, learning_rate=1e-3)
    """Schedule of the fine-tuning; 10 to 30 % of the student's epochs are usual."""
    skip: tuple[str, ...] = ()
    """Names of modules that stay dense, with all they hold."""

    card: ClassVar[MethodCard]

    @abstractmethod
    def run(self, session: Session) -> History:
        """Make the session's model sparse, in place, and return the learning curve.

        Raises:
            CompressionError: the model has no layer to make sparse, or ``skip`` names none of its modules.
        """


class NmSparsifier(Sparsifier):
    """Base of those that leave at most ``n`` of ``m`` consecutive inputs; 2:4 is what sparse tensor cores read."""

    n: Annotated[int, Field(ge=1, le=7)] = 2
    """Weights that stay in each group."""
    m: Annotated[int, Field(ge=2, le=8)] = 4
    """Weights in a group; layers whose inputs are no multiple of it stay dense."""

    @model_validator(mode="after")
    def _some_go(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"n has {self.n}, expected less than m = {self.m}. Use 2 of 4.")
        return self


class MaskLearner(Sparsifier):
    """Base of those that learn masks under frozen weights first, and then the weights under frozen masks."""

    mask_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the epochs in which masks are learnt, at least one; with 1 the weights are never trained."""
    mask_learning_rate: Annotated[float, Field(gt=0, le=10)]
    """Peak learning rate of what decides the masks."""

    @model_validator(mode="after")
    def _both_parts(self) -> Self:
        if self.mask_share < 1 and self.train.epochs < 2:
            raise ValueError(
                "train.epochs has 1, expected at least 2, because masks and weights are learnt one after the other. "
                "Raise it, or set mask_share to 1."
            )
        return self

    def schedules(self) -> tuple[TrainConfig, TrainConfig | None]:
        """Those of masks and of weights; None where the weights stay as they are."""
        epochs, share = self.train.epochs, self.mask_share
        first = max(1, round(share * epochs))
        if share < 1:
            first = min(first, epochs - 1)
        masks = self.train.model_copy(update={"epochs": first, "learning_rate": self.mask_learning_rate})
        return masks, self.train.model_copy(update={"epochs": epochs - first}) if first < epochs else None
