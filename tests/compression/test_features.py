"""Hooks give what the network computed, and are gone afterwards."""

import pytest
import torch
from torch import nn

from compression.errors import ShapeError
from compression.features import captured, frozen, image_of, looked_at, penultimate, stage_names, tokens_of
from compression.zoo import (
    DepthwiseCnn,
    Mixer,
    PlainCnn,
    ResidualCnn,
    TimmModel,
    TorchvisionModel,
    VisionTransformer,
)

SMALL_NET = ResidualCnn(widths=(8, 12), depths=(1, 1), strides=(1, 2), stem_width=8)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_captured_equals_running_the_parts():
    model = SMALL_NET.build(3, (1, 8, 8)).eval()
    images = torch.randn(2, 1, 8, 8)
    with captured(model, ["stem", "blocks.0"]) as features:
        assert features == {}
        model(images)
    torch.testing.assert_close(features["stem"], model.stem(images))
    torch.testing.assert_close(features["blocks.0"], model.blocks[0](model.stem(images)))
    assert hooks(model) == 0


def test_captured_features_carry_gradients_and_the_latest_call_wins():
    model = SMALL_NET.build(3, (1, 8, 8))
    with captured(model, ["stem"]) as features:
        model(torch.randn(4, 1, 8, 8))
        model(torch.randn(2, 1, 8, 8))
    assert features["stem"].shape[0] == 2
    features["stem"].sum().backward()
    assert model.stem[0].weight.grad is not None


def test_captured_leaves_no_hook_after_an_error():
    model = SMALL_NET.build(3, (1, 8, 8))
    with pytest.raises(RuntimeError), captured(model, ["stem", "blocks"]):
        model(torch.randn(2, 5, 8, 8))
    assert hooks(model) == 0


def test_captured_names_a_missing_submodule_before_running():
    model = SMALL_NET.build(3, (1, 8, 8))
    with pytest.raises(ShapeError, match="blocks.9"), captured(model, ["stem", "blocks.9"]):
        pytest.fail("the block must not run")
    assert hooks(model) == 0


def test_frozen_gives_back_every_mode_and_flag():
    model = SMALL_NET.build(3, (1, 8, 8)).train()
    model.stem.eval()
    model.head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    statistics = model.blocks[0].first[1].running_mean.clone()
    with pytest.raises(KeyError), frozen(model) as teacher:
        assert not any(module.training for module in teacher.modules())
        assert not teacher(torch.randn(2, 1, 8, 8)).requires_grad
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model.blocks[0].first[1].running_mean, statistics)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (SMALL_NET, 12),
        (PlainCnn(), 128),
        (DepthwiseCnn(), 64),
        (VisionTransformer(width=32, depth=1), 32),
        (Mixer(width=32, depth=1), 32),
        (TimmModel(name="resnet18"), 512),
        (TimmModel(name="test_vit"), 64),
        (TorchvisionModel(name="mobilenet_v3_small"), 1024),
        (TorchvisionModel(name="squeezenet1_1"), 512),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "kind", None)),
)
def test_penultimate_gives_the_classifier_its_input(config, width):
    shape = (1, 32, 32)
    model = config.build(5, shape).eval()
    images = torch.randn(3, *shape)
    logits, features = penultimate(model, images)
    assert features.shape == (3, width)
    assert features.dtype == torch.float32
    torch.testing.assert_close(logits, model(images))
    assert hooks(model) == 0
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if config.kind == "residual_cnn":
        torch.testing.assert_close(head[-1](features), logits)


def test_penultimate_of_a_net_without_a_classifier_is_refused():
    with pytest.raises(ShapeError, match="no linear layer"):
        penultimate(nn.Flatten(), torch.randn(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (SMALL_NET, ["blocks.0", "blocks.1"]),
        (ResidualCnn(widths=(8, 8, 8), strides=(2, 2, 1)), ["stem.2", "blocks.0", "blocks.2"]),
        (VisionTransformer(width=16, depth=2, num_heads=2, patch_size=2), ["tokens", "blocks.0", "blocks.1", "norm"]),
        (VisionTransformer(width=16, depth=6, num_heads=2), ["blocks.0", "blocks.2", "blocks.4", "norm"]),
    ],
)
def test_stages_are_the_last_outputs_before_each_change_of_resolution(config, stages):
    model = config.build(3, (1, 8, 8)).train()
    images = torch.randn(2, 1, 8, 8)
    assert list(stage_names(model, images)) == stages
    assert model.training
    outputs = looked_at(model.eval(), images, features=True, stages=stages)
    assert [len(each) for each in outputs.maps] == [2] * len(stages)
    torch.testing.assert_close(outputs.logits, model(images))
    torch.testing.assert_close(outputs.features["penultimate"], penultimate(model, images)[1])
    assert hooks(model) == 0


def test_stages_of_networks_from_elsewhere_leave_out_global_means_and_follow_the_last_tokens():
    images = torch.randn(1, 3, 32, 32)
    resnet = TorchvisionModel(name="resnet18").build(3, (3, 32, 32))
    assert list(stage_names(resnet, images))[-3:] == ["layer1.1", "layer2.1", "layer3.1"]
    vit = TimmModel(name="vit_tiny_patch16_224").build(3, (3, 32, 32))
    assert list(stage_names(vit, images))[-1] == "norm"
    assert len(stage_names(vit, images)) == 4


def test_a_network_without_maps_is_told_so():
    with pytest.raises(ShapeError, match="no child module whose output is an image"):
        stage_names(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(1, 1, 2, 2))


def test_tokens_and_images_are_two_readings_of_one_map():
    image = torch.randn(2, 5, 3, 3)
    assert torch.equal(image_of(tokens_of(image)), image)
    assert torch.equal(tokens_of(image)[:, 4], image[:, :, 1, 1])
    with pytest.raises(ShapeError, match="7 tokens, expected a square number"):
        image_of(torch.randn(2, 7, 5))
