"""Scaled families: width, depth, and weights that depend on the seed alone."""

import pytest
import torch

from compression import profile
from compression.models import ModelSpec, build_model
from compression.search.scale import Scale, scale_model
from compression.types import Preprocessing
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn

BASES = [
    ResidualCnn(widths=(16, 32), depths=(1, 2), strides=(1, 2), stem_width=16),
    PlainCnn(widths=(16, 32), depths=(1, 2), strides=(1, 2), stem_width=16),
    DepthwiseCnn(widths=(16, 32), depths=(1, 2), strides=(1, 2), stem_width=16),
]


@pytest.fixture(params=BASES, ids=lambda base: base.kind)
def space(request) -> Scale:
    return Scale(base=request.param)


@pytest.fixture
def template(space) -> ModelSpec:
    return ModelSpec(
        model=space.base,
        num_classes=3,
        input_shape=(1, 16, 16),
        class_names=("a", "b", "c"),
        preprocessing=Preprocessing(scale=255.0, mean=(0.5,), std=(0.25,)),
    )


def test_width_one_and_no_depth_is_the_base(space, template):
    model, spec = scale_model(space, template, width=1.0, depth=0, seed=0)
    assert spec == template
    assert profile.params(model) == profile.params(build_model(template))


def test_more_width_and_more_depth_cost_more(space, template):
    def macs(width: float, depth: int) -> int:
        model, spec = scale_model(space, template, width=width, depth=depth, seed=0)
        assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 3)
        return profile.macs(model, spec.input_shape)

    assert macs(0.5, 0) < macs(1.0, 0) < macs(2.0, 0)
    assert macs(1.0, 0) < macs(1.0, 1)


def test_weights_are_a_function_of_the_seed(space, template):
    def weights(seed: int) -> torch.Tensor:
        model, _ = scale_model(space, template, width=0.5, depth=0, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.manual_seed(1)
    first = weights(3)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(weights(3), first)
    assert torch.equal(torch.rand(2), expected), "the global random state was touched"
    assert not torch.equal(weights(4), first)


def test_choices_are_sorted_and_said_once():
    space = Scale(base=BASES[0], widths=(1.0, 0.5, 1.0), depths=(1, -1, 0))
    assert space.widths == (0.5, 1.0)
    assert space.depths == (-1, 0, 1)
    with pytest.raises(ValueError, match="greater than 0"):
        Scale(base=BASES[0], widths=(0.0,))
