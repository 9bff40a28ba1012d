"""The partition keeps what the student knew and learns what others know better."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from compression.augment import NoAugment, normalise
from compression.data.dataset import Dataset
from compression.distill import (
    CrossEntropy,
    DistillConfig,
    Kd,
    Uniform,
    distill,
    distillation_step,
    live_distillation_step,
)
from compression.distill.teachers import Partition, ValidationWeighted
from compression.errors import ShapeError
from compression.metrics import predict
from compression.teacher_outputs import OutputsSpec
from compression.train import Hardware, TrainConfig
from compression.types import Batch, Outputs, TeacherOutputs
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

KD = Kd(weight=1.0, temperature=1.0)
CPU = Hardware(accelerator="cpu")
CLASSES = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def weigh(*sources: Tensor, labels: Tensor, by_label: bool = True) -> Tensor:
    return Partition(labels=by_label).build()(torch.stack(sources), labels)


def loss_of(student: Tensor, *sources: Tensor, labels: Tensor) -> Tensor:
    return KD.build()(Outputs(student), TeacherOutputs(torch.stack(sources), weigh(*sources, labels=labels)), labels)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("by_label", [True, False])
def test_every_sample_has_exactly_one_source_and_ties_are_shared(by_label):
    labels = labels_of(40)
    weights = weigh(*(draw(40, CLASSES, seed=seed) for seed in range(3)), labels=labels, by_label=by_label)
    assert torch.equal(weights.sum(0), torch.ones(40))
    assert ((weights == 1).sum(0) == 1).all()
    same = draw(40, CLASSES)
    tied = weigh(same, same, draw(40, CLASSES, seed=7) - 100 * nn.functional.one_hot(labels, CLASSES), labels=labels)
    torch.testing.assert_close(tied, torch.tensor([0.5, 0.5, 0.0]).unsqueeze(1).expand(3, 40))


def test_a_teacher_that_is_the_snapshot_teaches_nothing():
    start, labels = draw(16, CLASSES), labels_of(16)
    student = start.clone().requires_grad_()
    loss = loss_of(student, start, start, labels=labels)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(student.grad.abs().max()) < 1e-7


def test_rows_of_the_snapshot_have_no_gradient_at_the_start():
    start, teacher, labels = draw(64, CLASSES), draw(64, CLASSES, seed=1), labels_of(64)
    own = weigh(teacher, start, labels=labels)[1] == 1
    assert 0 < int(own.sum()) < 64
    student = start.double().requires_grad_()
    loss_of(student, teacher.double(), start.double(), labels=labels).backward()
    assert float(student.grad[own].abs().max()) < 1e-12
    assert float(student.grad[~own].abs().max(dim=1).values.min()) > 1e-4


def test_one_source_that_dominates_is_distillation_from_it():
    labels = labels_of(20)
    best = draw(20, CLASSES) + 50 * nn.functional.one_hot(labels, CLASSES)
    others = [draw(20, CLASSES, seed=seed) for seed in (1, 2)]
    student = draw(20, CLASSES, seed=9)
    alone = KD.build()(Outputs(student), TeacherOutputs(best.unsqueeze(0), torch.ones(1, 20)), labels)
    torch.testing.assert_close(loss_of(student, others[0], best, others[1], labels=labels), alone)


def test_a_random_start_wins_where_all_teachers_give_the_label_less_than_chance():
    labels = labels_of(200)
    teachers = [4 * draw(200, CLASSES, seed=seed) for seed in (1, 2)]
    start = 1e-3 * draw(200, CLASSES, seed=3)
    doubted = torch.stack(teachers).softmax(-1)[:, torch.arange(200), labels].amax(0) < 1 / CLASSES - 1e-3
    won = weigh(*teachers, start, labels=labels)[2] == 1
    assert 0 < int(doubted.sum()) < 200
    assert won[doubted].all()
    assert int((won & ~doubted).sum()) <= 2
    assert not weigh(*teachers, start, labels=labels, by_label=False)[2].any()


# ---------------------------------------------------------------- in a training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def net(seed: int, width: int = 12) -> nn.Module:
    """Without batch norm: its first training step equals its inference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES))


class Told:
    """A teacher that gives the label of every sample a fixed logit more than the rest."""

    class_names = ("a", "b", "c", "d")
    spec = OutputsSpec(views=1, seed=0, augment=NoAugment())

    def __init__(self, dataset: Dataset, lead: float) -> None:
        self._rows = lead * nn.functional.one_hot(dataset.train.labels, CLASSES).float()
        self.validation_logits = lead * nn.functional.one_hot(dataset.validation.labels, CLASSES).float()

    def logits(self, ids: Tensor, view: int) -> Tensor:
        return self._rows[ids]

    def features(self, ids: Tensor, view: int) -> Tensor:
        raise AssertionError


TRAIN = TrainConfig(epochs=4, batch_size=16, learning_rate=0.01, weight_decay=0.0)


def train(student: nn.Module, dataset: Dataset, lead: float, combination, **changes) -> nn.Module:
    config = DistillConfig(
        train=TRAIN.model_copy(update=changes.pop("train", {})), teachers=combination, losses=(KD,), views=1
    )
    options = {"seed": 0, "augment": NoAugment(), "hardware": CPU} | changes
    distill(student, [Told(dataset, lead)], dataset, config, **options)
    return student.eval()


def probs(model: nn.Module, dataset: Dataset) -> Tensor:
    return predict(model, dataset.train, dataset.preprocessing).softmax(-1)


@pytest.fixture(scope="module")
def start(dataset) -> nn.Module:
    """A student that knows the task already."""
    student = net(3)
    config = DistillConfig(train=TRAIN.model_copy(update={"epochs": 20}), losses=(CrossEntropy(),), views=1)
    distill(student, [], dataset, config, seed=0, augment=NoAugment(), hardware=CPU)
    return student.eval()


def test_a_teacher_that_is_always_worse_leaves_the_weights_put(dataset, start):
    student = copy.deepcopy(start)
    rows = torch.arange(64)
    images = normalise(dataset.train.images, dataset.preprocessing)
    batch = Batch(images, dataset.train.labels, rows, view=0, epoch=0, step=0)
    step = distillation_step((KD,), Partition(), [Told(dataset, -8.0)], [copy.deepcopy(student)])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        step(student, batch)["kd"].backward()
        optimizer.step()
    for left, right in zip(student.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_a_teacher_that_is_always_worse_hardly_moves_the_student_in_a_training(dataset, start):
    """AdamW makes steps of the rounding of a zero gradient, and the term pulls back: the student trembles."""
    before = probs(start, dataset)
    assert float(before[torch.arange(64), dataset.train.labels].min()) > 0.3
    kept = train(copy.deepcopy(start), dataset, -8.0, Partition())
    moved = train(copy.deepcopy(start), dataset, -8.0, Uniform())
    assert float((probs(kept, dataset) - before).abs().max()) < 0.05
    assert float((probs(moved, dataset) - before).abs().max()) > 0.2
    assert torch.equal(probs(kept, dataset).argmax(1), before.argmax(1))


def test_a_teacher_that_is_always_better_is_plain_distillation_from_it(dataset):
    partitioned = train(net(3), dataset, 12.0, Partition())
    plain = train(net(3), dataset, 12.0, Uniform())
    torch.testing.assert_close(probs(partitioned, dataset), probs(plain, dataset), rtol=0, atol=1e-4)


def test_the_snapshot_is_a_frozen_copy_of_the_start(dataset, start):
    student, seen = copy.deepcopy(start), []
    student[1].register_forward_hook(lambda module, args, output: seen.append(module))
    first = [parameter.detach().clone() for parameter in student.parameters()]
    train(student, dataset, 4.0, Partition(), train={"epochs": 1})
    (snapshot,) = {id(module): module for module in seen if module is not student[1]}.values()
    assert torch.equal(snapshot.weight, first[0])
    assert not snapshot.weight.requires_grad
    assert not torch.equal(student[1].weight, first[0])


def test_a_training_that_stopped_goes_on_to_the_same_student(dataset, start, tmp_path):
    """The snapshot of the second call is the same start, though the checkpoint has moved on."""

    def stop_at(done: int, total: int) -> None:
        if done == 9:
            raise InterruptedError

    options = {"train": {"checkpoint_every_steps": 4}}
    for combination in (Partition(), ValidationWeighted()):
        folder = tmp_path / combination.kind
        whole = train(copy.deepcopy(start), dataset, 2.0, combination, **copy.deepcopy(options))
        with pytest.raises(InterruptedError):
            train(
                copy.deepcopy(start),
                dataset,
                2.0,
                combination,
                checkpoint_dir=folder,
                on_step=stop_at,
                **copy.deepcopy(options),
            )
        assert list(folder.iterdir())
        resumed = train(
            copy.deepcopy(start), dataset, 2.0, combination, checkpoint_dir=folder, **copy.deepcopy(options)
        )
        for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(left, right), combination.kind


def test_a_live_copy_of_the_student_gives_its_weights_no_gradient(dataset, start):
    """As in quantization, where the float student is among the teachers."""
    student = copy.deepcopy(start)
    rows = torch.arange(16)
    images = normalise(dataset.train.images[rows], dataset.preprocessing)
    batch = Batch(images, dataset.train.labels[rows], rows, view=0, epoch=0, step=0)
    step = live_distillation_step((KD,), Partition(), [copy.deepcopy(student)])
    step(student, batch)["kd"].backward()
    assert all(float(parameter.grad.abs().max()) < 1e-6 for parameter in student.parameters())


# ---------------------------------------------------------------- weights from the validation split


def observed(dataset: Dataset, *leads: float, sharpness: float = 0.1):
    combine = ValidationWeighted(sharpness=sharpness).build()
    combine.observe([Told(dataset, lead) for lead in leads], dataset)
    return combine


def test_validation_weights_fall_with_the_exponential_of_the_nll(dataset):
    leads = (1.0, 1.5, 0.5)
    combine = observed(dataset, *leads)
    nll = torch.tensor([-torch.tensor([lead, 0, 0, 0]).log_softmax(0)[0] for lead in leads])
    expected = torch.exp(-nll / 0.1) / torch.exp(-nll / 0.1).sum()
    weights = combine(draw(3, 6, CLASSES), labels_of(6))
    torch.testing.assert_close(weights, expected.unsqueeze(1).expand(3, 6))
    assert weights.argmax(0).unique().tolist() == [1]


def test_sharpness_goes_from_the_best_alone_to_all_alike(dataset):
    logits, labels = draw(2, 5, CLASSES), labels_of(5)
    torch.testing.assert_close(observed(dataset, 1.0, 2.0, sharpness=1e-3)(logits, labels)[1], torch.ones(5))
    alike = observed(dataset, 1.0, 2.0, sharpness=100)(logits, labels)
    torch.testing.assert_close(alike, torch.full((2, 5), 0.5), rtol=0, atol=5e-3)
    torch.testing.assert_close(observed(dataset, 1.5, 1.5)(logits, labels), torch.full((2, 5), 0.5))


def test_live_teachers_count_as_much_as_the_mean_of_the_stored_ones(dataset):
    combine = observed(dataset, 1.0, 2.0)
    stored = combine(draw(2, 5, CLASSES), labels_of(5))
    both = combine(draw(3, 5, CLASSES), labels_of(5))
    torch.testing.assert_close(both.sum(0), torch.ones(5))
    torch.testing.assert_close(both[2], torch.full((5,), 1 / 3))
    torch.testing.assert_close(both[:2] / both[:2].sum(0), stored)
    with pytest.raises(ShapeError, match="have 1 teachers, expected at least the 2"):
        combine(draw(1, 5, CLASSES), labels_of(5))


def test_weights_are_state_and_nothing_else_is(dataset):
    combine = observed(dataset, 1.0, 2.0)
    assert list(combine.state_dict()) == ["weights"]
    assert not list(combine.parameters())
    other = observed(dataset, 2.0, 1.0)
    other.load_state_dict(combine.state_dict())
    assert torch.equal(other.weights, combine.weights)


def test_without_stored_teachers_all_count_the_same(dataset):
    combine = ValidationWeighted().build()
    combine.observe([], SimpleNamespace(validation=dataset.validation))
    torch.testing.assert_close(combine(draw(3, 5, CLASSES), labels_of(5)), torch.full((3, 5), 1 / 3))
