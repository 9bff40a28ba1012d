"""What a recipe says about distillation."""

from pydantic import Field, PositiveInt

from compression.distill.losses import AnyLoss, CrossEntropy, Kd
from compression.distill.teachers import AnyCombination, Uniform
from compression.train import TrainConfig
from compression.types import Frozen


class DistillConfig(Frozen):
    """How the student learns from the panel."""

    train: TrainConfig
    """Schedule; the control arm has the same."""
    teachers: AnyCombination = Uniform()
    """How much each teacher counts, sample by sample."""
    losses: tuple[AnyLoss, ...] = Field(default=(CrossEntropy(weight=0.5), Kd(weight=0.5)), min_length=1)
    """Terms of the sum that is minimised."""
    views: PositiveInt = 5
    """Augmented views whose teacher outputs are stored; epoch e uses view e modulo this."""
    control: bool = True
    """Also train the same student without teachers, so that the report can say what they were worth."""
