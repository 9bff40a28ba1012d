"""MaKD: outputs beside the classifier learn what a multimodal model answered about each image.

Legend: B batch, C classes, D width of the student's penultimate features, N samples with answers, Q questions.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.types import Helper, LossFn, Needs, Shapes, TeacherLogits, widened
from compression.errors import CompressionError, ShapeError
from compression.types import Frozen, Outputs, TeacherOutputs

_FORM = (
    "an .npz with 'answers' (float32 [N, Q], 0..1) and either 'ids' (int64 [N], of samples) or 'classes' "
    "([N], their names)"
)
_WAY_OUT = "Write one with numpy.savez(path, answers=..., ids=...), and set answers to it."


@dataclass(frozen=True)
class Answers:
    """Probability of a yes to every question, for samples or for classes."""

    values: Tensor
    """[N,Q], float32, 0..1."""
    ids: Tensor | None
    """Samples of the rows, int64 [N], ascending; None when rows are classes."""
    classes: tuple[str, ...]
    """Names of the rows; empty when rows are samples."""


def read_answers(path: Path) -> Answers:
    """Read and check the file of answers.

    Raises:
        CompressionError: it is absent or unreadable, or its arrays are not what they should be.
    """
    if not path.is_file():
        raise CompressionError(f"File '{path}' does not exist, expected {_FORM}. {_WAY_OUT}")
    if not zipfile.is_zipfile(path):
        raise CompressionError(f"File '{path}' is no archive, expected {_FORM}. {_WAY_OUT}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("answers", "ids", "classes") if name in archive.files}
            names = sorted(archive.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CompressionError(f"File '{path}' cannot be read ({error}), expected {_FORM}. {_WAY_OUT}") from error
    if "answers" not in arrays or ("ids" in arrays) == ("classes" in arrays):
        raise CompressionError(f"File '{path}' has the arrays {names}, expected {_FORM}. {_WAY_OUT}")
    values = arrays["answers"]
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind != "f":
        raise CompressionError(
            f"File '{path}' has answers {values.dtype} {list(values.shape)}, expected {_FORM}. {_WAY_OUT}"
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise CompressionError(
            f"File '{path}' has answers from {values.min()} to {values.max()}, expected probabilities of a yes, "
            "0 to 1. Take the softmax over the model's logits of yes and no."
        )
    rows = arrays["ids"] if "ids" in arrays else arrays["classes"]
    kinds = "iu" if "ids" in arrays else "U"
    if rows.shape != values.shape[:1] or rows.dtype.kind not in kinds:
        raise CompressionError(
            f"File '{path}' has {rows.dtype} {list(rows.shape)} beside answers {list(values.shape)}, expected {_FORM}. "
            f"{_WAY_OUT}"
        )
    first, counts = np.unique(rows, return_counts=True)
    if len(first) < len(rows):
        raise CompressionError(
            f"File '{path}' has {counts.max()} rows for '{first[counts.argmax()]}', expected one. Remove the others."
        )
    tensor = torch.from_numpy(values.astype(np.float32))
    if "classes" in arrays:
        return Answers(tensor, ids=None, classes=tuple(str(name) for name in rows))
    order = np.argsort(rows)
    return Answers(tensor[torch.from_numpy(order)], torch.from_numpy(rows[order].astype(np.int64)), classes=())


class AspectHead(Helper):
    """Binary cross entropy of extra outputs of the student against the answers, in float32 under autocast too.

    Lee et al. 2025 (arXiv:2501.13341). Mean over questions and batch; its least value is the answers' entropy, not 0.
    Teachers are not looked at. Answers are about the sample, or about its class when the file has ``classes``; then
    samples without a label count 0.

    The authors widen the classifier to C+Q outputs and cut the last Q off afterwards. Here they are a linear layer of
    their own on the features that the classifier sees, which is the same: every row of a linear layer is a function of
    its input alone, so the C logits and all gradients are those of the wide layer, and cutting is leaving behind.
    Answers do not follow augmentation: a crop may lose what a question is about.
    """

    answers: Tensor
    """[N,Q] by sample, in the order of ``ids``, or [C,Q] by class, 0 until ``observe`` has seen the class names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def prepare(self, shapes: Shapes) -> None:
        """Read the answers, and make an output for each question.

        Raises:
            CompressionError: the file is absent or not usable.
        """
        self.given = read_answers(self.path)
        self.ids = self.given.ids
        """Int64 [N], ascending, on the CPU as the ids of a batch are; None when the answers are about classes."""
        questions = self.given.values.shape[1]
        self.head = nn.Linear(shapes.student_width, questions)
        if self.ids is None:
            self.register_buffer("answers", torch.zeros(shapes.num_classes, questions))
        else:  # read anew at each start instead of being part of every checkpoint
            self.register_buffer("answers", self.given.values, persistent=False)

    def observe(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> None:
        """Check that every sample of the train split, or every class, has its answers.

        Raises:
            CompressionError: one has none, or answers are about classes and no sample has a label.
        """
        del panel
        if self.ids is not None:
            missing = dataset.train.ids[~torch.isin(dataset.train.ids, self.ids)]
            if len(missing):
                raise CompressionError(
                    f"File '{self.path}' has no answers for {len(missing)} of {len(dataset.train.ids)} train samples "
                    f"of '{dataset.name}', {int(missing[0])} the first, expected all of them. Add their rows; "
                    "samples are numbered as the data source numbers them."
                )
            return
        if not (dataset.train.labels >= 0).any():
            raise CompressionError(
                f"Train split of '{dataset.name}' has 0 labels, expected some, because file '{self.path}' has answers "
                "about classes. Give answers about samples."
            )
        absent = [name for name in dataset.class_names if name not in self.given.classes]
        if absent:
            raise CompressionError(
                f"File '{self.path}' has no answers for {len(absent)} of the {dataset.num_classes} classes of "
                f"'{dataset.name}', '{absent[0]}' the first, expected all of them. Add their rows."
            )
        rows = [self.given.classes.index(name) for name in dataset.class_names]
        self.answers.copy_(self.given.values[rows])

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, mean over questions and batch, in nats.

        Args:
            student: penultimate features [B,D].
            teachers: ids int64 [B]; needed when the answers are about samples.
            labels: int64 [B]; looked at when the answers are about classes, -1 for a sample without one.

        Raises:
            ShapeError: the ids of the samples are not given.
            CompressionError: a sample has no answers.
        """
        features = widened(student.features["penultimate"])
        counted = torch.ones_like(labels, dtype=torch.bool)
        if self.ids is None:
            counted = labels >= 0
            rows = labels.clamp(min=0)
        else:
            rows = self._rows(teachers.ids).to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features)
        costs = F.binary_cross_entropy_with_logits(logits, self.answers[rows].to(logits.dtype), reduction="none")
        return (costs.mean(dim=-1) * counted).mean()

    def _rows(self, ids: Tensor | None) -> Tensor:
        """Rows of the answers, int64 [B], on the CPU."""
        if ids is None or self.ids is None:
            raise ShapeError(
                "Teacher outputs have no sample ids, expected int64 [batch], because loss 'multi_aspect' looks answers "
                "up by them. Give TeacherOutputs.ids."
            )
        wanted = ids.cpu()
        rows = torch.searchsorted(self.ids, wanted).clamp(max=len(self.ids) - 1)
        missing = wanted[self.ids[rows] != wanted]
        if len(missing):
            raise CompressionError(
                f"File '{self.path}' has no answers for sample {int(missing[0])}, expected all samples of the batch. "
                "Add its row."
            )
        return rows


class MultiAspect(Frozen):
    """Extra outputs of the student learn a multimodal model's answers about each image or class."""

    kind: Literal["multi_aspect"] = "multi_aspect"
    weight: Annotated[float, Field(ge=0)] = 4.0
    """Factor of this term in the sum; it is a mean over questions, and the paper's 4 goes with 50 of them."""
    answers: Path | None = None
    """An .npz with ``answers``, float32 [N,Q] of probabilities of a yes, and either ``ids``, int64 [N], or the names
    of ``classes``, [N]. There is no default, so name one."""

    needs: ClassVar[Needs] = Needs(
        student_features=True, another_term="it trains outputs of its own and not the student's classifier"
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Multi-aspect distillation (MaKD)",
        paper="Lee et al. 2025, Multi-aspect Knowledge Distillation with Large Language Model, arXiv:2501.13341",
        summary="Questions about the classes are put to a multimodal model once, and extra outputs on the student's "
        "features learn its answers beside the labels. The extra outputs are dropped at export.",
        needs="A file of answers by sample or by class, made beforehand with a multimodal model; penultimate features "
        "of the student; labels only when the answers are by class; and another term that trains the classifier, say "
        "cross_entropy. Answers by sample do not fit images that are mixed with another.",
        cost="As many questions per image (or class) put to the multimodal model, once; in training one more linear "
        "layer, nothing afterwards.",
        evidence="The paper reports gains over its baselines in all of its image classification experiments. "
        "Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight; it is a helper, and reads the file when it is prepared.

        Raises:
            CompressionError: no file is named.
        """
        if self.answers is None:
            raise CompressionError(f"Loss 'multi_aspect' has no file of answers, expected {_FORM}. {_WAY_OUT}")
        return AspectHead(self.answers)
