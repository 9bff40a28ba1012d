"""Of two networks the one that knows a sample teaches it; the peer learns, resumes, and is gone afterwards."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from compression.data.dataset import Dataset, without_labels
from compression.distill import CrossEntropy, DistillationStep, DistillConfig, Kd, Uniform
from compression.distill.online import Changed, OnlineAugment
from compression.distill.procedures import Single, Training
from compression.distill.procedures.peers import Peers, PeersStep, directions, of_labelled, selective
from compression.errors import CompressionError
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Batch
from compression.zoo import VisionTransformer
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import CLASSES, tiny_dataset

BATCH = 64
PEER = VisionTransformer(width=8, depth=1, num_heads=2, stem="patch")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and peer, and labels, a quarter of them unknown."""
    labels = torch.arange(BATCH) % len(CLASSES)
    labels[::4] = -1
    shape = (BATCH, len(CLASSES))
    return 2 * randn(*shape, seed=1, dtype=dtype), 2 * randn(*shape, seed=2, dtype=dtype), labels


# ---------------------------------------------------------------- who teaches whom


def test_at_most_one_teaches_and_only_where_it_is_right_and_surer_of_the_label():
    student, peer, labels = pair()
    to_student, to_peer = directions(student, peer, labels)
    assert not (to_student & to_peer).any()
    for row, label in enumerate(labels.tolist()):
        ours, theirs = (-each[row].log_softmax(-1)[label] for each in (student, peer))
        assert bool(to_student[row]) == (label >= 0 and theirs < ours and int(peer[row].argmax()) == label)
        assert bool(to_peer[row]) == (label >= 0 and ours < theirs and int(student[row].argmax()) == label)
    assert to_student.any()
    assert to_peer.any()
    assert not (to_student | to_peer)[labels >= 0].all()


def test_directions_change_with_the_roles():
    student, peer, labels = pair()
    assert torch.equal(directions(student, peer, labels)[0], directions(peer, student, labels)[1])


def test_equal_networks_teach_nothing():
    student, _, labels = pair()
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = selective(first, second, labels, temperature=2.0)
    loss.backward()
    assert loss == 0
    assert first.grad.abs().max() == 0
    assert second.grad.abs().max() == 0


def test_is_the_divergence_from_whoever_teaches_and_reaches_the_taught_alone():
    student, peer, labels = pair(torch.float64)
    student.requires_grad_()
    peer.requires_grad_()
    loss = selective(student, peer, labels, temperature=3.0)
    loss.backward()
    to_student, to_peer = directions(student, peer, labels)
    expected = 0.0
    for row in range(BATCH):
        ours, theirs = (each[row].detach().div(3.0).softmax(-1) for each in (student, peer))
        if to_student[row]:
            expected += float((theirs * (theirs / ours).log()).sum()) * 9.0 / BATCH
        if to_peer[row]:
            expected += float((ours * (ours / theirs).log()).sum()) * 9.0 / BATCH
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    for found, taught in ((student.grad, to_student), (peer.grad, to_peer)):
        assert (found[taught].abs().amax(-1) > 0).all()
        assert found[~taught].abs().max() == 0
    torch.testing.assert_close(
        student.grad[to_student], 3.0 / BATCH * ((student / 3.0).softmax(-1) - (peer / 3.0).softmax(-1))[to_student]
    )


def test_order_of_the_batch_changes_nothing():
    student, peer, labels = pair()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    mixed = selective(student[order], peer[order], labels[order], temperature=2.0)
    torch.testing.assert_close(mixed, selective(student, peer, labels, temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_a_finite_float32_value_and_gradient(dtype):
    student, peer, labels = (each.to(dtype) if each.is_floating_point() else each for each in pair())
    student, peer = (student * 1e4).requires_grad_(), (peer * 1e4).requires_grad_()
    loss = selective(student, peer, labels, temperature=1.0) + of_labelled(peer, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(peer.grad).all()


def test_labels_that_are_missing_count_as_nothing():
    student, peer, labels = pair()
    known = labels >= 0
    share = float(known.double().mean())
    alone = selective(student[known], peer[known], labels[known], temperature=2.0)
    torch.testing.assert_close(selective(student, peer, labels, temperature=2.0), share * alone)
    torch.testing.assert_close(of_labelled(peer, labels), share * F.cross_entropy(peer[known], labels[known]))
    none = torch.full_like(labels, -1)
    peer.requires_grad_()
    (selective(student, peer, none, temperature=2.0) + of_labelled(peer, none)).backward()
    assert peer.grad.abs().max() == 0


# ---------------------------------------------------------------- the step


def batch_of(labels: torch.Tensor) -> Batch:
    count = len(labels)
    return Batch(randn(count, 1, 8, 8), labels, torch.arange(count), view=0, epoch=0, step=0)


def test_terms_are_the_configured_ones_the_peers_own_and_the_exchange():
    labels = torch.arange(8) % len(CLASSES)
    student, peer, teacher = net(6, seed=1), net(4, seed=2), net(8, seed=3)
    alone = DistillationStep((CrossEntropy(), Kd()), Uniform(), (), [teacher])(student, batch_of(labels))
    step = DistillationStep((CrossEntropy(), Kd()), Uniform(), (), [teacher])
    terms = PeersStep(step, peer, weight=0.7, temperature=2.0)(student, batch_of(labels))
    assert list(terms) == ["cross_entropy", "kd", "peer_cross_entropy", "peers"]
    images = batch_of(labels).images
    torch.testing.assert_close(torch.stack([terms["cross_entropy"], terms["kd"]]), torch.stack([*alone.values()]))
    torch.testing.assert_close(terms["peer_cross_entropy"], F.cross_entropy(peer(images), labels))
    exchanged = selective(student(images), peer(images), labels, temperature=2.0)
    torch.testing.assert_close(terms["peers"], 0.7 * exchanged)
    terms["peers"].backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in student.parameters())


class Upside(OnlineAugment):
    """Turns the images over and keeps the labels of every other sample."""

    def forward(self, batch: Batch, student: nn.Module, teachers: object) -> Changed:
        labels = batch.labels.clone()
        labels[::2] = -1
        return Changed(batch.images.flip(2), labels)


def test_the_peer_sees_the_batch_as_the_student_sees_it():
    labels = torch.arange(8) % len(CLASSES)
    student, peer = net(6, seed=1), net(4, seed=2)
    step = DistillationStep((CrossEntropy(), Kd()), Uniform(), (), [net(8, seed=3)], online=Upside())
    terms = PeersStep(step, peer, weight=1.0, temperature=2.0)(student, batch_of(labels))
    changed = Upside()(batch_of(labels), student, ())
    torch.testing.assert_close(terms["peer_cross_entropy"], of_labelled(peer(changed.images), changed.labels))
    exchanged = selective(student(changed.images), peer(changed.images), changed.labels, temperature=2.0)
    torch.testing.assert_close(terms["peers"], exchanged)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(validation=16)


@pytest.fixture(scope="module")
def panel(dataset, tmp_path_factory):
    return [stored(dataset, tmp_path_factory.mktemp("outputs"), width=8, seed=8)]


def training(panel, dataset, folder, **changes) -> Training:
    """12 steps in 3 epochs on labels and one teacher."""
    train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    return Training(
        student=net(6, seed=3),
        panel=panel,
        teachers=(),
        dataset=dataset,
        config=DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2),
        seed=0,
        augment=SHIFT,
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder,
        **changes,
    )


def test_the_peer_learns_resumes_and_stays_out_of_the_student(panel, dataset, tmp_path):
    procedure, whole = Peers(peer=PEER, weight=1.0).build(), training(panel, dataset, tmp_path / "whole")
    history = procedure(whole)
    rows = history.rows
    assert rows[-1]["peer_cross_entropy"] < rows[0]["peer_cross_entropy"]
    assert all(row["peers"] > 0 for row in rows)
    assert list(whole.student.state_dict()) == list(net(6, seed=3).state_dict())
    parts = load_state(tmp_path / "whole")["helpers"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = PEER.build(len(CLASSES), (1, 8, 8)).state_dict()
    assert sorted(parts) == sorted(f"1.{name}" for name in start)
    assert all((parts[f"1.{name}"] - value).abs().max() > 1e-4 for name, value in start.items())

    with pytest.raises(Stop):
        procedure(training(panel, dataset, tmp_path / "cut", on_step=stop_at(7)))
    again = training(panel, dataset, tmp_path / "cut")
    procedure(again)
    assert_same(again.student.state_dict(), whole.student.state_dict())
    assert_same(load_state(tmp_path / "cut")["helpers"], parts)


def test_without_exchange_the_student_learns_as_if_it_were_alone(panel, dataset, tmp_path):
    alone, beside, taught = (training(panel, dataset, None) for _ in range(3))
    Single().build()(alone)
    Peers(peer=PEER, weight=0.0).build()(beside)
    Peers(peer=PEER, weight=1.0).build()(taught)
    assert_same(beside.student.state_dict(), alone.student.state_dict())
    assert not torch.equal(taught.student.state_dict()["0.weight"], alone.student.state_dict()["0.weight"])


def test_data_without_labels_are_refused_before_training(panel, dataset):
    with pytest.raises(CompressionError, match=r"'blobs' has 0 labels for 64 samples.*Set distill.labels to all"):
        Peers(peer=PEER).build()(training(panel, without_labels(dataset), None))


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"temperature": 0}, {"peer": {"kind": "nobody"}}, {"peers": 2}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Peers.model_validate(wrong)
