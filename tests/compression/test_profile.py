"""Counts against arithmetic done by hand."""

import pytest
import torch
from torch import nn
from torchvision import models

from compression.profile import macs, params, state_bytes
from compression.zoo import PlainCnn, ResidualCnn, VisionTransformer


def test_convolution_and_linear_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )
    assert macs(model, (3, 8, 8)) == 16 * 8 * 3 * 9 + 16 * 8 * 9 + 128 * 5
    assert params(model) == 8 * 3 * 9 + 16 + (8 * 9 + 8) + (128 * 5 + 5)
    assert state_bytes(model) == 4 * (params(model) + 16) + 8  # running statistics, and an int64 counter


def test_attention_products_count():
    tokens, width = 49, 32
    model = VisionTransformer(stem="patch", width=width, depth=1, num_heads=2, mlp_ratio=2).build(10, (1, 28, 28))
    linear = 28 * 28 * width + tokens * (4 + 4) * width**2 + width * 10
    attention = 2 * tokens**2 * width
    assert macs(model, (1, 28, 28)) == linear + attention


def test_library_attention_counts_although_it_has_a_fast_path():
    width, hidden, tokens = 32, 48, 5  # four patches and a class token
    model = models.VisionTransformer(32, 16, 2, 4, width, hidden, num_classes=10)
    block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    assert macs(model, (3, 32, 32)) == 2 * block + 32 * 32 * 3 * width + width * 10
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    model = ResidualCnn(widths=(8,), depths=(1,), strides=(1,)).build(3, (1, 8, 8)).train(training)
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs(model, (1, 8, 8))
    assert model.training is training
    assert not model.stem.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_stride_two_in_the_stem_quarters_the_rest():
    near, far = (PlainCnn(strides=(1, 1, 1), stem_stride=stride).build(10, (1, 32, 32)) for stride in (1, 2))
    head = 128 * 10
    assert macs(near, (1, 32, 32)) - head == 4 * (macs(far, (1, 32, 32)) - head)
    assert params(near) == params(far)


def test_shared_tensors_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    apart = params(model), state_bytes(model)
    model[1].weight = model[0].weight
    assert (params(model), state_bytes(model)) == (apart[0] // 2, apart[1] // 2)
