"""Layer pruning: whole blocks of a trained network are left out.

After Zhang et al. 2024, "LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models"
(arXiv:2404.11098): what leaving out a set of blocks changes at the output is close to the sum of what each block
changes alone, so that the best set is a knapsack.

Legend: N images, C classes.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression import profile
from compression.card import MethodCard
from compression.edits import SkipModule
from compression.errors import CompressionError
from compression.features import frozen
from compression.models import ModelSpec, build_model
from compression.search.knapsack import cheapest_cover
from compression.search.space import Choices, Genes, Space, Workshop
from compression.types import Frozen

logger = logging.getLogger(__name__)

CHUNK = 256
"""Images per forward pass when blocks are scored."""

Cost = Literal["latency", "macs", "params"]
Measure = Literal["mse", "kl"]
Share = Annotated[float, Field(gt=0.0, le=1.0)]

_BREAKAGE = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What the forward pass of a network raises that cannot do without a block."""


class Blocks(Frozen):
    """What is known of the removable blocks of a parent; kept as JSON."""

    names: tuple[str, ...]
    """Dotted names, in the order of the network."""
    scores: tuple[float, ...]
    """Change of the output when this block alone is left out."""
    costs: tuple[float, ...]
    """What leaving it out saves."""


class Chosen(Frozen):
    """The blocks that go for one share; kept as JSON."""

    names: tuple[str, ...]
    change: float
    """Change of the output when all of them are left out."""
    additivity: float | None
    """That over the sum of their scores; None where the sum is 0."""


class Layers(Space):
    """One teacher without some of its blocks, those that matter least for what they cost.

    Left out are shape-preserving blocks (see ``removable``), replaced by identities; the candidate starts from the
    teacher's remaining weights. A block's score is the change of the logits over the calibration images when it alone
    is left out; of the sets that save ``share`` of what all removable blocks cost together, the one with the smallest
    sum of scores goes, and the log says how far sum and truth are apart.

    Ours beyond the paper: latency may be the cost, where the paper counts parameters; with ``rescore_every`` the sum is
    corrected on the way, since it fails for neighbours when many blocks go; and the knapsack is solved without rounding
    costs. The paper's training, with the normalised distance of feature maps, is a loss of its own: trials train with
    the recipe's losses that do without live teachers, and the full distillation of a finalist gets all of them, so list
    ``{kind: normalised_features}`` beside another one under ``distill.losses``.
    """

    kind: Literal["layers"] = "layers"
    parent: str = Field(min_length=1)
    """Name of the teacher whose blocks are left out."""
    shares: tuple[Share, ...] = Field(default=(0.25, 0.5, 0.75), min_length=1)
    """Shares of what the removable blocks cost to save, each a choice of the search."""
    cost: Cost = "latency"
    """What a block costs: its time as the latency model of this machine predicts it, or a count."""
    rescore_every: int = Field(default=0, ge=0)
    """Score the remaining blocks anew after so many removals; 0 scores once."""
    measure: Measure = "mse"
    """Change of the output: squared distance of the logits, or the KL divergence of the probabilities in nats."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Layer pruning (LAPTOP-Diff)",
        paper="Zhang et al. 2024, LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion "
        "Models, arXiv:2404.11098",
        summary="Leaves out whole blocks of a teacher: those whose removal changes its logits least for the time it "
        "saves, chosen by an exact knapsack. For the paper's way to train the rest, put "
        "{kind: normalised_features} beside another loss under distill.losses.",
        needs="A trained teacher with blocks whose output has the shape of their input, and unlabelled images; cost "
        "'latency' also a latency model.",
        cost="One pass over the calibration images per removable block, once; with rescore_every again and again.",
        evidence="For diffusion models at half size the paper reports a PickScore 4.0 % lower where other ways to "
        "prune lose at least 8.2 %. Measured on Fashion-MNIST: see `measured`.",
    )

    @field_validator("shares")
    @classmethod
    def _ascending(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(shares)))

    @property
    def label(self) -> str:
        return f"layers-{self.parent}"

    @property
    def wants_latency_model(self) -> bool:
        """Whether costs are predicted times."""
        return self.cost == "latency"

    def genes(self, shop: Workshop) -> Genes:
        self._names(shop)
        return {"share": self.shares}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        self._names(shop)
        chosen = self._chosen(float(choices["share"]), shop)
        return without_blocks(*shop.parent(self.parent), chosen.names)

    def _names(self, shop: Workshop) -> tuple[str, ...]:
        """The removable blocks.

        Raises:
            CompressionError: there are none, or no latency model where one is wanted.
        """
        parent, spec = shop.parent(self.parent)
        if self.cost == "latency" and shop.latency is None:
            raise CompressionError(
                f"Search of '{self.label}' has cost 'latency' and no latency model, expected one. Pass latency_model, "
                "or set cost to macs."
            )
        key = f"{self.label}/removable"
        if key not in shop.memory:
            shop.memory[key] = removable(parent, spec.input_shape)
        names = shop.memory[key]
        if not names:
            raise CompressionError(
                f"Parent '{self.parent}' ({spec.model.kind}) has no block whose output has the shape of its input, "
                "expected at least one in a sequence of blocks. Prune its channels with kind 'prune', or search with "
                "kind 'scale'."
            )
        return names

    def _blocks(self, shop: Workshop) -> Blocks:
        """Scores and costs, found once for a study."""

        def found() -> Blocks:
            names = self._names(shop)
            model, spec = _copy_of(shop, self.parent)
            scores = scores_of(model, shop.calibration()[0], names, self.measure)
            for name, score in zip(names, scores, strict=True):
                if not math.isfinite(score):
                    raise CompressionError(
                        f"Parent '{self.parent}' has a score of {score} for block '{name}', expected a number. Its "
                        "logits are not finite: train it again with a lower learning rate."
                    )
            return Blocks(names=names, scores=scores, costs=costs_of(model, names, self._price(spec, shop)))

        return _kept(shop, f"{self.label}/blocks-{self.cost}-{self.measure}", Blocks, found)

    def _chosen(self, share: float, shop: Workshop) -> Chosen:
        """The blocks that go for this share, found once for a study."""

        def found() -> Chosen:
            blocks = self._blocks(shop)
            model, _ = _copy_of(shop, self.parent)
            images, _ = shop.calibration()
            need = share * math.fsum(blocks.costs)
            if need <= 0:
                raise CompressionError(
                    f"Parent '{self.parent}' has blocks that cost no {self.cost}, expected some that do. Choose "
                    "another cost."
                )
            if self.rescore_every:
                names = rescored_choice(
                    model, images, blocks, need, rescore_every=self.rescore_every, measure=self.measure
                )
            else:
                names = tuple(blocks.names[place] for place in cheapest_cover(blocks.scores, blocks.costs, need))
            change = change_of(model, images, names, self.measure)
            alone = math.fsum(score for name, score in zip(blocks.names, blocks.scores, strict=True) if name in names)
            chosen = Chosen(names=names, change=change, additivity=change / alone if alone > 0 else None)
            logger.info(
                "%s share %g: without %s the logits change by %.4g, %s times the sum of %.4g",
                *(self.label, share, ", ".join(names), change),
                *("-" if chosen.additivity is None else f"{chosen.additivity:.3g}", alone),
            )
            return chosen

        name = f"{self.label}/chosen-{self.cost}-{self.measure}-{self.rescore_every}-{share!r}"
        return _kept(shop, name, Chosen, found)

    def _price(self, spec: ModelSpec, shop: Workshop) -> Callable[[nn.Module], float]:
        """What a whole network costs."""
        latency = shop.latency
        if self.cost == "latency" and latency is not None:
            return lambda model: latency.predict_ms(model, spec.input_shape)
        if self.cost == "macs":
            return lambda model: float(profile.macs(model, spec.input_shape))
        return lambda model: float(profile.params(model))


def removable(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Dotted names of the blocks that can be left out, in the order of the network; ``model`` is unchanged.

    A block is a child of a ``Sequential`` or ``ModuleList``, of more than one layer and with a convolution or linear
    layer in it, that runs once, whose output has the shape of its input, and without which the forward pass works.
    A branch is no block: what lies inside another such child must be the only way through it. The outer one is a
    stage then, and no block either.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    images = torch.randn((2, *input_shape), generator=torch.Generator().manual_seed(0)).to(_device(model))
    children = _children_of_sequences(model)
    preserving = _shape_preserving(model, images, children)
    found = []
    for name in preserving:
        around = [other for other in children if name.startswith(f"{other}.")]
        if _only_way_through(model, images, name, around) and _works_without(model, images, name):
            found.append(name)
    return tuple(name for name in found if not any(other.startswith(f"{name}.") for other in found))


@contextmanager
def skipping(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Identities take the places of the named modules inside the block."""
    with ExitStack() as stack:
        for name in names:
            path, _, child = name.rpartition(".")
            parent = model.get_submodule(path)
            stack.callback(parent._modules.__setitem__, child, parent._modules[child])
            parent._modules[child] = nn.Identity()
        yield


def output_change(whole: Tensor, without: Tensor, measure: Measure) -> Tensor:
    """How far logits [N,C] moved, per image [N], 0 at least; float64.

    ``mse`` is the squared distance, summed over classes; ``kl`` the divergence of the probabilities from those of
    ``whole``, nats.
    """
    whole, without = whole.double(), without.double()
    if measure == "mse":
        return (whole - without).square().sum(dim=1)
    target = whole.log_softmax(dim=1)
    return F.kl_div(without.log_softmax(dim=1), target, reduction="none", log_target=True).sum(dim=1).clamp_min(0.0)


def change_of(model: nn.Module, images: Tensor, names: Sequence[str], measure: Measure) -> float:
    """Mean change of the logits over ``images`` [N,C,H,W] when all named blocks are left out."""
    return scores_of(model, images, (), measure, also=[tuple(names)])[0]


def scores_of(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    measure: Measure,
    *,
    also: Sequence[Sequence[str]] = (),
    without: Sequence[str] = (),
) -> tuple[float, ...]:
    """Mean change of the logits of the whole network over ``images`` [N,C,H,W], for each name and then for each set.

    Args:
        model: The network; it is the same afterwards.
        images: Normalised.
        names: Blocks that are left out, each alone.
        measure: See ``output_change``.
        also: Sets of blocks that are left out together.
        without: Blocks that are left out besides, each time.
    """
    sets = [(name, *without) for name in names] + [(*each, *without) for each in also]
    sums = [0.0] * len(sets)
    device = _device(model)
    with frozen(model), torch.no_grad():
        for part in images.split(CHUNK):
            part = part.to(device)
            whole = model(part)
            for place, left_out in enumerate(sets):
                with skipping(model, left_out):
                    sums[place] += float(output_change(whole, model(part), measure).sum())
    return tuple(total / len(images) for total in sums)


def costs_of(model: nn.Module, names: Sequence[str], price: Callable[[nn.Module], float]) -> tuple[float, ...]:
    """What leaving out each named block alone saves of the price of the network; 0 at least."""
    whole = price(model)
    costs = []
    for name in names:
        with skipping(model, [name]):
            costs.append(max(0.0, whole - price(model)))
    return tuple(costs)


def rescored_choice(
    model: nn.Module, images: Tensor, blocks: Blocks, need: float, *, rescore_every: int, measure: Measure
) -> tuple[str, ...]:
    """The names of blocks that save ``need``, in the order of the network, scored anew after so many removals.

    Each round solves the knapsack for what is still needed and takes of its blocks those with the lowest score per
    cost. The score of a block is then what leaving it out adds to the change so far, 0 at least.
    """
    costs = dict(zip(blocks.names, blocks.costs, strict=True))
    scores = dict(zip(blocks.names, blocks.scores, strict=True))
    gone: list[str] = []
    saved = 0.0
    while True:
        left = [name for name in blocks.names if name not in gone]
        places = cheapest_cover([scores[name] for name in left], [costs[name] for name in left], need - saved)
        wanted = sorted((left[place] for place in places), key=lambda name: scores[name] / max(costs[name], 1e-30))
        gone += wanted[:rescore_every]
        if len(wanted) <= rescore_every:
            return tuple(name for name in blocks.names if name in gone)
        saved = math.fsum(costs[name] for name in gone)
        left = [name for name in left if name not in gone]
        *changes, so_far = scores_of(model, images, left, measure, also=[()], without=gone)
        scores = {name: max(0.0, change - so_far) for name, change in zip(left, changes, strict=True)}


def without_blocks(model: nn.Module, spec: ModelSpec, names: Sequence[str]) -> tuple[nn.Module, ModelSpec]:
    """A copy of ``model`` without the named blocks, eval mode, all weights trainable; and the spec that rebuilds it."""
    edits = tuple(SkipModule(module=name) for name in names)
    smaller = spec.model_copy(update={"edits": (*spec.edits, *edits)})
    with torch.random.fork_rng(devices=[]):
        fresh = build_model(smaller)
    below = tuple(f"{name}." for name in names)
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith(below)})
    return fresh.to(_device(model)).eval().requires_grad_(True), smaller


def _copy_of(shop: Workshop, name: str) -> tuple[nn.Module, ModelSpec]:
    """The parent to work on: blocks are taken out and put back, and the parent itself must not change."""
    model, spec = shop.parent(name)
    return copy.deepcopy(model).eval(), spec


def _children_of_sequences(model: nn.Module) -> list[str]:
    """Names of the children of all ``Sequential`` and ``ModuleList``, in the order of the network."""
    return [
        name
        for name, _ in model.named_modules()
        if name and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Sequential | nn.ModuleList)
    ]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


def _shape_preserving(model: nn.Module, images: Tensor, names: Sequence[str]) -> list[str]:
    """Those of more than one layer, with a convolution or linear layer, that run once and keep the shape."""
    calls: dict[str, list[bool]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)

            def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
                same = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
                calls[name].append(same and inputs[0].shape == output.shape)

            if next(module.children(), None) is not None and any(
                isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) for part in module.modules()
            ):
                stack.callback(module.register_forward_hook(keep).remove)
        with torch.no_grad():
            model(images)
    return [name for name in names if calls[name] == [True]]


def _only_way_through(model: nn.Module, images: Tensor, name: str, around: Sequence[str]) -> bool:
    """Whether the outputs of the modules around it depend on their inputs through this module alone.

    Found by gradients: its output is cut off, and nothing else may connect output and input.
    """
    if not around:
        return True
    connected: list[bool] = []
    with ExitStack() as stack:

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # A copy: the module may work in place, which a leaf does not allow.
            return tuple(
                each.detach().requires_grad_().clone()
                if isinstance(each, Tensor) and each.is_floating_point()
                else each
                for each in inputs
            )

        def leave(_module: nn.Module, _inputs: object, output: Any) -> None:
            connected.append(not isinstance(output, Tensor) or output.requires_grad)

        for other in around:
            module = model.get_submodule(other)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        cut = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: output.detach())
        stack.callback(cut.remove)
        with torch.enable_grad():
            model(images)
    return bool(connected) and not any(connected)


def _works_without(model: nn.Module, images: Tensor, name: str) -> bool:
    with torch.no_grad():
        whole = model(images)
        try:
            with skipping(model, [name]):
                logits = model(images)
        except _BREAKAGE:
            return False
    return isinstance(logits, Tensor) and logits.shape == whole.shape and bool(logits.isfinite().all())


def _kept(shop: Workshop, name: str, kind: type[Frozen], make: Callable[[], Any]) -> Any:
    """What ``make`` gave the first time in this study, from memory or its folder."""
    if name in shop.memory:
        return shop.memory[name]
    path = shop.folder / f"{name}.json"
    if path.is_file():
        value = kind.model_validate_json(path.read_text(encoding="utf-8"))
    else:
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(value.model_dump(mode="json"), indent=1), encoding="utf-8")
        draft.replace(path)
    shop.memory[name] = value
    return value
