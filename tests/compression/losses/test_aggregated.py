"""The aggregator of experts, the inner step it learns through, and training with both."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.distill import DistillConfig, Shapes
from compression.distill.losses.aggregated import Aggregated, AggregatedExperts, Aggregator, adapted, halves
from compression.errors import ShapeError
from compression.types import Outputs, TeacherOutputs
from tests.compression.losses.short_training import (
    CLASSES,
    Stop,
    assert_same,
    distilled,
    fresh_parts,
    net,
    stop_at,
    stored,
)
from tests.compression.tiny_data import tiny_dataset

WIDTH, BATCH = 5, 6
WIDTHS = (7, 3, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
SMALL = {"width": 8, "heads": 2, "dropout": 0.0}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(widths: tuple[int, ...] = WIDTHS, **options) -> AggregatedExperts:
    """The loss in float64, ready for teachers of these widths."""
    loss = Aggregated(**{**SMALL, **options}).build()
    assert isinstance(loss, AggregatedExperts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(num_classes=len(CLASSES), student_width=WIDTH, teacher_widths=widths))
    return loss.double()


def experts(batch: int = BATCH) -> list[Tensor]:
    return [randn(batch, width, seed=10 + width) for width in WIDTHS]


def everyone(batch: int = BATCH) -> Tensor:
    return torch.ones(len(WIDTHS), batch, dtype=torch.bool)


def outputs(features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features), len(CLASSES)), {"penultimate": features})


def panel(features: list[Tensor], weights: Tensor | None = None) -> TeacherOutputs:
    count, batch = len(features), len(features[0])
    shares = torch.full((count, batch), 1 / count, dtype=torch.float64) if weights is None else weights
    return TeacherOutputs(torch.zeros(count, batch, len(CLASSES)), shares, tuple(features))


# ---------------------------------------------------------------- the aggregator


def test_order_of_the_experts_changes_nothing():
    whole, features = prepared().aggregator, experts()
    order = [2, 0, 1]
    other = prepared(tuple(WIDTHS[k] for k in order)).aggregator
    other.layer.load_state_dict(whole.layer.state_dict())
    for place, k in enumerate(order):
        other.projections[place].load_state_dict(whole.projections[k].state_dict())
    present = everyone()
    present[1, :3] = False
    torch.testing.assert_close(other([features[k] for k in order], present[order]), whole(features, present))


def test_an_excluded_expert_is_as_good_as_absent():
    whole, features, present = prepared().aggregator, experts(), everyone()
    present[1, 2:] = False
    found = whole(features, present)
    loud = [features[0], features[1] * -9 + randn(BATCH, 3, seed=5), features[2]]
    changed = whole(loud, present)
    torch.testing.assert_close(changed[2:], found[2:], rtol=0, atol=0)
    assert (changed[:2] - found[:2]).abs().amax(-1).min() > 1e-3

    fewer = Aggregator((WIDTHS[0], WIDTHS[2]), width=8, heads=2, dropout=0.0).double()
    fewer.layer.load_state_dict(whole.layer.state_dict())
    fewer.projections[0].load_state_dict(whole.projections[0].state_dict())
    fewer.projections[1].load_state_dict(whole.projections[2].state_dict())
    without = fewer([features[0], features[2]], torch.ones(2, BATCH, dtype=torch.bool))
    torch.testing.assert_close(without[2:], found[2:])
    assert (without[:2] - found[:2]).abs().max() > 1e-3


def test_experts_are_read_together():
    """Attention: what one expert adds to the sum depends on the others."""
    aggregator, features = prepared().aggregator, experts()
    with torch.no_grad():
        aggregator.layer.self_attn.in_proj_weight.mul_(3)
    before = []
    aggregator.layer.register_forward_hook(lambda _m, _i, output: before.append(output[:, 0]))
    aggregator(features, everyone())
    aggregator([features[0], features[1] + randn(BATCH, 3, seed=6), features[2]], everyone())
    assert (before[0] - before[1]).abs().max() > 1e-3


def test_scale_and_offset_of_an_experts_features_do_not_matter():
    aggregator, features = prepared().aggregator, experts()
    scaled = [features[0] * 100, features[1] * 10 + 3, features[2]]
    torch.testing.assert_close(aggregator(scaled, everyone()), aggregator(features, everyone()), rtol=1e-3, atol=1e-3)


def test_the_summary_has_one_scale():
    summary = prepared().aggregator(experts(), everyone())
    assert summary.shape == (BATCH, 8)
    torch.testing.assert_close(summary.mean(-1), torch.zeros(BATCH).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(summary.var(-1, unbiased=False), torch.ones(BATCH).double(), rtol=1e-3, atol=1e-3)


def test_weights_say_who_is_heard_and_no_more():
    loss, student = prepared(), outputs(randn(BATCH, WIDTH))
    some = torch.tensor([[0.7], [0.1], [0.2]]).double().expand(-1, BATCH)
    equal = loss(student, panel(experts()), LABELS)
    torch.testing.assert_close(loss(student, panel(experts(), some), LABELS), equal)
    fewer = torch.tensor([[0.7], [0.0], [0.3]]).double().expand(-1, BATCH)
    assert abs(loss(student, panel(experts(), fewer), LABELS) - equal) > 1e-4


# ---------------------------------------------------------------- the inner step


def test_the_inner_step_is_one_of_gradient_descent():
    layer, features, target = nn.Linear(WIDTH, 8).double(), randn(BATCH, WIDTH), randn(BATCH, 8, seed=1)
    loss = (layer(features) - target).square().sum(-1).mean() / (2 * WIDTH)
    by_weight, by_bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
    weight, bias = adapted(layer.weight, layer.bias, features, target, rate=0.3)
    torch.testing.assert_close(weight, layer.weight - 0.3 * by_weight)
    torch.testing.assert_close(bias, layer.bias - 0.3 * by_bias)


def test_adaptation_with_rate_0_changes_nothing():
    layer, features = nn.Linear(WIDTH, 8).double(), randn(BATCH, WIDTH)
    weight, bias = adapted(layer.weight, layer.bias, features, randn(BATCH, 8, seed=1), rate=0.0)
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)


def test_rate_1_closes_the_gap_of_one_sample():
    features, target = F.layer_norm(randn(1, 400), (400,)), randn(1, 8, seed=1)
    layer = nn.Linear(400, 8).double()
    moved = F.linear(features, *adapted(layer.weight, layer.bias, features, target, rate=1.0))
    before = (layer(features) - target).norm()
    assert (moved - target).norm() < 0.01 * before


def meta_term(loss: AggregatedExperts, *, given: list[Tensor]) -> Tensor:
    features = F.layer_norm(randn(BATCH, WIDTH), (WIDTH,))
    target = loss.aggregator(given, everyone())
    return loss.after_adaptation(features, target, LABELS, torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]))


def test_the_aggregator_learns_through_the_inner_step_and_by_it_alone():
    loss = prepared(inner_rate=0.5)
    parameters = [each for name, each in loss.aggregator.named_parameters() if "weight" in name]
    gradients = torch.autograd.grad(meta_term(loss, given=experts()), parameters)
    assert sum(float(each.abs().sum()) for each in gradients) > 1e-3
    off = prepared(inner_rate=0.0)
    gradients = torch.autograd.grad(meta_term(off, given=experts()), list(off.aggregator.parameters()))
    assert all(each.abs().max() == 0 for each in gradients)


def test_gradient_through_the_inner_step_is_that_of_finite_differences():
    loss, features = prepared(inner_rate=0.5), experts()
    weight = loss.aggregator.projections[0].weight
    (gradient,) = torch.autograd.grad(meta_term(loss, given=features), weight)
    for place in ((0, 0), (3, 5), (7, 6)):
        values = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += change
                values.append(meta_term(loss, given=features))
                weight[place] -= change
        assert float(gradient[place]) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-10)
    assert gradient.abs().max() > 1e-4


def test_the_query_half_is_classified_by_the_adapted_adapter():
    loss, features, target = prepared(inner_rate=0.5), randn(BATCH, WIDTH), randn(BATCH, 8, seed=1)
    support, query = torch.tensor([0, 3, 5, 4]), torch.tensor([1, 2])
    gap = (loss.adapter(features[support]) - target[support]).square().sum(-1).mean() / (2 * WIDTH)
    slopes = torch.autograd.grad(gap, [loss.adapter.weight, loss.adapter.bias])
    moved = [each - 0.5 * slope for each, slope in zip(loss.adapter.parameters(), slopes, strict=True)]
    expected = F.cross_entropy(loss.head(F.linear(features[query], *moved)), LABELS[query])
    torch.testing.assert_close(loss.after_adaptation(features, target, LABELS, support, query), expected)


def test_halves_are_disjoint_alike_and_independent_of_order():
    hardness = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7])
    support, query = halves(hardness)
    assert (support.tolist(), query.tolist()) == ([1, 2, 0], [3, 4])
    order = torch.tensor([4, 2, 0, 1, 3])
    support, query = halves(hardness[order])
    assert order[support].tolist() == [1, 2, 0]
    assert order[query].tolist() == [3, 4]
    assert [part.tolist() for part in halves(torch.ones(1))] == [[0], [0]]


# ---------------------------------------------------------------- the whole loss


def test_is_the_sum_of_its_terms():
    loss, student, given = prepared(follow=2.0, meta=3.0), randn(BATCH, WIDTH), experts()
    features = F.layer_norm(student, (WIDTH,))
    target = loss.aggregator(given, everyone())
    hardness = F.cross_entropy(loss.head(target), LABELS, reduction="none")
    after = loss.after_adaptation(features, target, LABELS, *halves(hardness))
    gap = F.mse_loss(loss.adapter(features), target)
    torch.testing.assert_close(loss(outputs(student), panel(given), LABELS), hardness.mean() + 2 * gap + 3 * after)
    loss.inner_rate = 0.0
    torch.testing.assert_close(loss(outputs(student), panel(given), LABELS), hardness.mean() + 2 * gap)


def test_the_aggregator_does_not_give_way_to_the_student():
    """Only the labels teach it when there is no inner step: the distance pulls the student alone."""
    given, gradients = panel(experts()), []
    for follow in (0.0, 5.0):
        loss, student = prepared(follow=follow, inner_rate=0.0), randn(BATCH, WIDTH).requires_grad_()
        loss(outputs(student), given, LABELS).backward()
        gradients.append(loss.aggregator.projections[0].weight.grad)
        assert (student.grad is None or student.grad.abs().max() == 0) == (follow == 0)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_batch_of_one_teaches_every_part(rate):
    loss, student = prepared(inner_rate=rate), randn(1, WIDTH).requires_grad_()
    value = loss(outputs(student), panel(experts(1)), LABELS[:1])
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() > 0
    assert all(torch.isfinite(each.grad).all() for each in loss.parameters())


def test_refuses_other_teachers():
    loss = prepared((7,))
    with pytest.raises(ShapeError, match=r"\[\[6, 3\]\], expected \[\[6, 7\]\]"):
        loss(outputs(randn(BATCH, WIDTH)), panel([randn(BATCH, 3)]), LABELS)
    more = TeacherOutputs(torch.zeros(1, BATCH, 9), torch.ones(1, BATCH), (randn(BATCH, 7),))
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        loss(outputs(randn(BATCH, WIDTH)), more, LABELS)


@pytest.mark.parametrize(
    "wrong", [{"dropout": 1.0}, {"inner_rate": -0.1}, {"inner_rate": 1.1}, {"width": 1}, {"meta": -1}, {"layers": 2}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Aggregated.model_validate(wrong)


def test_heads_must_share_the_width():
    with pytest.raises(ValidationError, match="has heads 3, expected a divisor of width 128"):
        Aggregated(heads=3)


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'aggregated' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Aggregated(),)})


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """One as wide as the student, and a wider one."""
    folder = tmp_path_factory.mktemp("outputs")
    return [stored(tiny_dataset(validation=16), folder / str(width), width=width, seed=width) for width in (6, 8)]


def test_parts_learn_resume_and_stay_out_of_the_student(teachers, tmp_path):
    data, loss = tiny_dataset(validation=16), Aggregated(width=8, heads=2)
    start = fresh_parts(loss, net(6, seed=3), teachers, data)
    student, parts, history = distilled(loss, teachers, data, tmp_path / "whole")
    assert sorted(parts) == sorted(start)
    for key, value in parts.items():
        assert (value - start[key]).abs().max() > 1e-3, key
    assert history.rows[-1]["aggregated"] < history.rows[0]["aggregated"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(loss, teachers, data, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, data, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)
