"""Sparse fine-tuning: only the weights that moved most in a full fine-tuning may move, from the same start.

Legend: theta0 the student's weights as the procedure gets it, theta1 after the full fine-tuning.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.deltas import largest_changes, maskable
from compression.distill.procedures.training import ProcedureFn, Training, joined
from compression.errors import CompressionError
from compression.train import History, TrainConfig
from compression.types import Batch, Frozen


class Anchored:
    """Parameters of a model that can be put back, outside a mask, to what they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = maskable(model)
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.masks: dict[str, Tensor] = {}

    @property
    def total(self) -> int:
        """Number of entries."""
        return sum(each.numel() for each in self.start.values())

    @property
    def moved(self) -> int:
        """Entries that are no longer what they were."""
        self._to_device()
        return sum(int((parameter != self.start[name]).sum()) for name, parameter in self.parameters.items())

    def free(self, count: int) -> None:
        """From now on only the ``count`` entries that have moved most may differ from what they were."""
        self._to_device()
        self.masks = largest_changes(self.start, self.parameters, count)

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything outside the masks, in place; what is inside keeps its bits."""
        self._to_device()
        for name, mask in self.masks.items():
            parameter = self.parameters[name]
            parameter.copy_(torch.where(mask, parameter, self.start[name]))

    def distance(self) -> Tensor:
        """Mean over all entries of how far each moved, a scalar."""
        self._to_device()
        moved = [(parameter - self.start[name]).abs().sum() for name, parameter in self.parameters.items()]
        return torch.stack(moved).sum() / self.total

    def _to_device(self) -> None:
        """A training moves its model to a device, and back again."""
        for kept in (self.start, self.masks):
            for name, value in kept.items():
                device = self.parameters[name].device
                if value.device != device:
                    kept[name] = value.to(device)


def sparse_finetuning(training: Training, config: "SparseFinetuning") -> History:
    """Train the student fully, choose what may change, rewind it, and train that alone.

    The last row also has ``delta_entries``, how many entries of maskable weights differ from theta0, and
    ``delta_share``, their share of all of them.

    Raises:
        CompressionError: there is one epoch only, a merge would follow, or the student has no weights to mask.
    """
    train = training.config.train
    if train.epochs < 2:
        raise CompressionError(
            f"Procedure 'sparse_finetuning' has {train.epochs} epoch, expected at least 2, one for each part. "
            "Raise train.epochs."
        )
    if training.config.merge is not None:
        raise CompressionError(
            "Procedure 'sparse_finetuning' has a merge after it, expected none, because branches that go on move all "
            "weights. Remove merge, or take procedure 'single'."
        )
    student = training.student
    anchored = Anchored(student)
    if not anchored.total:
        raise CompressionError(
            f"Student '{type(student).__name__}' has 0 weights outside its classifier and norms, expected at least 1. "
            "Take procedure 'single'."
        )
    start: Mapping[str, Tensor] = {name: value.detach().clone() for name, value in student.state_dict().items()}
    epochs = min(max(1, round(config.full_share * train.epochs)), train.epochs - 1)
    full = _train(training, anchored, config.l1, name="full", train=train.model_copy(update={"epochs": epochs}))
    anchored.free(max(1, round(config.keep_share * anchored.total)))
    student.load_state_dict(dict(start))

    def on_step(done: int, total: int) -> None:
        anchored.put_back()
        if training.on_step is not None:
            training.on_step(done, total)

    sparse = _train(
        replace(training, on_step=on_step),
        anchored,
        config.l1,
        name="sparse",
        train=train.model_copy(update={"epochs": train.epochs - epochs}),
    )
    history = joined(full, sparse)
    history.rows[-1] |= {"delta_entries": anchored.moved, "delta_share": anchored.moved / anchored.total}
    return history


class SparseFinetuning(Frozen):
    """The student ends as its start plus a sparse delta, which can be shipped, added to others and taken back.

    Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (arXiv:2110.07560): a full training
    from theta0 to theta1; the entries with the largest ``|theta1 - theta0|`` over all weights together; back to
    theta0; a second training that moves these entries alone. Classifier, norms and buffers are trained fully and
    rewound too. Where ours differs:

    - Gradients are not multiplied by the mask. After each step what is outside it is put back to theta0, bit for bit,
      which also undoes weight decay; as AdamW treats every entry by itself, entries inside move as they would have.
    - The paper freezes layer norms for tasks; here norms learn, because the statistics of batch norm move anyway.
    - The number of entries is a share of the weights and not fixed; the share of the paper's task deltas is the
      default.
    """

    kind: Literal["sparse_finetuning"] = "sparse_finetuning"
    keep_share: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Share of the weights outside classifier and norms that may change, at least one weight."""
    full_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the epochs for the full training that chooses them; each part has one epoch at least."""
    l1: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Factor of the mean distance from the start, as a term of both losses; the paper takes 0.1 for language models."""

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are needed, beside what they said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Sparse fine-tuning (LT-SFT)",
        paper="Ansell et al. 2022, Composable Sparse Fine-Tuning for Cross-Lingual Transfer, arXiv:2110.07560",
        summary="Trains the student, goes back to its start and trains again only the weights that moved most. The "
        "result is the start plus a sparse delta: `stillhouse delta make` writes it, and deltas of several sites add "
        "up.",
        needs="A student whose starting weights are worth keeping, say a pruned teacher, and its checkpoint to make "
        "the delta from; at least two epochs; nothing after it that moves all weights.",
        cost="No more epochs than configured, shared by two trainings; a copy of the weights and a mask in memory.",
        evidence="Not measured on our data yet.",
    )

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return partial(sparse_finetuning, config=self)


def _train(training: Training, anchored: Anchored, l1: float, *, name: str, train: TrainConfig) -> History:
    """One part, with the distance from theta0 as a further term where it counts."""
    if l1 == 0:
        return training.run(name=name, train=train)
    step = training.step(training.student, epochs=train.epochs)

    def with_distance(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return step(model, batch) | {"l1": l1 * anchored.distance()}

    return training.run(
        name=name,
        train=train,
        step=with_distance,
        helpers=step.helpers,
        self_trained=step.self_trained,
        backward=step.backward,
    )
