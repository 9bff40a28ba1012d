"""A group is the sum of its members, scales, prunes and exports as one network, and lets easy samples leave early."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from compression import profile
from compression.features import penultimate
from compression.models import ModelSpec
from compression.search.prune import prune_model
from compression.types import Preprocessing
from compression.zoo.depthwise_cnn import DepthwiseCnn
from compression.zoo.group import Group, GroupNet, early_exit
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn

SHAPE = (1, 8, 8)
MEMBERS = (
    PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8),
    DepthwiseCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8),
    ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(2, 2), stem_width=8),
)
GROUP = Group(members=MEMBERS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def confident(scale: float) -> GroupNet:
    """A group in inference mode whose logits are as large as asked for."""
    model = GROUP.build(4, SHAPE).eval()
    for member in model.members:
        torch.nn.init.normal_(member.head.weight, std=scale)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_the_sum_of_the_members(training):
    model = GROUP.build(4, SHAPE).train(training)
    expected = torch.stack([member(images()) for member in model.members]).sum(dim=0)
    torch.testing.assert_close(model(images()), expected)


def test_every_member_learns_and_the_features_are_the_last_ones():
    model = GROUP.build(4, SHAPE)
    logits, features = penultimate(model, images())
    assert features.shape == (6, 16)
    torch.nn.functional.cross_entropy(logits, torch.arange(6) % 4).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_scaled_scales_every_member():
    scaled = GROUP.scaled(width=2.0, depth_delta=1, round_to=4)
    assert scaled.members == tuple(member.scaled(width=2.0, depth_delta=1, round_to=4) for member in MEMBERS)
    assert GROUP.scaled() == GROUP
    assert scaled.build(3, SHAPE)(images()).shape == (6, 3)


def test_costs_what_its_members_cost():
    alone = [member.build(4, SHAPE) for member in MEMBERS]
    model = GROUP.build(4, SHAPE)
    assert profile.params(model) == sum(map(profile.params, alone))
    assert profile.macs(model, SHAPE) == sum(profile.macs(member, SHAPE) for member in alone)


def test_a_written_group_is_read_back_and_its_members_keep_their_kind():
    read = TypeAdapter(Group).validate_json(GROUP.model_dump_json())
    assert read == GROUP
    assert [type(member) for member in read.members] == [PlainCnn, DepthwiseCnn, ResidualCnn]


def test_default_runs_the_cheapest_member_first():
    model = Group().build(4, SHAPE)
    macs = [profile.macs(member, SHAPE) for member in model.members]
    assert macs == sorted(macs)
    assert len(set(macs)) == len(macs)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ((MEMBERS[0],), "at least 2"),
        (MEMBERS[:1] * 9, "at most 8"),
        (({"kind": "mixer"}, {"kind": "plain_cnn"}), "should be 'depthwise_cnn'"),
        (({"kind": "plain_cnn", "kernel": 4}, {"kind": "plain_cnn"}), "odd"),
    ],
)
def test_wrong_members_are_refused(members, said):
    with pytest.raises(ValidationError, match=said):
        Group(members=members)


def test_exports_with_a_dynamic_batch():
    model = GROUP.build(4, SHAPE).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images(5)), model(images(5)))


def test_is_pruned_as_one_network():
    model = Group(members=(MEMBERS[0], MEMBERS[2])).scaled(width=2.0).build(4, SHAPE).eval()
    spec = ModelSpec(
        model=Group(members=(MEMBERS[0], MEMBERS[2])).scaled(width=2.0),
        num_classes=4,
        input_shape=SHAPE,
        class_names=("a", "b", "c", "d"),
        preprocessing=Preprocessing(scale=255.0, mean=(0.5,), std=(0.5,)),
    )
    pruned, _ = prune_model(model, spec, ratio=0.5)
    assert isinstance(pruned, GroupNet)
    assert pruned(images()).shape == (6, 4)
    for before, after in zip(model.members, pruned.members, strict=True):
        assert profile.macs(after, SHAPE) < profile.macs(before, SHAPE)


# ---------------------------------------------------------------- early exit


@pytest.mark.parametrize(("threshold", "members"), [(0.0, 1), (1.0, 3)])
def test_thresholds_at_the_ends_use_the_first_member_or_all(threshold, members):
    model = confident(0.1)
    logits, used = early_exit(model, images(), threshold)
    assert used.dtype == torch.int64
    assert used.tolist() == [members] * 6
    expected = torch.stack([member(images()) for member in model.members[:members]]).sum(dim=0)
    torch.testing.assert_close(logits, expected.detach())


def test_each_sample_leaves_after_the_first_sum_that_is_sure_enough():
    model, threshold = confident(20.0), 0.9
    logits, used = early_exit(model, images(64), threshold)
    running = torch.stack([member(images(64)) for member in model.members]).cumsum(dim=0).detach()
    sure = running.softmax(dim=-1).amax(dim=-1) > threshold
    sure[-1] = True
    first = sure.int().argmax(dim=0)
    assert used.tolist() == (first + 1).tolist()
    assert set(used.tolist()) == {1, 2, 3}
    torch.testing.assert_close(logits, running[first, torch.arange(64)])


def test_members_run_on_the_samples_that_are_left_alone():
    model, seen = confident(20.0), []
    for member in model.members:
        member.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    _, used = early_exit(model, images(64), 0.9)
    assert seen == [int((used > number).sum()) for number in range(3)]
    assert seen[0] > seen[1] > seen[2] > 0


def test_members_that_nobody_needs_do_not_run():
    model = confident(20.0)
    model.members[1].register_forward_hook(lambda *_: pytest.fail("nobody was left"))
    assert early_exit(model, images(), 0.0)[1].tolist() == [1] * 6


def test_gives_back_mode_and_statistics():
    model = GROUP.build(4, SHAPE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, _ = early_exit(model, images(), 0.5)
    assert not logits.requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
