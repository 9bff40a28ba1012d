import math

import pytest
import torch
from torch import nn

from compression.data.dataset import Split
from compression.errors import CompressionError, ShapeError
from compression.metrics import Metrics, adaptive_ece, metrics_of, per_class_accuracy, predict, reliability
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
    assert found.ece == pytest.approx(float(wanted), abs=1e-12)
    bins = reliability(logits, labels)
    assert sum(count for _, _, count in bins) == 500
    gaps = sum(count / 500 * abs(accuracy - conf) for conf, accuracy, count in bins)
    assert found.ece == pytest.approx(gaps, abs=1e-12)


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


def certain(confidence: float) -> list[float]:
    """Logits of two classes whose first one has this probability."""
    return [math.log(confidence), math.log(1 - confidence)]


def test_adaptive_ece_of_a_worked_example() -> None:
    """Two bins of two samples: |0.65 - 0.5| and |0.85 - 1|, half of the samples each."""
    logits = torch.tensor([certain(c) for c in (0.6, 0.9, 0.7, 0.8)], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0])
    assert adaptive_ece(logits, labels, bins=2) == pytest.approx(0.5 * 0.15 + 0.5 * 0.15)
    assert adaptive_ece(logits, labels, bins=1) == pytest.approx(abs(0.75 - 0.75), abs=1e-12)


def test_adaptive_bins_hold_equally_many_samples_and_see_what_one_wide_bin_hides() -> None:
    """All samples in one equal-width bin: halves that err in opposite ways cancel in it, not in equal-mass bins."""
    logits = torch.tensor([certain(0.951)] * 10 + [certain(0.999)] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 10 + [0] * 9 + [1])
    found = metrics_of(logits, labels)
    assert found.ece == pytest.approx(abs(0.95 - 0.975), abs=1e-4)
    assert found.ece_adaptive == pytest.approx(0.5 * 0.049 + 0.5 * 0.099)


def test_equal_confidences_share_a_bin_so_that_order_changes_nothing() -> None:
    labels = torch.arange(30) % 3
    logits = torch.zeros(30, 3)
    logits[:, 0] = 1.0
    orders = [torch.randperm(30, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = {adaptive_ece(logits[order], labels[order]) for order in orders}
    assert max(found) - min(found) < 1e-12
    assert min(found) == pytest.approx(math.e / (math.e + 2) - 1 / 3)


def test_errors_are_those_of_torchmetrics_and_classwise_the_mean_of_its_binary_ones() -> None:
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 5, generator=generator) * 2
    labels = torch.randint(0, 5, (400,), generator=generator)
    probs = logits.double().softmax(1)
    each = [binary_calibration_error(probs[:, c].contiguous(), (labels == c).long(), n_bins=15) for c in range(5)]
    found = metrics_of(logits, labels)
    assert found.ece_classwise == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    theirs = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=15, norm="l1")
    assert found.ece == pytest.approx(float(theirs), abs=1e-6)


def test_classwise_ece_sees_the_classes_that_were_not_predicted() -> None:
    """Top confidence is right on average; the rest of the mass is on the wrong one of the two other classes."""
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]] * 10, dtype=torch.float64))
    labels = torch.tensor([0] * 6 + [2] * 4)
    found = metrics_of(logits, labels)
    assert found.ece == pytest.approx(0.0, abs=1e-6)
    assert found.ece_classwise == pytest.approx((0.0 + 0.3 + 0.3) / 3)


def test_accuracy_per_class_is_none_where_a_class_does_not_occur() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[5.0, 0, 0], [5, 0, 0], [0, 5, 0], [5, 0, 0]])
    assert per_class_accuracy(logits, labels) == [1.0, 0.5, None]


def test_results_of_older_runs_still_load() -> None:
    old = {"accuracy": 0.9, "nll": 0.3, "ece": 0.02, "brier": 0.1, "worst_class_accuracy": 0.8, "num_samples": 10}
    loaded = Metrics.model_validate(old)
    assert (loaded.ece_adaptive, loaded.ece_classwise) == (None, None)
    assert loaded.model_dump(exclude_none=True) == old


def test_labels_that_are_no_class_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"1 of 2 values outside 0\.\.2"):
        metrics_of(torch.zeros(2, 3), torch.tensor([0, 3]))
