"""Online teacher: the first teacher goes on learning beside the student, slowly, and stays near what it teaches.

Legend: K teachers, B batch, C classes.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import divergence
from compression.distill.procedures.training import ProcedureFn, Training
from compression.distill.step import DistillationStep
from compression.distill.types import CombineFn, Helper, widened
from compression.errors import CompressionError
from compression.train import History
from compression.types import Frozen, Outputs, TeacherOutputs


def teacher_loss(teacher: Tensor, student: Tensor, labels: Tensor, *, weight: float, temperature: float) -> Tensor:
    """Return CE(teacher, labels) + weight * temperature^2 * KL(teacher || student), batch mean, in nats.

    Samples without a label have the second part alone. No gradient reaches the student.

    Args:
        teacher: logits [B,C].
        student: logits [B,C].
        labels: int64 [B]; -1 for none.
        weight: pull towards the student.
        temperature: above 1 flattens both sides of the divergence; the square keeps gradients comparable.
    """
    teacher, student = widened(teacher), widened(student.detach())
    hard = F.cross_entropy(teacher, labels, ignore_index=-1, reduction="sum") / len(labels)
    log_teacher, log_student = (F.log_softmax(each / temperature, dim=-1) for each in (teacher, student))
    return hard + weight * temperature**2 * divergence(log_teacher, log_student).mean()


class Moves(nn.Module):
    """How far each parameter of a teacher has moved, in units of the share of the learning rate; 0 at the start.

    A step of Adam does not depend on the scale of the gradient: under the optimiser of the student a weight of
    ``start + share * move`` therefore takes steps of that share, on the student's schedule, and its state is saved
    with the student's. Decay of the moves draws the teacher to where it came from, not to 0.
    """

    def __init__(self, teacher: nn.Module, share: float) -> None:
        super().__init__()
        self.names, self.share = [name for name, _ in teacher.named_parameters()], share
        self.moves = nn.ParameterList(torch.zeros_like(parameter) for parameter in teacher.parameters())

    def applied(self, teacher: nn.Module) -> dict[str, Tensor]:
        """Return the moved parameters of the teacher, by name; gradients go to the moves alone."""
        starts = dict(teacher.named_parameters())
        moves = zip(self.names, self.moves, strict=True)
        return {name: starts[name].detach() + self.share * move for name, move in moves}


class MovedTeacher(nn.Module):
    """The teacher as it is after its moves; the network it is made of stays as it was.

    It runs in inference mode: batch norms keep their statistics and dropout is off, so that it starts out saying what
    was stored of it.
    """

    def __init__(self, teacher: nn.Module, moves: Moves) -> None:
        super().__init__()
        self.teacher = teacher
        self._moves = (moves,)  # trained as a helper, not frozen as a part of a teacher

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B,C]; ``latest`` keeps them with their gradient where the caller wants none."""
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            self.latest: Tensor = functional_call(self.teacher, self._moves[0].applied(self.teacher), (images,))
        return self.latest if wanted else self.latest.detach()

    def get_submodule(self, target: str) -> nn.Module:
        """Return a part of the teacher by the name it has there."""
        return self.teacher.get_submodule(target)


class TrainsTeacher(Helper):
    """The configured combination, with the loss of the online teacher beside its own terms."""

    def __init__(self, combine: CombineFn, online: MovedTeacher, *, weight: float, temperature: float) -> None:
        super().__init__()
        self._parts = (combine, online)  # registered where they belong: this one has no state
        self.weight, self.temperature = weight, temperature

    def forward(self, teachers: Tensor, labels: Tensor, student: Tensor) -> Tensor:
        return self._parts[0](teachers, labels, student)

    def terms(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> dict[str, Tensor]:
        combine, online = self._parts
        own = combine.terms(student, teachers, labels) if isinstance(combine, Helper) else {}
        loss = teacher_loss(online.latest, student.logits, labels, weight=self.weight, temperature=self.temperature)
        return own | {"online_teacher": loss}


class OnlineTeacher(Frozen):
    """The first teacher learns on beside the student."""

    kind: Literal["online_teacher"] = "online_teacher"
    learning_rate_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Learning rate of the teacher, as a share of the student's; a large one undoes what the teacher has learnt."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """How strongly the teacher is drawn to the student, beside the labels."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 4.0
    """Softening of both sides of that pull."""

    needs_teachers: ClassVar[bool] = True
    """Whether the teachers themselves are needed, beside what they said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Online teacher (BD-KD, reconstructed)",
        paper="After Amara et al. 2022, BD-KD: Balancing the Divergences for Online Knowledge Distillation, "
        "arXiv:2212.12965",
        summary="A copy of the first teacher goes on learning the labels beside the student, at a small share of its "
        "learning rate and drawn to what the student says; the student's losses see it as it is at each step. With "
        "loss bd_kd this is the online form of that method; formula and defaults are ours.",
        needs="The teachers themselves, and labels.",
        cost="Every teacher runs at every step, the first forwards and backwards, and its weights are in memory four "
        "times more; nothing afterwards.",
        evidence="The paper's abstract claims better accuracy and calibration than other online distillation on "
        "CIFAR-10, CIFAR-100, TinyImageNet and ImageNet. Measured on our data: see `measured`.",
    )

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return self.train_both

    def train_both(self, training: Training) -> History:
        """Train the student on the configured losses, and the copy of its first teacher on its own.

        Raises:
            CompressionError: there are no teachers beside their outputs, or the train split has no labels.
        """
        _check(training)
        step, moves = self.step_of(training)
        helpers = nn.ModuleList([step.helpers, moves])
        return training.run(step=step, helpers=helpers, self_trained=step.self_trained, backward=step.backward)

    def step_of(self, training: Training) -> tuple[DistillationStep, Moves]:
        """Return the configured step with all teachers live and the first of them moved, and its moves."""
        first, *others = training.teachers
        moves = Moves(first, self.learning_rate_share)
        online = MovedTeacher(first, moves)
        step = training.step(training.student, epochs=training.config.train.epochs)
        step.stored, step.live = (), [online, *others]
        step.combine = TrainsTeacher(step.combine, online, weight=self.weight, temperature=self.temperature)
        return step, moves


def _check(training: Training) -> None:
    if not training.teachers:
        raise CompressionError(
            f"Training has outputs of {len(training.panel)} teachers and 0 teachers, expected the teachers themselves, "
            "because procedure 'online_teacher' trains one of them on. Give them as teachers."
        )
    labels = training.dataset.train.labels
    if not bool((labels >= 0).any()):
        raise CompressionError(
            f"Train split of data set '{training.dataset.name}' has 0 labels for {len(labels)} samples, expected some, "
            "because without them the teacher would only follow its student. Set distill.labels to all, or take "
            "procedure 'single'."
        )
