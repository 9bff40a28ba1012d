"""Answers as extra outputs: the loss, the wide layer it stands for, the file, and training with it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.distill import DistillConfig, Shapes
from compression.distill.losses.multi_aspect import AspectHead, MultiAspect, read_answers
from compression.errors import CompressionError, ShapeError
from compression.train import TrainConfig
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

WIDTH, QUESTIONS = 5, 3
IDS = np.array([40, 7, 12, 3])
DATA = tiny_dataset(validation=16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chances(rows: int, questions: int = QUESTIONS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, questions), dtype=np.float32)


def written(folder: Path, **arrays) -> Path:
    np.savez(folder / "answers.npz", **arrays)
    return folder / "answers.npz"


def prepared(path: Path, *, width: int = WIDTH, classes: int = len(CLASSES)) -> AspectHead:
    loss = MultiAspect(answers=path).build()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(classes, width))
    return loss


def outputs(features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features), len(CLASSES)), {"penultimate": features})


def about(ids: Tensor | None, batch: int = 4) -> TeacherOutputs:
    return TeacherOutputs(torch.zeros(1, batch, len(CLASSES)), torch.ones(1, batch), ids=ids)


# ---------------------------------------------------------------- the loss


def test_answers_are_looked_up_by_sample_in_whatever_order_they_come(tmp_path):
    answers, features = chances(4), randn(4, WIDTH)
    loss = prepared(written(tmp_path, answers=answers, ids=IDS))
    probs = loss.head(features).sigmoid()
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        target = torch.from_numpy(answers[order])
        expected = -(target * probs.log() + (1 - target) * (1 - probs).log()).mean()
        found = loss(outputs(features), about(torch.from_numpy(IDS[order])), torch.full((4,), -1))
        torch.testing.assert_close(found, expected)


def test_answers_about_classes_follow_the_label_by_name(tmp_path):
    answers, features = chances(5), randn(4, WIDTH)
    loss = prepared(written(tmp_path, answers=answers, classes=np.array(["d", "b", "z", "a", "c"])))
    loss.observe([], DATA)
    assert torch.equal(loss.answers, torch.from_numpy(answers[[3, 1, 4, 0]]))
    labels = torch.tensor([2, 0, -1, 3])
    target = torch.from_numpy(answers[[4, 3, 0]])
    costs = nn.functional.binary_cross_entropy_with_logits(loss.head(features)[[0, 1, 3]], target)
    torch.testing.assert_close(loss(outputs(features), about(None), labels), costs * 3 / 4)
    nothing = loss(outputs(features), about(None), torch.full((4,), -1))
    nothing.backward()
    assert nothing == 0
    assert torch.equal(loss.head.weight.grad, torch.zeros(QUESTIONS, WIDTH))


def test_is_least_at_the_answers_and_is_their_entropy_there(tmp_path):
    answers = torch.from_numpy(chances(4))
    loss = prepared(written(tmp_path, answers=answers.numpy(), ids=np.arange(4)))
    nn.init.zeros_(loss.head.bias)
    loss.head.weight.data = torch.logit(answers).T.contiguous()
    loss.head.in_features = 4
    value = loss(outputs(torch.eye(4)), about(torch.arange(4)), torch.zeros(4, dtype=torch.int64))
    value.backward()
    entropy = -(answers * answers.log() + (1 - answers) * (1 - answers).log()).mean()
    torch.testing.assert_close(value.detach(), entropy)
    assert loss.head.weight.grad.abs().max() < 1e-6


def test_is_the_same_as_more_rows_of_the_last_layer(tmp_path):
    """The paper's form: C+Q outputs, of which the first C are exported."""
    answers, labels = chances(4), torch.tensor([0, 3, 1, 2])
    loss = prepared(written(tmp_path, answers=answers, ids=np.arange(4)))
    classifier, wide = nn.Linear(WIDTH, len(CLASSES)), nn.Linear(WIDTH, len(CLASSES) + QUESTIONS)
    wide.weight.data = torch.cat([classifier.weight.data, loss.head.weight.data])
    wide.bias.data = torch.cat([classifier.bias.data, loss.head.bias.data])
    ours, theirs = randn(4, WIDTH).requires_grad_(), randn(4, WIDTH).requires_grad_()
    logits = classifier(ours)
    apart = nn.functional.cross_entropy(logits, labels) + 4 * loss(
        Outputs(logits, {"penultimate": ours}), about(torch.arange(4)), labels
    )
    both = wide(theirs)
    together = nn.functional.cross_entropy(both[:, : len(CLASSES)], labels)
    together = together + 4 * nn.functional.binary_cross_entropy_with_logits(
        both[:, len(CLASSES) :], torch.from_numpy(answers)
    )
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(logits, both[:, : len(CLASSES)])
    apart.backward()
    together.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(torch.cat([classifier.weight.grad, loss.head.weight.grad]), wide.weight.grad)


def test_samples_without_ids_or_answers_are_refused(tmp_path):
    loss = prepared(written(tmp_path, answers=chances(4), ids=IDS))
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"no sample ids.*Give TeacherOutputs.ids"):
        loss(outputs(randn(4, WIDTH)), about(None), labels)
    for stranger in (0, 8, 41):
        with pytest.raises(CompressionError, match=f"no answers for sample {stranger}, expected all"):
            loss(outputs(randn(4, WIDTH)), about(torch.tensor([40, 7, stranger, 3])), labels)


# ---------------------------------------------------------------- the file


def test_without_a_file_it_is_refused_with_the_way_out():
    with pytest.raises(CompressionError, match=r"no file of answers, expected an .npz.*numpy.savez"):
        MultiAspect().build()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": IDS}, r"has the arrays \['ids'\], expected an .npz"),
        ({"answers": chances(4)}, r"has the arrays \['answers'\], expected"),
        ({"answers": chances(4), "ids": IDS, "classes": np.array(list("abcd"))}, "has the arrays .* either 'ids'"),
        ({"answers": chances(4)[0], "ids": IDS}, r"has answers float32 \[3\], expected"),
        ({"answers": chances(4) > 0.5, "ids": IDS}, r"has answers bool \[4, 3\], expected"),
        ({"answers": chances(4)[:, :0], "ids": IDS}, r"has answers float32 \[4, 0\], expected"),
        ({"answers": chances(4) + 0.5, "ids": IDS}, "expected probabilities of a yes, 0 to 1. Take the softmax"),
        ({"answers": chances(4) * np.nan, "ids": IDS}, "has answers from nan to nan, expected probabilities"),
        ({"answers": chances(4), "ids": IDS[:3]}, r"has int64 \[3\] beside answers \[4, 3\], expected"),
        ({"answers": chances(4), "ids": IDS * 1.0}, r"has float64 \[4\] beside answers"),
        ({"answers": chances(4), "classes": np.arange(4)}, r"has int64 \[4\] beside answers"),
        ({"answers": chances(4), "ids": np.array([1, 7, 7, 3])}, "has 2 rows for '7', expected one"),
        ({"answers": chances(4), "classes": np.array(list("abca"))}, "has 2 rows for 'a', expected one"),
        ({"answers": chances(4), "classes": np.array(list("abcd"), dtype=object)}, "cannot be read"),
    ],
)
def test_arrays_that_are_not_answers_are_refused(tmp_path, arrays, message):
    with pytest.raises(CompressionError, match=message):
        read_answers(written(tmp_path, **arrays))


def test_files_that_are_no_archive_are_refused(tmp_path):
    with pytest.raises(CompressionError, match=r"absent.npz' does not exist, expected an .npz.*numpy.savez"):
        read_answers(tmp_path / "absent.npz")
    np.save(tmp_path / "plain.npy", chances(4))
    with pytest.raises(CompressionError, match=r"plain.npy' is no archive"):
        read_answers(tmp_path / "plain.npy")
    whole = written(tmp_path, answers=chances(400), ids=np.arange(400)).read_bytes()
    (tmp_path / "broken.npz").write_bytes(whole[:200] + bytes(100) + whole[300:])
    with pytest.raises(CompressionError, match=r"broken.npz' cannot be read"):
        read_answers(tmp_path / "broken.npz")


def test_train_samples_and_classes_without_answers_are_refused_before_training(tmp_path):
    loss = prepared(written(tmp_path, answers=chances(60), ids=np.arange(60)))
    with pytest.raises(CompressionError, match="no answers for 4 of 64 train samples of 'blobs', 60 the first"):
        loss.observe([], DATA)
    enough = replace(DATA, train=replace(DATA.train, ids=torch.arange(60).repeat(2)[:64]))
    loss.observe([], enough)
    loss = prepared(written(tmp_path, answers=chances(3), classes=np.array(["a", "c", "x"])))
    with pytest.raises(CompressionError, match="no answers for 2 of the 4 classes of 'blobs', 'b' the first"):
        loss.observe([], DATA)


def test_answers_about_classes_are_refused_where_no_sample_has_a_label(tmp_path):
    loss = prepared(written(tmp_path, answers=chances(4), classes=np.array(CLASSES)))
    unlabelled = replace(DATA, train=replace(DATA.train, labels=torch.full((64,), -1)))
    with pytest.raises(CompressionError, match=r"'blobs' has 0 labels, expected some.*Give answers about samples"):
        loss.observe([], unlabelled)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return [stored(DATA, tmp_path_factory.mktemp("outputs"), width=6, seed=6)]


@pytest.mark.parametrize("by_class", [False, True])
def test_the_outputs_learn_resume_and_stay_out_of_the_student(teachers, tmp_path, by_class):
    of_class = np.array([[0.1, 0.9], [0.9, 0.1], [0.8, 0.8], [0.1, 0.1]], dtype=np.float32)
    if by_class:
        path = written(tmp_path, answers=of_class[::-1], classes=np.array(CLASSES[::-1]))
    else:
        path = written(tmp_path, answers=of_class[DATA.train.labels.numpy()], ids=DATA.train.ids.numpy())
    loss = MultiAspect(answers=path)
    start = fresh_parts(loss, net(6, seed=3), teachers, DATA)
    student, parts, history = distilled(loss, teachers, DATA, tmp_path / "whole")
    assert sorted(name.split(".", 1)[1] for name in parts) == ["answers"] * by_class + ["head.bias", "head.weight"]
    for name in parts:
        moved = float((parts[name] - start[name]).abs().max())
        assert moved == 0 if name.endswith("answers") else moved > 1e-3, name
    assert history.rows[-1]["multi_aspect"] < history.rows[0]["multi_aspect"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(loss, teachers, DATA, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, DATA, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


def test_without_weight_the_student_learns_as_if_it_were_not_there(teachers, tmp_path):
    path = written(tmp_path, answers=chances(64), ids=np.arange(64))
    with_it, _, _ = distilled(MultiAspect(answers=path, weight=0.0), teachers, DATA, tmp_path / "one")
    path = written(tmp_path, answers=chances(64, seed=1), ids=np.arange(64))
    other, _, _ = distilled(MultiAspect(answers=path, weight=0.0), teachers, DATA, tmp_path / "two")
    assert_same(with_it.state_dict(), other.state_dict())
    moved, _, _ = distilled(MultiAspect(answers=path), teachers, DATA, tmp_path / "three")
    assert any(not torch.equal(moved.state_dict()[name], value) for name, value in other.state_dict().items())


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'multi_aspect' alone, expected another term beside it"):
        DistillConfig(train=TrainConfig(epochs=1), losses=(MultiAspect(),))


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"answers": 3}, {"questions": 50}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        MultiAspect.model_validate(wrong)
