"""Branches of a trained student: trained on apart, merged, and kept if that did not hurt."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from compression.augment import AnyAugment, NoAugment
from compression.data.dataset import Dataset
from compression.distill.merging.fisher import FisherMerge
from compression.distill.merging.soup import UniformSoup
from compression.distill.merging.task_vectors import TaskVectors
from compression.distill.merging.types import Merging
from compression.metrics import evaluate
from compression.train.config import TrainConfig
from compression.types import Frozen

AnyMerge = UniformSoup | FisherMerge | TaskVectors
"""What a recipe may name under ``distill.merge.method``."""

TrainBranch = Callable[[nn.Module, int, str], object]
"""(model, seed, name) -> anything; trains the model in place."""


class Merge(Frozen):
    """After the distillation copies of the student go on for a few epochs, and their weights are merged.

    Each copy has a seed of its own. The result is kept only if its validation NLL is not worse than the student's.
    """

    method: AnyMerge = UniformSoup()
    """How weights become one."""
    members: Annotated[int, Field(ge=2, le=16)] = 3
    """Copies of the student that go on."""
    train: TrainConfig = TrainConfig(epochs=2, learning_rate=3e-4)
    """Schedule of each copy; short and gentle, so that they stay where weights can be averaged."""


@dataclass(frozen=True)
class MergeReport:
    """What merging was worth; negative log-likelihoods on the validation split, in nats."""

    student_nll: float
    """Of the student before its branches."""
    member_nlls: tuple[float, ...]
    """Of each branch after its training."""
    merged_nll: float
    """Of the merged model."""
    kept: Literal["student", "merged"]
    """Which of the two the student is now; branches are never kept."""


def merge_branches(
    student: nn.Module,
    config: Merge,
    dataset: Dataset,
    *,
    seed: int,
    train_branch: TrainBranch,
    augment: AnyAugment | None = None,
) -> MergeReport:
    """Train copies of ``student``, merge them, and load the result into ``student`` if it is not worse.

    The better of the student before and the merged one is chosen on the validation split, a tie is the merged one's.
    The student's modes, and its bits if it is kept, are left alone.

    Args:
        student: changed in place.
        config: how many copies, and how they are merged; its ``train`` is for ``train_branch`` to use.
        dataset: train images and calibration labels are for the merge, the validation split for the choice.
        seed: copy ``number`` gets ``seed + 1 + number``; the merge gets ``seed``.
        train_branch: called once per copy, with its seed and its name ``branch-<number>``.
        augment: views the merge looks at, say those of the training; plain images when None.

    Raises:
        ShapeError: a copy no longer has the student's names or shapes.
        CompressionError: weights are quantized or not finite, or the merged model's logits are not finite.
    """
    members = [copy.deepcopy(student) for _ in range(config.members)]
    for number, member in enumerate(members):
        train_branch(member, seed + 1 + number, f"branch-{number}")
    given = Merging(base=student, members=members, dataset=dataset, seed=seed, augment=augment or NoAugment())
    merged = config.method.build()(given)

    def nll(model: nn.Module) -> float:
        return evaluate(model, dataset.validation, dataset.preprocessing).nll

    before, after = nll(student), nll(merged)
    better = after <= before
    if better:
        student.load_state_dict(merged.state_dict())
    return MergeReport(
        student_nll=before,
        member_nlls=tuple(nll(member) for member in members),
        merged_nll=after,
        kept="merged" if better else "student",
    )
