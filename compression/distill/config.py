"""What a distillation needs to know."""

from typing import Annotated

from pydantic import Field, model_validator

from compression.distill.losses import AnyLoss, CrossEntropy, Kd
from compression.distill.teachers import AnyCombination, Uniform
from compression.train import TrainConfig
from compression.types import Frozen


class DistillConfig(Frozen):
    """How students learn from the panel."""

    train: TrainConfig
    """The schedule."""
    teachers: AnyCombination = Uniform()
    """How much each teacher counts."""
    losses: Annotated[tuple[AnyLoss, ...], Field(min_length=1)] = (CrossEntropy(), Kd())
    """Terms of the training loss, each with its weight."""
    views: Annotated[int, Field(gt=0, le=1000)] = 8
    """Augmented views for which teacher outputs are stored; epochs take them in turn."""
    control: bool = True
    """Also train the same student on labels alone, to show what the teachers are worth."""

    @model_validator(mode="after")
    def _some_weight(self) -> "DistillConfig":
        if sum(loss.weight for loss in self.losses) <= 0:
            raise ValueError("losses have weights that sum to 0, expected more. Raise one of them.")
        active = [loss for loss in self.losses if loss.weight > 0]
        if all(loss.needs.another_term for loss in active):
            raise ValueError(
                f"losses have '{active[0].kind}' alone, expected another term beside it, because it matches the batch "
                "as a whole and cannot teach which image is which. Add cross_entropy or kd."
            )
        return self

    @property
    def teacher_features(self) -> bool:
        """Whether a loss needs stored features beside logits."""
        return any(loss.needs.teacher_features for loss in self.losses)
