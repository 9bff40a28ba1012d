"""Layer pruning: what counts as a block, what leaving it out costs and saves, and which set goes."""

import copy
import itertools
import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.edits import SkipModule
from compression.errors import CompressionError
from compression.models import AnyModel, ModelSpec, build_model
from compression.search import knapsack
from compression.search.knapsack import cheapest_cover
from compression.search.layers import (
    Blocks,
    Layers,
    change_of,
    costs_of,
    output_change,
    removable,
    rescored_choice,
    scores_of,
)
from compression.search.space import Operator, Workshop
from compression.zoo import DepthwiseCnn, Group, Mixer, PlainCnn, ResidualCnn, VisionTransformer
from export.onnx_graph import to_onnx
from tests.compression.test_study import PREPROCESSING, Trainer, config_of, dataset_of, search

RESIDUAL = ResidualCnn(widths=(8, 16), depths=(3, 3), strides=(1, 2), stem_width=8)
NAMES = ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5")
TRANSFORMER = VisionTransformer(width=16, depth=3, num_heads=2, patch_size=4, stem="patch")


def parent_of(config: AnyModel = RESIDUAL) -> tuple[Any, ModelSpec]:
    spec = ModelSpec(
        model=config,
        num_classes=3,
        input_shape=(1, 12, 12),
        class_names=("a", "b", "c"),
        preprocessing=PREPROCESSING,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(spec)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval(), spec


@pytest.fixture(scope="module")
def parent() -> tuple[Any, ModelSpec]:
    return parent_of()


def shop_of(folder: Path, parent: tuple[nn.Module, ModelSpec], **changes: Any) -> Workshop:
    return Workshop({"teacher": parent}, dataset_of(), seed=0, folder=folder, **changes)


def images() -> torch.Tensor:
    return torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))


class Clock:
    """A latency model: so many milliseconds for each block of the first and second stage that is there."""

    batch = 1

    def __init__(self, first: float, second: float) -> None:
        self.price = {name: first if name in NAMES[:3] else second for name in NAMES}

    def predict_ms(self, model: nn.Module, input_shape: tuple[int, int, int]) -> float:
        assert input_shape == (1, 12, 12)
        there = [name for name in NAMES if not isinstance(model.get_submodule(name), nn.Identity)]
        return 1.0 + sum(self.price[name] for name in there)

    def operators_ms(self, operators: list[Operator]) -> list[float]:
        raise NotImplementedError


# --- the knapsack


def by_trying_all(scores: list[float], costs: list[float], need: float) -> float:
    """The smallest sum of scores of a set that is enough."""
    places = range(len(scores))
    sets = itertools.chain.from_iterable(itertools.combinations(places, count) for count in range(len(scores) + 1))
    return min(
        sum(scores[place] for place in each)
        for each in sets
        if sum(costs[place] for place in each) >= need * (1 - 1e-9)
    )


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["fractions", "integers", "equal_costs", "correlated"])
def test_the_dynamic_programme_equals_trying_all(count, share, kind):
    rng = random.Random(f"{count} {share} {kind}")
    scores = [rng.random() for _ in range(count)]
    costs = {
        "fractions": [rng.random() for _ in range(count)],
        "integers": [float(rng.randint(0, 9)) for _ in range(count)],
        "equal_costs": [0.1] * count,
        "correlated": [score + 0.01 * rng.random() for score in scores],
    }[kind]
    need = share * math.fsum(costs)
    chosen = cheapest_cover(scores, costs, need)
    assert list(chosen) == sorted(set(chosen))
    assert sum(costs[place] for place in chosen) >= need * (1 - 1e-9)
    assert sum(scores[place] for place in chosen) == pytest.approx(by_trying_all(scores, costs, need), abs=1e-12)


def test_equal_scores_take_no_more_than_asked_for():
    assert cheapest_cover([0.0, 0.0, 0.0], [1.0, 2.0, 4.0], 2.0) == (1,)
    assert cheapest_cover([1.0, 1.0], [1.0, 1.0], 0.0) == ()


def test_many_choices_are_thinned_and_still_enough(monkeypatch):
    monkeypatch.setattr(knapsack, "MOST_STATES", 50)
    rng = random.Random(0)
    scores = [rng.random() for _ in range(12)]
    costs = [score + 0.01 * rng.random() for score in scores]
    for share in (0.2, 0.5, 1.0):
        need = share * sum(costs)
        chosen = cheapest_cover(scores, costs, need)
        assert sum(costs[place] for place in chosen) >= need * (1 - 1e-9)
        best = by_trying_all(scores, costs, need)
        assert best - 1e-12 <= sum(scores[place] for place in chosen) <= 1.1 * best


@pytest.mark.parametrize(
    ("scores", "costs", "need", "said"),
    [
        ([1.0], [1.0, 2.0], 1.0, "1 scores and 2 costs"),
        ([1.0], [-1.0], 0.0, "no negative cost"),
        ([math.nan], [1.0], 0.0, "finite numbers"),
        ([1.0, 1.0], [1.0, 1.0], 2.1, "sum to 2.0, expected 2.1 at least"),
    ],
)
def test_an_impossible_knapsack_is_refused(scores, costs, need, said):
    with pytest.raises(ValueError, match=said):
        cheapest_cover(scores, costs, need)


# --- blocks


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RESIDUAL, NAMES),
        (PlainCnn(widths=(8, 16), depths=(1, 2), strides=(1, 2), stem_width=8), ("blocks.0", "blocks.2")),
        (DepthwiseCnn(widths=(8, 16), depths=(1, 1), stem_width=8), ("blocks.0", "blocks.2")),
        (TRANSFORMER, ("blocks.0", "blocks.1", "blocks.2")),
        (Mixer(width=16, depth=2, stem="patch"), ("blocks.0", "blocks.1")),
        (VisionTransformer(width=16, depth=3, num_heads=2, keep_tokens=(9, 4, 4)), ("blocks.0", "blocks.2")),
        (
            Group(members=(PlainCnn(widths=(8,), depths=(2,), strides=(2,), stem_width=8),) * 2),
            ("members.0.blocks.1", "members.1.blocks.1"),
        ),
    ],
    ids=["residual", "plain", "depthwise", "transformer", "mixer", "transformer_that_drops_tokens", "group"],
)
def test_blocks_that_keep_the_shape_are_removable(config, expected):
    model, spec = parent_of(config)
    assert removable(model, spec.input_shape) == expected


class Stage(nn.Module):
    """A halving, then two blocks in series; or, with a way around, two parts of one branch."""

    def __init__(self, *, way_around: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 2, stride=2)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)))
        self.way_around = way_around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return self.blocks(x) + x if self.way_around else self.blocks(x)


@pytest.mark.parametrize(("way_around", "found"), [(False, ("0.blocks.0", "0.blocks.1")), (True, ())])
def test_a_stage_gives_way_to_its_blocks_and_branches_are_none(way_around, found):
    model = nn.Sequential(Stage(way_around=way_around), nn.Flatten(), nn.Linear(36, 3))
    assert removable(model, (4, 6, 6)) == found


def test_a_block_the_network_cannot_do_without_is_not_removable():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first: Any = self.blocks[0]
            return self.blocks(x.flatten(1)) * first[0].weight.mean()

    assert removable(Reads(), (1, 2, 2)) == ("blocks.1",)


# --- scores and costs


def test_changes_are_squared_distances_or_divergences():
    whole = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    without = torch.tensor([[1.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    assert output_change(whole, without, "mse").tolist() == [5.0, 0.0]
    target, other = whole[0].softmax(0), without[0].softmax(0)
    found = output_change(whole, without, "kl")
    assert found[0].item() == pytest.approx((target * (target / other).log()).sum().item(), rel=1e-5)
    assert found[1] == 0.0


@pytest.mark.parametrize("measure", ["mse", "kl"])
def test_scores_are_what_the_logits_change_by(parent, measure):
    model, _ = parent
    scores = scores_of(model, images(), NAMES, measure)
    assert all(score > 0 for score in scores)
    blocks = list(model.blocks)
    with torch.no_grad():
        whole = model(images())
        without = copy.deepcopy(model)
        without.blocks = nn.Sequential(*blocks[:4], *blocks[5:])
        expected = output_change(whole, without(images()), measure).mean().item()
    assert scores[NAMES.index("blocks.4")] == pytest.approx(expected, rel=1e-6)


def make_identity(model: Any, name: str) -> None:
    """The block computes nothing: its last layer gives 0."""
    block = model.get_submodule(name)
    last = block.second[1] if hasattr(block, "second") else block.mlp[2]
    for layer in (last, block.attn.proj) if hasattr(block, "attn") else (last,):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("config", [RESIDUAL, TRANSFORMER], ids=["residual", "transformer"])
@pytest.mark.parametrize("measure", ["mse", "kl"])
def test_a_block_that_does_nothing_scores_zero(config, measure):
    model, _ = parent_of(config)
    make_identity(model, "blocks.1")
    first, second = scores_of(model, images(), ("blocks.0", "blocks.1"), measure)
    assert second == 0.0
    assert first > 0.0


def test_looking_at_a_network_leaves_it_as_it_was(parent):
    model = copy.deepcopy(parent[0]).train()
    model.head.bias.requires_grad_(False)
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    removable(model, (1, 12, 12))
    scores_of(model, images(), NAMES, "mse")
    costs_of(model, NAMES, profile.params)
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in modules.values())
    assert not model.head.bias.requires_grad
    assert model.head.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_costs_are_what_the_network_saves(parent):
    model, spec = parent
    expected = [profile.params(model.get_submodule(name)) for name in NAMES]
    assert costs_of(model, NAMES, profile.params) == tuple(expected)
    assert costs_of(model, NAMES, lambda net: -profile.params(net)) == (0.0,) * 5, "a saving below 0 is none"
    convolutions = 2 * 9 * 8 * 8 * 12 * 12
    assert costs_of(model, NAMES[:1], lambda net: profile.macs(net, spec.input_shape)) == (convolutions,)


# --- which set goes


class Push(nn.Module):
    """Adds a fixed vector."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.tensor(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.vector


def test_scoring_anew_sees_what_the_sum_does_not():
    """Two blocks push the same way: together they matter four times as much as one."""
    model = nn.Sequential(Push(1.0, 0.0), Push(1.0, 0.0), Push(0.0, 1.1), Push(-9.0, 9.0))
    points = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    names = ("0", "1", "2", "3")
    scores = scores_of(model, points, names, "mse")
    assert scores == pytest.approx((1.0, 1.0, 1.21, 162.0), rel=1e-5)
    blocks = Blocks(names=names, scores=scores, costs=(1.0, 1.0, 1.0, 1.0))
    assert [names[place] for place in cheapest_cover(scores, blocks.costs, 2.0)] == ["0", "1"]
    assert change_of(model, points, ("0", "1"), "mse") == pytest.approx(4.0, rel=1e-5)

    def rescored(every: int) -> tuple[str, ...]:
        return rescored_choice(model, points, blocks, 2.0, rescore_every=every, measure="mse")

    assert rescored(1) == ("0", "2")
    assert change_of(model, points, ("0", "2"), "mse") == pytest.approx(2.21, rel=1e-5)
    assert rescored(2) == ("0", "1"), "there is nothing left to score anew"


def test_scoring_anew_removes_no_more_than_asked_for():
    model = nn.Sequential(Push(2.0), Push(-2.0), Push(3.0), Push(-3.0))
    points = torch.zeros(1, 1)
    names = ("0", "1", "2", "3")
    blocks = Blocks(names=names, scores=scores_of(model, points, names, "mse"), costs=(1.0, 1.0, 1.0, 1.0))
    assert rescored_choice(model, points, blocks, 2.0, rescore_every=1, measure="mse") == ("0", "1")
    assert rescored_choice(model, points, blocks, 4.0, rescore_every=1, measure="mse") == names


@pytest.mark.parametrize("cost", ["latency", "macs", "params"])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_the_set_saves_the_share_and_has_the_smallest_sum(tmp_path, parent, cost, share):
    space = Layers(parent="teacher", shares=(0.3, 0.6, 1.0), cost=cost)
    shop = shop_of(tmp_path, parent, latency=Clock(5.0, 1.0))
    model, spec = space.build({"share": share}, shop)
    gone = [edit.module for edit in spec.edits if isinstance(edit, SkipModule)]
    assert [name for name in NAMES if isinstance(model.get_submodule(name), nn.Identity)] == gone
    whole = parent[0]
    price = {
        "latency": lambda net: Clock(5.0, 1.0).predict_ms(net, (1, 12, 12)),
        "macs": lambda net: float(profile.macs(net, (1, 12, 12))),
        "params": lambda net: float(profile.params(net)),
    }[cost]
    costs = costs_of(copy.deepcopy(whole), NAMES, price)
    scores = scores_of(copy.deepcopy(whole), shop.calibration()[0], NAMES, "mse")
    need = share * sum(costs)
    assert price(whole) - price(model) >= need * (1 - 1e-9)
    assert sum(scores[NAMES.index(name)] for name in gone) == pytest.approx(
        by_trying_all(list(scores), list(costs), need), rel=1e-9
    )
    assert (share == 1.0) == (len(gone) == len(NAMES))


def test_what_costs_time_goes_rather_than_what_costs_parameters(tmp_path, parent):
    def gone(folder: str, clock: Clock) -> set[str]:
        space = Layers(parent="teacher", shares=(0.4,))
        _, spec = space.build({"share": 0.4}, shop_of(tmp_path / folder, parent, latency=clock))
        return {edit.module for edit in spec.edits if isinstance(edit, SkipModule)}

    assert gone("a", Clock(100.0, 1e-3)) <= set(NAMES[:3])
    assert gone("b", Clock(1e-3, 100.0)) <= set(NAMES[3:])


def test_a_block_that_does_nothing_goes_first(tmp_path):
    model, spec = parent_of()
    make_identity(model, "blocks.2")
    space = Layers(parent="teacher", shares=(0.05,), cost="macs")
    candidate, found = space.build({"share": 0.05}, shop_of(tmp_path, (model, spec)))
    assert found.edits == (SkipModule(module="blocks.2"),)
    with torch.no_grad():
        assert torch.equal(candidate(images()), model(images()))


def test_how_far_the_sum_is_from_the_truth_is_reported(tmp_path, parent, caplog):
    space = Layers(parent="teacher", shares=(0.5,), cost="macs")
    shop = shop_of(tmp_path, parent)
    with caplog.at_level(logging.INFO):
        space.build({"share": 0.5}, shop)
    chosen = shop.memory["layers-teacher/chosen-macs-mse-0-0.5"]
    assert len(chosen.names) > 1
    model = copy.deepcopy(parent[0])
    together = change_of(model, shop.calibration()[0], chosen.names, "mse")
    alone = sum(scores_of(model, shop.calibration()[0], chosen.names, "mse"))
    assert chosen.change == pytest.approx(together, rel=1e-9)
    assert chosen.additivity == pytest.approx(together / alone, rel=1e-9)
    assert f"{chosen.additivity:.3g} times the sum" in caplog.text
    assert ", ".join(chosen.names) in caplog.text


# --- candidates


@pytest.mark.parametrize("rescore_every", [0, 1])
@pytest.mark.parametrize("config", [RESIDUAL, TRANSFORMER], ids=["residual", "transformer"])
def test_candidates_are_the_same_again_keep_weights_and_leave_the_parent_alone(tmp_path, config, rescore_every):
    model, spec = parent_of(config)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    space = Layers(parent="teacher", shares=(0.6,), cost="macs", rescore_every=rescore_every, measure="kl")
    random_state = torch.get_rng_state()
    first: Any
    first, first_spec = space.build({"share": 0.6}, shop_of(tmp_path / "a", (model, spec)))
    second, second_spec = space.build({"share": 0.6}, shop_of(tmp_path / "b", (model, spec)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first_spec == second_spec
    assert first_spec.edits
    assert not first.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, before[name])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_checkpoint(first, first_spec, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(loaded(images()), first(images()))
        first.head.bias.add_(1.0)
    assert torch.equal(model.head.bias, before["head.bias"]), "weights are copies"


def test_scores_and_costs_survive_a_kill(tmp_path, parent):
    """After a restart a latency model fitted anew must not lead to another candidate."""
    space = Layers(parent="teacher", shares=(0.5, 0.7))
    first = shop_of(tmp_path, parent, latency=Clock(5.0, 1.0))
    _, spec = space.build({"share": 0.5}, first)
    assert json.loads((tmp_path / "layers-teacher" / "blocks-latency-mse.json").read_text())["names"] == list(NAMES)
    assert not list(tmp_path.rglob("*.part"))
    later = shop_of(tmp_path, parent, latency=Clock(1.0, 50.0))
    assert space.build({"share": 0.5}, later)[1] == spec
    space.build({"share": 0.7}, later)
    assert (
        later.memory["layers-teacher/blocks-latency-mse"].costs
        == first.memory["layers-teacher/blocks-latency-mse"].costs
    )


def test_a_pruned_parent_can_lose_more(tmp_path, parent):
    once, spec = Layers(parent="teacher", shares=(0.3,), cost="params").build(
        {"share": 0.3}, shop_of(tmp_path / "a", parent)
    )
    again = Layers(parent="teacher", shares=(0.5,), cost="params")
    twice, found = again.build({"share": 0.5}, shop_of(tmp_path / "b", (once, spec)))
    assert found.edits[: len(spec.edits)] == spec.edits
    assert len(found.edits) > len(spec.edits)
    save_checkpoint(twice, found, tmp_path / "checkpoint")


@pytest.mark.parametrize("fast", [True, False], ids=["traced", "exported"])
def test_exports_with_the_same_logits(tmp_path, parent, fast):
    space = Layers(parent="teacher", shares=(0.5,), cost="macs")
    model, spec = space.build({"share": 0.5}, shop_of(tmp_path, parent))
    to_onnx(model, tmp_path / "model.onnx", input_shape=spec.input_shape, metadata={}, fast=fast)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images().numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(found) - model(images())).abs().max() < 1e-4


def test_a_whole_study(tmp_path, parent):
    space = Layers(parent="teacher", shares=(0.3, 0.6, 0.9))
    assert space.wants_latency_model
    assert not Layers(parent="teacher", cost="macs").wants_latency_model
    config = config_of(trials=3, spaces=(space,))
    clock = Clock(2.0, 1.0)
    result = search(
        tmp_path, config, train=Trainer(), parents={"teacher": parent}, latency_model=clock, best_teacher="teacher"
    )
    assert [trial.state for trial in result.trials] == ["complete"] * 3
    assert [trial.choices["share"] for trial in result.trials] == [0.6, 0.3, 0.9]
    predicted = {trial.choices["share"]: trial.latency_predicted_ms for trial in result.trials}
    whole = clock.predict_ms(parent[0], (1, 12, 12))
    assert all(value is not None and whole - value >= share * 8.0 - 1e-9 for share, value in predicted.items())
    model, spec = load_checkpoint(result.finalists[0])
    assert any(isinstance(edit, SkipModule) for edit in spec.edits)
    assert profile.params(model) == result.chosen[0].params


# --- refusals


def test_impossible_settings_are_refused_before_any_work(tmp_path, parent):
    with pytest.raises(CompressionError, match=r"parent 'nobody', expected one of teacher"):
        Layers(parent="nobody", cost="macs").genes(shop_of(tmp_path, parent))
    with pytest.raises(CompressionError, match=r"'layers-teacher' has cost 'latency' and no latency model.*macs"):
        Layers(parent="teacher").genes(shop_of(tmp_path, parent))
    without_blocks = parent_of(PlainCnn(widths=(8, 16), depths=(1, 1), strides=(2, 2), stem_width=4))
    with pytest.raises(CompressionError, match=r"Parent 'teacher' \(plain_cnn\) has no block"):
        Layers(parent="teacher", cost="macs").genes(shop_of(tmp_path, without_blocks))
    free = Layers(parent="teacher", shares=(0.5,))
    with pytest.raises(CompressionError, match="blocks that cost no latency"):
        free.build({"share": 0.5}, shop_of(tmp_path / "free", parent, latency=Clock(0.0, 0.0)))
    broken = parent_of()
    broken[0].head.bias.data.fill_(math.nan)
    with pytest.raises(CompressionError, match=r"no block|not finite"):
        Layers(parent="teacher", cost="macs").build({"share": 0.25}, shop_of(tmp_path / "broken", broken))


@pytest.mark.parametrize("changes", [{"shares": (0.0,)}, {"shares": (1.5,)}, {"shares": ()}, {"rescore_every": -1}])
def test_fields_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"shares|rescore_every"):
        Layers(parent="teacher", **changes)


def test_shares_ascend_and_the_config_survives_json():
    space = Layers(parent="teacher", shares=(0.5, 0.25, 0.5), cost="params")
    assert space.shares == (0.25, 0.5)
    assert Layers.model_validate_json(space.model_dump_json()) == space
