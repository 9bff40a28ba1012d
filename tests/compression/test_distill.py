"""Students learn from stored and live teachers alike, and what does not fit is refused before training."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import NoAugment, ShiftFlip, augment, normalise
from compression.data.dataset import Dataset
from compression.distill import (
    Confidence,
    CrossEntropy,
    DistillConfig,
    Kd,
    Uniform,
    distill,
    distillation_step,
    live_distillation_step,
    plain_step,
)
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, TrainConfig, fit
from compression.types import Batch
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Hardware(accelerator="cpu")
SHIFT = ShiftFlip(pad=1, flip=False)
TRAIN = TrainConfig(epochs=2, batch_size=16, learning_rate=0.01)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def net(width: int, seed: int, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, classes),
        )


@pytest.fixture(scope="module")
def teachers(dataset) -> list[nn.Module]:
    models = [net(8, seed=1), net(6, seed=2)]
    for model in models:
        fit(model, plain_step(), dataset, TRAIN, seed=0, augment=SHIFT, hardware=CPU)
    return models


def store(model: nn.Module, dataset: Dataset, folder: Path, *, views: int = 2, seed: int = 0) -> StoredOutputs:
    write_teacher_outputs(model, dataset, OutputsSpec(views=views, seed=seed, augment=SHIFT), folder)
    return StoredOutputs.open(folder)


@pytest.fixture(scope="module")
def panel(dataset, teachers, tmp_path_factory) -> list[StoredOutputs]:
    return [
        store(model, dataset, tmp_path_factory.mktemp("outputs") / str(number)) for number, model in enumerate(teachers)
    ]


def batch_of(dataset: Dataset, rows: Tensor, view: int = 0) -> Batch:
    split = dataset.train
    raw = augment(split.images[rows], split.ids[rows], view=view, seed=0, config=SHIFT)
    images = normalise(raw, dataset.preprocessing)
    return Batch(images, split.labels[rows], split.ids[rows], view=view, epoch=view, step=0)


def run(student: nn.Module, panel, dataset, config: DistillConfig, **options):
    return distill(student, panel, dataset, config, **({"seed": 0, "augment": SHIFT, "hardware": CPU} | options))


@pytest.mark.parametrize("combination", [Uniform(), Confidence()])
def test_stored_and_live_teachers_teach_the_same(dataset, teachers, panel, combination):
    losses = (CrossEntropy(), Kd())
    rows = torch.tensor([5, 60, 2, 33])
    batch = batch_of(dataset, rows, view=1)
    student = net(4, seed=3).eval()
    stored = distillation_step(losses, combination, panel)(student, batch)
    live = live_distillation_step(losses, combination, teachers)(student, batch)
    mixed = distillation_step(losses, combination, panel[:1], teachers[1:])(student, batch)
    assert list(stored) == list(live) == ["cross_entropy", "kd"]
    for name, value in stored.items():
        torch.testing.assert_close(value, live[name], rtol=5e-3, atol=1e-3)
        torch.testing.assert_close(value, mixed[name], rtol=5e-3, atol=1e-3)


def test_terms_carry_their_weight_and_repeated_kinds_are_numbered(dataset, panel):
    losses = (Kd(weight=0.25), Kd(weight=1.0), CrossEntropy(weight=0.0))
    terms = distillation_step(losses, Uniform(), panel)(net(4, seed=3).eval(), batch_of(dataset, torch.arange(8)))
    assert list(terms) == ["kd", "kd_2", "cross_entropy"]
    torch.testing.assert_close(terms["kd"] * 4, terms["kd_2"])
    assert terms["cross_entropy"] == 0


def test_live_teachers_are_frozen_and_unchanged(dataset):
    teacher = net(8, seed=1).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    step = live_distillation_step((Kd(),), Uniform(), [teacher])
    teacher.train()
    sum(step(net(4, seed=3), batch_of(dataset, torch.arange(16))).values()).backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_student_moves_towards_its_teachers(dataset, panel):
    """Distilled from the panel alone, no labels: validation divergence from the teachers falls."""
    target = torch.stack([stored.validation_logits for stored in panel]).softmax(-1).mean(0)

    def gap(student: nn.Module) -> float:
        images = normalise(dataset.validation.images, dataset.preprocessing)
        with torch.no_grad():
            return float(F.kl_div(student(images).log_softmax(-1), target, reduction="batchmean"))

    student = net(6, seed=3).eval()
    before = gap(student)
    config = DistillConfig(train=TRAIN.model_copy(update={"epochs": 6}), losses=(Kd(weight=1.0),), views=2)
    history = run(student, panel, dataset, config)
    assert gap(student) < 0.5 * before
    assert history.rows[-1]["kd"] < history.rows[0]["kd"]
    assert "cross_entropy" not in history.rows[0]


def test_distillation_on_its_own_start_stays_there(dataset, tmp_path):
    """A teacher equal to the student gives zero gradient: nothing moves but float16 rounding of the logits."""
    student = net(4, seed=3)
    stored = store(student, dataset, tmp_path)
    terms = distillation_step((Kd(),), Uniform(), [stored])(student.eval(), batch_of(dataset, torch.arange(16)))
    terms["kd"].backward()
    assert float(terms["kd"].detach()) < 1e-5
    assert all(float(p.grad.abs().max()) < 1e-2 for p in student.parameters())


def test_empty_panel_is_the_control_arm(dataset):
    """Exactly plain training on labels, on the same views."""
    config = DistillConfig(train=TRAIN, losses=(Kd(weight=1.0),), views=2)
    control, plain = net(4, seed=3), net(4, seed=3)
    history = run(control, [], dataset, config)
    fit(plain, plain_step(), dataset, TRAIN, seed=0, augment=SHIFT, views=2, hardware=CPU)
    assert list(history.rows[0])[:3] == ["epoch", "loss", "cross_entropy"]
    for left, right in zip(control.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)


def test_label_smoothing_reaches_plain_training(dataset):
    batch, student = batch_of(dataset, torch.arange(16)), net(4, seed=3).eval()
    smoothed = plain_step(0.2)(student, batch)["cross_entropy"]
    torch.testing.assert_close(smoothed, F.cross_entropy(student(batch.images), batch.labels, label_smoothing=0.2))


def test_students_of_other_seeds_share_stored_outputs(dataset, teachers, panel, tmp_path):
    """Views come from the seed the outputs were stored under, whatever the student's seed is."""
    seen = {}

    class Spy:
        spec, class_names = panel[0].spec, panel[0].class_names

        def logits(self, ids: Tensor, view: int) -> Tensor:
            seen.setdefault("ids", ids)
            seen.setdefault("view", view)
            return panel[0].logits(ids, view)

    images = []
    student = net(4, seed=3)
    student.register_forward_pre_hook(lambda module, args: images.append(args[0]))
    run(student, [Spy()], dataset, DistillConfig(train=TRAIN, views=2), seed=41)
    expected = batch_of(dataset, seen["ids"], view=seen["view"])
    assert torch.equal(images[1], expected.images)


def test_same_seed_same_student(dataset, panel):
    config = DistillConfig(train=TRAIN, teachers=Confidence(), views=2)
    first, second = net(4, seed=3), net(4, seed=3)
    run(first, panel, dataset, config)
    run(second, panel, dataset, config)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


# ---------------------------------------------------------------- refusals


def test_teacher_of_other_classes_is_refused(dataset, teachers, tmp_path):
    other = Dataset(**{**dataset.__dict__, "class_names": ("a", "b", "c")})
    stored = store(net(4, seed=1, classes=3), other, tmp_path)
    with pytest.raises(ShapeError, match=r"Teacher 0 of the panel has 3 classes .* expected the 4 of data set"):
        run(net(4, seed=3), [stored], dataset, DistillConfig(train=TRAIN, views=2))


def test_classes_in_another_order_are_refused(dataset, panel):
    other = Dataset(**{**dataset.__dict__, "class_names": ("b", "a", "c", "d")})
    with pytest.raises(ShapeError, match="Use a teacher of the same classes"):
        run(net(4, seed=3), panel, other, DistillConfig(train=TRAIN, views=2))


def test_student_of_other_classes_is_refused_untouched(dataset, panel):
    student = net(4, seed=3, classes=7)
    with pytest.raises(ShapeError, match=r"\[1, 7\] for one image, expected \[1, 4\]"):
        run(student, panel, dataset, DistillConfig(train=TRAIN, views=2))
    assert student.training
    assert student[1].num_batches_tracked == 0


def test_outputs_of_another_augmentation_are_refused(dataset, panel):
    with pytest.raises(CompressionError, match=r"expected NoAugment.*Store them again"):
        run(net(4, seed=3), panel, dataset, DistillConfig(train=TRAIN, views=2), augment=NoAugment())


def test_outputs_of_different_seeds_do_not_mix(dataset, teachers, panel, tmp_path):
    other = store(teachers[0], dataset, tmp_path, seed=9)
    with pytest.raises(CompressionError, match="with seed 9"):
        run(net(4, seed=3), [panel[0], other], dataset, DistillConfig(train=TRAIN, views=2))


def test_too_few_views_are_refused(dataset, panel):
    with pytest.raises(CompressionError, match="have 2 views, expected 3"):
        run(net(4, seed=3), panel, dataset, DistillConfig(train=TRAIN, views=3))


def test_step_needs_a_loss_and_a_teacher(panel):
    with pytest.raises(CompressionError, match="0 losses and 2 teachers"):
        distillation_step((), Uniform(), panel)
    with pytest.raises(CompressionError, match="1 losses and 0 teachers"):
        live_distillation_step((Kd(),), Uniform(), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"losses": ()},
        {"losses": ({"kind": "kd", "temperature": 0},)},
        {"losses": ({"kind": "kd", "temprature": 2},)},
        {"losses": ({"kind": "kd", "weight": 0},)},
        {"losses": ({"kind": "kl"},)},
        {"teachers": {"kind": "best"}},
        {"views": 0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DistillConfig.model_validate({"train": {"epochs": 1}} | wrong)


def test_settings_survive_json():
    config = DistillConfig(train=TRAIN, teachers=Confidence(labels=False), losses=(Kd(temperature=3.0),))
    assert DistillConfig.model_validate_json(config.model_dump_json()) == config
