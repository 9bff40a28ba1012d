"""TGeo-KD: a small network decides per sample how much the teachers count against the label.

Legend: K teachers, B batch, C classes, D width of the student's penultimate features, V samples of a held-out batch,
N training samples.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import normalise
from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.mixture import mixture
from compression.distill.types import Helper, LossFn, Needs, Shapes, TeacherLogits, widened
from compression.errors import CompressionError
from compression.features import frozen
from compression.types import Batch, Frozen, Outputs, TeacherOutputs

CHUNK = 4096
"""Samples whose teacher logits are in memory at a time."""
MEASURES = 9
"""Numbers that describe a sample to the controller."""


def geometry(student: Tensor, teacher: Tensor, usual: Tensor, labels: Tensor) -> Tensor:
    """Return what the controller sees of each sample, [B,9]: five squared distances, 0..2, and four probabilities.

    With S, T, U the distributions given and G that of the label, the distances are U-S, G-S, T-S, T-G and U-G. The
    probabilities are those of the label by S, T and U, and the largest of T.

    Args:
        student: distribution [B,C].
        teacher: distribution [B,C].
        usual: mean distribution of the teachers over the class of the label [B,C].
        labels: int64 [B].
    """
    truth = F.one_hot(labels, student.shape[-1]).to(student.dtype)
    sides = ((usual, student), (truth, student), (teacher, student), (teacher, truth), (usual, truth))
    distances = [(left - right).square().sum(dim=-1) for left, right in sides]
    of_label = [(each * truth).sum(dim=-1) for each in (student, teacher, usual)]
    return torch.stack([*distances, *of_label, teacher.amax(dim=-1)], dim=-1)


def fused(logits: Tensor, softened: Tensor, labels: Tensor, ratio: Tensor, *, temperature: float) -> Tensor:
    """Return ratio * temperature^2 * KL(softened || student) + (1 - ratio) * cross entropy, batch mean, in nats.

    Args:
        logits: of the student [B,C].
        softened: the teachers' distribution at ``temperature`` [B,C].
        labels: int64 [B].
        ratio: of each sample [B], 0..1.
        temperature: softens the student's side of the divergence.
    """
    log_student = F.log_softmax(logits / temperature, dim=-1)
    divergence = F.kl_div(log_student, softened, reduction="none").sum(dim=-1) * temperature**2
    return (ratio * divergence + (1 - ratio) * F.cross_entropy(logits, labels, reduction="none")).mean()


def fused_gradient(logits: Tensor, softened: Tensor, labels: Tensor, ratio: Tensor, *, temperature: float) -> Tensor:
    """Return the gradient [B,C] of ``fused`` by the logits; itself differentiable by ``ratio``."""
    to_teacher = temperature * ((logits / temperature).softmax(dim=-1) - softened)
    to_label = logits.softmax(dim=-1) - F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    share = ratio.unsqueeze(-1)
    return (share * to_teacher + (1 - share) * to_label) / len(logits)


@dataclass(frozen=True)
class HeldOut:
    """What the student says about a held-out batch before its classifier."""

    features: Tensor
    """[V,D], no gradient."""
    labels: Tensor
    """int64 [V]."""
    weight: Tensor
    """Of the classifier [C,D], no gradient."""
    bias: Tensor | None
    """Of the classifier [C]; None when it has none."""

    def loss_after(self, features: Tensor, gradient: Tensor, *, rate: float) -> Tensor:
        """Return the cross entropy once the classifier has made one step of gradient descent.

        Args:
            features: of the training batch [B,D].
            gradient: of the training loss by the batch's logits [B,C].
            rate: length of the step.
        """
        weight = self.weight - rate * gradient.T @ features
        bias = None if self.bias is None else self.bias - rate * gradient.sum(dim=0)
        return F.cross_entropy(F.linear(self.features, weight, bias), self.labels)


def held_out(model: nn.Module, images: Tensor, labels: Tensor) -> HeldOut:
    """Return what ``model`` says about normalised images [V,C,H,W]; its state and the random state are given back.

    Raises:
        CompressionError: the logits do not come straight from a linear layer.
    """
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [(module, inputs[0], output)]

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[images.device] if images.is_cuda else []))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                stack.callback(module.register_forward_hook(keep).remove)
        logits = model(images)
    classifier, inputs, output = seen[0] if seen else (None, images, images)
    if not isinstance(classifier, nn.Linear) or not _same(output, logits):
        found = f"{type(classifier).__name__} as its last layer" if seen else "no linear layer"
        raise CompressionError(
            f"Student '{type(model).__name__}' has {found}, expected a Linear whose outputs are the logits, because "
            "loss 'tgeo' looks one step of it ahead. Take kd and cross_entropy with fixed weights instead."
        )
    bias = None if classifier.bias is None else widened(classifier.bias.detach())
    return HeldOut(widened(inputs), labels, widened(classifier.weight.detach()), bias)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of any float types have the same numbers, or lack of them."""
    same_shape = left.shape == right.shape
    return same_shape and torch.allclose(left.float(), right.float(), rtol=0.0, atol=0.0, equal_nan=True)


def usual_answers(panel: Sequence[TeacherLogits], dataset: Dataset) -> Tensor:
    """Return the teachers' mean distribution [C,C] over each class of the train split in view 0, equal weights.

    Rows are classes; 0 for one without samples. Samples without a label, -1, are passed over.
    """
    labelled = dataset.train.labels >= 0
    ids, labels = dataset.train.ids[labelled], dataset.train.labels[labelled]
    sums = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.float64)
    for start in range(0, len(ids), CHUNK):
        logits = torch.stack([teacher.logits(ids[start : start + CHUNK], 0) for teacher in panel])
        weights = torch.full(logits.shape[:2], 1 / len(panel))
        sums.index_add_(0, labels[start : start + CHUNK], TeacherOutputs(logits, weights).probs().double())
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    return (sums / counts.clamp(min=1).unsqueeze(-1)).float()


class FusionRatio(Helper):
    """The loss with a ratio per sample, in float32 under autocast too.

    Hu et al. 2023 (arXiv:2312.15112). The loss of a sample is :func:`fused` of the teachers' mixture and the label;
    its ratio comes from a controller of three layers that sees :func:`geometry`, and no gradient of the loss reaches
    it. The controller learns on its own, every ``outer_every`` steps of an epoch from its first: the student's
    classifier makes one virtual step on the batch at hand with the ratios of the controller, and the controller
    follows the gradient of the cross entropy that the classifier then has on a batch of the calibration split. The
    features of that batch are taken in inference mode, and the student stays as it is.

    Ours: the authors' released controller gets no gradient, so that the virtual step is our reading of the paper; it
    is one of plain gradient descent, of the classifier alone and on this term alone, which needs no second backward
    pass through the student. The controller sees 9 numbers in place of 9 C, which did not scale to many classes. Its
    Adam has a rate of 0.01, not 0.1, and no weight decay, which would outweigh the small gradients. Its state is in
    buffers. ``before_step`` looks at the held-out batch, and the loss itself makes the outer step, since it has
    what student and teachers say about the batch at hand: nothing from an earlier step is needed.
    """

    def __init__(
        self, *, temperature: float, inner_rate: float, controller_rate: float, outer_every: int, outer_batch: int
    ) -> None:
        super().__init__()
        self.temperature, self.inner_rate, self.controller_rate = temperature, inner_rate, controller_rate
        self.outer_every, self.outer_batch = outer_every, outer_batch
        self.ahead: HeldOut | None = None
        """What the outer step of the training step at hand looks at; None when it makes none."""

    def prepare(self, shapes: Shapes) -> None:
        """Make the controller, and room for its optimiser and the teachers' usual answers."""
        self.controller = nn.Sequential(
            nn.Linear(MEASURES, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        )
        self.register_buffer("usual", torch.zeros(shapes.num_classes, shapes.num_classes))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))  # steps of the controller
        for number, parameter in enumerate(self.controller.parameters()):
            self.register_buffer(f"exp_avg_{number}", torch.zeros_like(parameter))
            self.register_buffer(f"exp_avg_sq_{number}", torch.zeros_like(parameter))

    def observe(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> None:
        """Take the teachers' usual answers, and keep the calibration split to look at.

        Raises:
            CompressionError: no teacher has stored outputs, or the calibration split is empty.
        """
        if not panel:
            raise CompressionError(
                "Panel has stored outputs of 0 teachers, expected at least 1, because loss 'tgeo' needs their mean "
                "answer for each class. Store outputs of a teacher."
            )
        if not len(dataset.calibration.labels):
            raise CompressionError(
                f"Calibration split of data set '{dataset.name}' has 0 samples, expected at least 1, because loss "
                "'tgeo' trains its controller on it. Make the split larger."
            )
        self.get_buffer("usual").copy_(usual_answers(panel, dataset))
        self.split, self.preprocessing = dataset.calibration, dataset.preprocessing
        self.order = torch.randperm(len(self.split.labels), generator=torch.Generator().manual_seed(0))

    def self_trained(self) -> list[nn.Parameter]:
        """The controller's."""
        return list(self.controller.parameters())

    def before_step(self, model: nn.Module, batch: Batch) -> None:
        """Look at the next held-out batch, if an outer step is due.

        Raises:
            CompressionError: the student's logits do not come straight from a linear layer.
        """
        self.ahead = None
        if batch.step % self.outer_every:
            return
        device, size = batch.images.device, min(self.outer_batch, len(self.order))
        rows = self.order[(int(self.get_buffer("taken")) * size + torch.arange(size)) % len(self.order)]
        raw = self.split.images[rows].to(device).contiguous(memory_format=torch.channels_last)
        self.ahead = held_out(model, normalise(raw, self.preprocessing), self.split.labels[rows].to(device))

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss; before that the controller learns, if ``before_step`` has looked ahead.

        Args:
            student: logits [B,C], and in a step that looks ahead penultimate features [B,D].
            teachers: logits [K,B,C], weights [K,B].
            labels: int64 [B].

        Raises:
            ShapeError: the teachers have another number of classes than the student.
        """
        logits = widened(student.logits)
        softened = mixture(logits, teachers, self.temperature)
        measures = geometry(
            logits.detach().softmax(dim=-1), mixture(logits, teachers), self.get_buffer("usual")[labels], labels
        )
        if self.ahead is not None:
            features = widened(student.features["penultimate"].detach())
            self._learn(self.outer_loss(self.ahead, features, logits.detach(), softened, measures, labels))
            self.ahead = None
        return fused(logits, softened, labels, self.ratio(measures).detach(), temperature=self.temperature)

    def ratio(self, measures: Tensor) -> Tensor:
        """Return how much the teachers count in each sample [B], 0..1, given :func:`geometry` [B,9]."""
        with torch.autocast(measures.device.type, enabled=False):
            return self.controller(measures).squeeze(-1).sigmoid()

    def outer_loss(
        self, ahead: HeldOut, features: Tensor, logits: Tensor, softened: Tensor, measures: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the held-out cross entropy after the virtual step, with a gradient to the controller alone.

        Args:
            ahead: the held-out batch and the classifier.
            features: of the student [B,D], no gradient.
            logits: of the student [B,C], no gradient.
            softened: the teachers' distribution at the temperature [B,C].
            measures: what the controller sees [B,9].
            labels: int64 [B].
        """
        with torch.autocast(logits.device.type, enabled=False):
            gradient = fused_gradient(logits, softened, labels, self.ratio(measures), temperature=self.temperature)
            return ahead.loss_after(features, gradient, rate=self.inner_rate)

    def _learn(self, loss: Tensor) -> None:
        """Make one step of Adam (Kingma and Ba 2014, arXiv:1412.6980), whose state lives in the buffers."""
        parameters = self.self_trained()
        taken = self.get_buffer("taken")
        optimizer = torch.optim.Adam(parameters, lr=self.controller_rate)
        gradients = torch.autograd.grad(loss, parameters)
        for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            moments = {name: self.get_buffer(f"{name}_{number}") for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(taken)), **moments}
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.add_(1)


class Tgeo(Frozen):
    """Divergence from the teachers and cross entropy, mixed per sample by a trained controller."""

    kind: Literal["tgeo"] = "tgeo"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.5
    """Softening of both sides of the divergence."""
    inner_rate: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Length of the classifier's virtual step, as a rate of plain gradient descent."""
    controller_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Learning rate of the controller."""
    outer_every: Annotated[int, Field(ge=1)] = 10
    """Training steps per step of the controller."""
    outer_batch: Annotated[int, Field(ge=1)] = 64
    """Calibration samples that a step of the controller looks at."""

    needs: ClassVar[Needs] = Needs(student_features=True, labels=True)
    card: ClassVar[MethodCard] = MethodCard(
        name="Trilateral geometry (TGeo-KD)",
        paper="Hu et al. 2023, Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation, "
        "arXiv:2312.15112",
        summary="Research: kd and cross entropy in one loss, mixed per sample by a small network that sees how far "
        "student, teachers and label are apart. It learns which mixture makes one step of the classifier better on "
        "calibration samples, which the student thereby gets to know a little.",
        needs="Labels, stored teacher logits, a student that ends in a linear layer, and a calibration split.",
        cost="One forward pass over a calibration batch every `outer_every` steps; nothing afterwards.",
        evidence="The paper reports 76.8 % on CIFAR-100 against 74.1 % with kd; its reviewers miss details of the "
        "training of the ratio, and the released code does not train it. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return FusionRatio(
            temperature=self.temperature,
            inner_rate=self.inner_rate,
            controller_rate=self.controller_rate,
            outer_every=self.outer_every,
            outer_batch=self.outer_batch,
        )
