"""Every sample has one source: the surest of the teachers and of the student as it was before training."""

from functools import partial
from typing import ClassVar, Literal

from compression.card import MethodCard
from compression.distill.teachers.confidence import confidence
from compression.distill.types import CombineFn
from compression.types import Frozen


class Partition(Frozen):
    """The most confident source of each sample, the student's own start among them.

    Roth et al. 2023, "Fantastic Gains and Where to Find Them" (arXiv:2310.17653), data partition. The choice is
    that of ``confidence``: weights [K,B] over K sources, the frozen initial student last among them when the step is
    made by ``distill``; in quantization the float student already is a live teacher and plays its part. Where the
    start is the surest, the KD term asks the student to stay what it was: a weak teacher cannot undo what it knows.

    It wants a student with inherited weights: pruned from a trained parent, or trained before. A student with random
    weights gives every label about 1/C. With ``labels`` such a start then wins the samples whose label all teachers
    hold for less likely than that, and pulls them to its almost uniform guess: confident errors of the teachers are
    smoothed, and nothing is kept. Without ``labels`` it wins next to nothing, and this is ``confidence``.

    Only terms that look at teachers hold the student where it was, and only up to small steps: batch norm in training
    mode and dropout make it differ from its snapshot, which runs in inference mode, and AdamW enlarges the rounding
    of a gradient of zero until the term pulls back.
    """

    kind: Literal["partition"] = "partition"
    labels: bool = True
    """Confidence in the true label; off, in the source's own first choice (works without labels)."""

    adds_snapshot: ClassVar[bool] = True
    """Whether a frozen copy of the student as it was before training joins the teachers."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Data partition with the initial student",
        paper="Roth et al. 2023, Fantastic Gains and Where to Find Them, arXiv:2310.17653",
        summary="Splits the samples among the teachers and the student as it was before training: who is surest of a "
        "sample teaches it, so that the student learns what others know better and keeps what it knows itself.",
        needs="A student with inherited weights, and sources of comparable calibration; labels unless "
        "`labels: false`. A random start is surest only where every teacher gives the label less than 1/C.",
        cost="One forward of the frozen student per step, and a second copy of it in memory.",
        evidence="The paper reports the best transfer of all its variants between pre-trained models, without cross "
        "entropy and over few epochs. Measured on our data: see `measured`.",
    )

    def build(self) -> CombineFn:
        """Return the function that weighs sources."""
        return partial(confidence, by_label=self.labels)
