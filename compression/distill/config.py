"""What a distillation needs to know."""

from typing import Annotated

from pydantic import Field, model_validator

from compression.distill.losses import AnyLoss, CrossEntropy, Kd
from compression.distill.monitor import Monitor
from compression.distill.samplers import AnySampler, Full, RandomSubset
from compression.distill.samplers.random_subset import reweighted
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
    sampler: AnySampler = Full()
    """Which samples each epoch shows, to the student and to its control arm alike."""
    monitor: Monitor = Monitor()
    """Watch for students that learn their teachers' faults."""
    control: bool = True
    """Also train the same student on labels alone, to show what the teachers are worth."""

    @model_validator(mode="after")
    def _some_weight(self) -> "DistillConfig":
        if sum(loss.weight for loss in self.losses) <= 0:
            raise ValueError("losses have weights that sum to 0, expected more. Raise one of them.")
        active = [loss for loss in self.losses if loss.weight > 0]
        if all(loss.needs.another_term for loss in active):
            raise ValueError(
                f"losses have '{active[0].kind}' alone, expected another term beside it, because "
                f"{active[0].needs.another_term}. Add cross_entropy or kd."
            )
        for loss in active:
            if loss.needs.teacher_features and self.teachers.adds_snapshot:
                raise ValueError(
                    f"losses have '{loss.kind}', which needs stored features of every teacher, beside teachers of kind "
                    f"'{self.teachers.kind}', which adds the student's own start as one. Take another combination."
                )
        if all(loss.needs.another_term for loss in self.weighted_losses if loss.weight > 0):
            raise ValueError(
                "losses have no weight left beside terms that cannot teach alone, expected some, because the sampler "
                "keeps so few samples that its schedule takes all weight from cross_entropy. Add kd, raise "
                "sampler.share, or set sampler.kd_weight_schedule to false."
            )
        return self

    @property
    def weighted_losses(self) -> tuple[AnyLoss, ...]:
        """The losses with the weights a student is trained with: a random subset may move them to the teachers."""
        if isinstance(self.sampler, RandomSubset) and self.sampler.kd_weight_schedule:
            return reweighted(self.losses, self.sampler.share)
        return self.losses

    @property
    def teacher_features(self) -> bool:
        """Whether a loss needs stored features beside logits."""
        return any(loss.needs.teacher_features for loss in self.losses)
