"""ExSSNeT (Yadav and Bansal 2022): a mask over fixed weights, then only weights that no earlier task uses are trained.

A network of several tasks keeps one tensor of weights a layer and one mask a task and layer. Masks may overlap: a
new task reads the weights of earlier ones, but changes only those that none of them reads.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.distill.procedures import joined
from compression.errors import CompressionError
from compression.sparsify.config import MaskLearner
from compression.sparsify.mask_learning import Choice, learn_masks
from compression.sparsify.nm import Layer, Masks, apply_masks, largest, layers_of
from compression.sparsify.session import Session
from compression.train import History, TrainConfig


def straight_through_mask(scores: Tensor, count: int) -> Tensor:
    """1 for the ``count`` largest of ``|scores|``, 0 elsewhere; its gradient passes to ``|scores|`` unchanged."""
    size = scores.abs()
    return largest(size, count) + (size - size.detach())


def kept_count(weight: Tensor, keep: float) -> int:
    """How many weights of a layer a mask keeps: the share rounded down, at least one."""
    return max(1, math.floor(keep * weight.numel()))


def signed_constant(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Weights [O,I,...] of random sign and one size, that of Kaiming's normal initialisation: sqrt(2 / inputs)."""
    size = math.sqrt(2 / weight[0].numel())
    signs = torch.randint(0, 2, tuple(weight.shape), generator=generator) * 2 - 1
    return signs.to(weight) * size


def exclusive(masks: Masks, earlier: Sequence[Masks]) -> Masks:
    """The part of ``masks`` that none of the ``earlier`` ones has: what a new task may train."""
    free = dict(masks)
    for old in earlier:
        free = {name: mask & ~old[name].to(mask.device) for name, mask in free.items()}
    return free


class TaskMasks:
    """Several tasks in one set of weights; what a task does not mask (norms, biases, skipped layers) it has alone."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        """Start from the weights of ``layers`` as they are, before any task is learnt."""
        self.weights = {name: layer.weight.detach().cpu().clone() for name, layer in layers.items()}
        self.masks: dict[str, Masks] = {}
        self._rest: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def start(self, layers: Mapping[str, Layer]) -> None:
        """Give ``layers``, in place, the weights that a new task starts from: those of all tasks, and the unused."""
        for name, layer in layers.items():
            layer.weight.copy_(self.weights[name])

    def add(self, task: str, model: nn.Module, masks: Masks) -> None:
        """Keep ``model`` as it was trained for a task: new values only where no earlier task reads them.

        Raises:
            CompressionError: the task is there already, or the masks are of other weights.
        """
        if task in self.masks or masks.keys() != self.weights.keys():
            raise CompressionError(
                f"Task '{task}' has masks of {len(masks)} weights, expected a new task beside "
                f"{', '.join(self.masks) or 'none'} with masks of the same {len(self.weights)}. Use one sparsifier "
                "for all tasks, and another name for each."
            )
        masks = {name: mask.cpu() for name, mask in masks.items()}
        state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        for name, free in exclusive(masks, list(self.masks.values())).items():
            self.weights[name] = torch.where(free, state.pop(name), self.weights[name])
        self.masks[task], self._rest[task] = masks, state

    def load(self, task: str, model: nn.Module) -> None:
        """Make ``model``, in place, the network of a task."""
        masked = {name: self.weights[name].masked_fill(~mask, 0.0) for name, mask in self.masks[task].items()}
        model.load_state_dict(self._rest[task] | masked)


class Scores(Choice):
    """One score a weight; the largest keep theirs."""

    def __init__(self, scores: Tensor, count: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.count = count

    def soft(self, weight: Tensor) -> Tensor:
        """See the base."""
        del weight
        return straight_through_mask(self.scores, self.count)

    def hard(self, weight: Tensor) -> Tensor:
        """See the base."""
        del weight
        return largest(self.scores.abs(), self.count)


class Supermask(MaskLearner):
    """Learn a mask over frozen weights by scores, then train the weights that the mask keeps.

    Ours are: that a recipe, which has one task, starts from the student's own weights with scores in their
    proportion, so that the first mask is that of the largest weights; ``signed_constant`` starts as the paper does.
    Adam's decoupled decay acts on scores; norms keep their factors and shifts, and each task has its own; there is no
    transfer of scores from the nearest earlier task.
    """

    kind: Literal["supermask"] = "supermask"
    mask_learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.01
    """Peak learning rate of the scores."""
    keep: Annotated[float, Field(gt=0, le=0.875)] = 0.1
    """Share of the weights of each layer that stays."""
    start: Literal["student", "signed_constant"] = "student"
    """``student``: its trained weights; ``signed_constant``: weights of one size and random sign, random scores."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Exclusive supermask (ExSSNeT)",
        paper="Yadav and Bansal 2022, Exclusive Supermask Subnetwork Training for Continual Learning, arXiv:2210.10209",
        summary="Research: learns which tenth of each layer's weights stays, then trains those. Its point, tasks that "
        "share a network without harm to older ones, needs several tasks; a recipe has one.",
        needs="A student, trained or fresh.",
        cost="One training, with a sort of every layer's scores per step. Zeros have no pattern, so nothing runs "
        "faster for them.",
        evidence="The paper reports 8.3 % over its predecessor at 2 to 10 % density, over a sequence of tasks. "
        "Not measured on our data yet.",
    )

    def run(self, session: Session) -> History:
        """See the base."""
        layers = layers_of(session.model, skip=self.skip)
        if self.start == "signed_constant":
            set_signed_constants(layers, seed=session.seed)
        return learn_task(session, self)[1]


@torch.no_grad()
def set_signed_constants(layers: Mapping[str, Layer], *, seed: int) -> None:
    """Give ``layers``, in place, weights of one size and random sign; see :func:`signed_constant`."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.weight.copy_(signed_constant(layer.weight, generator))


def learn_task(session: Session, config: Supermask, earlier: Sequence[Masks] = ()) -> tuple[Masks, History]:
    """The masks of a task and the learning curve; the session's model becomes the network of that task.

    It starts from the model's weights as they are. ``earlier`` are the masks of older tasks: a weight that one of them
    keeps may be read, and is left as it is.
    """
    layers = layers_of(session.model, skip=config.skip)
    generator = torch.Generator().manual_seed(session.seed)
    choices = {
        name: Scores(_first_scores(layer.weight, config, generator), kept_count(layer.weight, config.keep))
        for name, layer in layers.items()
    }
    first, rest = config.schedules()
    masks, history = learn_masks(session, layers, choices, first)
    if rest is None:
        apply_masks(session.model, masks)
        return masks, history
    return masks, joined(history, _train_free(session, layers, masks, exclusive(masks, earlier), rest))


def _train_free(
    session: Session, layers: Mapping[str, Layer], masks: Masks, free: Masks, train: TrainConfig
) -> History:
    """Train what is ``free``; the rest of ``masks`` keeps its values, and what is in neither is zero."""
    apply_masks(session.model, masks)
    fixed = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def put_back(done: int, total: int) -> None:
        del done, total
        with torch.no_grad():
            for name, layer in layers.items():
                weight = layer.weight
                weight.copy_(torch.where(free[name].to(weight.device), weight, fixed[name].to(weight.device)))

    return session.train(train, name="weights", after_step=put_back)


def _first_scores(weight: Tensor, config: Supermask, generator: torch.Generator) -> Tensor:
    """Within the bound of Kaiming's uniform initialisation with slope sqrt(5): 1 / sqrt(inputs)."""
    bound = 1 / math.sqrt(weight[0].numel())
    if config.start == "student":
        largest_weight = weight.detach().abs().max()
        return weight.detach() * (bound / largest_weight.clamp_min(torch.finfo(weight.dtype).tiny))
    scores = torch.rand(tuple(weight.shape), generator=generator) * 2 - 1
    return (scores * bound).to(weight)
