"""A training that is asked to end saves what it has done; one that is cut anywhere ends with the same bits."""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from compression.augment import ShiftFlip
from compression.distill import plain_step
from compression.train import TrainConfig, saving
from compression.train.step_checkpoint import load_state
from tests.compression.test_train import assert_same_weights, make_net, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(epochs=3, batch_size=16, checkpoint_every_steps=1000)
STEPS = 18
RESUMED = {"augment": ShiftFlip(pad=1), "views": 2}


@pytest.fixture(scope="module")
def unbroken() -> nn.Module:
    torch.set_num_threads(1)
    model = make_net()
    train(model, CONFIG, **RESUMED)
    return model


def signalling_step(number: int, at: int) -> Callable[..., dict[str, torch.Tensor]]:
    """A step that gets a signal in its middle, the ``at``-th time it is called."""
    plain, calls = plain_step(), itertools.count(1)

    def step(net: nn.Module, batch) -> dict[str, torch.Tensor]:
        terms = plain(net, batch)
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return terms

    return step


class Ended(BaseException):
    """What a handler of SIGTERM raises, as Prefect's does."""


@pytest.fixture
def _ended_by_sigterm():
    def raise_it(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, raise_it)
    yield
    assert signal.getsignal(signal.SIGTERM) is raise_it, "the handler was given back"
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_ended_by_sigterm")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Ended), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
@pytest.mark.parametrize("at", [1, 4, 6, 7, 18])
def test_a_signal_ends_the_training_after_the_step_with_its_state_saved(tmp_path, unbroken, number, error, at):
    steps: list[int] = []
    with pytest.raises(error):
        train(
            make_net(),
            CONFIG,
            step=signalling_step(number, at),
            checkpoint_dir=tmp_path,
            on_step=lambda done, total: steps.append(done),
            **RESUMED,
        )
    assert steps[-1] == at
    state = load_state(tmp_path)
    assert state is not None
    assert state["epoch"] * 6 + state["step_in_epoch"] == at
    again = make_net(seed=5)
    train(again, CONFIG, checkpoint_dir=tmp_path, on_step=lambda done, total: steps.append(done), **RESUMED)
    assert steps == list(range(1, STEPS + 1)), "no step was done twice"
    assert_same_weights(again, unbroken)


def test_an_exception_in_the_middle_of_a_step_saves_nothing_half_done(tmp_path, unbroken):
    plain, calls = plain_step(), itertools.count(1)

    def step(net, batch):
        terms = plain(net, batch)
        if next(calls) == 8:
            raise Ended
        return terms

    config = CONFIG.model_copy(update={"checkpoint_every_steps": 5})
    with pytest.raises(Ended):
        train(make_net(), config, step=step, checkpoint_dir=tmp_path, **RESUMED)
    assert sorted(path.name[:15] for path in tmp_path.iterdir()) == ["step-0000000005"]
    again = make_net(seed=5)
    train(again, config, checkpoint_dir=tmp_path, **RESUMED)
    assert_same_weights(again, unbroken)


def test_a_second_signal_is_not_held_back(tmp_path):
    plain, calls = plain_step(), itertools.count(1)

    def step(net, batch):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the step went on")
        return plain(net, batch)

    with pytest.raises(KeyboardInterrupt):
        train(make_net(), CONFIG, step=step, checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_epochs_begin_and_end_once_however_often_it_is_ended(tmp_path, unbroken):
    """Signals from outside, at any moment; between trainings nothing is lost and nothing is done twice."""
    begun: list[int] = []
    ended: list[int] = []
    steps: list[int] = []
    random_ = random.Random(0)
    for attempt in range(200):
        model = make_net(seed=attempt if any(tmp_path.iterdir()) else 0)
        timer = threading.Timer(random_.uniform(0.002, 0.03 + 0.005 * attempt), signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()  # later each time, so that a slow machine gets through too
            train(
                model,
                CONFIG,
                checkpoint_dir=tmp_path,
                on_epoch_start=lambda epoch, net: begun.append(epoch),
                on_epoch=lambda row: ended.append(row["epoch"]),
                on_step=lambda done, total: steps.append(done),
                **RESUMED,
            )
            timer.cancel()
            timer.join()
            break
        except KeyboardInterrupt:
            timer.join()
    else:
        raise AssertionError("it never ended")
    assert attempt > 0
    assert steps == list(range(1, STEPS + 1))
    assert ended == [0, 1, 2]
    assert sorted(set(begun)) == [0, 1, 2]
    assert_same_weights(model, unbroken)


def test_states_are_written_by_time_and_large_ones_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(saving, "LARGEST_SHARE_OF_SAVING", 1e9)
    seen: list[str] = []

    def look(done: int, total: int) -> None:
        seen.append(max((path.name[:15] for path in tmp_path.iterdir()), default=""))

    train(make_net(), CONFIG, checkpoint_dir=tmp_path, on_step=look)
    assert seen == ["", *(f"step-{step:010d}" for step in range(1, STEPS))]
    monkeypatch.setattr(saving, "LARGEST_SHARE_OF_SAVING", 1e-9)
    seen.clear()
    rare = tmp_path / "rare"
    train(make_net(), CONFIG, checkpoint_dir=rare, on_step=lambda done, total: seen.append(str(_count(rare))))
    assert set(seen[2:]) == {"1"}, "the first state has shown what writing costs"


def _count(folder: Path) -> int:
    return len(list(folder.glob("step-*"))) if folder.is_dir() else 0


def test_signals_are_left_alone_outside_of_the_main_thread(tmp_path):
    found: list[object] = []

    def go() -> None:
        train(make_net(), CONFIG.model_copy(update={"epochs": 1}), checkpoint_dir=tmp_path)
        found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
