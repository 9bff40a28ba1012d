"""What a distillation needs to know."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compression.distill.losses import AnyLoss, CrossEntropy, Kd, MultiAspect
from compression.distill.merging import Merge
from compression.distill.monitor import Monitor
from compression.distill.online import AnyOnline, Off
from compression.distill.procedures import AnyProcedure, Single
from compression.distill.samplers import AnySampler, ClassSubset, Full, RandomSubset
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
    """Which samples each epoch shows, to the student and to its control arm alike (which sees all of them where the
    choice is the teachers')."""
    online: AnyOnline = Off()
    """Changes of a batch that stored outputs do not know, so that the teachers run at every step."""
    procedure: AnyProcedure = Single()
    """How the training is organised: in one go, in stages, beside a peer, by a budget of labels."""
    merge: Merge | None = None
    """After the training, let copies of the student go on apart and merge them; None: do not."""
    labels: Literal["all", "none"] = "all"
    """none: the student never sees a label of the train split, only what the teachers say. The control arm does."""
    monitor: Monitor = Monitor()
    """Watch for students that learn their teachers' faults."""
    control: bool = True
    """Also train the same student on labels alone, to show what the teachers are worth."""

    @model_validator(mode="after")
    def _some_weight(self) -> "DistillConfig":
        if sum(loss.weight for loss in self.losses) <= 0:
            raise ValueError("losses have weights that sum to 0, expected more. Raise one of them.")
        active = [loss for loss in self.losses if loss.weight > 0]
        if self.labels == "none":
            for loss in active:
                if loss.needs.labels:
                    raise ValueError(
                        f"losses have '{loss.kind}', which learns from labels, but labels is none. Remove it, or give "
                        "it weight 0."
                    )
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
        if self.teachers.adds_snapshot and self.needs_teachers:
            raise ValueError(
                f"teachers is '{self.teachers.kind}', which adds the student's own start as a teacher, beside "
                f"{self.needs_teachers}, which runs the teachers. Take another combination."
            )
        if all(loss.needs.another_term for loss in self.weighted_losses if loss.weight > 0):
            raise ValueError(
                "losses have no weight left beside terms that cannot teach alone, expected some, because the sampler "
                "keeps so few samples that its schedule takes all weight from cross_entropy. Add kd, raise "
                "sampler.share, or set sampler.kd_weight_schedule to false."
            )
        return self

    @model_validator(mode="after")
    def _files_and_budgets(self) -> "DistillConfig":
        aspects = [loss for loss in self.losses if isinstance(loss, MultiAspect)]
        if any(loss.answers is None for loss in aspects):
            raise ValueError("losses have 'multi_aspect' without answers, expected a .npz file. Name it in answers.")
        if aspects and self.online.kind == "mixup":
            raise ValueError(
                "losses have 'multi_aspect', whose answers are about whole images, but online is mixup. Remove one."
            )
        if isinstance(self.sampler, ClassSubset) and self.sampler.target is None:
            raise ValueError(
                "sampler 'dp4tl' has no target, expected a .npz file with images of the task it chooses classes for. "
                "Name it in sampler.target."
            )
        if self.procedure.kind == "active" and self.labels == "none":
            raise ValueError("procedure 'active' spends a budget of labels, but labels is none. Take procedure single.")
        return self

    @property
    def weighted_losses(self) -> tuple[AnyLoss, ...]:
        """The losses with the weights a student is trained with: a random subset may move them to the teachers."""
        if isinstance(self.sampler, RandomSubset) and self.sampler.kd_weight_schedule:
            return reweighted(self.losses, self.sampler.share)
        return self.losses

    @property
    def needs_teachers(self) -> str:
        """What runs the teachers themselves, in words; empty where stored outputs are enough."""
        for loss in self.losses:
            if loss.needs.teacher_maps:
                return f"loss '{loss.kind}'"
        if not isinstance(self.online, Off):
            return f"online augmentation '{self.online.kind}'"
        if self.procedure.needs_teachers:
            return f"procedure '{self.procedure.kind}'"
        return f"sampler '{self.sampler.kind}'" if self.sampler.needs_teachers else ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that losses and sampler read."""
        parts = (*self.losses, self.sampler)
        found = [getattr(part, name, None) for part in parts for name in ("answers", "target")]
        return tuple(path for path in found if path is not None)

    def plain(self, train: TrainConfig) -> "DistillConfig":
        """This with another schedule and without what needs the teachers themselves, files, or more than one training.

        For short trials; kd at temperature 2 takes the place of losses where none is left that can teach alone.
        """
        kept = [loss for loss in self.losses if not (loss.needs.teacher_maps or getattr(loss, "answers", None))]
        if not any(loss.weight > 0 and not loss.needs.another_term for loss in kept):
            kept.append(Kd(temperature=2.0))
        sampler = Full() if self.sampler.needs_teachers or self.sampler.adaptive else self.sampler
        changes = {
            "train": train,
            "losses": tuple(kept),
            "sampler": sampler,
            "online": Off(),
            "procedure": Single(),
            "merge": None,
        }
        return self.model_copy(update=changes)

    @property
    def teacher_features(self) -> bool:
        """Whether a loss needs stored features beside logits."""
        return any(loss.needs.teacher_features for loss in self.losses)
