"""The gate: what it looks at, whom it sends a sample to, what it learns from, and training with it."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.augment import NoAugment
from compression.data.dataset import Dataset
from compression.distill import DistillConfig, Kd, Shapes, distill
from compression.distill.teachers.router import (
    Router,
    RouterGate,
    gate_inputs,
    imbalance,
    imitation,
    misjudgement,
    routed,
)
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import UNKNOWN, Outputs, TeacherOutputs
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHERS, BATCH, CLASSES = 3, 8, 4
LABELS = torch.arange(BATCH) % CLASSES


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gate(teachers: int = TEACHERS, *, drawn: bool = True, **settings) -> RouterGate:
    """A gate with drawn weights, or as it starts."""
    combine = Router(**settings).build()
    combine.prepare(Shapes(CLASSES, 6, num_teachers=teachers))
    if drawn:
        combine.gate.weight.data = randn(*combine.gate.weight.shape, seed=7)
    return combine


def terms(combine: RouterGate, student: Tensor, logits: Tensor, labels: Tensor = LABELS) -> dict[str, Tensor]:
    weights = combine(logits, labels, student)
    return combine.terms(Outputs(student), TeacherOutputs(logits, weights), labels)


# ---------------------------------------------------------------- the choice


def test_the_gate_sees_centred_logits_and_how_sure_the_teachers_are():
    student, logits = randn(BATCH, CLASSES), randn(TEACHERS, BATCH, CLASSES, seed=1)
    logits[2, :, 3] = UNKNOWN
    seen = gate_inputs(logits, student.requires_grad_())
    assert seen.shape == (BATCH, CLASSES + 2 * TEACHERS)
    assert not seen.requires_grad
    torch.testing.assert_close(seen[:, :CLASSES], student.detach() - student.detach().mean(-1, keepdim=True))
    probs = logits.softmax(-1)
    torch.testing.assert_close(seen[:, CLASSES : CLASSES + TEACHERS], probs.amax(-1).T)
    entropy = torch.distributions.Categorical(probs=probs).entropy().T
    torch.testing.assert_close(seen[:, CLASSES + TEACHERS :], entropy, rtol=1e-4, atol=1e-5)
    shifted = gate_inputs(logits + randn(TEACHERS, BATCH, 1), student + randn(BATCH, 1, seed=5))
    torch.testing.assert_close(shifted, seen, rtol=1e-4, atol=1e-5)


def test_weights_are_the_largest_gate_probabilities_over_their_sum():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    torch.testing.assert_close(routed(probs, top_k=1).T, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(routed(probs, top_k=2).T, torch.tensor([[0.625, 0.375, 0.0], [0.0, 2 / 9, 7 / 9]]))
    for all_of_them in (3, 9):
        torch.testing.assert_close(routed(probs, top_k=all_of_them).T, probs)
    torch.testing.assert_close(routed(torch.tensor([[0.4, 0.4, 0.2]]), top_k=1).T, torch.tensor([[0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_gate_that_has_learnt_nothing_gives_all_teachers_the_same(top_k):
    weights = gate(drawn=False, top_k=top_k)(randn(TEACHERS, BATCH, CLASSES), LABELS, randn(BATCH, CLASSES))
    torch.testing.assert_close(weights, torch.full((TEACHERS, BATCH), 1 / TEACHERS))


def test_samples_are_routed_apart_by_a_gate_with_weights():
    weights = gate()(randn(TEACHERS, BATCH, CLASSES), LABELS, randn(BATCH, CLASSES, seed=3))
    assert not weights.requires_grad
    assert ((weights == 1).sum(0) == 1).all()
    assert len(weights.argmax(0).unique()) > 1


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_teachers_are_one_teacher_whatever_the_gate(top_k):
    logits, student = randn(1, BATCH, CLASSES), randn(BATCH, CLASSES, seed=3)
    kd = Kd().build()
    weights = gate(top_k=top_k)(logits.expand(TEACHERS, -1, -1), LABELS, student)
    torch.testing.assert_close(
        kd(Outputs(student), TeacherOutputs(logits.expand(TEACHERS, -1, -1), weights), LABELS),
        kd(Outputs(student), TeacherOutputs(logits, torch.ones(1, BATCH)), LABELS),
    )


def test_other_teachers_than_the_gate_was_made_for_are_refused():
    with pytest.raises(CompressionError, match="0 teachers announced, expected at least 1"):
        Router().build().prepare(Shapes(CLASSES, 6))
    with pytest.raises(ShapeError, match="4 teachers and 4 classes, expected the 3 teachers and 4 classes"):
        gate()(randn(4, BATCH, CLASSES), LABELS, randn(BATCH, CLASSES))
    with pytest.raises(ShapeError, match="3 teachers and 6 classes, expected the 3 teachers and 4 classes"):
        gate()(randn(3, BATCH, 6), LABELS, randn(BATCH, 6))


# ---------------------------------------------------------------- what the gate learns from


def test_imitation_is_the_gradient_of_a_gate_that_is_multiplied_in():
    scores, costs = randn(BATCH, TEACHERS).requires_grad_(), randn(BATCH, TEACHERS, seed=1).exp().requires_grad_()
    (ours,) = torch.autograd.grad(imitation(scores.log_softmax(-1), costs), scores)
    (multiplied,) = torch.autograd.grad((scores.softmax(-1) * costs).sum(-1).mean(), scores)
    torch.testing.assert_close(ours, multiplied)
    (renormalised,) = torch.autograd.grad((routed(scores.softmax(-1), top_k=1).T * costs).sum(-1).mean(), scores)
    assert ours.abs().max() > 1e-2
    assert renormalised.abs().max() < 1e-7  # the best one's share of itself is 1
    imitation(scores.log_softmax(-1), costs).backward()
    assert costs.grad is None


def test_balance_is_0_where_all_get_the_same_on_average_and_grows_at_collapse():
    apart = torch.eye(3).repeat(2, 1).clamp(min=1e-6).log()  # each sample has one teacher, each teacher has two samples
    assert float(imbalance(apart)) == pytest.approx(0, abs=1e-5)
    assert float(imbalance(torch.zeros(5, 3).log_softmax(-1))) == pytest.approx(0, abs=1e-6)
    mean = torch.tensor([0.5, 0.25, 0.25])
    assert float(imbalance(mean.log().expand(4, 3))) == pytest.approx(float((math.log(1 / 3) - mean.log()).mean()))
    collapsed = [imbalance((torch.tensor([s, 0.0, 0.0]).expand(4, 3)).log_softmax(-1)) for s in (1.0, 10.0, 1e4)]
    assert 0.05 < collapsed[0] < collapsed[1] < collapsed[2] < math.inf


def test_misjudgement_asks_for_the_teachers_that_are_right():
    logits = randn(TEACHERS, BATCH, CLASSES)
    right = torch.stack([logits[k].log_softmax(-1)[torch.arange(BATCH), LABELS] for k in range(TEACHERS)], dim=1)
    wanted = (right / 0.5).softmax(-1)
    entropy = -(wanted * wanted.log()).sum(-1).mean()
    torch.testing.assert_close(misjudgement(wanted.log(), logits, LABELS, sharpness=0.5), entropy)
    for seed in range(5):
        other = randn(BATCH, TEACHERS, seed=seed).log_softmax(-1)
        assert misjudgement(other, logits, LABELS, sharpness=0.5) > entropy


def test_only_labels_that_some_teacher_knows_are_learnt_from():
    logits, log_gate = randn(TEACHERS, BATCH, CLASSES), randn(BATCH, TEACHERS).log_softmax(-1)
    logits[:, :, 3] = UNKNOWN
    labels = torch.tensor([0, -1, 3, 1, -1, 2, 3, 0])
    rows = torch.tensor([0, 3, 5, 7])
    found = misjudgement(log_gate, logits, labels, sharpness=1.0)
    alone = misjudgement(log_gate[rows], logits[:, rows], labels[rows], sharpness=1.0)
    torch.testing.assert_close(found, alone * len(rows) / BATCH)
    scores = randn(BATCH, TEACHERS).requires_grad_()
    nothing = misjudgement(scores.log_softmax(-1), logits, torch.full((BATCH,), -1), sharpness=1.0)
    nothing.backward()
    assert nothing == 0
    assert torch.equal(scores.grad, torch.zeros(BATCH, TEACHERS))


@pytest.mark.parametrize("drawn", [False, True])
def test_every_term_trains_the_gate_and_nothing_else(drawn):
    """Also from the start, where renormalised weights alone would tell the gate nothing."""
    student, logits = randn(BATCH, CLASSES).requires_grad_(), randn(TEACHERS, BATCH, CLASSES, seed=2).requires_grad_()
    combine = gate(drawn=drawn)
    found = terms(combine, student, logits)
    assert list(found) == ["gate_kd", "gate_balance", "gate_labels"]
    for name, value in found.items():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value >= 0
        (moved,) = torch.autograd.grad(value, combine.gate.weight, retain_graph=True)
        # at the start the gate is balanced already
        assert (float(moved.abs().max()) > 1e-3) == (drawn or name != "gate_balance"), name
    sum(terms(combine, student, logits).values()).backward()
    assert student.grad is None
    assert logits.grad is None


def test_terms_have_their_weights_and_the_divergences_their_temperature():
    student, logits = randn(BATCH, CLASSES), randn(TEACHERS, BATCH, CLASSES, seed=2)
    plain = terms(gate(), student, logits)
    for name, field in (("gate_kd", "kd_weight"), ("gate_balance", "balance_weight"), ("gate_labels", "label_weight")):
        changed = terms(gate(**{field: 3.0}), student, logits)
        for other in plain:
            torch.testing.assert_close(changed[other], plain[other] * (3 if other == name else 1))
    combine = gate(temperature=2.0)
    probs = combine.log_probs(logits, student).exp()
    kd = Kd(temperature=2.0).build()
    costs = torch.stack(
        [
            torch.stack(
                [
                    kd(
                        Outputs(student[i : i + 1]),
                        TeacherOutputs(logits[k : k + 1, i : i + 1], torch.ones(1, 1)),
                        LABELS,
                    )
                    for k in range(TEACHERS)
                ]
            )
            for i in range(BATCH)
        ]
    )
    torch.testing.assert_close(terms(combine, student, logits)["gate_kd"], (probs * costs).sum(-1).mean())


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_terms_are_finite_at_extreme_logits_and_the_same_under_autocast(scale):
    student, logits, combine = randn(BATCH, CLASSES), randn(TEACHERS, BATCH, CLASSES, seed=2), gate()
    extreme = terms(combine, student * scale, logits * scale)
    sum(extreme.values()).backward()
    assert all(torch.isfinite(value) for value in extreme.values())
    assert torch.isfinite(combine.gate.weight.grad).all()
    expected = terms(combine, student, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, value in terms(combine, student, logits).items():
            torch.testing.assert_close(value, expected[name])


# ---------------------------------------------------------------- training

DATA = tiny_dataset(validation=16)


class HalfRight:
    """Knows the label of the classes it is good at, and is as sure of a wrong one elsewhere."""

    class_names = ("a", "b", "c", "d")
    spec = OutputsSpec(views=1, seed=0, augment=NoAugment())

    def __init__(self, dataset: Dataset, good: tuple[int, ...]) -> None:
        self._rows, self.validation_logits = (
            5.0 * nn.functional.one_hot(torch.where(torch.isin(labels, torch.tensor(good)), labels, 3 - labels), 4)
            for labels in (dataset.train.labels, dataset.validation.labels)
        )

    def logits(self, ids: Tensor, view: int) -> Tensor:
        del view
        return self._rows[ids]

    def features(self, ids: Tensor, view: int) -> Tensor:
        raise AssertionError


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def trained(folder: Path, *, epochs: int = 3, on_step=None) -> tuple[nn.Module, dict[str, Tensor], list]:
    """A student of two teachers that are right about two classes each, the state of the gate, and the rows."""
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=0.02, checkpoint_every_steps=2)
    config = DistillConfig(train=train, teachers=Router(), views=1)
    student = net()
    history = distill(
        student,
        [HalfRight(DATA, (0, 1)), HalfRight(DATA, (2, 3))],
        DATA,
        config,
        seed=0,
        augment=NoAugment(),
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder,
        on_step=on_step,
    )
    state = load_state(folder)
    assert state is not None
    return student, state["helpers"], history.rows


def test_the_gate_learns_who_is_right_and_the_student_follows(tmp_path):
    """Each teacher alone is right about half of the samples."""
    student, parts, rows = trained(tmp_path, epochs=15)
    combine = gate(2)
    combine.load_state_dict({name.split(".", 1)[1]: value for name, value in parts.items()})
    logits = torch.stack([HalfRight(DATA, good).logits(DATA.train.ids, 0) for good in ((0, 1), (2, 3))])
    with torch.no_grad():
        ours = student((DATA.train.images.float() / 255 - 0.3) / 0.2)
    chosen = combine(logits, DATA.train.labels, ours).argmax(0)
    assert float((chosen == (DATA.train.labels >= 2)).double().mean()) > 0.9
    assert rows[-1]["gate_labels"] < rows[0]["gate_labels"]
    assert rows[-1]["validation_accuracy"] > 0.9


def test_the_gate_resumes_and_stays_out_of_the_student(tmp_path):
    def stop(done: int, total: int) -> None:
        del total
        if done == 7:
            raise InterruptedError

    student, parts, rows = trained(tmp_path / "whole")
    assert sorted(name.split(".", 1)[1] for name in parts) == ["gate.bias", "gate.weight"]
    assert all(float(value.abs().max()) > 1e-3 for value in parts.values())
    assert {"gate_kd", "gate_balance", "gate_labels", "kd", "cross_entropy"} <= set(rows[-1])
    assert list(student.state_dict()) == list(net().state_dict())

    with pytest.raises(InterruptedError):
        trained(tmp_path / "cut", on_step=stop)
    again, parts_again, _ = trained(tmp_path / "cut")
    for left, right in ((again.state_dict(), student.state_dict()), (parts_again, parts)):
        assert list(left) == list(right)
        for name in left:
            assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"temperature": 0}, {"sharpness": 0}, {"kd_weight": -1}, {"k": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Router.model_validate(wrong)
