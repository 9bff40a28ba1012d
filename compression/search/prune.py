"""Structured channel pruning of a trained network, by dependency graph.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900), through torch-pruning: the
library traces which parameters must be cut together and cuts them; which channels go is decided here.
"""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from compression import profile
from compression.card import MethodCard
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.errors import CompressionError, ShapeError
from compression.models import ModelSpec, build_model, diff_edits
from compression.search.allocation import allocations, stage_costs
from compression.search.criteria import Criterion, check_criterion, criterion_named
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.units import (
    BREAKAGE,
    Coupled,
    Part,
    Ranking,
    groups_of,
    kept_counts,
    ratio_levels,
    stages_of,
    traced,
)
from compression.train import TrainConfig

logger = logging.getLogger(__name__)

PROBE = 0.5
"""Share of channels by which is found out which groups can be cut at all."""

Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Order = Literal["prune_distil", "distil_prune"]


class Prune(Space):
    """Pruned copies of one teacher: every ratio is a candidate student that starts from its weights.

    A candidate depends on its choices, the parent, the calibration images and the seed alone. What had to be trained,
    or asked of a latency model, on the way to it is kept in ``shop.folder``, so that it is the same when it is built
    again.

    With ``target`` macs or latency the channels to remove are found by bisection over all outcomes of the ranking,
    which are nested: the largest network whose shapes fit (as far as predicted latency never falls when channels are
    added). With ``steps`` each cut leaves the same factor of what was left, counted from the parent's widths, so that
    rounding does not add up (Han et al. 2015, arXiv:1506.02626, prune and retrain in turn, single weights instead of
    channels).
    """

    kind: Literal["prune"] = "prune"
    parent: str = Field(min_length=1)
    """Name of the teacher that is pruned."""
    ratios: tuple[Ratio, ...] = Field(default=(0.25, 0.5, 0.625, 0.75), min_length=1)
    """Shares of ``target`` to remove, each a choice of the search; r of the channels leaves about (1 - r)^2 of the
    MACs."""
    criterion: Criterion = "magnitude"
    """How channels are ranked."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Channel counts that remain are multiples of this; counts below 16 save MACs, not time."""
    ranking: Ranking = "per_layer"
    """``per_layer`` removes the same share everywhere, ``global`` the worst of all layers, by scores divided by the
    mean of their layer."""
    min_keep: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Least share of its channels that each layer keeps when ranking is global."""
    target: Literal["channels", "macs", "latency"] = "channels"
    """What ratios are shares of: channels, or the parent's MACs, or the latency that the study's model predicts for
    it; of the latter two at least the share is removed."""
    stage_ratios: tuple[Ratio, ...] = ()
    """Shares of channels to choose from for each stage by itself, instead of ``ratios``: for each resolution, or for
    attention heads, MLP widths and embedding width."""
    use_sensitivity: bool = False
    """Begin with ratios that spare the stages whose layers lose most with half their channels, by the parent's
    sensitivity table; changes nothing without ``stage_ratios``."""
    heads: bool = True
    """Whether a network of tokens loses attention heads."""
    mlp: bool = True
    """Whether it loses hidden channels of its MLPs."""
    embedding: bool = True
    """Whether it loses channels of its tokens and of the layers that make them."""
    steps: int = Field(default=1, ge=1, le=16)
    """Cuts in which a ratio is reached, with a distillation between each two."""
    between: TrainConfig | None = None
    """Schedule of the distillation between two steps, and of that before pruning in order ``distil_prune``."""
    order: tuple[Order, ...] = Field(default=("prune_distil",), min_length=1)
    """``distil_prune`` first distils a copy of the parent from the panel; more than one is a choice of the search.
    The trial's distillation comes last in either."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Structured pruning (DepGraph)",
        paper="Fang et al. 2023, arXiv:2301.12900",
        summary="Removes whole channels and attention heads of a teacher, coupled layers together, "
        "and hands the smaller dense network its remaining weights.",
        needs="A trained teacher whose operations can be traced; criteria 'taylor' and 'hessian' also labelled images, "
        "steps and order 'distil_prune' a schedule, target 'latency' a latency model.",
        cost="Seconds per candidate; with steps, a distillation between each two of them.",
        evidence="Measured on Fashion-MNIST: with a ratio for each stage 2.0 points above uniform width at equal "
        "latency, and 0.5 above one ratio for all; see `measured`.",
    )

    @field_validator("ratios", "stage_ratios")
    @classmethod
    def _ascending(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(ratios)))

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len(set(self.order)) != len(self.order):
            raise ValueError(f"order has {', '.join(self.order)}, expected each at most once. Name each order once.")
        if self.between is None and (self.steps > 1 or "distil_prune" in self.order):
            why = f"steps {self.steps}" if self.steps > 1 else "order distil_prune"
            raise ValueError(
                f"between has no schedule, expected one for {why}. Set between, or prune in one step before distilling."
            )
        if self.stage_ratios and self.target != "channels":
            raise ValueError(
                f"stage_ratios has shares of channels and target has {self.target}, expected target channels. "
                "Leave one of them out."
            )
        return self

    @property
    def label(self) -> str:
        differs = (
            ("global", self.ranking == "global"),
            (self.target, self.target != "channels"),
            ("stages", bool(self.stage_ratios)),
            ("iterative", self.steps > 1),
            ("distilled", self.order == ("distil_prune",)),
            ("orders", len(self.order) > 1),
            *((f"all_{part}", part not in self._parts) for part in ("heads", "mlp", "embedding")),
        )
        return "-".join(["prune", self.parent, self.criterion, *(name for name, is_so in differs if is_so)])

    @property
    def trains_while_building(self) -> bool:
        return self.steps > 1 or "distil_prune" in self.order

    @property
    def wants_latency_model(self) -> bool:
        """Whether ``shop.latency`` is asked."""
        return self.target == "latency"

    @property
    def _parts(self) -> tuple[Part, ...]:
        chosen: tuple[tuple[Part, bool], ...] = (
            ("heads", self.heads),
            ("mlp", self.mlp),
            ("embedding", self.embedding),
        )
        return ("channels", *(part for part, wanted in chosen if wanted))

    def genes(self, shop: Workshop) -> Genes:
        shop.parent(self.parent)
        self._check(shop)
        orders = {"order": self.order} if len(self.order) > 1 else {}
        if not self.stage_ratios:
            return {"ratio": self.ratios, **orders}
        stages = 1 + max(self._whole(shop).stages.values())
        return {**{f"ratio_{stage}": self.stage_ratios for stage in range(stages)}, **orders}

    @property
    def wants_sensitivity(self) -> bool:
        """Whether ``shop.sensitivity`` must have the parent's table."""
        return self.use_sensitivity and bool(self.stage_ratios)

    def first_choices(self, shop: Workshop) -> list[Choices]:
        """Allocations by sensitivity, see :func:`compression.search.allocation.allocations`; none if not asked for."""
        if not self.wants_sensitivity:
            return []
        costs = stage_costs(self._whole(shop).layers, shop.sensitivity[self.parent], self.parent)
        return [
            {f"ratio_{stage}": ratio for stage, ratio in enumerate(ratios)}
            for ratios in allocations(costs, self.stage_ratios)
        ]

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        self._check(shop)
        ratios = [float(choices[gene]) for gene in self.genes(shop) if gene != "order"]
        first = choices.get("order", self.order[0]) == "distil_prune"
        model, spec = self._distilled(shop) if first else shop.parent(self.parent)
        if not any(ratios):
            return copy.deepcopy(model).eval().requires_grad_(True), spec
        if self.steps == 1 and self.target != "latency":
            return self._smaller(model, spec, ratios, shop, known=f"distilled {first}")
        changing = self.model_dump(mode="json", exclude={"ratios", "stage_ratios", "order", "use_sensitivity"})
        key = self._key(shop, {"space": changing, "choices": choices})
        folder = shop.folder / self.label / key
        if not (folder / "spec.json").is_file():
            for step in range(1, self.steps + 1):
                part = step / self.steps
                now = ratios if step == self.steps else [1.0 - (1.0 - ratio) ** part for ratio in ratios]
                known = f"distilled {first}" if step == 1 else None
                model, spec = self._smaller(model, spec, now, shop, known=known)
                if step < self.steps:
                    self._distil(model, f"{self.label}-{key}-{step}", shop)
            save_checkpoint(model, spec, folder)
            for step in range(1, self.steps):
                shutil.rmtree(shop.folder / "steps" / f"{self.label}-{key}-{step}", ignore_errors=True)
        return load_checkpoint(folder)

    def _check(self, shop: Workshop) -> None:
        """Nothing, when the study has what this space asks of it."""
        if self.target == "latency" and shop.latency is None:
            raise CompressionError(
                f"Space '{self.label}' has target latency and no latency model, expected one. Give run_study "
                "latency_model, or set target to macs."
            )
        if self.wants_sensitivity and self.parent not in shop.sensitivity:
            raise CompressionError(
                f"Space '{self.label}' has use_sensitivity and no sensitivity table of '{self.parent}', expected one "
                f"(tables: {', '.join(sorted(shop.sensitivity)) or 'none'}). Turn the sensitivity stage on, prune the "
                "best teacher, or set use_sensitivity to false."
            )
        if (self.steps > 1 or "distil_prune" in self.order) and shop.start_training is None:
            raise CompressionError(
                f"Space '{self.label}' has distillations of its own and no way to train, expected one. Give run_study "
                "start_training, or prune in one step before distilling."
            )

    def _distil(self, model: nn.Module, name: str, shop: Workshop) -> None:
        """Trains in place on the panel."""
        if self.between is not None:
            shop.training(model, self.between, name).run()
        model.eval()

    def _distilled(self, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        """A copy of the parent that was distilled from the panel; made once for all spaces that prune it."""
        parent, spec = shop.parent(self.parent)
        between = None if self.between is None else self.between.model_dump(mode="json")
        key = self._key(shop, {"between": between})
        folder = shop.folder / f"prune-{self.parent}-distilled" / key
        if not (folder / "spec.json").is_file():
            model = copy.deepcopy(parent).requires_grad_(True)
            name = f"prune-{self.parent}-distilled-{key}"
            self._distil(model, name, shop)
            save_checkpoint(model, spec, folder)
            shutil.rmtree(shop.folder / "steps" / name, ignore_errors=True)
        return load_checkpoint(folder)

    def _key(self, shop: Workshop, content: Mapping[str, Any]) -> str:
        """A hash over ``content``, the parent and the seed."""
        from compression.search.candidate import digest_of

        whole = {**content, "parent": digest_of(*shop.parent(self.parent)), "seed": shop.seed}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def _smaller(
        self, model: nn.Module, spec: ModelSpec, ratios: Sequence[float], shop: Workshop, *, known: str | None
    ) -> tuple[nn.Module, ModelSpec]:
        """``model`` without the shares ``ratios`` of what the parent had: one for all stages, or one for each.

        ``known`` names the model where it is pruned more than once; it is then traced and scored only once.
        """
        survey = self._survey(model, spec, shop, known)
        if self.ranking == "per_layer" and self.target == "channels" and self.steps == 1 and not self.stage_ratios:
            return survey.pruned(kept_counts(survey.groups, ratios[0]))
        whole = self._whole(shop)
        survey = replace(survey, groups=tuple(group for group in survey.groups if group.name in whole.units))

        def kept(groups: Sequence[Coupled], ratio: float) -> dict[str, int]:
            return kept_counts(groups, ratio, ranking=self.ranking, min_keep=self.min_keep, whole=whole.units)

        if self.stage_ratios:
            counts: dict[str, int] = {}
            for stage, ratio in enumerate(ratios):
                counts |= kept([group for group in survey.groups if whole.stages.get(group.name) == stage], ratio)
            return survey.pruned(counts)
        if self.target == "channels":
            return survey.pruned(kept(survey.groups, ratios[0]))
        cost, (parent, _) = self._cost(shop), shop.parent(self.parent)
        limit = (1.0 - ratios[0]) * cost(parent, spec)
        levels = ratio_levels(survey.groups, ranking=self.ranking, min_keep=self.min_keep, whole=whole.units)

        def costs(level: float) -> float:
            return cost(survey.cut(kept(survey.groups, level))[0], spec)

        if (least := costs(levels[-1])) > limit:
            raise CompressionError(
                f"Space '{self.label}' has ratio {ratios[0]:.3g} of {self.target} to remove, expected at most "
                f"{1.0 - least / cost(parent, spec):.3g}, which the smallest network removes. "
                "Lower the ratio, round_to or min_keep."
            )
        low, high = -1, len(levels) - 1  # the smallest level that fits lies in low + 1 .. high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if costs(levels[middle]) <= limit else (middle, high)
        return survey.pruned(kept(survey.groups, levels[high]))

    def _cost(self, shop: Workshop) -> Callable[[nn.Module, ModelSpec], float]:
        predictor = shop.latency
        if self.target == "latency" and predictor is not None:
            return lambda model, spec: predictor.predict_ms(model, spec.input_shape)
        return lambda model, spec: float(profile.macs(model, spec.input_shape))

    def _survey(self, model: nn.Module, spec: ModelSpec, shop: Workshop, known: str | None) -> "Survey":
        def made() -> Survey:
            return survey_of(
                model,
                spec,
                criterion=self.criterion,
                round_to=self.round_to,
                calibration=shop.calibration() if criterion_named(self.criterion).needs_calibration else None,
                seed=shop.seed,
                parts=self._parts,
            )

        if known is None:
            return made()
        kept_as = json.dumps(
            ["prune", known, self.parent, self.criterion, self.round_to, self._parts, str(self.between)]
        )
        if kept_as not in shop.memory:
            shop.memory[kept_as] = made()
        return shop.memory[kept_as]

    def _whole(self, shop: Workshop) -> "_Whole":
        """What of the parent can be cut; the same for every criterion."""
        kept_as = json.dumps(["prune", "whole", self.parent, self.round_to, self._parts])
        if kept_as not in shop.memory:
            survey = survey_of(*shop.parent(self.parent), round_to=self.round_to, parts=self._parts).usable()
            stages = stages_of(survey.groups)
            if not stages:
                raise CompressionError(
                    f"Parent '{self.parent}' has no layer wider than round_to {self.round_to}, expected at least one. "
                    "Lower round_to, or choose another parent."
                )
            layers = [
                tuple(group.attention or group.name for group in survey.groups if stages.get(group.name) == stage)
                for stage in range(1 + max(stages.values()))
            ]
            shop.memory[kept_as] = _Whole({group.name: group.count for group in survey.groups}, stages, layers)
        return shop.memory[kept_as]


@dataclass(frozen=True)
class _Whole:
    """A parent before anything was cut."""

    units: Mapping[str, int]
    """Of each group that can be cut, by name."""
    stages: Mapping[str, int]
    """The stage of each group that can shrink."""
    layers: Sequence[tuple[str, ...]]
    """Of each stage, the layers or attention blocks where its cuts start."""


def prune_model(
    model: nn.Module,
    spec: ModelSpec,
    *,
    ratio: float,
    criterion: Criterion = "magnitude",
    round_to: int = 8,
    calibration: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    ranking: Ranking = "per_layer",
    min_keep: float = 0.1,
    parts: Sequence[Part] = ("channels", "heads", "mlp", "embedding"),
) -> tuple[nn.Module, ModelSpec]:
    """A smaller copy of ``model`` (eval mode, all weights trainable) and the spec that rebuilds it.

    Every prunable width keeps about ``1 - ratio`` of its channels, rounded to ``round_to``; the classifier's
    outputs stay, and attention loses whole heads, so that those that remain compute what they did before.
    With ``ranking`` global that share holds for all widths together, and each keeps at least ``min_keep``.
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
    survey = survey_of(
        model, spec, criterion=criterion, round_to=round_to, calibration=calibration, seed=seed, parts=parts
    )
    if ranking == "global":
        survey = survey.usable()
    return survey.pruned(kept_counts(survey.groups, ratio, ranking=ranking, min_keep=min_keep))


@dataclass(frozen=True)
class Survey:
    """A network with what can be cut from it; nothing here changes it."""

    model: nn.Module
    """Eval mode."""
    spec: ModelSpec
    example: Tensor
    """Two images."""
    groups: tuple[Coupled, ...]

    def pruned(self, kept: Mapping[str, int]) -> tuple[nn.Module, ModelSpec]:
        """The network in which each group keeps its best ``kept`` units, and the spec that rebuilds it.

        Raises:
            CompressionError: no group can be cut.
            ShapeError: the pruned network cannot be rebuilt from its spec.
        """
        smaller, _ = self.cut(kept)
        edits = diff_edits(self.model, smaller)
        if not edits:
            logger.info("every width stays as it was: none is far enough above what is kept of it")
        spec = self.spec.model_copy(update={"edits": (*self.spec.edits, *edits)})
        return rebuilt_copy(smaller, spec, self.example), spec

    def usable(self) -> "Survey":
        """Without the groups that cannot be cut.

        Raises:
            CompressionError: none can.
        """
        _, broken = self.cut(kept_counts(self.groups, PROBE))
        return replace(self, groups=tuple(group for group in self.groups if group.name not in broken))

    def cut(self, kept: Mapping[str, int]) -> tuple[nn.Module, frozenset[str]]:
        """A cut copy of the network, and the groups that break its forward pass: they are left out and logged.

        Raises:
            CompressionError: all of them do.
        """
        cuts = [
            _Cut(group, kept[group.name]) for group in self.groups if kept.get(group.name, group.count) < group.count
        ]
        try:
            return self._attempt(cuts), frozenset()
        except BREAKAGE as error:
            logger.info("cutting all groups at once failed (%s); trying each alone", error)
        usable: list[_Cut] = []
        for cut in cuts:
            try:
                self._attempt([cut])
            except BREAKAGE as error:
                logger.warning("the channels of '%s' stay: cutting them breaks the model (%s)", cut.group.name, error)
            else:
                usable.append(cut)
        if not usable:
            raise CompressionError(
                f"Model '{type(self.model).__name__}' has no group of channels that can be cut without breaking its "
                "forward pass, expected at least one. Search it with kind 'scale', or prune another teacher."
            )
        return self._attempt(usable), frozenset(cut.group.name for cut in cuts if cut not in usable)

    def _attempt(self, cuts: Sequence["_Cut"]) -> nn.Module:
        trial = copy.deepcopy(self.model)
        _apply(trial, self.example, cuts)
        with torch.no_grad():
            logits = trial(self.example)
        if logits.shape != (len(self.example), self.spec.num_classes):
            raise ShapeError(
                f"Pruned model has outputs of shape {tuple(logits.shape)}, expected "
                f"{(len(self.example), self.spec.num_classes)}. Choose another parent."
            )
        return trial


def survey_of(
    model: nn.Module,
    spec: ModelSpec,
    *,
    criterion: Criterion = "magnitude",
    round_to: int = 8,
    calibration: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    parts: Sequence[Part] = ("channels", "heads", "mlp", "embedding"),
) -> Survey:
    """What of a copy of ``model`` can be cut, its channels scored by ``criterion``; see ``prune_model``.

    ``parts`` are the kinds of groups that may be cut.

    Raises:
        CompressionError: the criterion lacks what it needs, or nothing of the network can be pruned.
    """
    chosen = criterion_named(criterion)
    check_criterion(chosen, model, has_calibration=calibration is not None)
    work = copy.deepcopy(model).eval().requires_grad_(True)
    device = next(work.parameters()).device
    example = torch.randn((2, *spec.input_shape), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
        device
    )
    if calibration is not None:
        chosen.prepare(work, *calibration)
    groups = groups_of(work, example, round_to=round_to, score=chosen.build(seed=seed))
    work.zero_grad(set_to_none=True)
    allowed = tuple(group for group in groups if group.part in parts)
    if not allowed:
        raise CompressionError(
            f"Model '{type(model).__name__}' has only {', '.join(sorted({group.part for group in groups}))} to cut, "
            f"expected one of {', '.join(parts)}. Allow them."
        )
    return Survey(work, spec, example, allowed)


@dataclass(frozen=True, eq=False)
class _Cut:
    """A group and how many of its units stay."""

    group: Coupled
    kept: int


def _apply(model: nn.Module, example: Tensor, cuts: Sequence[_Cut]) -> None:
    """Cuts ``model`` in place."""
    graph = traced(model, example)
    for cut in cuts:
        drop = cut.group.units.worst(cut.group.scores, cut.group.count - cut.kept)
        group = graph.get_pruning_group(model.get_submodule(cut.group.name), cut.group.handler, drop)
        if not graph.check_pruning_group(group):
            raise ShapeError(
                f"Layer '{cut.group.name}' has a cut of {len(drop)} channels that leaves none in a "
                "coupled layer, expected some to stay. Lower the ratio."
            )
        group.prune()
    for cut in cuts:
        if cut.group.attention is not None:
            attention: Any = model.get_submodule(cut.group.attention)
            attention.num_heads = cut.kept
            if hasattr(attention, "attn_dim"):
                attention.attn_dim = cut.kept * attention.head_dim


def rebuilt_copy(pruned: nn.Module, spec: ModelSpec, example: Tensor) -> nn.Module:
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
