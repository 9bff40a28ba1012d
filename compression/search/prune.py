"""Structured channel pruning of a trained network, by dependency graph.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900), through torch-pruning: the
library traces which parameters must be cut together and cuts them; which channels go is decided here.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.errors import CompressionError, ShapeError
from compression.models import ModelSpec, build_model, diff_edits
from compression.search.criteria import Criterion, ScoreFn, check_criterion, criterion_named
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.units import Units, units_of

logger = logging.getLogger(__name__)

_BREAKAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, ShapeError, ValueError)
"""What a network cut along a wrongly traced dimension raises."""

Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]


class Prune(Space):
    """Pruned copies of one teacher: every ratio is a candidate student that starts from its weights."""

    kind: Literal["prune"] = "prune"
    parent: str = Field(min_length=1)
    """Name of the teacher that is pruned."""
    ratios: tuple[Ratio, ...] = Field(default=(0.25, 0.5, 0.625, 0.75), min_length=1)
    """Shares of channels to remove, each a choice of the search; r leaves about (1 - r)^2 of the MACs."""
    criterion: Criterion = "magnitude"
    """How channels are ranked."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Channel counts that remain are multiples of this; counts below 16 save MACs, not time."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Structured pruning (DepGraph)",
        paper="Fang et al. 2023, arXiv:2301.12900",
        summary="Removes whole channels and attention heads of a teacher, coupled layers together, "
        "and hands the smaller dense network its remaining weights.",
        needs="A trained teacher whose operations can be traced; criterion 'taylor' also labelled images.",
        cost="Seconds per candidate.",
        evidence="Measured on Fashion-MNIST: inherited weights give +1.9 points at fewer MACs than a fresh "
        "net, yet no less time: candidates are compared by measured latency.",
    )

    @field_validator("ratios")
    @classmethod
    def _ascending(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(ratios)))

    @property
    def label(self) -> str:
        return f"prune-{self.parent}-{self.criterion}"

    def genes(self, shop: Workshop) -> Genes:
        shop.parent(self.parent)
        return {"ratio": self.ratios}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        parent, spec = shop.parent(self.parent)
        return prune_model(
            parent,
            spec,
            ratio=float(choices["ratio"]),
            criterion=self.criterion,
            round_to=self.round_to,
            calibration=shop.calibration() if self.criterion == "taylor" else None,
            seed=shop.seed,
        )


@dataclass(frozen=True)
class _Cut:
    """Channels ``drop`` of ``module``, to be cut by ``handler`` together with all that is coupled."""

    module: nn.Module
    handler: Callable[..., Any]
    drop: list[int]
    attention: nn.Module | None = None
    heads: int | None = None
    """How many heads ``attention`` keeps."""


def prune_model(
    model: nn.Module,
    spec: ModelSpec,
    *,
    ratio: float,
    criterion: Criterion = "magnitude",
    round_to: int = 8,
    calibration: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, ModelSpec]:
    """A smaller copy of ``model`` (eval mode, all weights trainable) and the spec that rebuilds it.

    Every prunable width keeps about ``1 - ratio`` of its channels, rounded to ``round_to``; the classifier's
    outputs stay, and attention loses whole heads, so that those that remain compute what they did before.
    A group of layers that cannot be cut without breaking the forward pass stays whole and is logged.
    ``calibration`` is (normalised images [N,C,H,W], labels [N]). ``model`` is not changed, ratio 0 copies it.

    Raises:
        CompressionError: the ratio is out of range, the criterion lacks what it needs, or nothing of the
            network can be pruned.
        ShapeError: the pruned network cannot be rebuilt from its spec.
    """
    if not 0.0 <= ratio < 1.0:
        raise CompressionError(
            f"Pruning ratio '{ratio}' has a value outside 0 <= ratio < 1, expected a share of channels to "
            "remove. 0.5 removes half of them."
        )
    if ratio == 0.0:
        return copy.deepcopy(model).eval().requires_grad_(True), spec
    chosen = criterion_named(criterion)
    check_criterion(chosen, model, has_calibration=calibration is not None)

    work = copy.deepcopy(model).eval().requires_grad_(True)
    device = next(work.parameters()).device
    example = torch.randn((2, *spec.input_shape), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
        device
    )
    if criterion == "taylor":
        _accumulate_gradients(work, cast("tuple[Tensor, Tensor]", calibration))
    cuts = _plan(work, example, ratio=ratio, round_to=round_to, score=chosen.build(seed=seed))
    pruned = _cut_all(work, example, cuts, spec)
    pruned.zero_grad(set_to_none=True)
    edits = diff_edits(model, pruned)
    if not edits:
        logger.info("ratio %.3f leaves every width as it was: all are at or below round_to=%d", ratio, round_to)
    new_spec = spec.model_copy(update={"edits": (*spec.edits, *edits)})
    return _rebuilt(pruned, new_spec, example), new_spec


def _accumulate_gradients(model: nn.Module, calibration: tuple[Tensor, Tensor], *, chunk: int = 256) -> None:
    """Leaves the gradient of the mean cross entropy over the calibration images in ``model``."""
    images, labels = calibration
    device = next(model.parameters()).device
    with torch.enable_grad():
        for start in range(0, len(labels), chunk):
            logits = model(images[start : start + chunk].to(device))
            part = F.cross_entropy(logits, labels[start : start + chunk].to(device), reduction="sum")
            (part / len(labels)).backward()


def _graph(model: nn.Module, example: Tensor) -> Any:
    """The traced dependency graph; nothing is shared between two of them.

    ``BasePruner`` is left out on purpose: it writes ``num_heads`` and channel groups into its default
    dictionaries, which all pruners of a process share.
    """
    import torch_pruning as tp

    try:
        with torch.enable_grad():
            return tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
    except Exception as error:  # whatever the tracer trips over, it means the same to the caller
        raise CompressionError(
            f"Model '{type(model).__name__}' has operations the dependency tracer cannot follow ({error!r}), "
            "expected convolutions, linear layers and norms. Search it by kind 'scale'."
        ) from error


def _plan(model: nn.Module, example: Tensor, *, ratio: float, round_to: int, score: ScoreFn) -> list[_Cut]:
    """One cut per group of coupled layers that has channels to spare; ``model`` keeps its shapes."""
    graph = _graph(model, example)
    attentions = {module.qkv: module for module in model.modules() if _is_attention(module)}
    groups = list(graph.get_all_groups(ignored_layers=[_classifier(model, example)]))
    cuts: list[_Cut] = []
    unranked = 0
    for group in groups:
        outs = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        attention = next((attentions[module] for module in outs if module in attentions), None)
        rooted = group if attention is None else _rooted_at_projection(graph, group, attention)
        ranked = None if rooted is None else _ranked(graph, rooted, attention, round_to, score)
        if ranked is None:
            unranked += 1
            continue
        units, scores = ranked
        drop, kept = units.dropped(scores, ratio)
        if drop:
            root = cast("Any", rooted)[0].dep
            heads = None if attention is None else kept
            cuts.append(_Cut(root.target.module, root.handler, drop, attention, heads))
    if unranked == len(groups):
        raise CompressionError(
            f"Model '{type(model).__name__}' has {len(groups)} groups of channels and none can be ranked, "
            "expected a convolution or linear layer before the classifier. Search it by kind 'scale'."
        )
    return cuts


def _ranked(
    graph: Any, group: Any, attention: nn.Module | None, round_to: int, score: ScoreFn
) -> tuple[Units, Tensor] | None:
    """The units of a group and a score per channel; None, logged, when its layers disagree on their width."""
    try:
        scores = score(group)
        if scores is not None:
            return units_of(graph, group, len(scores), attention, round_to), scores
    except _BREAKAGE as error:
        name = group[0].dep.target.name
        logger.info("the channels of '%s' stay: coupled layers count them differently (%s)", name, error)
    return None


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int)


def _rooted_at_projection(graph: Any, group: Any, attention: nn.Module) -> Any | None:
    """The same group seen from the layer that reads the heads, where q, k and v share one index."""
    width = cast("nn.Linear", attention.qkv).out_features // 3
    for dep, _ in group:
        module = dep.target.module
        if (
            isinstance(module, nn.Linear)
            and graph.is_in_channel_pruning_fn(dep.handler)
            and module.in_features == width
        ):
            return graph.get_pruning_group(module, dep.handler, list(range(width)))
    return None


def _classifier(model: nn.Module, example: Tensor) -> nn.Module:
    """The last linear or convolution layer that ran: its outputs are the logits."""
    ran: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, _inputs, _output: ran.append(module))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise CompressionError(
            f"Model '{type(model).__name__}' has no linear or convolution layer, expected a classifier. "
            "Choose another parent."
        )
    return ran[-1]


def _apply(model: nn.Module, example: Tensor, cuts: list[_Cut], names: dict[nn.Module, str]) -> None:
    """Cuts ``model`` in place; ``names`` maps the modules of the planned network to their names."""
    graph = _graph(model, example)
    for cut in cuts:
        group = graph.get_pruning_group(model.get_submodule(names[cut.module]), cut.handler, cut.drop)
        if not graph.check_pruning_group(group):
            raise ShapeError(
                f"Layer '{names[cut.module]}' has a cut of {len(cut.drop)} channels that leaves none in a "
                "coupled layer, expected some to stay. Lower the ratio."
            )
        group.prune()
    for cut in cuts:
        if cut.attention is not None and cut.heads is not None:
            attention: Any = model.get_submodule(names[cut.attention])
            attention.num_heads = cut.heads
            if hasattr(attention, "attn_dim"):
                attention.attn_dim = cut.heads * attention.head_dim


def _cut_all(model: nn.Module, example: Tensor, cuts: list[_Cut], spec: ModelSpec) -> nn.Module:
    """A cut copy of ``model``; cuts that break the forward pass on their own are left out and logged."""
    names = {module: name for name, module in model.named_modules()}

    def attempt(chosen: list[_Cut]) -> nn.Module:
        trial = copy.deepcopy(model)
        _apply(trial, example, chosen, names)
        with torch.no_grad():
            logits = trial(example)
        if logits.shape != (len(example), spec.num_classes):
            raise ShapeError(
                f"Pruned model has outputs of shape {tuple(logits.shape)}, expected "
                f"{(len(example), spec.num_classes)}. Choose another parent."
            )
        return trial

    try:
        return attempt(cuts)
    except _BREAKAGE as error:
        logger.info("cutting all groups at once failed (%s); trying each alone", error)
    usable: list[_Cut] = []
    for cut in cuts:
        try:
            attempt([cut])
        except _BREAKAGE as error:
            logger.warning("the channels of '%s' stay: cutting them breaks the model (%s)", names[cut.module], error)
        else:
            usable.append(cut)
    if not usable:
        raise CompressionError(
            f"Model '{type(model).__name__}' has no group of channels that can be cut without breaking its "
            "forward pass, expected at least one. Search it with kind 'scale', or prune another teacher."
        )
    return attempt(usable)


def _rebuilt(pruned: nn.Module, spec: ModelSpec, example: Tensor) -> nn.Module:
    """The network ``spec`` builds, holding the weights of ``pruned``: what a later load will give."""
    with torch.random.fork_rng(devices=[]):
        fresh = build_model(spec)
    try:
        fresh.load_state_dict(pruned.state_dict())
        with torch.no_grad():
            expected = pruned(example)
            found = fresh.to(example.device).eval()(example)
    except (RuntimeError, ValueError) as error:
        raise ShapeError(
            f"Pruned model has a structure its spec does not rebuild ({error}), expected equal shapes. "
            "Prune a model of the zoo, or search with kind 'scale'."
        ) from error
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ShapeError(
            f"Pruned model has outputs {float((found - expected).abs().max()):.2e} away from its rebuilt "
            "copy, expected the same. Prune a model of the zoo, or search with kind 'scale'."
        )
    return fresh.requires_grad_(True)
