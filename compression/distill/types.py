"""The shapes of a loss, of a combination of teachers, and of teacher outputs looked up by sample."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from compression.teacher_outputs import OutputsSpec
from compression.types import Outputs, TeacherOutputs

LossFn = Callable[[Outputs, TeacherOutputs, Tensor], Tensor]
"""(student outputs, teacher outputs, labels int64 [B]) -> batch mean, a float32 scalar, in nats."""

CombineFn = Callable[[Tensor, Tensor], Tensor]
"""(teacher logits [K,B,C], labels int64 [B]) -> weights [K,B]: not negative, summing to 1 over K."""


class TeacherLogits(Protocol):
    """One teacher's outputs on named views of named samples; ``StoredOutputs`` is one."""

    spec: OutputsSpec
    class_names: tuple[str, ...]

    def logits(self, ids: Tensor, view: int) -> Tensor:
        """Return float32 logits [B,C] of samples ``ids`` int64 [B] in view ``view``."""
        ...
