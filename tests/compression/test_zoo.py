"""Every family: builds for the usual image shapes, trains, exports with a dynamic batch, suits int8."""

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from compression.errors import CheckpointError, ShapeError
from compression.zoo import (
    AnyModel,
    DepthwiseCnn,
    GatedCnn,
    Group,
    Mixer,
    PlainCnn,
    ResidualCnn,
    TimmModel,
    TorchvisionModel,
    VisionTransformer,
)

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
TINY: list[AnyModel] = [
    ResidualCnn(widths=(8, 16), depths=(2, 1), strides=(2, 2), stem_width=8, stem_stride=2, stem_kernel=5),
    PlainCnn(widths=(8, 16), depths=(1, 2), strides=(2, 2), stem_width=8),
    DepthwiseCnn(widths=(8, 16), depths=(1, 2), strides=(1, 2), stem_width=8),
    VisionTransformer(width=16, depth=2, num_heads=2, stem_width=8),
    VisionTransformer(width=16, depth=1, num_heads=4, stem="patch"),
    Mixer(width=16, depth=2, token_hidden=8, stem_width=8),
    Group(members=(PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8),) * 2),
    GatedCnn(widths=(8, 16), depths=(1, 2), strides=(2, 2), stem_width=8),
]
CONVOLUTIONAL = [config for config in TINY if isinstance(config, ResidualCnn | PlainCnn | DepthwiseCnn | GatedCnn)]
DEFAULTS: list[AnyModel] = [
    ResidualCnn(),
    PlainCnn(),
    DepthwiseCnn(),
    VisionTransformer(),
    Mixer(),
    Group(),
    GatedCnn(),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def names(config: AnyModel) -> str:
    return f"{config.kind}-{config.stem}" if isinstance(config, VisionTransformer) else config.kind


def images(shape: tuple[int, int, int], batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", TINY + DEFAULTS, ids=names)
def test_every_parameter_gets_a_gradient(config, shape):
    model = config.build(7, shape).to(memory_format=torch.channels_last)
    logits = model(images(shape).contiguous(memory_format=torch.channels_last))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", TINY, ids=names)
def test_exports_with_a_dynamic_batch(config, shape):
    model = config.build(7, shape).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (images(shape, 2),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        torch.testing.assert_close(program.module()(images(shape, size)), model(images(shape, size)))


@pytest.mark.parametrize("config", TINY, ids=names)
def test_a_few_steps_learn_a_small_batch(config):
    torch.manual_seed(0)
    model = config.build(4, (1, 8, 8))
    inputs, labels = images((1, 8, 8), 16), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("config", CONVOLUTIONAL, ids=names)
def test_convolutions_fold_and_activations_are_relu(config):
    model = config.build(4, (1, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for first, second in zip(module, list(module)[1:], strict=False):
                assert not isinstance(first, nn.Conv2d) or isinstance(second, nn.BatchNorm2d)
    allowed = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.Identity)
    leaves = [module for module in model.modules() if not list(module.children())]
    assert [module for module in leaves if not isinstance(module, allowed)] == []
    assert not any(module.inplace for module in leaves if isinstance(module, nn.ReLU))


@pytest.mark.parametrize("config", TINY, ids=names)
def test_batch_order_changes_nothing(config):
    model = config.build(4, (1, 28, 28)).eval()
    inputs, order = images((1, 28, 28), 6), torch.randperm(6)
    torch.testing.assert_close(model(inputs[order]), model(inputs)[order])


def test_fused_attention_equals_the_spelt_out_products():
    model = VisionTransformer(width=24, depth=2, num_heads=3).build(4, (1, 28, 28)).eval()
    fused = model(images((1, 28, 28)))
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images((1, 28, 28))), fused)


@pytest.mark.parametrize("config", CONVOLUTIONAL, ids=names)
@pytest.mark.parametrize(("width", "depth_delta"), [(0.1, -5), (1.0, 0), (1.3, 1), (3.0, 2)])
def test_scaled_rounds_widths_and_keeps_a_block(config, width, depth_delta):
    scaled = config.scaled(width=width, depth_delta=depth_delta, round_to=4)
    assert type(scaled) is type(config)
    assert all(value % 4 == 0 and value >= 4 for value in (*scaled.widths, scaled.stem_width))
    assert scaled.depths == tuple(max(1, depth + depth_delta) for depth in config.depths)
    assert (scaled.strides, scaled.kernel) == (config.strides, config.kernel)
    assert scaled.build(3, (1, 8, 8))(images((1, 8, 8))).shape == (4, 3)


@pytest.mark.parametrize("config", CONVOLUTIONAL, ids=names)
def test_scaled_by_one_is_the_same(config):
    assert config.scaled(round_to=8) == config


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        (ResidualCnn, {"widths": (8,), "depths": (1, 1)}, "same number"),
        (PlainCnn, {"kernel": 4}, "odd"),
        (DepthwiseCnn, {"widths": ()}, "at least 1"),
        (ResidualCnn, {"depth": (1,)}, "Extra inputs"),
        (VisionTransformer, {"width": 30, "num_heads": 4}, "multiple of num_heads"),
        (Mixer, {"patch_size": 6}, "power of two"),
        (TimmModel, {"name": "hf-hub:someone/model"}, "pattern"),
        (TimmModel, {"name": "local-dir:/tmp/model"}, "pattern"),
    ],
)
def test_wrong_fields_are_named(family, fields, said):
    with pytest.raises(ValidationError, match=said):
        family(**fields)


def test_patches_must_tile_the_image():
    with pytest.raises(ShapeError, match="patch_size 5"):
        VisionTransformer(stem="patch", patch_size=5).build(4, (1, 28, 28))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_vit"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 64)], ids=str)
def test_timm_builds_for_channels_and_size(name, shape):
    model = TimmModel(name=name).build(5, shape)
    assert model.training
    assert model.eval()(images(shape, 2)).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 64, 64)], ids=str)
def test_torchvision_builds_for_channels_and_size(name, shape):
    assert TorchvisionModel(name=name).build(5, shape).eval()(images(shape, 2)).shape == (2, 5)


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (TimmModel(name="resnet1"), (3, 32, 32), "expected a registered name"),
        (TorchvisionModel(name="resnet1"), (3, 32, 32), "such as resnet"),
        (TorchvisionModel(name="lraspp_mobilenet_v3_large"), (3, 32, 32), "classifiers"),
        (TimmModel(name="vit_tiny_patch16_224"), (1, 28, 28), "patches are 16x16"),
        (TimmModel(name="test_convnext2"), (1, 28, 28), "1x28x28 images"),
        (TorchvisionModel(name="alexnet"), (1, 28, 28), "1x28x28 images"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_library_models_that_cannot_be_had_are_refused(config, shape, said):
    with pytest.raises(CheckpointError, match=said) as refused:
        config.build(10, shape)
    assert f"'{config.name}'" in str(refused.value)
