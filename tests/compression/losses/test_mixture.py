"""The panel's distribution, and the losses that refuse a panel of other classes."""

import pytest
import torch

from compression.distill import BdKd, Dist, Dkd, Kd, Pld, TopKld
from compression.distill.mixture import divergence, log_mixture, mixture
from compression.errors import ShapeError
from compression.types import Outputs, TeacherOutputs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def panel_of(batch: int, classes: int, scale: float = 3.0) -> TeacherOutputs:
    weights = randn(3, batch, seed=1).softmax(0)
    return TeacherOutputs(randn(3, batch, classes, seed=2) * scale, weights)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_is_the_weighted_mean_of_softened_teachers(temperature):
    panel = panel_of(7, 5)
    expected = torch.stack(
        [sum(panel.weights[k, i] * (panel.logits[k, i] / temperature).softmax(0) for k in range(3)) for i in range(7)]
    )
    found = mixture(torch.zeros(7, 5), panel, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(7))
    torch.testing.assert_close(log_mixture(torch.zeros(7, 5), panel, temperature).exp(), expected)


def test_logarithm_is_finite_where_the_probability_rounds_to_zero():
    logits = torch.tensor([[[0.0, -1e4]], [[0.0, -2e4]]])
    panel = TeacherOutputs(logits, torch.full((2, 1), 0.5))
    assert mixture(torch.zeros(1, 2), panel)[0, 1] == 0
    expected = torch.tensor([[0.0, -1e4 - 0.6931]])
    torch.testing.assert_close(log_mixture(torch.zeros(1, 2), panel), expected)


def test_a_teacher_without_weight_is_not_heard():
    panel = panel_of(4, 5)
    weights = torch.stack([torch.ones(4), torch.zeros(4), torch.zeros(4)])
    found = log_mixture(torch.zeros(4, 5), TeacherOutputs(panel.logits, weights), 2.0)
    torch.testing.assert_close(found, (panel.logits[0] / 2).log_softmax(1))


def test_half_precision_is_widened_and_no_gradient_comes_back():
    panel = panel_of(4, 5)
    logits, weights = panel.logits.half().requires_grad_(), panel.weights.half().requires_grad_()
    for found in (mixture, log_mixture):
        value = found(torch.zeros(4, 5), TeacherOutputs(logits, weights))
        assert value.dtype == torch.float32
        assert not value.requires_grad


def test_divergence_of_a_known_pair():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    torch.testing.assert_close(divergence(p.log(), q.log()), torch.tensor([0.14384104]))
    torch.testing.assert_close(divergence(q.log(), p.log()), torch.tensor([0.13081204]))


@pytest.mark.parametrize("loss", [Kd(), Pld(), Dkd(), Dist(), BdKd(), TopKld(), TopKld(top_k=9)], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 1, 5), (6, 5)])
def test_losses_refuse_shapes_that_would_broadcast(loss, shape):
    teachers = TeacherOutputs(torch.zeros(shape), torch.ones(shape[:-1]))
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        loss.build()(Outputs(torch.zeros(6, 5)), teachers, torch.zeros(6, dtype=torch.int64))
