"""N2N: the space of removed blocks and narrowed stages, the reward, and a policy that learns from rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.errors import CheckpointError, CompressionError
from compression.models import ModelSpec, build_model
from compression.search import Scale
from compression.search.samplers import Situation
from compression.search.samplers.n2n import (
    INVALID,
    Episode,
    Learner,
    N2n,
    Policy,
    load_policy,
    removal_episode,
    reward,
    rewards,
    save_policy,
    shrinkage_episode,
)
from compression.search.shrink import Layer, Shrink
from compression.search.space import Workshop
from compression.search.trials import TrialResult
from compression.zoo import PlainCnn, ResidualCnn
from tests.compression.test_study import config_of, dataset_of, search, teacher_of

NETS = {
    "teacher": ResidualCnn(widths=(16, 32), depths=(2, 2), strides=(1, 2), stem_width=16),
    "deep": PlainCnn(widths=(16,), depths=(5,), strides=(2,), stem_width=16),
}
SHRINK = Shrink(parent="teacher", widths=(0.5, 0.75, 1.0))
DEEP = Shrink(parent="deep", widths=SHRINK.widths)
SHARES = torch.tensor(SHRINK.widths)


def net_of(config, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    spec = teacher_of()[1].model_copy(update={"model": config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(spec).eval(), spec


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Workshop:
    """Both parents, looked at once."""
    parents = {name: net_of(config) for name, config in NETS.items()}
    shop = Workshop(parents, dataset_of(), 0, tmp_path_factory.mktemp("shop"))
    SHRINK.genes(shop)
    DEEP.genes(shop)
    return shop


@pytest.fixture
def shop(plans, tmp_path) -> Workshop:
    known = {key: value for key, value in plans.memory.items() if "shrink" in key}
    return replace(plans, folder=tmp_path / "shop", memory=known)


def choices_of(space: Shrink, shop: Workshop, **changes):
    return {gene: values[-1] for gene, values in space.genes(shop).items()} | changes


# --- the space


def test_every_removable_block_and_every_stage_is_a_gene(shop):
    widths = SHRINK.widths
    expected = {"keep_0": (0, 1), "keep_1": (0, 1), "keep_2": (0, 1), "width_0": widths, "width_1": widths}
    assert SHRINK.genes(shop) == expected
    assert list(DEEP.genes(shop)) == ["keep_0", "keep_1", "keep_2", "keep_3", "width_0", "width_1"]
    layers = SHRINK.layers(shop)
    assert [layer.block for layer in layers] == [None, 0, 0, 1, 1, None, None, None, 2, 2, None]
    assert [layer.stage for layer in layers] == [0] * 5 + [1] * 5 + [None]
    assert layers[-1] == Layer("linear", 1, 1, 3, 0)
    assert layers[5] == Layer("conv", 3, 2, 32, 1, stage=1)


def test_a_removed_block_is_an_identity_and_the_rest_keeps_its_weights(shop):
    parent, _ = shop.parent("teacher")
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    model, spec = SHRINK.build(choices_of(SHRINK, shop, keep_1=0), shop)
    images = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = parent.blocks[0](parent.stem(images))
        expected = parent.head(parent.blocks[3](parent.blocks[2](x)).mean((2, 3)))
        assert torch.equal(model(images), expected)
    assert not any(name.startswith("blocks.1.") for name in model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_taken_away_is_a_copy_of_the_teacher(shop):
    parent, spec = shop.parent("teacher")
    model, same = SHRINK.build(choices_of(SHRINK, shop), shop)
    assert same == spec
    assert model is not parent
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in parent.state_dict().items())


def test_each_stage_has_the_width_that_was_chosen(shop):
    model, _ = SHRINK.build(choices_of(SHRINK, shop, keep_0=0, width_0=0.5), shop)
    assert model.stem[0].out_channels == 8
    assert model.head.in_features == 32
    model, _ = SHRINK.build(choices_of(SHRINK, shop, width_1=0.75), shop)
    assert model.stem[0].out_channels == 16
    assert model.head.in_features == 24


def test_channels_worth_nothing_go_first(shop):
    parent, spec = net_of(NETS["deep"], seed=1)
    dead = torch.arange(16) % 2 == 0
    convs = [module for module in parent.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for conv in convs:
            conv.weight[dead] = 0.0
            if conv is not convs[0]:
                conv.weight[:, dead] = 0.0
        parent.head.weight[:, dead] = 0.0
        for norm in (module for module in parent.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight[dead] = 0.0
    own = replace(shop, parents={"deep": (parent, spec)}, memory={})
    halves = dict.fromkeys(("width_0", "width_1"), 0.5)
    model, _ = DEEP.build(choices_of(DEEP, own, keep_2=0, **halves), own)
    whole, _ = DEEP.build(choices_of(DEEP, own, keep_2=0), own)
    images = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    assert profile.params(model) < 0.3 * profile.params(whole)
    assert torch.allclose(model(images), whole(images), atol=1e-5)


@pytest.fixture(scope="module")
def smaller(plans) -> tuple[nn.Module, ModelSpec]:
    return SHRINK.build(choices_of(SHRINK, plans, keep_0=0, width_0=0.5, width_1=0.75), plans)


def test_equal_choices_give_equal_bits_and_reload(shop, smaller, tmp_path):
    model, spec = smaller
    choices = choices_of(SHRINK, shop, keep_0=0, width_0=0.5, width_1=0.75)
    again, again_spec = SHRINK.build(choices, replace(shop, seed=1, memory={}))
    assert again_spec == spec
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    save_checkpoint(model, spec, tmp_path / "kept")
    loaded, _ = load_checkpoint(tmp_path / "kept")
    images = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("fast", [True, False])
def test_exports_with_parity(smaller, tmp_path, fast):
    import onnxruntime

    from export.onnx_graph import to_onnx

    model, spec = smaller
    to_onnx(model, tmp_path / "m.onnx", input_shape=spec.input_shape, metadata={}, fast=fast)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, *spec.input_shape, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.abs(found - model(images).detach().numpy()).max() < 1e-4


def test_impossible_candidates_and_settings_are_refused(shop):
    with pytest.raises(CompressionError, match="no choice of keep_1, keep_2, width_0, width_1"):
        SHRINK.build({"keep_0": 1}, shop)
    with pytest.raises(CompressionError, match="parent 'nobody', expected one of deep, teacher"):
        Shrink(parent="nobody").genes(shop)
    with pytest.raises(ValidationError, match=r"widths are 0.5, expected 1 among them"):
        Shrink(parent="teacher", widths=(0.5,))
    bare = PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8)
    with pytest.raises(CompressionError, match=r"no removable block and no layer wider than round_to 8"):
        Shrink(parent="bare").genes(replace(shop, parents={"bare": net_of(bare)}))


# --- the reward


def test_reward_of_the_corners():
    assert reward(0.9, 0.9, 0.0) == 0.0
    assert reward(0.9, 0.9, 1.0) == 1.0
    assert reward(0.9, 0.9, 0.5) == 0.75


share = st.floats(0.0, 1.0)


@settings(max_examples=50)
@given(share, share, share, st.floats(0.1, 1.0))
def test_reward_is_concave_and_monotone(low, high, accuracy, teacher):
    low, high = min(low, high), max(low, high)
    at_low, at_high = reward(accuracy, teacher, low), reward(accuracy, teacher, high)
    assert at_low <= at_high + 1e-12
    assert reward(accuracy, teacher, (low + high) / 2) >= (at_low + at_high) / 2 - 1e-12
    assert reward(low, teacher, accuracy) <= reward(high, teacher, accuracy)


def row_of(number: int, choices, state="complete", *, accuracy=None, params=None, space="shrink-teacher", **changes):
    return TrialResult(number, space, choices, state, accuracy=accuracy, params=params, **changes)


def test_rewards_of_rows(shop):
    whole = profile.params(shop.parent("teacher")[0])
    a, b, c = ({"keep_0": value} for value in (0, 1, 2))
    rows = [
        row_of(0, a, accuracy=0.5, params=whole // 2, digest="x"),
        row_of(1, b, "failed"),
        row_of(2, b, "infeasible", params=10),
        row_of(3, c, accuracy=0.9, params=whole),
        row_of(4, a, "duplicate"),
        row_of(5, c, "duplicate", digest="x"),
        row_of(6, c, "filtered", params=10),
        row_of(7, c, "stopped", params=whole // 2, curve=(0.1, 0.5)),
    ]
    found = rewards(rows, {"shrink-teacher": SHRINK}, shop)
    assert found[0] > 0.0
    assert found[4] == found[0]
    assert found[7] == found[0]
    assert found[1] == found[2] == found[3] == INVALID
    assert found[5] == INVALID, "the same choices come before the same weights"
    assert 6 not in found
    assert (shop.folder / "n2n" / "teachers.json").is_file()


# --- the policy


def policy_of(seed: int = 0) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(SHRINK.widths)


def test_log_probability_counts_the_free_layers_only(shop):
    policy, layers = policy_of(), SHRINK.layers(shop)
    choices = choices_of(SHRINK, shop, keep_1=0, width_0=0.5)
    removal = removal_episode(layers, choices)
    assert removal.free == (1, 3, 8)
    assert removal.actions == (1, 0, 1)
    table = policy.log_probs(removal)
    assert torch.allclose(table.exp().sum(1), torch.ones(len(layers)))
    assert torch.equal(policy.log_prob(removal), table[1, 1] + table[3, 0] + table[8, 1])
    shrinkage = shrinkage_episode(layers, choices, SHRINK.widths, choices)
    assert len(shrinkage.layers) == len(layers) - 2, "layers of the removed block are gone"
    assert shrinkage.free == (0, 3)
    assert shrinkage.actions == (0, 2)
    table = policy.log_probs(shrinkage)
    assert torch.equal(policy.log_prob(shrinkage), table[0, 0] + table[3, 2])


def test_shrinkage_sees_what_was_chosen_before_and_nothing_later(shop):
    policy, layers, keeps = policy_of(), SHRINK.layers(shop), choices_of(SHRINK, shop)
    first, other = (
        policy.log_probs(shrinkage_episode(layers, keeps, SHRINK.widths, keeps | {"width_0": width}))
        for width in (0.5, 1.0)
    )
    assert torch.equal(first[0], other[0])
    assert not torch.allclose(first[5], other[5])


@pytest.mark.parametrize("phase", ["removal", "shrinkage"])
def test_what_is_rewarded_becomes_likelier(shop, phase):
    layers, choices = SHRINK.layers(shop), choices_of(SHRINK, shop, keep_0=0, keep_1=0, width_1=0.5)
    episode = removal_episode(layers, choices)
    if phase == "shrinkage":
        episode = shrinkage_episode(layers, choices, SHRINK.widths, choices)
    for gained, direction in ((1.0, 1), (-1.0, -1)):
        learner = Learner(policy_of(), rollouts=2, learning_rate=0.01)
        before = learner.policy.log_prob(episode).item()
        learner.learn(episode, gained)
        assert learner.policy.log_prob(episode).item() == before, "a step needs two roll-outs"
        learner.learn(episode, gained)
        assert (learner.policy.log_prob(episode).item() - before) * direction > 0


def test_rewards_like_those_before_teach_nothing(shop):
    episode = removal_episode(SHRINK.layers(shop), choices_of(SHRINK, shop))
    learner = Learner(policy_of(), rollouts=1, learning_rate=0.1)
    before = policy_of().state_dict()
    learner.learn(episode, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in learner.policy.state_dict().items())


# --- the sampler


def situation_of(shop: Workshop, rows=(), *, spaces=(SHRINK,), seed: int = 0) -> Situation:
    named = {space.label: space for space in spaces}
    genes = {label: space.genes(shop) for label, space in named.items()}
    return Situation(named, genes, rows, len(rows), seed, shop)


def proposals(sampler: N2n, shop: Workshop, count: int, *, accuracy=lambda choices: 0.5) -> list[TrialResult]:
    """The rows of a study whose candidates have made-up sizes and accuracies; each forgets the process before."""
    rows: list[TrialResult] = []
    whole = profile.params(shop.parent("teacher")[0])
    for number in range(count):
        label, choices = sampler.propose(situation_of(shop, rows, seed=number))
        kept = (1 + sum(value for value in choices.values())) / (1 + len(choices))
        rows.append(row_of(number, choices, accuracy=accuracy(choices), params=int(whole * kept), space=label))
    return rows


def test_first_blocks_go_then_the_best_removal_is_shrunk(shop):
    sampler = N2n(removal_trials=4)
    rows = proposals(sampler, shop, 8, accuracy=lambda choices: 0.9 if choices["keep_1"] == 0 else 0.1)
    removals, shrunk = rows[:4], rows[4:]
    assert all(row.choices["width_0"] == row.choices["width_1"] == 1.0 for row in removals)
    gained = rewards(rows, {"shrink-teacher": SHRINK}, shop)
    best = max(removals, key=lambda row: gained[row.number]).choices
    for row in shrunk:
        assert (row.choices["width_0"], row.choices["width_1"]) != (1.0, 1.0)
        assert [row.choices[f"keep_{block}"] for block in range(3)] == [best[f"keep_{block}"] for block in range(3)]
    keys = [str(sorted(row.choices.items())) for row in rows]
    assert len(keys) == len(set(keys))
    assert str(sorted(choices_of(SHRINK, shop).items())) not in keys, "the teacher itself is no candidate"


def test_a_policy_is_what_its_rows_make_it(shop):
    """Learning row by row and replaying all rows at once give the same bits, and so the same proposals."""
    sampler = N2n(removal_trials=4, rollouts=2)
    state = torch.get_rng_state()
    rows = proposals(sampler, shop, 7)
    situation = situation_of(shop, rows, seed=7)
    last = sampler.propose(situation)
    kept = load_policy(shop.folder / "n2n" / "policy.safetensors", SHRINK.widths).state_dict()
    fresh = replace(shop, folder=shop.folder / "again", memory={k: v for k, v in shop.memory.items() if "shrink" in k})
    assert sampler.propose(replace(situation, shop=fresh)) == last
    again = load_policy(fresh.folder / "n2n" / "policy.safetensors", SHRINK.widths).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    assert not all(torch.equal(value, policy_of().state_dict()[name]) for name, value in kept.items()), "it learnt"
    assert torch.equal(torch.get_rng_state(), state)


def test_other_rows_than_before_are_replayed_from_the_start(shop):
    sampler = N2n(rollouts=1)
    rows = proposals(sampler, shop, 3)
    sampler.propose(situation_of(shop, [replace(rows[0], accuracy=0.1), *rows[1:]]))
    changed = load_policy(shop.folder / "n2n" / "policy.safetensors", SHRINK.widths).state_dict()
    sampler.propose(situation_of(shop, rows))
    found = load_policy(shop.folder / "n2n" / "policy.safetensors", SHRINK.widths).state_dict()
    assert not all(torch.equal(value, changed[name]) for name, value in found.items())


def test_other_seeds_propose_otherwise(shop):
    sampler = N2n()
    assert len({str(sampler.propose(situation_of(shop, seed=seed))) for seed in range(10)}) > 1


def test_spaces_take_turns(shop):
    sampler, rows = N2n(), []
    for number in range(4):
        label, choices = sampler.propose(situation_of(shop, rows, spaces=(SHRINK, DEEP), seed=number))
        rows.append(row_of(number, choices, "failed", space=label))
    assert [row.space for row in rows] == ["shrink-teacher", "shrink-deep"] * 2


def test_a_policy_learnt_on_one_teacher_removes_more_of_a_deeper_one(shop):
    whole = profile.params(shop.parent("teacher")[0])
    rows = []
    for number in range(24):  # roll-outs of three: without blocks all is well, with them nothing
        removed = number // 3 % 2 == 0
        choices = choices_of(SHRINK, shop, **{f"keep_{block}": int(not removed) for block in range(3)})
        rows.append(row_of(number, choices, accuracy=0.9 if removed else 0.1, params=int(whole * 0.5)))
    sampler = N2n(rollouts=3, learning_rate=0.03)
    sampler.propose(situation_of(shop, rows))
    learnt = shop.folder / "n2n" / "policy.safetensors"
    other = replace(shop, folder=shop.folder / "deep")

    def removed_by(sampler: N2n) -> float:
        found = [sampler.propose(situation_of(other, spaces=(DEEP,), seed=seed))[1] for seed in range(12)]
        return sum(choices[f"keep_{block}"] == 0 for choices in found for block in range(4)) / len(found)

    assert removed_by(N2n(policy=learnt)) > removed_by(N2n()) + 1.0


def test_policies_that_do_not_fit_are_refused(shop, tmp_path):
    save_policy(Policy((0.3, 1.0)), tmp_path / "policy.safetensors")
    with pytest.raises(CompressionError, match=r"multipliers \[0.3, 1.0\], expected \[0.5, 0.75, 1.0\]"):
        N2n(policy=tmp_path / "policy.safetensors").propose(situation_of(shop))
    with pytest.raises(CheckpointError, match="no file there"):
        N2n(policy=tmp_path / "absent.safetensors").propose(situation_of(shop))


def test_spaces_that_do_not_fit_are_refused(shop):
    with pytest.raises(CompressionError, match="expected one of kind 'shrink' at least"):
        N2n().propose(situation_of(shop, spaces=(Scale(base=NETS["deep"]),)))
    with pytest.raises(CompressionError, match="with different widths"):
        N2n().propose(situation_of(shop, spaces=(SHRINK, Shrink(parent="deep", widths=(0.5, 1.0)))))


def test_an_episode_without_decisions_teaches_nothing():
    learner = Learner(policy_of(), rollouts=1, learning_rate=0.1)
    learner.learn(Episode("removal", torch.zeros(2, 5), ()), 1.0)
    assert all(
        torch.equal(value, policy_of().state_dict()[name]) for name, value in learner.policy.state_dict().items()
    )


def test_a_study_by_the_policy(tmp_path):
    sampler = N2n(removal_trials=2, rollouts=1)
    config = config_of(spaces=(SHRINK,), trials=5, max_macs_share=0.95, sampler=sampler)
    parents = {"teacher": net_of(NETS["teacher"])}
    result = search(tmp_path, config, parents=parents, best_teacher="teacher")
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert len(complete) == 5
    own = [trial.choices for trial in result.trials[1:]]
    assert own[0]["width_0"] == own[0]["width_1"] == 1.0
    assert own[-1]["width_0"] * own[-1]["width_1"] < 1.0
    assert (tmp_path / "trials" / "shop" / "n2n" / "policy.safetensors").is_file()
    model, spec = load_checkpoint(result.finalists[0])
    assert profile.macs(model, spec.input_shape) == result.chosen[0].macs
