"""What every pruning criterion promises; a new one is a row here by being in the union."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compression.errors import CompressionError
from compression.models import ModelSpec, build_model
from compression.search import criteria
from compression.search.criteria import AnyCriterion, Criterion, criterion_named
from compression.search.prune import prune_model
from compression.search.units import groups_of, traced
from compression.types import Frozen, Preprocessing
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn, VisionTransformer

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
    for kind in KINDS:
        if criterion_named(kind).needs_calibration:
            with pytest.raises(CompressionError, match=f"'{kind}' has no calibration images"):
                prune(*cnn, kind, calibration=None)
    without_norms = VisionTransformer(width=32, depth=1, num_heads=4, stem="patch")
    with pytest.raises(CompressionError, match=r"no batch norm.*magnitude"):
        prune(*parent(without_norms), "bn_scale")
    with pytest.raises(CompressionError, match="'unknown' has no implementation, expected one of magnitude"):
        criterion_named("unknown")


# ---------------------------------------------------------------- hessian


def test_hessian_of_two_linear_layers_is_what_a_hand_computes():
    """0.5 x mean squared gradient x weight^2, over a hidden channel's row, its bias and the column that reads it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    first, _, second = net
    inputs, labels = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
    criterion = criterion_named("hessian")
    criterion.prepare(net, inputs, labels)
    (group,) = groups_of(net, inputs, round_to=1, score=criterion.build(seed=0))

    worth = torch.zeros(6, dtype=torch.float64)
    weights = [each.detach().double() for each in (first.weight, first.bias, second.weight)]
    for x, label in zip(inputs.double(), labels.tolist(), strict=True):
        before = weights[0] @ x + weights[1]
        hidden = before.clamp_min(0)
        out = (weights[2] @ hidden + second.bias.detach().double()).softmax(0) - F.one_hot(torch.tensor(label), 3)
        back = (weights[2].T @ out) * (before > 0)
        worth += (0.5 * (back[:, None] * x) ** 2 * weights[0] ** 2).sum(1) / 9
        worth += 0.5 * back**2 * weights[1] ** 2 / 9
        worth += (0.5 * (out[:, None] * hidden) ** 2 * weights[2] ** 2).sum(0) / 9
    torch.testing.assert_close(group.scores.double(), worth, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8),
        DepthwiseCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8),
        VisionTransformer(width=16, depth=1, num_heads=2, stem="patch"),
    ],
    ids=["residual", "depthwise", "transformer"],
)
def test_hessian_counts_every_weight_that_goes_with_a_unit_once(model):
    """The saliency of the whole network falls by a unit's score when the unit is cut."""

    def saliency(net: nn.Module) -> float:
        return sum(
            float((0.5 * each.grad * each.detach() ** 2).sum()) for each in net.parameters() if each.grad is not None
        )

    def scored() -> tuple[nn.Module, tuple]:
        net, _ = parent(model)
        criterion = criterion_named("hessian")
        criterion.prepare(net, *calibration())
        return net, groups_of(net, calibration()[0][:2], round_to=1, score=criterion.build(seed=0))

    count = len(scored()[1])
    assert count >= 3
    for number in range(count):
        net, groups = scored()
        group, before = groups[number], saliency(net)
        channels = group.units.members[1].tolist()
        graph = traced(net, calibration()[0][:2])
        graph.get_pruning_group(net.get_submodule(group.name), group.handler, channels).prune()
        lost = before - saliency(net)
        assert lost == pytest.approx(float(group.scores[1]) * len(channels), rel=1e-3, abs=1e-6 * before)
        assert lost > 0


def test_hessian_leaves_samples_known_perfectly_out():
    """Where probabilities are those of the labels the gradients vanish, and with them the curvature that is seen."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(100.0 * torch.eye(2))
    criterion_named("hessian").prepare(net, torch.eye(2), torch.arange(2))
    assert net[0].weight.grad.abs().max() == 0
    criterion_named("hessian").prepare(net, torch.eye(2), 1 - torch.arange(2))
    torch.testing.assert_close(net[0].weight.grad, torch.full((2, 2), 0.5))
