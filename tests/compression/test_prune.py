"""Pruning: what is smaller, what stays, and that nothing leaks between two calls."""

import inspect
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.errors import CompressionError
from compression.models import ModelSpec, build_model
from compression.search.prune import Prune, prune_model, survey_of
from compression.search.units import Coupled, Units, kept_counts, kept_units, ratio_levels, stages_of
from compression.types import Preprocessing
from compression.zoo import (
    DepthwiseCnn,
    Mixer,
    PlainCnn,
    ResidualCnn,
    TimmModel,
    TorchvisionModel,
    VisionTransformer,
)

CLASSES = 5
ZOO = {
    "residual": ResidualCnn(widths=(16, 32), depths=(1, 2), strides=(1, 2), stem_width=16),
    "plain": PlainCnn(widths=(16, 32), depths=(1, 2), strides=(1, 2), stem_width=16),
    "depthwise": DepthwiseCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16),
    "transformer": VisionTransformer(width=32, depth=2, num_heads=4, patch_size=4, stem_width=16),
    "mixer": Mixer(width=32, depth=2, patch_size=4, stem_width=16, token_hidden=32),
}


def spec_of(model, input_shape=(1, 16, 16)) -> ModelSpec:
    channels = input_shape[0]
    return ModelSpec(
        model=model,
        num_classes=CLASSES,
        input_shape=input_shape,
        class_names=tuple(f"class {i}" for i in range(CLASSES)),
        preprocessing=Preprocessing(scale=255.0, mean=(0.5,) * channels, std=(0.25,) * channels),
    )


def parent_of(model, input_shape=(1, 16, 16), seed=0) -> tuple[nn.Module, ModelSpec]:
    """A network with spread-out weights and batch-norm statistics, as after training."""
    spec = spec_of(model, input_shape)
    torch.manual_seed(seed)
    net = build_model(spec)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.2, 1.8)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval(), spec


def images_of(input_shape=(1, 16, 16), count=4) -> torch.Tensor:
    return torch.randn(count, *input_shape, generator=torch.Generator().manual_seed(1))


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    return images_of(count=20), torch.arange(20) % CLASSES


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(params=ZOO, scope="module")
def parent(request) -> tuple[nn.Module, ModelSpec]:
    return parent_of(ZOO[request.param])


def test_half_of_the_channels_leaves_a_smaller_working_network(parent):
    model, spec = parent
    pruned, new_spec = prune_model(model, spec, ratio=0.5)
    assert pruned(images_of()).shape == (4, CLASSES)
    assert profile.params(pruned) < 0.75 * profile.params(model)
    assert profile.macs(pruned, spec.input_shape) < 0.75 * profile.macs(model, spec.input_shape)
    assert new_spec.edits
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pruned.parameters())


def test_widths_that_changed_are_multiples_of_round_to(parent):
    model, spec = parent
    pruned, _ = prune_model(model, spec, ratio=0.4)
    before = dict(model.named_modules())
    for name, module in pruned.named_modules():
        for size in ("out_channels", "out_features", "in_channels", "in_features", "num_features"):
            now = getattr(module, size, None)
            if isinstance(now, int) and now != getattr(before[name], size):
                assert now % 8 == 0, (name, size, now)


def test_uniform_ratio_reaches_every_free_width_of_a_cnn():
    model, spec = parent_of(ZOO["residual"])
    pruned, _ = prune_model(model, spec, ratio=0.5)
    widths = {module.out_channels for module in pruned.modules() if isinstance(module, nn.Conv2d)}
    assert widths == {8, 16}


def test_classifier_keeps_its_outputs(parent):
    model, spec = parent
    pruned, _ = prune_model(model, spec, ratio=0.75)
    last = [module for module in pruned.modules() if isinstance(module, nn.Linear)][-1]
    assert last.out_features == CLASSES
    assert last.bias is not None


def test_spec_rebuilds_bit_for_bit(parent, tmp_path):
    model, spec = parent
    pruned, new_spec = prune_model(model, spec, ratio=0.5)
    save_checkpoint(pruned, new_spec, tmp_path / "pruned")
    again, spec_again = load_checkpoint(tmp_path / "pruned")
    assert spec_again == new_spec
    assert same_weights(pruned, again)
    assert torch.equal(pruned(images_of()), again(images_of()))


def test_ratio_zero_is_the_identity(parent):
    model, spec = parent
    same, same_spec = prune_model(model, spec, ratio=0.0)
    assert same is not model
    assert same_spec == spec
    assert same_weights(same, model)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random", "hessian"])
def test_one_seed_gives_one_result_and_leaves_the_parent_alone(parent, criterion):
    model, spec = parent
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"ratio": 0.5, "criterion": criterion, "calibration": calibration(), "seed": 3}
    first, first_spec = prune_model(model, spec, **settings)
    torch.manual_seed(99)
    second, second_spec = prune_model(model, spec, **settings)
    assert first_spec == second_spec
    assert same_weights(first, second)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_global_random_state_is_left_alone():
    model, spec = parent_of(ZOO["plain"])
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    prune_model(model, spec, ratio=0.5, criterion="random")
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parent_can_be_pruned_without_gradients_around():
    model, spec = parent_of(ZOO["plain"])
    model.requires_grad_(False)
    with torch.no_grad():
        pruned, _ = prune_model(model, spec, ratio=0.5, criterion="taylor", calibration=calibration())
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dead_channels_go_first_and_take_nothing_with_them():
    model, spec = parent_of(PlainCnn(widths=(16, 16), depths=(1, 1), strides=(1, 2), stem_width=16))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    dead = [torch.randperm(16, generator=torch.Generator().manual_seed(i))[:8] for i in range(len(convs))]
    with torch.no_grad():
        for conv, norm, gone in zip(convs, norms, dead, strict=True):
            conv.weight[gone] = 0
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor[gone] = 0
    pruned, _ = prune_model(model, spec, ratio=0.5)
    torch.testing.assert_close(pruned(images_of()), model(images_of()))
    assert {module.out_channels for module in pruned.modules() if isinstance(module, nn.Conv2d)} == {8}


def test_attention_loses_whole_heads_and_knows_it():
    model, spec = parent_of(ZOO["transformer"])
    pruned, new_spec = prune_model(model, spec, ratio=0.5)
    rebuilt = build_model(new_spec)
    for net in (pruned, rebuilt):
        for block in net.blocks:
            assert (block.attn.num_heads, block.attn.head_dim) == (2, 8)
            assert block.attn.qkv.out_features == 3 * 2 * 8
            assert block.attn.proj.in_features == 2 * 8
    assert [block.attn.num_heads for block in model.blocks] == [4, 4]


def library_defaults() -> list[int]:
    """Sizes of the dictionaries that torch-pruning shares between all pruners of a process."""
    import torch_pruning

    defaults = inspect.signature(torch_pruning.pruner.BasePruner.__init__).parameters.values()
    return [len(parameter.default) for parameter in defaults if isinstance(parameter.default, dict)]


def test_two_pruners_in_one_process_do_not_see_each_other():
    before = library_defaults()
    transformer, cnn = parent_of(ZOO["transformer"]), parent_of(ZOO["residual"])
    first = [prune_model(*transformer, ratio=0.5), prune_model(*cnn, ratio=0.5)]
    prune_model(*parent_of(ZOO["transformer"], seed=5), ratio=0.25)
    second = [prune_model(*transformer, ratio=0.5), prune_model(*cnn, ratio=0.5)]
    for (one, one_spec), (other, other_spec) in zip(first, second, strict=True):
        assert one_spec == other_spec
        assert same_weights(one, other)
    assert library_defaults() == before


def test_pruning_a_pruned_network_again():
    model, spec = parent_of(PlainCnn(widths=(32, 32), depths=(1, 1), strides=(1, 2), stem_width=32))
    once, once_spec = prune_model(model, spec, ratio=0.5)
    twice, twice_spec = prune_model(once, once_spec, ratio=0.5)
    assert {module.out_channels for module in twice.modules() if isinstance(module, nn.Conv2d)} == {8}
    assert twice_spec.edits[: len(once_spec.edits)] == once_spec.edits
    rebuilt = build_model(twice_spec)
    rebuilt.load_state_dict(twice.state_dict())


@pytest.mark.parametrize("name", ["regnetx_002", "vit_tiny_patch16_224"])
def test_timm_networks_with_grouped_convolutions_and_attention(name):
    shape = (3, 32, 32)
    model, spec = parent_of(TimmModel(name=name), shape)
    pruned, _ = prune_model(model, spec, ratio=0.34)
    assert profile.params(pruned) < 0.7 * profile.params(model)
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d):
            assert module.in_channels % module.groups == 0


def test_torchvision_network_with_inverted_residuals():
    shape = (3, 32, 32)
    model, spec = parent_of(TorchvisionModel(name="mobilenet_v2"), shape)
    pruned, _ = prune_model(model, spec, ratio=0.5)
    assert profile.params(pruned) < 0.45 * profile.params(model)


@given(units=st.integers(1, 512), ratio=st.floats(0, 0.99), step=st.integers(1, 32))
def test_kept_units_are_some_and_a_multiple(units, ratio, step):
    kept = kept_units(units, ratio, step)
    assert 1 <= kept <= units
    if ratio == 0.0 or units <= step:
        assert kept == units
    else:
        assert kept % step == 0
        assert abs(kept - units * (1 - ratio)) <= step


# ---------------------------------------------------------------- global ranking


def group_of(units: int, *, step: int = 1, channels: int = 1, name: str = "a", scores=None) -> Coupled:
    members = torch.arange(units * channels).view(units, channels)
    scores = torch.arange(1.0, units + 1) if scores is None else torch.tensor(scores)
    return Coupled(name, prune_model, Units(members, step), scores)


@st.composite
def layers(draw) -> list[Coupled]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        units = draw(st.integers(1, 40))
        scores = draw(st.lists(st.floats(0, 10, width=32), min_size=units, max_size=units))
        step, channels = draw(st.sampled_from((1, 2, 4, 8))), draw(st.integers(1, 3))
        found.append(group_of(units, step=step, channels=channels, name=str(number), scores=scores))
    return found


@given(groups=layers(), ratio=st.floats(0.01, 0.99), min_keep=st.floats(0, 0.9))
def test_global_ranking_keeps_whole_steps_and_the_least_share(groups, ratio, min_keep):
    kept = kept_counts(groups, ratio, ranking="global", min_keep=min_keep)
    for group in groups:
        count = kept[group.name]
        assert count == group.count or count % group.units.step == 0
        assert count >= min(group.count // group.units.step * group.units.step or group.count, min_keep * group.count)
        assert count >= 1
    tighter = kept_counts(groups, min(ratio + 0.2, 0.999), ranking="global", min_keep=min_keep)
    assert all(tighter[name] <= count for name, count in kept.items())


@given(groups=layers(), ranking=st.sampled_from(("per_layer", "global")))
def test_levels_are_the_outcomes_there_are_from_whole_to_smallest(groups, ranking):
    levels = ratio_levels(groups, ranking=ranking, min_keep=0.1)
    assert levels == sorted(levels)
    outcomes = [kept_counts(groups, level, ranking=ranking, min_keep=0.1) for level in levels]
    assert outcomes[0] == {group.name: group.count for group in groups}
    for before, after in pairwise(outcomes):
        assert before != after
        for group in groups:
            assert 0 <= before[group.name] - after[group.name] <= group.units.step
    for ratio in torch.linspace(0.003, 0.997, 50).tolist():
        assert kept_counts(groups, ratio, ranking=ranking, min_keep=0.1) in outcomes


def test_global_ranking_divides_scores_by_the_mean_of_their_layer():
    """Absolute sizes say nothing; a layer of a few large scores and many small ones loses most."""
    even = group_of(8, name="even", scores=[1e-3] * 8)
    uneven = group_of(8, name="uneven", scores=[1.0] * 6 + [1000.0] * 2)
    assert kept_counts([even, uneven], 0.25, ranking="global") == {"even": 8, "uneven": 4}
    assert kept_counts([even, uneven], 0.375, ranking="global", min_keep=0.5) == {"even": 6, "uneven": 4}
    assert kept_counts([even, uneven], 0.25) == {"even": 6, "uneven": 6}


def test_what_was_cut_before_counts():
    now = group_of(24, step=8)
    assert kept_counts([now], 0.5, whole={"a": 32}) == {"a": 16}
    assert kept_counts([now], 0.25, whole={"a": 32}) == {"a": 24}
    assert kept_counts([now], 0.5, ranking="global", whole={"a": 32}) == {"a": 16}
    assert kept_counts([now], 0.1, ranking="global", whole={"a": 32}) == {"a": 24}
    assert ratio_levels([now], ranking="global", whole={"a": 32}) == [0.0, 0.5, 0.75]


def test_global_ranking_takes_from_layers_what_they_do_not_need(parent):
    model, spec = parent
    pruned, new_spec = prune_model(model, spec, ratio=0.5, round_to=2, ranking="global", min_keep=0.25)
    survey, after = survey_of(model, spec, round_to=2).usable(), survey_of(pruned, new_spec, round_to=2)
    left = {group.name: group for group in after.groups}
    shares = {group.name: left[group.name].count / group.count for group in survey.groups}
    assert all(share >= 0.25 for share in shares.values())
    assert len({share for share in shares.values() if share < 1}) > 1, "the share differs by layer"
    assert all(group.channels == left[group.name].channels for group in survey.groups)
    can_go = [group for group in survey.groups if group.can_shrink]
    total = sum(group.count * group.channels for group in can_go)
    remaining = sum(left[group.name].count * group.channels for group in can_go)
    assert abs(remaining - total / 2) <= 8
    assert pruned(images_of()).shape == (4, CLASSES)


# ---------------------------------------------------------------- parts of a network of tokens


def test_a_transformer_loses_only_what_may_be_cut():
    model, spec = parent_of(ZOO["transformer"])

    def sizes(**parts: bool) -> tuple[int, int, int, int]:
        names = tuple(part for part in ("heads", "mlp", "embedding") if parts.get(part))
        net, _ = prune_model(model, spec, ratio=0.5, parts=names)
        block = net.blocks[0]
        return (
            block.attn.num_heads,
            block.mlp[0].out_features,
            net.head.in_features,
            net.tokens.layers[0][0].out_channels,
        )

    hidden = model.blocks[0].mlp[0].out_features
    assert sizes(heads=True) == (2, hidden, 32, 16)
    assert sizes(mlp=True) == (4, hidden // 2, 32, 16)
    assert sizes(embedding=True) == (4, hidden, 16, 8)
    assert sizes(heads=True, mlp=True, embedding=True) == (2, hidden // 2, 16, 8)
    with pytest.raises(CompressionError, match="has only embedding, heads, mlp to cut, expected one of channels"):
        prune_model(model, spec, ratio=0.5, parts=("channels",))


def test_stages_are_resolutions_or_the_three_widths_of_tokens():
    for name, expected in (
        ("residual", {"channels"}),
        ("transformer", {"heads", "mlp", "embedding"}),
        ("mixer", {"mlp", "embedding"}),
    ):
        groups = {group.name: group for group in survey_of(*parent_of(ZOO[name])).usable().groups}
        stages = stages_of(list(groups.values()))
        assert {groups[each].part for each in stages} == expected
        keys = {
            (number, groups[each].area if name == "residual" else groups[each].part) for each, number in stages.items()
        }
        assert len(keys) == max(stages.values()) + 1, "a stage is one resolution, or one kind of width"
    residual = survey_of(*parent_of(ZOO["residual"]))
    assert {stages_of(residual.groups)[group.name]: group.area for group in residual.groups} == {0: 256, 1: 64}


# ---------------------------------------------------------------- what cannot be traced


class Shuffle(nn.Module):
    """Mixes two halves of the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


class Inner(nn.Module):
    """A layer whose forward returns what the tracer cannot read, and the caller can."""

    def __init__(self, broken: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.broken(self.conv(x))
        return found if isinstance(found, torch.Tensor) else found[0][0]


class StrangeNorm(nn.BatchNorm2d):
    """Counts as a batch norm and returns a list, which the tracer takes for a tensor."""

    def forward(self, x: torch.Tensor) -> list[list[torch.Tensor]]:
        return [[super().forward(x)]]


def strange(broken: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = nn.ModuleList([Inner(nn.Identity()), Inner(broken)])
        net = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.Sequential(*blocks), nn.Flatten(), nn.Linear(16 * 49, CLASSES))
    return net.eval()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (StrangeNorm(16), r"cannot follow in module '1\.1\.broken' of type StrangeNorm"),
        (Shuffle(), r"cannot follow behind module '1\.1\.conv' \(a reshape gives"),
    ],
    ids=["output", "reshape"],
)
def test_what_the_tracer_cannot_follow_is_refused_by_the_name_of_the_module(broken, message):
    with pytest.raises(CompressionError, match=message):
        prune_model(strange(broken), spec_of(ZOO["plain"]), ratio=0.5)


def test_a_network_without_gradients_is_refused_by_the_name_of_where_they_end():
    net = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.ReLU(), Detached(), nn.Flatten(), nn.Linear(16 * 49, CLASSES))
    with pytest.raises(CompressionError, match="none can be ranked .no gradient passes module '2'"):
        prune_model(net.eval(), spec_of(ZOO["plain"]), ratio=0.5)


def test_layers_the_tracer_does_not_see_stay_and_are_named(caplog):
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2), Detached(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(16 * 25, CLASSES),
    )
    with caplog.at_level("WARNING", logger="compression.search.units"):
        survey = survey_of(net.eval(), spec_of(ZOO["plain"]))
    assert [group.name for group in survey.groups] == ["2"]
    assert "the channels of 0 stay" in caplog.text


def test_errors_name_the_value_and_the_way_out():
    model, spec = parent_of(ZOO["plain"])
    with pytest.raises(CompressionError, match=r"'1\.0'.*0 <= ratio < 1"):
        prune_model(model, spec, ratio=1.0)
    with pytest.raises(CompressionError, match=r"'taylor' has no calibration images.*magnitude"):
        prune_model(model, spec, ratio=0.5, criterion="taylor")


def test_ratios_are_sorted_and_said_once():
    assert Prune(parent="teacher", ratios=(0.5, 0.25, 0.5)).ratios == (0.25, 0.5)
    with pytest.raises(ValueError, match="less than 1"):
        Prune(parent="teacher", ratios=(1.0,))


def test_a_network_the_tracer_cannot_follow_is_refused_by_name():
    model, spec = parent_of(TorchvisionModel(name="shufflenet_v2_x0_5"), (3, 32, 32))
    with pytest.raises(
        CompressionError, match=r"'ShuffleNetV2' has operations the dependency tracer cannot follow in module 'stage2"
    ):
        prune_model(model, spec, ratio=0.5)


def test_widths_shared_between_positions_and_channels_stay(caplog):
    """A mixer's token width meets layers over positions; only what is inside its MLPs can be cut."""
    base = Mixer(width=16, depth=1, patch_size=4, stem_width=16, token_hidden=32)  # 16 tokens of width 16
    model, spec = parent_of(base)
    with caplog.at_level("WARNING", logger="compression.search.prune"):
        pruned, _ = prune_model(model, spec, ratio=0.5)
    assert pruned.head.in_features == 16
    assert pruned.blocks[0].over_tokens[0].out_features == 16
    assert "cutting them breaks the model" in caplog.text
