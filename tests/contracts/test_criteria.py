"""What every pruning criterion promises; a new one is a row here by being in the union."""

from typing import get_args

import pytest
import torch
from torch import nn

from compression.errors import CompressionError
from compression.models import ModelSpec, build_model
from compression.search import criteria
from compression.search.criteria import AnyCriterion, Criterion, criterion_named
from compression.search.prune import prune_model
from compression.types import Frozen, Preprocessing
from compression.zoo import PlainCnn, VisionTransformer

KINDS = get_args(Criterion)


def parent(model) -> tuple[nn.Module, ModelSpec]:
    spec = ModelSpec(
        model=model,
        num_classes=4,
        input_shape=(1, 16, 16),
        class_names=("a", "b", "c", "d"),
        preprocessing=Preprocessing(scale=255.0, mean=(0.5,), std=(0.25,)),
    )
    torch.manual_seed(0)
    net = build_model(spec)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.2, 1.8)
    return net.eval(), spec


@pytest.fixture(scope="module")
def cnn() -> tuple[nn.Module, ModelSpec]:
    return parent(PlainCnn(widths=(16, 16), depths=(1, 1), strides=(1, 2), stem_width=16))


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 1, 16, 16, generator=generator), torch.arange(16) % 4


def prune(model, spec, kind, **changes):
    settings = {"ratio": 0.5, "criterion": kind, "calibration": calibration(), "seed": 0} | changes
    return prune_model(model, spec, **settings)


def test_union_literal_and_module_agree():
    members = get_args(AnyCriterion)
    assert tuple(member.model_fields["kind"].default for member in members) == KINDS
    written = {
        value
        for value in vars(criteria).values()
        if isinstance(value, type) and issubclass(value, Frozen) and "kind" in value.model_fields
    }
    assert written == set(members), "a criterion is missing from the union"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_the_card_says_something(kind):
    card = criterion_named(kind).card
    assert all(len(text) > 5 for text in card.model_dump().values())


@pytest.mark.parametrize("kind", KINDS)
def test_prunes_to_the_same_widths_whatever_the_ranking(kind, cnn):
    pruned, _ = prune(*cnn, kind)
    assert [module.out_channels for module in pruned.modules() if isinstance(module, nn.Conv2d)] == [8, 8, 8]
    assert pruned(calibration()[0]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_weights(kind, cnn):
    first, second = prune(*cnn, kind)[0].state_dict(), prune(*cnn, kind)[0].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
def test_channels_worth_nothing_go_first(kind, cnn):
    model, spec = parent(cnn[1].model)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    alive = torch.arange(16) % 2 == 1
    with torch.no_grad():
        for conv, norm in zip(convs, norms, strict=True):
            conv.weight[~alive] = 0
            norm.weight[~alive] = 0
            norm.bias[~alive] = 0
    pruned, _ = prune(model, spec, kind)
    kept = [module for module in pruned.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, smaller in zip(norms, kept, strict=True):
        assert torch.equal(smaller.weight, norm.weight[alive])


def test_random_depends_on_the_seed(cnn):
    first, second = prune(*cnn, "random", seed=0)[0], prune(*cnn, "random", seed=1)[0]
    assert not torch.equal(first.head.weight, second.head.weight)


def test_a_criterion_that_lacks_what_it_needs_says_so(cnn):
    with pytest.raises(CompressionError, match="no calibration images"):
        prune(*cnn, "taylor", calibration=None)
    without_norms = VisionTransformer(width=32, depth=1, num_heads=4, stem="patch")
    with pytest.raises(CompressionError, match=r"no batch norm.*magnitude"):
        prune(*parent(without_norms), "bn_scale")
    with pytest.raises(CompressionError, match="'unknown' has no implementation, expected one of magnitude"):
        criterion_named("unknown")
