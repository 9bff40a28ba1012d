import math

import pytest
import torch
from torch import nn

from compression.data.dataset import Split
from compression.errors import CompressionError, ShapeError
from compression.metrics import metrics_of, predict, reliability
from compression.types import Preprocessing

PLAIN = Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,))


def test_a_perfect_and_a_uniform_answer() -> None:
    labels = torch.arange(20) % 4
    perfect = metrics_of(torch.nn.functional.one_hot(labels, 4).float() * 100, labels)
    assert (perfect.accuracy, perfect.worst_class_accuracy) == (1.0, 1.0)
    assert perfect.nll == pytest.approx(0, abs=1e-6)
    assert perfect.ece == pytest.approx(0, abs=1e-6)
    uniform = metrics_of(torch.zeros(20, 4), labels)
    assert uniform.nll == pytest.approx(math.log(4))
    assert uniform.brier == pytest.approx(0.75)


def test_ece_equals_its_definition_and_the_reliability_gaps() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=generator) * 2
    labels = torch.randint(0, 5, (500,), generator=generator)
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    wanted = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            wanted += inside.double().mean() * (correct[inside].mean() - confidence[inside].mean()).abs()
    found = metrics_of(logits, labels)
    assert found.ece == pytest.approx(float(wanted), abs=1e-4)
    bins = reliability(logits, labels)
    assert sum(count for _, _, count in bins) == 500
    gaps = sum(count / 500 * abs(accuracy - conf) for conf, accuracy, count in bins)
    assert found.ece == pytest.approx(gaps, abs=1e-4)


def test_the_worst_class_is_the_worst_one_that_occurs() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[5.0, 0, 0], [5, 0, 0], [0, 5, 0], [5, 0, 0]])
    found = metrics_of(logits, labels)
    assert found.worst_class_accuracy == 0.5
    assert found.accuracy == 0.75


def test_order_of_samples_changes_nothing() -> None:
    logits, labels = torch.randn(50, 3), torch.randint(0, 3, (50,))
    order = torch.randperm(50)
    first, second = metrics_of(logits, labels), metrics_of(logits[order], labels[order])
    assert first.model_dump() == pytest.approx(second.model_dump())


def test_broken_logits_are_refused() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(CompressionError):
        metrics_of(torch.full((4, 3), float("nan")), labels)
    with pytest.raises(ShapeError):
        metrics_of(torch.zeros(5, 3), labels)


def test_predict_gives_the_modes_back_and_uses_eval() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 3))
    model[1].eval()
    model[0].train()
    split = Split(images=torch.rand(10, 1, 2, 2), labels=torch.zeros(10, dtype=torch.int64), ids=torch.arange(10))
    modes = [module.training for module in model.modules()]
    first = predict(model, split, PLAIN, batch_size=3)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(first, model[2](split.images.flatten(1)).detach())
    assert first.shape == (10, 3)
