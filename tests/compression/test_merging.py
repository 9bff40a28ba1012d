import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import NoAugment, ShiftFlip, augment, normalise
from compression.data.dataset import Dataset
from compression.distill import plain_step
from compression.distill.merging import (
    FisherMerge,
    Merge,
    Merging,
    TaskVectors,
    UniformSoup,
    batch_norm,
    fisher,
    merge_branches,
    reestimate_batch_norm,
    task_vectors,
)
from compression.distill.merging.batch_norm import batch_statistics
from compression.distill.merging.fisher import FLOOR, diagonal_fisher, fisher_merge, importance
from compression.distill.merging.soup import uniform_soup
from compression.distill.merging.task_vectors import learned_scales, scaled_sum
from compression.distill.merging.weights import mean, weighted_mean
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.train import Hardware, TrainConfig, fit
from compression.zoo import DepthwiseCnn
from tests.compression.tiny_data import CLASSES, blobs, tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny_dataset()
IMAGES = DATA.train.images


def conv_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 5, 3, stride=2, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(80, len(CLASSES)),
        )


def linear_net(seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, len(CLASSES)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return model


def inputs(images: Tensor = IMAGES) -> Tensor:
    return normalise(images, DATA.preprocessing)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merging(base: nn.Module, members: Sequence[nn.Module], data: Dataset = DATA, seed: int = 0) -> Merging:
    return Merging(base=base, members=members, dataset=data, seed=seed)


def fisher_of(model: nn.Module, images: Tensor = IMAGES, *, exact_classes: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return diagonal_fisher(model, images, DATA.preprocessing, exact_classes=exact_classes, seed=seed)


def trained(model: nn.Module, *, seed: int, epochs: int = 1, learning_rate: float = 0.01) -> nn.Module:
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=learning_rate)
    fit(model, plain_step(), DATA, train, seed=seed, augment=NoAugment(), hardware=Hardware(accelerator="cpu"))
    return model


# ---------------------------------------------------------------- weighted means


def test_equal_weights_give_the_mean_and_equal_values_themselves():
    values, weights = [randn(4, 3, seed=seed) for seed in range(3)], randn(4, 3, seed=9).exp()
    torch.testing.assert_close(weighted_mean(values, [weights] * 3), torch.stack(values).mean(0))
    torch.testing.assert_close(mean(values), torch.stack(values).mean(0))
    others = [randn(4, 3, seed=seed).exp() for seed in range(5, 8)]
    torch.testing.assert_close(weighted_mean([values[0]] * 3, others), values[0], rtol=1e-15, atol=0)


def test_every_coordinate_lies_between_the_members():
    values = torch.stack([randn(50, seed=seed) for seed in range(3)])
    weights = [randn(50, seed=10 + seed).mul(4).exp() for seed in range(3)]
    found = weighted_mean(list(values), weights)
    assert (found >= values.amin(0) - 1e-12).all()
    assert (found <= values.amax(0) + 1e-12).all()
    assert (found - values.mean(0)).abs().max() > 0.1


def test_a_common_scale_of_the_weights_cancels_number_by_number():
    values = [randn(50, seed=seed) for seed in range(3)]
    weights, scale = [randn(50, seed=10 + seed).exp() for seed in range(3)], randn(50, seed=5).mul(3).exp()
    torch.testing.assert_close(weighted_mean(values, [w * scale for w in weights]), weighted_mean(values, weights))


def test_all_the_weight_on_one_member_returns_it():
    values, weights = (
        [randn(50, seed=seed) for seed in range(3)],
        [randn(50, seed=10 + seed).exp() for seed in range(3)],
    )
    for chosen in range(3):
        factors = [float(number == chosen) for number in range(3)]
        found = weighted_mean(values, [factor * weight for factor, weight in zip(factors, weights, strict=True)])
        torch.testing.assert_close(found, values[chosen], rtol=1e-14, atol=0)


def test_soup_is_the_mean_of_the_members_whatever_the_base():
    members = [linear_net(seed) for seed in (1, 2, 3)]
    found = uniform_soup(merging(linear_net(9), members))
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, torch.stack([member.state_dict()[name] for member in members]).mean(0))


def test_weights_of_half_precision_are_averaged_in_double_and_given_back_as_they_were():
    members = [linear_net(seed).half() for seed in range(7)]
    found = uniform_soup(merging(members[0], members)).state_dict()["1.weight"]
    assert found.dtype == torch.float16
    wanted = torch.stack([member[1].weight.detach().double() for member in members]).mean(0).half()
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------- Fisher information


def naive_fisher(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """One image, one class, one backward pass at a time."""
    model = copy.deepcopy(model).eval()
    totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    for image in inputs(images):
        log_probs = model(image.unsqueeze(0))[0].log_softmax(-1)
        for log_prob in log_probs:
            gradients = torch.autograd.grad(log_prob, list(model.parameters()), retain_graph=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += log_prob.exp().detach().double() * gradient.double().square() / len(images)
    return totals


def test_fisher_is_that_of_a_plain_loop():
    model = conv_net()
    reestimate_batch_norm(model, DATA)
    images = IMAGES[:6]
    for name, value in naive_fisher(model, images).items():
        torch.testing.assert_close(fisher_of(model, images)[name], value, rtol=1e-4, atol=1e-9)
        assert value.max() > 0


def test_fisher_of_softmax_regression_has_a_closed_form():
    """p_c (1 - p_c) x_d^2, because the labels are the model's own; the true labels would give another matrix."""
    model, values = linear_net(), inputs().flatten(1).double()
    probs = model(inputs()).detach().double().softmax(-1)
    spread = probs * (1 - probs)
    found = fisher_of(model)
    torch.testing.assert_close(found["1.weight"], spread.T @ values.square() / len(values), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["1.bias"], spread.mean(0), rtol=1e-4, atol=1e-9)


def test_exact_up_to_the_limit_and_drawn_beyond():
    model = linear_net()
    exact = fisher_of(model, exact_classes=4)
    for name, value in fisher_of(model, exact_classes=7, seed=5).items():
        assert torch.equal(value, exact[name]), name
    drawn = fisher_of(model, exact_classes=3)
    assert (drawn["1.bias"] - exact["1.bias"]).abs().max() > 1e-3
    assert torch.equal(drawn["1.bias"], fisher_of(model, exact_classes=3)["1.bias"])
    assert not torch.equal(drawn["1.bias"], fisher_of(model, exact_classes=3, seed=1)["1.bias"])


def test_drawn_labels_have_the_exact_mean():
    """Over 60 seeds of 3 draws for 64 images: 11520 draws, an error of about 1 %."""
    model = linear_net()
    exact = fisher_of(model)["1.bias"]
    drawn = torch.stack([fisher_of(model, exact_classes=3, seed=seed)["1.bias"] for seed in range(60)])
    torch.testing.assert_close(drawn.mean(0), exact, rtol=0.05, atol=0)
    assert (drawn[0] - exact).abs().max() / exact.max() > 0.02


@pytest.mark.parametrize("exact_classes", [4, 2])
def test_how_many_images_are_in_memory_changes_nothing(monkeypatch, exact_classes):
    model, found = conv_net(), []
    for most_images, most_gradients in ((64, 2**24), (5, 2**24), (64, 1)):
        monkeypatch.setattr(fisher, "MOST_IMAGES", most_images)
        monkeypatch.setattr(fisher, "MOST_GRADIENTS", most_gradients)
        found.append(fisher_of(model, IMAGES[:12], exact_classes=exact_classes))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-10)


def test_importance_has_unit_length_loses_its_scale_and_has_a_floor():
    values = {"a": randn(5, 6).square(), "b": torch.zeros(3, dtype=torch.float64)}
    found = importance(values)
    torch.testing.assert_close(found["a"].norm(), torch.tensor(1.0).double())
    assert torch.equal(found["b"], torch.full((3,), FLOOR, dtype=torch.float64))
    torch.testing.assert_close(importance({name: value * 1e-9 for name, value in values.items()}), found)
    nothing = importance({"a": torch.zeros(2)})
    assert torch.equal(nothing["a"], torch.full((2,), FLOOR))


def test_merged_weights_follow_the_formula():
    members = [linear_net(1), linear_net(2, scale=6.0)]
    found = fisher_merge(merging(linear_net(), members), samples=64, exact_classes=4).state_dict()
    weights = [importance(naive_fisher(member, IMAGES)) for member in members]
    for name, value in found.items():
        wanted = sum(w[name] * member.state_dict()[name].double() for w, member in zip(weights, members, strict=True))
        torch.testing.assert_close(
            value, (wanted / (weights[0][name] + weights[1][name])).float(), rtol=1e-3, atol=1e-5
        )
    plain = uniform_soup(merging(linear_net(), members)).state_dict()
    assert (plain["1.weight"] - found["1.weight"]).abs().max() > 0.05


def test_weights_on_which_no_answer_hangs_are_averaged_plainly():
    """The second half of the hidden units is dead: its outgoing weights have no effect."""

    def net(seed: int) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, len(CLASSES)))
        with torch.no_grad():
            model[1].bias[3:] = -1e3
        return model

    members = [net(1), net(2)]
    found = fisher_merge(merging(members[0], members), samples=64, exact_classes=4)[3].weight.detach()
    plain = torch.stack([member[3].weight.detach() for member in members]).mean(0)
    torch.testing.assert_close(found[:, 3:], plain[:, 3:])
    assert (found[:, :3] - plain[:, :3]).abs().max() > 1e-3


def test_fisher_looks_at_as_many_images_as_asked_for_and_at_no_label(monkeypatch):
    seen = []
    whole = fisher.diagonal_fisher

    def spy(model: nn.Module, images: Tensor, *args: object, **more: object) -> dict[str, Tensor]:
        seen.append(images)
        return whole(model, images, *args, **more)

    monkeypatch.setattr(fisher, "diagonal_fisher", spy)
    members = [linear_net(1), linear_net(2)]
    found = fisher_merge(merging(members[0], members), samples=7, exact_classes=4)
    assert [len(images) for images in seen] == [7, 7]
    assert torch.equal(seen[0], seen[1])
    other = replace(DATA, train=replace(DATA.train, labels=DATA.train.labels.flip(0)))
    again = fisher_merge(merging(members[0], members, other), samples=7, exact_classes=4)
    assert torch.equal(found[1].weight, again[1].weight)
    third = fisher_merge(merging(members[0], members, seed=1), samples=7, exact_classes=4)
    assert not torch.equal(found[1].weight, third[1].weight)


# ---------------------------------------------------------------- task vectors


def calibration_loss(model: nn.Module, data: Dataset = DATA) -> float:
    with batch_statistics(model), torch.no_grad():
        return float(F.cross_entropy(model(inputs(data.calibration.images)), data.calibration.labels))


def test_the_sum_is_scaled_block_by_block():
    base, vectors = (
        {"a": randn(3), "b": randn(2, 2)},
        [{"a": randn(3, seed=s), "b": randn(2, 2, seed=s)} for s in (1, 2)],
    )
    scales = torch.tensor([[0.5, -1.0], [2.0, 0.25]]).double()
    found = scaled_sum(base, vectors, scales)
    torch.testing.assert_close(found["a"], base["a"] + 0.5 * vectors[0]["a"] + 2 * vectors[1]["a"])
    torch.testing.assert_close(found["b"], base["b"] - vectors[0]["b"] + 0.25 * vectors[1]["b"])


def test_without_steps_it_is_the_soup():
    given = merging(conv_net(), [conv_net(seed) for seed in (1, 2, 3)])
    assert torch.equal(learned_scales(given, steps=0, learning_rate=0.01), torch.full((3, 6), 1 / 3))
    soup = uniform_soup(given).state_dict()
    for name, value in task_vectors.task_vectors(given, steps=0, learning_rate=0.01).state_dict().items():
        torch.testing.assert_close(value, soup[name], rtol=1e-5, atol=1e-6)


def test_the_first_step_goes_down_the_slope_of_the_loss():
    """Adam's first step is the learning rate against the slope's sign; the slope is taken by finite differences."""
    base, members = linear_net(), [linear_net(1), linear_net(2)]
    moved = learned_scales(merging(base, members), steps=1, learning_rate=0.01) - 0.5
    weights = {name: value.detach().double() for name, value in base.named_parameters()}
    vectors = [
        {name: value.detach().double() - weights[name] for name, value in each.named_parameters()} for each in members
    ]

    def loss(scales: Tensor) -> Tensor:
        values = scaled_sum(weights, vectors, scales)
        images = inputs(DATA.calibration.images).flatten(1).double()
        return F.cross_entropy(images @ values["1.weight"].T + values["1.bias"], DATA.calibration.labels)

    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.zeros(2, 2).double()
        step[place] = 1e-5
        slope = (loss(0.5 + step) - loss(0.5 - step)) / 2e-5
        assert slope.abs() > 1e-4
        wanted = -0.01 * slope / (slope.abs() + task_vectors.LEAST_SLOPE)
        torch.testing.assert_close(moved[place], wanted.float(), rtol=1e-4, atol=0)


def test_the_member_that_knows_gets_a_larger_scale_than_the_one_that_misleads():
    base = conv_net()
    good = trained(copy.deepcopy(base), seed=1, epochs=4)
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad[5].weight.copy_(2 * base[5].weight - good[5].weight)
    given = merging(base, [good, bad], replace(DATA, calibration=blobs(64, 2000)))
    scales = learned_scales(given, steps=60, learning_rate=0.02)
    names = [name for name, _ in base.named_parameters()]
    head = names.index("5.weight")
    assert scales[0, head] > 0.7
    assert scales[1, head] < 0.3
    torch.testing.assert_close(scales[0, 0], scales[1, 0])  # the same vector in both
    soup, learned = uniform_soup(given), task_vectors.task_vectors(given, steps=60, learning_rate=0.02)
    assert calibration_loss(learned, given.dataset) < 0.7 * calibration_loss(soup, given.dataset)


def test_blocks_that_no_member_changed_keep_their_start():
    base, member = linear_net(), linear_net()
    with torch.no_grad():
        member[1].weight += 0.1 * randn(4, 64).float()
    scales = learned_scales(merging(base, [member, member]), steps=5, learning_rate=0.05)
    assert torch.equal(scales[:, 1], torch.full((2,), 0.5))
    assert (scales[:, 0] - 0.5).abs().min() > 0.01


def test_rounding_errors_move_no_scale():
    """A bias in front of a batch norm has no effect, so that the slope of its scale is rounding alone."""
    given = merging(conv_net(), [conv_net(1), conv_net(2)])
    scales = learned_scales(given, steps=10, learning_rate=0.05)
    assert (scales[:, 1] - 0.5).abs().max() < 1e-3
    assert (scales[:, [0, 4, 5]] - 0.5).abs().min() > 0.01


def test_batches_are_fresh_orders_of_the_calibration_split(monkeypatch):
    monkeypatch.setattr(task_vectors, "BATCH", 5)
    batches = task_vectors._batches(blobs(13, 0), 0)
    epochs = [torch.cat([next(batches), next(batches)]) for _ in range(3)]
    assert all(len(set(rows.tolist())) == 10 for rows in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0][:5], next(task_vectors._batches(blobs(13, 0), 0)))


def test_it_learns_on_a_new_view_in_every_step(monkeypatch):
    seen = []

    def spy(self: Merging, split: object, rows: Tensor, number: int) -> Tensor:
        assert split is DATA.calibration
        seen.append(number)
        return view(self, split, rows, number)

    view = Merging.view
    monkeypatch.setattr(Merging, "view", spy)
    given = merging(linear_net(), [linear_net(1), linear_net(2)])
    plain = learned_scales(given, steps=4, learning_rate=0.01)
    shift = learned_scales(replace(given, augment=ShiftFlip(pad=2)), steps=4, learning_rate=0.01)
    assert seen == [0, 1, 2, 3] * 2
    assert not torch.equal(plain, shift)


def test_it_learns_under_no_grad_too():
    given = merging(linear_net(), [linear_net(1), linear_net(2)])
    wanted = learned_scales(given, steps=2, learning_rate=0.01)
    with torch.no_grad():
        assert torch.equal(learned_scales(given, steps=2, learning_rate=0.01), wanted)


def test_too_few_labels_and_a_loss_without_bounds_are_refused():
    given = merging(linear_net(), [linear_net(1), linear_net(2)])
    with pytest.raises(CompressionError, match="'calibration' has 1 samples, expected at least 2"):
        learned_scales(replace(given, dataset=replace(DATA, calibration=blobs(1, 2000))), steps=1, learning_rate=0.01)
    huge = merging(linear_net(), [linear_net(1, scale=1e38), linear_net(2)])
    with pytest.raises(CompressionError, match=r"loss of (nan|inf) at step 0.*learning_rate"):
        learned_scales(huge, steps=1, learning_rate=0.01)


# ---------------------------------------------------------------- batch norm


def test_statistics_are_the_mean_and_unbiased_variance_of_one_batch():
    model = conv_net()
    reestimate_batch_norm(model, DATA)
    values = model[0](inputs()).detach().transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(model[1].running_mean.double(), values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), values.var(1), rtol=1e-4, atol=1e-5)


def test_batches_count_alike_and_a_remainder_not_at_all(monkeypatch):
    monkeypatch.setattr(batch_norm, "BATCH", 24)
    model, rows = conv_net(), batch_norm.shuffled(64, seed=0, epoch=0)
    reestimate_batch_norm(model, DATA)
    values = model[0](inputs(IMAGES[rows])).detach().double()
    variances = [part.transpose(0, 1).flatten(1).var(1) for part in (values[:24], values[24:48])]
    torch.testing.assert_close(model[1].running_mean.double(), values[:48].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)


def test_only_as_many_images_as_asked_for_and_the_same_every_time():
    few, again, all_of_them = conv_net(), conv_net(), conv_net()
    again[1].running_mean.fill_(7.0)
    reestimate_batch_norm(few, DATA, images=16)
    reestimate_batch_norm(again, DATA, images=16)
    reestimate_batch_norm(all_of_them, DATA)
    assert torch.equal(few[1].running_mean, again[1].running_mean)
    assert (few[1].running_mean - all_of_them[1].running_mean).abs().max() > 1e-4


def test_statistics_are_those_of_the_views_of_the_training():
    shift = ShiftFlip(pad=3, flip=False)
    base, members = conv_net(), [conv_net(1), conv_net(2)]
    plain = uniform_soup(merging(base, members))
    found = uniform_soup(replace(merging(base, members, seed=5), augment=shift))
    assert torch.equal(found[0].weight, plain[0].weight)
    views = augment(IMAGES, DATA.train.ids, view=0, seed=5, config=shift)
    values = found[0](inputs(views)).detach()
    torch.testing.assert_close(found[1].running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (found[1].running_mean - plain[1].running_mean).abs().max() > 0.05


def test_everything_else_of_the_model_is_left_alone():
    model = conv_net().train()
    model[3].eval()
    model[1].momentum = 0.25
    model[1].num_batches_tracked.fill_(11)
    weights, state = [value.clone() for value in model.parameters()], torch.get_rng_state()
    reestimate_batch_norm(model, DATA)
    assert [module.training for module in model] == [True, True, True, False, True, True]
    assert (model[1].momentum, int(model[1].num_batches_tracked)) == (0.25, 11)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    broken = nn.Sequential(model, nn.Linear(9, 9)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        reestimate_batch_norm(broken, DATA)
    assert broken[0].training
    assert broken[0][1].momentum == 0.25


def test_networks_without_statistics_are_not_even_run():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3, track_running_stats=False)
            self.runs = 0

        def forward(self, images: Tensor) -> Tensor:
            self.runs += 1
            return images

    model = Counting()
    reestimate_batch_norm(model, DATA)
    assert model.runs == 0


def test_a_network_of_the_zoo_recovers_from_wrong_statistics():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DepthwiseCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8).build(len(CLASSES), (1, 8, 8))
    trained(model, seed=0, epochs=4, learning_rate=0.02)
    good = evaluate(model, DATA.validation, DATA.preprocessing).nll
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 3.0
            module.running_var *= 20.0
    bad = evaluate(model, DATA.validation, DATA.preprocessing).nll
    reestimate_batch_norm(model, DATA)
    found = evaluate(model, DATA.validation, DATA.preprocessing).nll
    assert bad > good + 0.2
    assert found < good + 0.05


# ---------------------------------------------------------------- branches


def shifted(amounts: Sequence[float]) -> Callable[[nn.Module, int, str], None]:
    """Branches that add a number to the bias of class 0."""
    left = list(amounts)

    def train_branch(model: nn.Module, seed: int, name: str) -> None:
        with torch.no_grad():
            model[1].bias[0] += left.pop(0)

    return train_branch


def nll(model: nn.Module) -> float:
    return evaluate(model, DATA.validation, DATA.preprocessing).nll


def test_every_branch_is_a_copy_with_a_seed_and_a_name_of_its_own():
    student, calls = linear_net(), []

    def train_branch(model: nn.Module, seed: int, name: str) -> str:
        assert torch.equal(model[1].weight, student[1].weight)
        assert model[1].weight is not student[1].weight
        calls.append((id(model), seed, name))
        return "ignored"

    report = merge_branches(student, Merge(members=3), DATA, seed=40, train_branch=train_branch)
    assert [call[1:] for call in calls] == [(41, "branch-0"), (42, "branch-1"), (43, "branch-2")]
    assert len({call[0] for call in calls}) == 3
    assert report.member_nlls == (report.student_nll,) * 3
    assert (report.merged_nll, report.kept) == (report.student_nll, "merged")


def test_a_worse_merge_leaves_the_students_bits():
    student = linear_net()
    before = copy.deepcopy(student.state_dict())
    report = merge_branches(student, Merge(members=2), DATA, seed=0, train_branch=shifted([5.0, 7.0]))
    assert report.kept == "student"
    assert report.student_nll == nll(student) < report.merged_nll
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with torch.no_grad():
        student[1].bias[0] += 6.0
    assert report.merged_nll == pytest.approx(nll(student), abs=1e-6)


def test_a_better_merge_becomes_the_student_even_of_worse_members():
    """The branches miss on either side; their mean does not."""
    student = linear_net()
    with torch.no_grad():
        student[1].bias[0] += 2.0
    student.train()
    given = student[1].weight
    report = merge_branches(student, Merge(members=2), DATA, seed=0, train_branch=shifted([-8.0, 4.0]))
    assert report.kept == "merged"
    assert report.merged_nll == nll(student) < report.student_nll
    assert min(report.member_nlls) > report.student_nll
    assert student[1].bias[0].item() == pytest.approx(linear_net()[1].bias[0].item(), abs=1e-6)
    assert student[1].weight is given
    assert student.training


@pytest.mark.parametrize("method", [UniformSoup(), FisherMerge(samples=16), TaskVectors(steps=2)], ids=str)
def test_the_merge_sees_the_views_it_is_told_to(method):
    shift, student = ShiftFlip(pad=3, flip=False), conv_net()

    def train_branch(model: nn.Module, seed: int, name: str) -> None:
        model.load_state_dict(conv_net(seed).state_dict())

    def merged_nll(**views: object) -> float:
        config = Merge(method=method, members=2)
        return merge_branches(
            copy.deepcopy(student), config, DATA, seed=0, train_branch=train_branch, **views
        ).merged_nll

    assert merged_nll() == merged_nll(augment=NoAugment())
    assert abs(merged_nll(augment=shift) - merged_nll()) > 1e-4


@pytest.mark.parametrize("method", [UniformSoup(), FisherMerge(samples=16), TaskVectors(steps=5)], ids=str)
def test_trained_branches_of_a_student_merge_into_a_good_one(method):
    student = trained(conv_net(), seed=0, epochs=2)
    config = Merge(method=method, members=2, train=TrainConfig(epochs=1, batch_size=16, learning_rate=0.003))

    def train_branch(model: nn.Module, seed: int, name: str) -> object:
        hardware = Hardware(accelerator="cpu")
        return fit(model, plain_step(), DATA, config.train, seed=seed, augment=NoAugment(), hardware=hardware)

    report = merge_branches(student, config, DATA, seed=0, train_branch=train_branch)
    assert len(set(report.member_nlls)) == 2
    assert report.kept == "merged"
    assert report.merged_nll == pytest.approx(nll(student), abs=1e-9)
    assert report.merged_nll < report.student_nll
    assert int(student[1].num_batches_tracked) == 8  # of the student's own training


def test_defaults_round_trip_and_bounds():
    config = Merge()
    assert (config.method, config.members) == (UniformSoup(), 3)
    assert (config.train.epochs, config.train.learning_rate) == (2, 3e-4)
    other = Merge(method=TaskVectors(steps=7), members=16)
    assert Merge.model_validate_json(other.model_dump_json()) == other
    assert Merge.model_validate({"method": {"kind": "fisher"}}).method == FisherMerge()
    for wrong in ({"members": 1}, {"members": 17}, {"method": {"kind": "stew"}}, {"keep": True}):
        with pytest.raises(ValidationError):
            Merge.model_validate(wrong)
    for kind, values in (("fisher", {"samples": 0}), ("fisher", {"exact_classes": 0}), ("task_vectors", {"steps": 0})):
        with pytest.raises(ValidationError):
            Merge.model_validate({"method": {"kind": kind, **values}})
