"""The monitor sees a student that turns away from the task, keeps quiet otherwise, and ends a training if asked."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import compression.distill.monitor as module
from compression.augment import NoAugment
from compression.data.dataset import Dataset
from compression.distill import DistillConfig, Kd, Monitor, distill, plain_step
from compression.distill.monitor import power_law_alarm, u_shape_alarm
from compression.errors import ShapeError
from compression.metrics import predict
from compression.teacher_outputs import OutputsSpec
from compression.train import Hardware, TrainConfig, fit
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Hardware(accelerator="cpu")
EPOCHS, TURN, DRAWS = 40, 15, 200
ALARMS = {"u_shape": u_shape_alarm, "power_law": power_law_alarm}

Curves = tuple[list[float], list[float]]


# ---------------------------------------------------------------- the two alarms


def noisy(golden: np.ndarray, proxy: np.ndarray, seed: int, *, noise: float) -> Curves:
    """Both curves with relative noise of their own."""
    factors = np.exp(noise * np.random.default_rng(seed).normal(size=(2, len(golden))))
    return (golden * factors[0]).tolist(), (proxy * factors[1]).tolist()


def healthy(seed: int) -> Curves:
    step = np.arange(1, EPOCHS + 1)
    return noisy(1.5 * step**-0.4, 2.0 * step**-0.7, seed, noise=0.02)


def levelled(seed: int) -> Curves:
    """What trainings do in the end: both curves come to rest on a floor."""
    step = np.arange(1, EPOCHS + 1)
    return noisy(0.4 + 0.8 * step**-0.6, 0.05 + 1.6 * step**-0.7, seed, noise=0.02)


def flat(seed: int) -> Curves:
    return noisy(np.ones(EPOCHS), np.ones(EPOCHS), seed, noise=0.05)


def turned(seed: int) -> Curves:
    """The student goes on towards its teachers; from epoch TURN on its NLL grows by 3 % an epoch."""
    step = np.arange(1, EPOCHS + 1)
    golden = np.maximum(1.5 * step**-0.4, 1.5 * TURN**-0.4) * (1 + 0.03 * np.maximum(0, step - TURN))
    return noisy(golden, 2.0 * step**-0.7, seed, noise=0.02)


def first_alarms(draw: Callable[[int], Curves], alarm: Callable[..., bool], draws: int = DRAWS) -> list[int]:
    """Evaluation of the first alarm, for the draws that have one; asked after each evaluation, as in a training."""
    found = []
    for seed in range(draws):
        golden, proxy = draw(seed)
        first = next((n for n in range(4, EPOCHS + 1) if alarm(golden[:n], proxy[:n])), None)
        found += [] if first is None else [first]
    return found


@pytest.mark.parametrize("alarm", ALARMS)
def test_healthy_curves_raise_no_alarm(alarm):
    assert first_alarms(healthy, ALARMS[alarm]) == []


@pytest.mark.parametrize(("alarm", "most"), [("u_shape", 0.1), ("power_law", 0.02)])
def test_curves_that_come_to_rest_or_are_noise_seldom_raise_one(alarm, most):
    assert len(first_alarms(flat, ALARMS[alarm])) <= most * DRAWS
    assert len(first_alarms(levelled, ALARMS[alarm], 50)) <= most * 50


@pytest.mark.parametrize(("alarm", "delay"), [("u_shape", 6), ("power_law", 8)])
def test_a_turn_is_always_seen_and_soon(alarm, delay):
    found = first_alarms(turned, ALARMS[alarm])
    assert len(found) == DRAWS
    assert np.median(found) <= TURN + delay


def test_a_student_that_leaves_its_teachers_too_is_not_hacking_them():
    """Both curves turn upward, say because the learning rate is too high."""
    for seed in range(20):
        golden, _ = turned(seed)
        _, proxy = turned(seed + 1000)
        away = (np.array(proxy) * np.maximum(1, np.arange(1, EPOCHS + 1) / TURN) ** 2).tolist()
        assert not u_shape_alarm(golden, away)
        assert not power_law_alarm(golden, away)


@pytest.mark.parametrize("length", range(8))
def test_short_curves_raise_no_alarm(length):
    golden, proxy = [float(n + 1) for n in range(length)], [float(9 - n) for n in range(length)]
    assert not power_law_alarm(golden, proxy)
    assert u_shape_alarm(golden, proxy) == (length >= 6)


def test_a_divergence_of_zero_is_no_error():
    assert not power_law_alarm([1.0] * 20, [0.0] * 20)
    assert not u_shape_alarm([1.0] * 20, [0.0] * 20)


def test_window_and_level_decide_the_u_shape():
    golden, proxy = turned(3)
    assert not u_shape_alarm(golden[: TURN + 5], proxy[: TURN + 5], window=25)
    assert u_shape_alarm(golden, proxy, window=25)
    strict = [u_shape_alarm(*(curve[: TURN + 4] for curve in turned(seed)), level=0.999) for seed in range(20)]
    loose = [u_shape_alarm(*(curve[: TURN + 4] for curve in turned(seed)), level=0.8) for seed in range(20)]
    assert sum(strict) < sum(loose)


@pytest.mark.parametrize("wrong", [{"window": 3}, {"level": 0.5}, {"level": 1.0}, {"halt": True}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Monitor(**wrong)


# ---------------------------------------------------------------- in a training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(validation=40)


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
        )


class Teacher:
    """Says class ``sample + shift``; a shift that is not 0 teaches what is wrong."""

    class_names = ("a", "b", "c", "d")

    def __init__(self, shift: int = 0, scale: float = 3.0, samples: int = 40) -> None:
        self.spec = OutputsSpec(views=2, seed=0, augment=NoAugment())
        self.shift, self.scale = shift, scale
        self.validation_logits = self.logits(torch.arange(1000, 1000 + samples), 0)

    def logits(self, ids: Tensor, view: int) -> Tensor:
        del view
        return nn.functional.one_hot((ids + self.shift) % 4, 4) * self.scale


def run(student: nn.Module, panel: list, dataset: Dataset, *, epochs: int = 12, monitor: Monitor | None = None, **more):
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=0.01, checkpoint_every_steps=3)
    config = DistillConfig(train=train, losses=(Kd(weight=1.0),), views=2, monitor=monitor or Monitor())
    return distill(student, panel, dataset, config, seed=0, augment=NoAugment(), hardware=CPU, **more)


def numbers(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_rows_carry_the_divergence_from_the_mixture_of_teachers(dataset):
    student, panel = net(), [Teacher(), Teacher(shift=1, scale=1.0)]
    row = run(student, panel, dataset, epochs=2).rows[-1]
    mixture = torch.stack([teacher.validation_logits for teacher in panel]).softmax(-1).mean(0)
    probs = predict(student, dataset.validation, dataset.preprocessing).softmax(-1)
    expected = float((mixture * (mixture / probs).log()).sum(1).mean())
    assert row["teacher_kl"] == pytest.approx(expected, rel=1e-5)
    assert row["hacking_u_shape"] == row["hacking_power_law"] == 0.0


def test_control_arm_and_teachers_without_validation_logits_are_not_watched(dataset):
    blind = Teacher()
    del blind.validation_logits
    for panel in ([], [blind], [Teacher(), blind]):
        assert "teacher_kl" not in run(net(), panel, dataset, epochs=1, monitor=Monitor(stop=True)).rows[0]


def test_watching_changes_nothing(dataset):
    blind = Teacher()
    del blind.validation_logits
    watched, alone = net(), net()
    run(watched, [Teacher()], dataset, epochs=2)
    run(alone, [blind], dataset, epochs=2)
    for left, right in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(left, right)


def test_outputs_of_another_validation_split_are_refused_before_training(dataset):
    steps = []
    with pytest.raises(ShapeError, match=r"teacher 0 .* shape \[39, 4\], expected \[40, 4\]"):
        run(net(), [Teacher(samples=39)], dataset, on_step=lambda *step: steps.append(step))
    assert steps == []


def test_a_teacher_of_wrong_answers_is_noticed_once_in_the_log(dataset, caplog):
    student = net()
    fit(student, plain_step(), dataset, TrainConfig(epochs=3, batch_size=16), seed=0, augment=NoAugment(), hardware=CPU)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        rows = run(student, [Teacher(shift=1)], dataset).rows
    alarms = [row["epoch"] for row in rows if row["hacking_u_shape"]]
    assert alarms
    assert alarms[0] >= 5
    assert len(rows) == 12
    warnings = [record.getMessage() for record in caplog.records if "hacking its teachers" in record.getMessage()]
    assert len(warnings) == 1
    assert f"From epoch {alarms[0]} on" in warnings[0]


class Stop(BaseException):
    """Ends a training as a kill would, but in this process."""


def test_stop_ends_the_training_at_the_alarm_and_a_resumed_one_ends_the_same(dataset, tmp_path):
    """Epochs have 4 steps and checkpoints come every 3: the second is killed in mid-epoch, the third goes on."""
    start = net()
    fit(start, plain_step(), dataset, TrainConfig(epochs=3, batch_size=16), seed=0, augment=NoAugment(), hardware=CPU)

    def student() -> nn.Module:
        copy = net()
        copy.load_state_dict(start.state_dict())
        return copy

    recorded = run(student(), [Teacher(shift=1)], dataset).rows
    first = next(row["epoch"] for row in recorded if row["hacking_u_shape"] or row["hacking_power_law"])
    assert first < 10
    monitor = Monitor(stop=True)
    whole, again, done_again = student(), net(seed=9), net(seed=8)
    ended = run(whole, [Teacher(shift=1)], dataset, monitor=monitor).rows
    assert numbers(ended) == numbers(recorded[: first + 1])

    def kill(done: int, total: int) -> None:
        assert total == 48
        if done == 4 * first - 2:
            raise Stop

    with pytest.raises(Stop):
        run(student(), [Teacher(shift=1)], dataset, monitor=monitor, checkpoint_dir=tmp_path, on_step=kill)
    resumed = run(again, [Teacher(shift=1)], dataset, monitor=monitor, checkpoint_dir=tmp_path).rows
    steps = []
    repeated = run(
        done_again,
        [Teacher(shift=1)],
        dataset,
        monitor=monitor,
        checkpoint_dir=tmp_path,
        on_step=lambda done, total: steps.append(done),
    ).rows
    assert numbers(resumed) == numbers(repeated) == numbers(ended)
    assert len(steps) <= 3
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(done_again.state_dict()[name], value), name
    assert not again.training


def test_fit_gives_the_logits_and_rows_it_promises(dataset):
    """The hook sees the logits that the row was measured on, and the row of the epoch at hand last."""
    seen = []

    def on_validation(logits: Tensor, rows) -> dict[str, float]:
        nll = float(nn.functional.cross_entropy(logits.double(), dataset.validation.labels))
        assert rows[-1]["validation_nll"] == nll
        seen.append(len(rows))
        return {"count": float(len(rows))}

    history = fit(
        net(),
        plain_step(),
        dataset,
        TrainConfig(epochs=5, batch_size=16),
        seed=0,
        augment=NoAugment(),
        hardware=CPU,
        on_validation=on_validation,
        should_stop=lambda rows: rows[-1]["count"] == 3,
    )
    assert seen == [1, 2, 3]
    assert [row["count"] for row in history.rows] == [1.0, 2.0, 3.0]
