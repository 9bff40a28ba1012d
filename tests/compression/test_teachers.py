"""Teachers of every source: specialists, random ones, black boxes; and images that nobody has labelled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compression.augment import NoAugment, ShiftFlip
from compression.data import Dataset, Digits, load_dataset, open_dataset, save_dataset, with_pool, without_labels
from compression.distill import CrossEntropy, DistillConfig, Kd, distill
from compression.errors import CheckpointError, CompressionError, DataError
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_given_outputs, write_teacher_outputs
from compression.teachers import FromOutputs, Teacher, TrainFromScratch, Untrained, check_teacher, obtain_teacher
from compression.train import Hardware, TrainConfig
from compression.types import UNKNOWN, known
from compression.zoo import PlainCnn
from tests.compression.losses.short_training import net
from tests.compression.tiny_data import CLASSES, blobs, tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8)
QUICK = TrainConfig(epochs=2, batch_size=16, learning_rate=0.01)
SPEC = OutputsSpec(views=2, seed=0, augment=ShiftFlip(pad=1, flip=False))


def pooled() -> Dataset:
    pool = blobs(12, 5000)
    return replace(tiny_dataset(), pool=replace(pool, labels=torch.full_like(pool.labels, -1)))


def ask(dataset: Dataset, path: Path, *, temperature: float = 1.0) -> np.ndarray:
    """A black box's answers about every sample it must be asked about: sure of the class that the bright row tells."""
    parts = [with_pool(dataset).train, dataset.validation]
    images = torch.cat([part.images for part in parts]).float()
    probabilities = (images[:, 0, ::2].mean(-1) / (8 * temperature)).softmax(1).numpy()
    ids = torch.cat([part.ids for part in parts]).numpy()
    order = np.random.default_rng(0).permutation(len(ids))
    np.savez(path, ids=ids[order], probabilities=probabilities[order])
    return probabilities


# ---------------------------------------------------------------- specialists and random teachers


def test_a_specialist_learns_its_classes_and_says_nothing_about_others(tmp_path):
    dataset = tiny_dataset()
    teacher = Teacher(name="half", model=MODEL, source=TrainFromScratch(train=QUICK), classes=("a", "c"))
    model, spec, history = obtain_teacher(teacher, dataset, seed=0, augment=NoAugment())
    assert history is not None
    assert spec.num_classes == 4
    write_teacher_outputs(model, dataset, SPEC.model_copy(update={"classes": teacher.classes}), tmp_path)
    stored = StoredOutputs.open(tmp_path)
    logits = stored.logits(dataset.train.ids, 1)
    assert torch.equal(known(logits), torch.tensor([True, False, True, False]).expand(64, 4))
    assert (logits[:, [1, 3]] == torch.tensor(UNKNOWN).half().float()).all()
    assert stored.validation_logits.softmax(1)[:, [1, 3]].max() == 0
    everyone, _, _ = obtain_teacher(teacher.model_copy(update={"classes": None}), dataset, seed=0, augment=NoAugment())
    with torch.no_grad():
        images = dataset.validation.images.float() / 255
        assert not torch.allclose(model(images), everyone(images))


def test_a_class_that_does_not_exist_is_named():
    teacher = Teacher(name="half", model=MODEL, source=TrainFromScratch(train=QUICK), classes=("a", "zebra"))
    with pytest.raises(CompressionError, match=r"'zebra', expected names of data set 'blobs': a, b, c, d"):
        obtain_teacher(teacher, tiny_dataset(), seed=0, augment=NoAugment())


def test_an_untrained_teacher_is_random_and_the_same_for_the_same_seed():
    teacher = Teacher(name="random", model=MODEL, source=Untrained())
    models = [obtain_teacher(teacher, tiny_dataset(), seed=seed, augment=NoAugment())[0] for seed in (0, 0, 1)]
    weights = [next(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not models[0].training


# ---------------------------------------------------------------- black boxes


def test_a_black_box_teaches_through_its_stored_probabilities(tmp_path):
    dataset = tiny_dataset()
    probabilities = ask(dataset, tmp_path / "answers.npz")
    write_given_outputs(tmp_path / "answers.npz", dataset, SPEC, tmp_path / "out")
    stored = StoredOutputs.open(tmp_path / "out")
    for view in (0, 1):
        found = stored.logits(dataset.train.ids, view).softmax(1)
        torch.testing.assert_close(found, torch.from_numpy(probabilities[:64]), atol=2e-3, rtol=2e-2)
    student = net(6, 3)
    config = DistillConfig(train=TrainConfig(epochs=4, batch_size=16, learning_rate=0.02), losses=(Kd(),), views=2)
    history = distill(student, [stored], dataset, config, seed=0, augment=SPEC.augment, hardware=Hardware())
    assert history.rows[-1]["teacher_kl"] < history.rows[0]["teacher_kl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": [0, 1], "probabilities": np.eye(4)[:2]}, "no row for 62 of 64 train samples, the first with id 2"),
        ({"ids": [0, 0], "probabilities": np.eye(4)[:2]}, "expected distinct whole numbers"),
        ({"ids": [0, 1], "probabilities": np.eye(3)[:2]}, r"shape \[2, 3\] and type float64, expected floats \[2, 4\]"),
        ({"ids": [0, 1], "probabilities": np.eye(4)[:2] * 5}, r"row 0 that is no distribution \(sum 5\)"),
        ({"ids": [0, 1]}, "cannot be read"),
    ],
)
def test_an_unfit_outputs_file_is_refused_with_place_and_way_out(tmp_path, content, message):
    np.savez(tmp_path / "answers.npz", **content)
    with pytest.raises(CompressionError, match=message):
        write_given_outputs(tmp_path / "answers.npz", tiny_dataset(), SPEC, tmp_path / "out")


def test_a_black_box_has_no_model_and_every_other_teacher_has_one(tmp_path):
    with pytest.raises(ValidationError, match="Remove model"):
        Teacher(name="box", model=MODEL, source=FromOutputs(path=tmp_path))
    with pytest.raises(ValidationError, match="Add model"):
        Teacher(name="net", source=Untrained())
    with pytest.raises(CheckpointError, match="no outputs file"):
        check_teacher(Teacher(name="box", source=FromOutputs(path=tmp_path / "absent.npz")))


# ---------------------------------------------------------------- without labels


def test_a_pool_of_unlabelled_images_survives_the_disk_and_joins_the_train_split_last(tmp_path):
    dataset = load_dataset(Digits(limit=300), seed=0, unlabelled=Digits(limit=200))
    assert dataset.pool is not None
    assert (dataset.pool.labels == -1).all()
    assert len(dataset.pool.ids) == 200
    every = torch.cat([getattr(dataset, name).ids for name in ("train", "validation", "calibration", "test", "pool")])
    assert len(every.unique()) == len(every)
    save_dataset(dataset, tmp_path)
    again = open_dataset(tmp_path)
    assert again.pool is not None
    assert torch.equal(again.pool.images, dataset.pool.images)
    joined = with_pool(again)
    assert joined.pool is None
    assert torch.equal(joined.train.labels[-200:], torch.full((200,), -1))
    assert torch.equal(joined.train.images[: len(dataset.train.ids)], dataset.train.images)
    assert with_pool(tiny_dataset()).train.ids.tolist() == list(range(64))


def test_unlabelled_images_of_another_size_are_refused(tmp_path):
    from compression.data import Arrays

    np.savez(tmp_path / "other.npz", images=np.zeros((60, 9, 9), np.uint8), labels=np.arange(60) % 10)
    with pytest.raises(DataError, match=r"shape \[1, 9, 9\] .* expected \[1, 8, 8\]"):
        load_dataset(Digits(limit=300), seed=0, unlabelled=Arrays(path=tmp_path / "other.npz"))


def test_students_learn_from_the_pool_what_teachers_say_of_it(tmp_path):
    dataset = pooled()
    write_teacher_outputs(net(8, 1), dataset, SPEC, tmp_path)
    stored = StoredOutputs.open(tmp_path)
    assert dataset.pool is not None
    assert stored.logits(dataset.pool.ids, 1).shape == (12, 4)
    losses = (CrossEntropy(), Kd())
    config = DistillConfig(train=TrainConfig(epochs=1, batch_size=76), losses=losses, views=2)
    with_it, without = net(6, 3), net(6, 3)
    rows = {}
    for name, student, data in (("with", with_it, dataset), ("without", without, tiny_dataset())):
        rows[name] = distill(student, [stored], data, config, seed=0, augment=SPEC.augment, hardware=Hardware()).rows[0]
    # One step on everything: the cross entropy is that of the 64 labelled of 76 samples.
    np.testing.assert_allclose(rows["with"]["cross_entropy"] / rows["without"]["cross_entropy"], 64 / 76, rtol=0.1)


def test_labels_none_hides_every_label_and_refuses_losses_of_labels(tmp_path):
    dataset = tiny_dataset()
    write_teacher_outputs(net(8, 1), dataset, SPEC, tmp_path)
    stored = StoredOutputs.open(tmp_path)
    config = DistillConfig(train=QUICK, losses=(Kd(),), views=2, labels="none")
    students = [net(6, 3), net(6, 3)]
    scrambled = replace(dataset, train=replace(dataset.train, labels=(dataset.train.labels + 1) % len(CLASSES)))
    for student, data in zip(students, (dataset, scrambled), strict=True):
        distill(student, [stored], data, config, seed=0, augment=SPEC.augment, hardware=Hardware())
    for mine, other in zip(*(student.state_dict().values() for student in students), strict=True):
        assert torch.equal(mine, other)
    assert (without_labels(dataset).train.labels == -1).all()
    with pytest.raises(ValidationError, match="'cross_entropy', which learns from labels, but labels is none"):
        DistillConfig(train=QUICK, labels="none")
