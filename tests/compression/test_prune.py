"""Pruning: what is smaller, what stays, and that nothing leaks between two calls."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.errors import CompressionError
from compression.models import ModelSpec, build_model
from compression.search.prune import Prune, prune_model
from compression.search.units import kept_units
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


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random"])
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
    with pytest.raises(CompressionError, match=r"'ShuffleNetV2' has operations the dependency tracer cannot"):
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
