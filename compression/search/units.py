"""What of a network can be cut: groups of coupled layers, the units they fall into, and how many of these stay.

Groups are traced by DepGraph (Fang et al. 2023, arXiv:2301.12900) through torch-pruning. How many units stay is
arithmetic on their counts and scores and asks no network.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from compression.errors import CompressionError, ShapeError
from compression.search.criteria import ScoreFn

logger = logging.getLogger(__name__)

BREAKAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, ShapeError, ValueError)
"""What a network cut along a wrongly traced dimension raises."""

Ranking = Literal["per_layer", "global"]
"""Whether every group loses the same share, or the worst units of all groups go."""

Part = Literal["channels", "heads", "mlp", "embedding"]
"""What a group is: channels of a convolutional network, or one of three widths of a network of tokens."""

_Joints = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.Parameter)
"""Whatever of these is in a group of a network of tokens, its channels are those that run through the network."""


# ---------------------------------------------------------------- units of one group


@dataclass(frozen=True)
class Units:
    """The smallest sets of channels that can go alone: one channel, one head, or one slot of all groups."""

    members: Tensor
    """[units, channels per unit]: channel indices of the group's root."""
    step: int
    """Kept counts are multiples of this many units."""

    def scores(self, scores: Tensor) -> Tensor:
        """The mean score of the channels of each unit, [units]."""
        return scores.float().cpu()[self.members].mean(dim=1)

    def worst(self, scores: Tensor, count: int) -> list[int]:
        """The channels of the ``count`` units with the lowest ``scores`` [units], ties by position."""
        return sorted(self.members[scores.argsort(stable=True)[:count]].flatten().tolist())


def kept_units(units: int, ratio: float, step: int) -> int:
    """How many of ``units`` stay: the multiple of ``step`` nearest to ``units * (1 - ratio)``, at least one.

    All stay when there are not more than ``step``, or when ``ratio`` is 0.
    """
    if ratio <= 0.0 or units <= step:
        return units
    nearest = math.floor(units * (1.0 - ratio) / step + 0.5) * step
    return min(max(nearest, step), units // step * step)


def units_of(graph: Any, group: Any, channels: int, attention: nn.Module | None, round_to: int) -> Units:
    """How the ``channels`` of a group fall into units that can go alone."""
    index = torch.arange(channels)
    if attention is not None:
        heads = int(cast("Any", attention).num_heads)
        head_dim = channels // heads
        return Units(index.view(heads, head_dim), round_to // math.gcd(head_dim, round_to))
    slots = _slots(graph, group)
    return Units(index.view(slots, channels // slots).T, round_to // math.gcd(slots, round_to))


def _slots(graph: Any, group: Any) -> int:
    """How many equal parts a grouped convolution or group norm divides the channels into; 1 for none."""
    counts = [1]
    for dep, _ in group:
        module = dep.target.module
        if not isinstance(module, nn.Conv2d | nn.GroupNorm):
            continue
        if isinstance(module, nn.Conv2d) and module.groups == module.out_channels:
            continue  # depthwise: each channel is on its own
        pruner = graph.get_pruner_of_module(module)
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        of = pruner.get_out_channel_groups if is_out else pruner.get_in_channel_groups
        counts.append(int(of(module)))
    return math.lcm(*counts)


# ---------------------------------------------------------------- how many stay


@dataclass(frozen=True)
class Coupled:
    """Layers that lose the same channels."""

    name: str
    """Of the layer at which the cut starts; the same in every pruned copy of a network."""
    handler: Callable[..., Any]
    """torch-pruning's function for that cut."""
    units: Units
    scores: Tensor
    """What each unit is worth, [units]; comparable within the group only."""
    part: Part = "channels"
    area: int = 1
    """Pixels of the layer's output."""
    attention: str | None = None
    """Name of the attention block whose heads the units are."""

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.units.members)

    @property
    def channels(self) -> int:
        """Of one unit."""
        return self.units.members.shape[1]

    @property
    def can_shrink(self) -> bool:
        return self.count > self.units.step


def stages_of(groups: Sequence[Coupled]) -> dict[str, int]:
    """The number of the stage of each group that can shrink, by name.

    Stages of a convolutional network are resolutions, the finest first; those of a network of tokens are attention
    heads, MLP widths and embedding widths, in this order, as far as it has them.
    """
    keys = {
        group.name: ("heads", "mlp", "embedding").index(group.part) if group.part != "channels" else -group.area
        for group in groups
        if group.can_shrink
    }
    numbers = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {name: numbers[key] for name, key in keys.items()}


def kept_counts(
    groups: Sequence[Coupled],
    ratio: float,
    *,
    ranking: Ranking = "per_layer",
    min_keep: float = 0.0,
    whole: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many units of each group stay, by name, when the share ``ratio`` of channels goes.

    ``per_layer``: each group keeps the multiple of its step nearest to that share of its units. ``global``: scores
    are divided by the mean of their group, so that groups of other sizes and scales compare (as Molchanov et al. 2017,
    arXiv:1611.06440, rescale theirs layer by layer with the l2 norm); then the lowest go, one step of a group at a
    time, until the number of channels that is left of all groups is nearest to the share, and no group falls below
    ``min_keep`` of its units. What a larger ratio keeps is part of what a smaller one keeps.

    Args:
        groups: As they are now.
        ratio: 0 keeps all.
        ranking: See above.
        min_keep: Least share of units a group keeps, rounded up to its step; of ``global`` only.
        whole: Number of units, by name, to which ``ratio`` refers, where something was cut before.
    """
    whole = {group.name: group.count for group in groups} if whole is None else whole
    if ranking == "per_layer" or ratio <= 0.0:
        return {
            group.name: min(kept_units(whole[group.name], ratio, group.units.step), group.count) for group in groups
        }
    kept = {group.name: group.count for group in groups}
    total, gone, blocks = _blocks(groups, min_keep, whole)
    sums = [gone, *accumulate((block.channels for block in blocks), initial=gone)][1:]
    nearest = min(range(len(sums)), key=lambda place: abs(sums[place] - ratio * total))
    for block in blocks[:nearest]:
        kept[block.group] -= block.units
    return kept


def ratio_levels(
    groups: Sequence[Coupled],
    *,
    ranking: Ranking = "per_layer",
    min_keep: float = 0.0,
    whole: Mapping[str, int] | None = None,
) -> list[float]:
    """One ratio for each outcome that ``kept_counts`` can have with these arguments, ascending from 0."""
    whole = {group.name: group.count for group in groups} if whole is None else whole
    if ranking == "global":
        total, gone, blocks = _blocks(groups, min_keep, whole)
        return [0.0, *(left / total for left in [*accumulate((b.channels for b in blocks), initial=gone)][1:])]
    shrinking = [(whole[group.name], group.units.step) for group in groups if whole[group.name] > group.units.step]
    bounds = {
        round(1.0 - (left + 0.5) * step / units, 9) for units, step in shrinking for left in range(1, units // step)
    }
    if any(units % step for units, step in shrinking):
        bounds.add(0.0)  # the least ratio already cuts these down to whole steps
    return [0.0, *((low + high) / 2.0 for low, high in pairwise([*sorted(bounds), 1.0]))]


@dataclass(frozen=True)
class _Block:
    """Units that a group loses at once, the worst it has left."""

    score: float
    group: str
    units: int
    channels: int


def _blocks(groups: Sequence[Coupled], min_keep: float, whole: Mapping[str, int]) -> tuple[int, int, list[_Block]]:
    """Channels of what can shrink, before any cut; how many of them are gone; what can still go, worst first."""
    shrinking = [group for group in groups if whole[group.name] > group.units.step]
    blocks: list[_Block] = []
    for group in shrinking:
        step, before = group.units.step, whole[group.name]
        least = max(math.ceil(min_keep * before / step - 1e-9), 1) * step
        ordered = (group.scores / group.scores.mean().clamp_min(torch.finfo(torch.float32).tiny)).sort().values
        left, floor = group.count, -math.inf
        while left > least:
            size = left % step or step
            start = group.count - left
            floor = max(floor, float(ordered[start : start + size].mean()))  # rounding must not swap two blocks
            blocks.append(_Block(floor, group.name, size, size * group.channels))
            left -= size
    total = sum(whole[group.name] * group.channels for group in shrinking)
    gone = total - sum(group.count * group.channels for group in shrinking)
    return total, gone, sorted(blocks, key=lambda block: block.score)


# ---------------------------------------------------------------- tracing


def traced(model: nn.Module, example: Tensor) -> Any:
    """The dependency graph of ``model``; nothing is shared between two of them.

    ``BasePruner`` is left out on purpose: it writes ``num_heads`` and channel groups into its default
    dictionaries, which all pruners of a process share.

    Raises:
        CompressionError: the tracer cannot follow the network; names the module where it gets stuck.
    """
    try:
        return _graph(model, (example,))
    except Exception as error:  # whatever the tracer trips over, it means the same to the caller
        name = _untraceable(model, (example,))
        where = f"module '{name}' of type {type(model.get_submodule(name)).__name__}" if name else "its own forward"
        raise CompressionError(
            f"Model '{type(model).__name__}' has operations the dependency tracer cannot follow in {where} "
            f"({error!r}), expected convolutions, linear layers and norms. Search it by kind 'scale'."
        ) from error


def groups_of(model: nn.Module, example: Tensor, *, round_to: int, score: ScoreFn) -> tuple[Coupled, ...]:
    """Every group of coupled layers whose channels can be ranked, without that of the classifier's outputs.

    ``model`` (eval mode) keeps its shapes. Layers that the tracer does not see stay whole and are logged.

    Raises:
        CompressionError: the network cannot be traced, or none of its channels can be ranked.
    """
    graph = traced(model, example)
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    attentions = {module.qkv: module for module in model.modules() if _is_attention(module)}
    ran = _layers_run(model, example)
    if unseen := [names[layer] for layer in ran if layer not in graph.module2node]:
        logger.warning("the channels of %s stay: the dependency tracer does not see them", ", ".join(unseen))
    of_tokens = bool(attentions) or any(
        isinstance(layer, nn.Linear) and len(shape) == 3 for layer, shape in ran.items()
    )
    found = 0
    groups: list[Coupled] = []
    for group in graph.get_all_groups(ignored_layers=[list(ran)[-1]]):
        found += 1
        outs = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        attention = next((attentions[module] for module in outs if module in attentions), None)
        rooted = group if attention is None else _rooted_at_projection(graph, group, attention)
        ranked = None if rooted is None else _ranked(graph, rooted, attention, round_to, score)
        if rooted is None or ranked is None:
            continue
        units, scores = ranked
        root = rooted[0].dep
        part: Part = "channels"
        if of_tokens:
            part = "embedding" if any(isinstance(dep.target.module, _Joints) for dep, _ in rooted) else "mlp"
        groups.append(
            Coupled(
                names[root.target.module],
                root.handler,
                units,
                units.scores(scores),
                part="heads" if attention is not None else part,
                area=_area(root.target.module, ran),
                attention=None if attention is None else names[attention],
            )
        )
    if not groups:
        raise CompressionError(
            f"Model '{type(model).__name__}' has {found} groups of channels and none can be ranked"
            f"{_blind_spot(model, example, unseen)}, expected a convolution or linear layer before the classifier. "
            "Search it by kind 'scale'."
        )
    return tuple(groups)


def _graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import torch_pruning as tp

    class Graph(tp.DependencyGraph):
        """Refuses channels that multiply at each reshape: the library would list them until memory runs out."""

        def get_pruning_group(self, module: Any, pruning_fn: Callable[..., Any], idxs: Sequence[int]) -> Any:
            for node in self.module2node.values():
                for dep in node.dependencies:
                    dep.index_mapping = _Bounded(dep.index_mapping, most=most)
            try:
                return super().get_pruning_group(module, pruning_fn, idxs)
            except _MultipliedError as error:
                raise CompressionError(
                    f"Model '{type(self.model).__name__}' has operations the dependency tracer cannot follow behind "
                    f"module '{self._module2name.get(module, '')}' (a reshape gives {error}), expected one that keeps "
                    "channels or flattens them. Search it by kind 'scale'."
                ) from error

    most = 4 * max((max(parameter.shape, default=1) for parameter in model.parameters()), default=1)
    with torch.enable_grad():
        return Graph().build_dependency(
            model, example_inputs=inputs, forward_fn=lambda module, given: module(*given), verbose=False
        )


class _MultipliedError(Exception):
    """A group has more channels than the widest layer."""


class _Bounded(list[Any]):
    """The index mappings of a dependency; each looks at how many indices it is given before it maps them."""

    def __init__(self, mappings: list[Any], *, most: int) -> None:
        super().__init__(list.__iter__(mappings))
        self.most = most

    def __iter__(self) -> Iterator[Any]:
        return (None if mapping is None else self._bounded(mapping) for mapping in super().__iter__())

    def _bounded(self, mapping: Callable[[Sequence[Any]], list[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
        def bounded(indices: Sequence[Any]) -> list[Any]:
            if len(indices) > self.most:
                raise _MultipliedError(f"{len(indices)} indices, at most {self.most} fit a layer")
            return mapping(indices)

        return bounded


def _untraceable(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Name of the innermost module that the tracer cannot follow by itself; empty for the whole network."""
    calls: dict[str, tuple[Any, ...]] = {}
    children = dict(_called(model))

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, given: None if name in calls else calls.update({name: given})

    handles = [child.register_forward_pre_hook(noting(name)) for name, child in children.items()]
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception:  # what stops the forward pass is in the call that came last
        logger.debug("the forward pass of '%s' fails by itself", type(model).__name__)
    finally:
        for handle in handles:
            handle.remove()
    for name, given in calls.items():
        own = tuple(each.detach().requires_grad_() for each in given if isinstance(each, Tensor))
        if len(own) != len(given):
            continue
        try:
            _graph(children[name], own)
        except Exception:  # any failure says that it is this one
            return ".".join(part for part in (name, _untraceable(children[name], own)) if part)
    return ""


def _called(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children of a module by name; those in lists and dictionaries, which nobody calls, are its own."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _layers_run(model: nn.Module, example: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    """The linear and convolution layers in the order they ran, and the shapes they gave; the last one gives the logits.

    Raises:
        CompressionError: there are none.
    """
    ran: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        ran.pop(module, None)
        ran[module] = tuple(output.shape)

    handles = [
        module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
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
    return ran


def _blind_spot(model: nn.Module, example: Tensor, unseen: Sequence[str]) -> str:
    """Where the tracer loses sight of a network, for an error; empty when it does not."""
    lost: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: (
                lost.append(name) if isinstance(output, Tensor) and not output.requires_grad else None
            )
        )
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.enable_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    if lost:
        return f" (no gradient passes module '{lost[0]}', and the tracer follows gradients)"
    return f" (the tracer does not see '{unseen[0]}')" if unseen else ""


def _area(layer: nn.Module, shapes: Mapping[nn.Module, tuple[int, ...]]) -> int:
    """Pixels of the output of a convolution [B,C,H,W] or linear layer [B,...,C]; 1 for one that was not seen."""
    shape = shapes.get(layer, ())
    return math.prod(shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:])


def _ranked(
    graph: Any, group: Any, attention: nn.Module | None, round_to: int, score: ScoreFn
) -> tuple[Units, Tensor] | None:
    """The units of a group and a score per channel; None, logged, when its layers disagree on their width."""
    try:
        scores = score(group)
        if scores is not None:
            return units_of(graph, group, len(scores), attention, round_to), scores
    except BREAKAGE as error:
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
