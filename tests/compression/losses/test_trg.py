"""Graph of patches: the three terms, what they do not depend on, the draw of nodes, and training with them."""

from itertools import permutations
from math import log

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.distill import CrossEntropy, DistillationStep, DistillConfig, Shapes, Uniform, distill
from compression.distill.losses.trg import (
    TokenGraph,
    Trg,
    affinities,
    global_term,
    inner_term,
    local_term,
    spread,
    squared_distances,
)
from compression.distill.types import Progress
from compression.errors import ShapeError
from compression.features import tokens_of
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Outputs, TeacherOutputs
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, one_thread, stop_at
from tests.compression.tiny_data import CLASSES, tiny_dataset

BATCH = 6
LABELS = torch.zeros(BATCH, dtype=torch.int64)
OURS, THEIRS, TOKENS = (5, 4, 4), (7, 2, 3), (9, 3)
"""Last maps of a student, of a teacher, and of one that gives tokens."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(ours: tuple[int, ...] = OURS, *theirs: tuple[int, ...], **options) -> TokenGraph:
    """The loss in float64, ready for networks with these last maps."""
    loss = Trg(**options).build()
    assert isinstance(loss, TokenGraph)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # An earlier stage stands before the last one of either side.
        loss.prepare(
            Shapes(
                num_classes=4,
                student_width=2,
                student_maps=((1, 8, 8), ours),
                teacher_maps=tuple(((2, 8, 8), shape) for shape in theirs or (THEIRS,)),
            )
        )
    return loss.double()


def outputs(last: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(last), 4), maps=(torch.zeros(len(last), 1, 8, 8), last))


def panel(*lasts: Tensor, weights: Tensor | None = None) -> TeacherOutputs:
    count, batch = len(lasts), len(lasts[0])
    shares = torch.full((count, batch), 1 / count, dtype=torch.float64) if weights is None else weights
    maps = tuple((torch.zeros(batch, 2, 8, 8), last) for last in lasts)
    return TeacherOutputs(torch.zeros(count, batch, 4), shares, maps=maps)


# ---------------------------------------------------------------- the graph


def test_distances_are_exact_far_from_the_origin_and_zero_to_oneself():
    nodes = randn(9, 4) + 1e6
    found = squared_distances(nodes)
    torch.testing.assert_close(found, (nodes.unsqueeze(1) - nodes).square().sum(-1))
    assert torch.equal(found.diagonal(), torch.zeros(9).double())
    assert (squared_distances((nodes - 1e6).float() + 100) >= 0).all()


def test_spread_is_the_median_of_pairs_but_not_of_an_empty_background():
    distances = squared_distances(randn(8, 3))
    pairs = sorted(float(distances[i, j]) for i in range(8) for j in range(8) if i != j)
    assert float(spread(distances)) == pairs[len(pairs) // 2 - 1]
    background = torch.cat([torch.zeros(12, 3).double(), randn(4, 3)])
    alike = squared_distances(background)
    assert float(spread(alike)) == pytest.approx(float(alike.sum()) / (16 * 15) / 100)
    for nothing in (torch.zeros(1, 1), torch.zeros(5, 5)):
        assert float(spread(nothing)) == 1.0


def test_an_affinity_stands_where_the_row_is_among_the_nearest_of_the_column():
    nodes = randn(10, 3)
    distances = squared_distances(nodes)
    found = affinities(distances, neighbours=3, scale=torch.tensor(0.7))
    for j in range(10):
        nearest = sorted((i for i in range(10) if i != j), key=lambda i: float(distances[i, j]))[:3]
        for i in range(10):
            expected = float(torch.exp(-distances[i, j] / 1.4)) if i in nearest else 0.0
            assert float(found[i, j]) == pytest.approx(expected)
    assert (found != found.T).any()


def test_nodes_equally_far_are_all_neighbours():
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    found = affinities(squared_distances(square), neighbours=1, scale=torch.tensor(0.5))
    assert torch.equal(found > 0, torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).bool())


def test_more_neighbours_than_nodes_tie_everyone():
    found = affinities(squared_distances(randn(5, 3)), neighbours=16, scale=torch.tensor(1.0))
    assert torch.equal(found > 0, ~torch.eye(5).bool())


def test_an_isolated_node_has_the_uniform_distribution():
    nodes = torch.cat([randn(6, 3), torch.full((1, 3), 50.0).double()])
    distances = squared_distances(nodes)
    graph = affinities(distances, neighbours=2, scale=spread(distances))
    assert torch.equal(graph[6], torch.zeros(7).double())
    # Against rows of zeros the divergence of a node is its distance from the uniform distribution.
    value = local_term(nodes, randn(7, 3, seed=1), neighbours=2)[6]
    distances = squared_distances(randn(7, 3, seed=1))
    row = affinities(distances, neighbours=2, scale=spread(distances))[6].softmax(0)
    assert float(value) == pytest.approx(float((row * row.log()).sum()) + log(7))


# ---------------------------------------------------------------- the terms


def test_local_and_inner_terms_are_zero_at_equality_and_positive_elsewhere():
    nodes, tokens = randn(12, 4), randn(3, 8, 4)
    assert torch.equal(local_term(nodes, nodes, neighbours=4), torch.zeros(12).double())
    assert torch.equal(inner_term(tokens, tokens), torch.zeros(3).double())
    assert local_term(nodes, randn(12, 6, seed=1), neighbours=4).min() > 1e-6
    assert inner_term(tokens, randn(3, 8, 6, seed=1)).min() > 1e-6


def test_local_term_sees_the_shape_of_the_cloud_and_inner_term_its_size_too():
    nodes, turn = randn(12, 4), torch.linalg.qr(randn(6, 6, seed=1)).Q[:4]
    assert local_term(nodes @ turn * 30 + 5, nodes, neighbours=4).abs().max() < 1e-12
    tokens, turned = nodes.view(3, 4, 4), (nodes @ turn).view(3, 4, 6)
    assert inner_term(turned * (6 / 4) ** 0.25, tokens).abs().max() < 1e-12  # the width is divided out
    assert inner_term(turned * 2, tokens).min() > 1e-3


def test_order_of_nodes_changes_no_term():
    ours, theirs, order = randn(12, 4), randn(12, 6, seed=1), torch.randperm(12)
    torch.testing.assert_close(
        local_term(ours[order], theirs[order], neighbours=4), local_term(ours, theirs, neighbours=4)[order]
    )
    same_width = theirs[:, :4]
    torch.testing.assert_close(
        global_term(ours[order], same_width[order], temperature=0.2),
        global_term(ours, same_width, temperature=0.2)[order],
    )
    torch.testing.assert_close(
        inner_term(ours[None, order], theirs[None, order]), inner_term(ours.unsqueeze(0), theirs.unsqueeze(0))
    )


def test_global_term_is_smallest_where_every_node_meets_itself():
    nodes = randn(4, 3)
    by_order = {
        order: float(global_term(nodes, nodes[list(order)], temperature=0.3).mean()) for order in permutations(range(4))
    }
    assert min(by_order.values()) > 0
    assert min(by_order, key=by_order.__getitem__) == (0, 1, 2, 3)


def test_terms_are_those_of_plain_loops():
    ours, theirs = randn(7, 4), randn(7, 4, seed=1)
    for i, value in enumerate(global_term(ours, theirs, temperature=0.3)):
        weights = [torch.exp(F.cosine_similarity(ours[i], theirs[j], dim=0) / 0.3) for j in range(7)]
        torch.testing.assert_close(value, -torch.log(weights[i] / sum(weights)))

    def row(nodes: Tensor, i: int) -> Tensor:
        distances = squared_distances(nodes)
        return affinities(distances, neighbours=3, scale=spread(distances))[i].softmax(0)

    for i, value in enumerate(local_term(ours, theirs, neighbours=3)):
        p, q = row(theirs, i), row(ours, i)
        torch.testing.assert_close(value, (p * (p / q).log()).sum())
    left, right = [(each @ each.T / 2).softmax(-1) for each in (ours, theirs)]
    torch.testing.assert_close(inner_term(ours[None], theirs[None]).squeeze(), (left - right).square().sum() / 49)


def test_gradients_are_those_of_finite_differences():
    """Of the affinities at a fixed scale, which is a constant of the step."""
    ours, theirs, scale = randn(6, 3).requires_grad_(), randn(6, 3, seed=1), torch.tensor(0.8)
    assert torch.autograd.gradcheck(lambda x: affinities(squared_distances(x), neighbours=2, scale=scale), ours)
    assert torch.autograd.gradcheck(lambda x: global_term(x, theirs, temperature=0.3), ours)
    assert torch.autograd.gradcheck(lambda x: inner_term(x.view(2, 3, 3), theirs.view(2, 3, 3)), ours)
    assert not spread(squared_distances(ours)).requires_grad


# ---------------------------------------------------------------- the loss


def test_maps_meet_on_the_coarsest_grid():
    loss = prepared(OURS, THEIRS, TOKENS)
    assert loss.grid == (2, 3)
    assert loss.widths == [5, 7, 3]
    assert prepared((5, 12, 12), (7, 16, 16)).grid == (4, 4)
    assert prepared((5, 12, 12), (7, 16, 16), grid=9).grid == (9, 9)
    last = randn(2, 7, 4, 6)
    cells = loss.tokens(last)
    assert cells.shape == (2, 6, 7)
    torch.testing.assert_close(cells[1, 4], last[1, :, 2:4, 2:4].mean((1, 2)))  # second row, second column
    image = randn(2, 3, 3, 3)
    torch.testing.assert_close(loss.tokens(tokens_of(image)), loss.tokens(image))


def test_is_the_weighted_sum_of_terms_teacher_by_teacher():
    ours, lasts = randn(BATCH, *OURS), (randn(BATCH, *THEIRS, seed=1), randn(BATCH, *TOKENS, seed=2))
    loss = prepared(OURS, THEIRS, TOKENS, alpha=0.3, beta=50.0, gamma=0.7, neighbours=5)
    share = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()
    weights = torch.stack([share, 1 - share])
    expected = 0.0
    for k, last in enumerate(lasts):
        mine, other = loss.tokens(ours), loss.tokens(last)
        a, b = mine.reshape(-1, 5), other.reshape(BATCH * 6, -1)
        local = local_term(a, b, neighbours=5).view(BATCH, 6).mean(1)
        globally = global_term(loss.ours[k](a), loss.theirs[k](b), temperature=0.5).view(BATCH, 6).mean(1)
        expected += (weights[k] * (0.3 * inner_term(mine, other) + 50.0 * local + 0.7 * globally)).mean()
    found = loss(outputs(ours), panel(*lasts, weights=weights), LABELS)
    torch.testing.assert_close(found, expected)


def test_both_sides_draw_the_same_nodes_from_the_random_state_of_the_process():
    last = randn(BATCH, *OURS)
    loss = prepared(OURS, OURS, nodes=20, alpha=0.0, gamma=0.0)
    for _ in range(5):
        assert loss(outputs(last), panel(last), LABELS) == 0
    other = panel(randn(BATCH, *OURS, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = (float(loss(outputs(last), other, LABELS).detach()) for _ in range(2))
        torch.manual_seed(3)
        again = float(loss(outputs(last), other, LABELS).detach())
    assert first == again != second


def test_no_draw_where_all_nodes_fit():
    before = torch.get_rng_state()
    loss = prepared(nodes=BATCH * 6)
    values = {
        float(loss(outputs(randn(BATCH, *OURS)), panel(randn(BATCH, *THEIRS)), LABELS).detach()) for _ in range(2)
    }
    assert len(values) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_falls_over_half_a_cosine():
    loss, found = prepared(), []
    for epoch in range(5):
        loss.progress = Progress(epoch=epoch, epochs=5)
        found.append(loss.temperature)
    assert (found[0], found[2], found[4]) == pytest.approx((0.5, 0.3, 0.1))
    assert found == sorted(found, reverse=True)
    assert found[0] - found[1] < found[1] - found[2]
    loss.progress = Progress(epoch=0, epochs=1)
    assert loss.temperature == pytest.approx(0.5)


def test_gradient_goes_to_the_student_and_the_projections_alone():
    ours, theirs = randn(BATCH, *OURS).requires_grad_(), randn(BATCH, *THEIRS).requires_grad_()
    loss = prepared()
    loss(outputs(ours), panel(theirs), LABELS).backward()
    assert ours.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters() if parameter.ndim > 1)
    assert theirs.grad is None


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_patches_all_alike_give_finite_numbers(value):
    loss, ours = prepared().float(), torch.full((BATCH, *OURS), value, requires_grad=True)
    found = loss(outputs(ours), panel(torch.full((BATCH, *THEIRS), value)), LABELS)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(ours.grad).all()
    assert found >= log(BATCH * 6) - 1e-4  # nothing tells a node from the others


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_maps_of_any_size_give_finite_numbers(scale):
    loss, ours = prepared().float(), (randn(BATCH, *OURS).float() * scale).requires_grad_()
    found = loss(outputs(ours), panel(randn(BATCH, *THEIRS, seed=1).float() * scale), LABELS)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(ours.grad).all()


def test_one_image_with_one_patch_has_nothing_to_learn():
    ours = randn(1, 5, 1, 1).requires_grad_()
    found = prepared((5, 1, 1), (7, 1, 1))(outputs(ours), panel(randn(1, 7, 1, 1)), LABELS[:1])
    found.backward()
    assert found == 0
    assert ours.grad.abs().max() == 0


def test_refuses_tokens_that_make_no_square_and_other_networks():
    with pytest.raises(ShapeError, match="17 tokens, expected a square"):
        prepared(OURS, (17, 8))
    with pytest.raises(ShapeError, match=r"widths \[5, 3\], expected \[5, 7\].*'trg'"):
        prepared()(outputs(randn(BATCH, *OURS)), panel(randn(BATCH, 3, 2, 3)), LABELS)
    with pytest.raises(ShapeError, match=r"widths \[5, 7, 7\], expected \[5, 7\]"):
        both = panel(randn(BATCH, *THEIRS), randn(BATCH, *THEIRS))
        prepared()(outputs(randn(BATCH, *OURS)), both, LABELS)
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        wrong = TeacherOutputs(torch.zeros(1, BATCH, 5), torch.ones(1, BATCH), maps=((randn(BATCH, *THEIRS),),))
        prepared()(outputs(randn(BATCH, *OURS)), wrong, LABELS)


# ---------------------------------------------------------------- training


def net(width: int, seed: int) -> nn.Module:
    """A network whose last map is ``width`` x 4 x 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, len(CLASSES)),
        )


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two models, and what is stored of them."""
    folder, models = tmp_path_factory.mktemp("outputs"), [net(8, seed=1), net(5, seed=2)]
    spec = OutputsSpec(views=2, seed=0, augment=SHIFT, features=False)
    for number, model in enumerate(models):
        write_teacher_outputs(model, tiny_dataset(validation=16), spec, folder / str(number))
    return [StoredOutputs.open(folder / str(number)) for number in range(2)], models


def test_learns_resumes_and_stays_out_of_the_student(teachers, tmp_path):
    panel, models = teachers
    # 64 of 16 x 16 patches, so that nodes are drawn; at one temperature, since values at different ones do not compare.
    loss = Trg(nodes=64, neighbours=4, projection=6, last_temperature=0.5)

    def distilled(name: str, on_step=None):
        student = net(6, seed=3)
        train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
        config = DistillConfig(train=train, losses=(CrossEntropy(), loss), views=2)
        with one_thread():
            history = distill(
                student,
                panel,
                tiny_dataset(validation=16),
                config,
                seed=0,
                augment=SHIFT,
                teachers=models,
                hardware=Hardware(accelerator="cpu"),
                checkpoint_dir=tmp_path / name,
                on_step=on_step,
            )
        return student, load_state(tmp_path / name)["helpers"], history

    step = DistillationStep((CrossEntropy(), loss), Uniform(), (), models)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        step.prepare(net(6, seed=3), tiny_dataset(validation=16))
    start = step.helpers.state_dict()

    student, parts, history = distilled("whole")
    assert sorted(parts) == sorted(start)
    assert {name: tuple(parts[name].shape) for name in parts if name.endswith("weight")} == {
        "0.ours.0.weight": (6, 6),
        "0.ours.1.weight": (6, 6),
        "0.theirs.0.weight": (6, 8),
        "0.theirs.1.weight": (6, 5),
    }
    for name, value in start.items():
        assert (parts[name] - value).abs().max() > 1e-3, name
    assert history.rows[-1]["trg"] < history.rows[0]["trg"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled("cut", stop_at(7))
    again, parts_again, _ = distilled("cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'trg' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Trg(),)})


@pytest.mark.parametrize(
    "wrong", [{"nodes": 1}, {"neighbours": 0}, {"grid": 0}, {"last_temperature": 0}, {"alpha": -1}, {"k": 16}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Trg.model_validate(wrong)
