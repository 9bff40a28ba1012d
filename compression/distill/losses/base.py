"""What all losses share."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compression.types import Frozen, Outputs, TeacherOutputs

LossFn = Callable[[Outputs, TeacherOutputs, Tensor], Tensor]
"""(student, teachers, labels [B]) -> scalar: a mean over the batch, in nats, without the weight."""


class LossConfig(Frozen):
    """The field every loss has."""

    weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Factor of this term in the sum that is minimised."""
