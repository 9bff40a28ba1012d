"""The loop learns, follows its schedule, names what went wrong, and leaves no trace."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from compression.augment import NoAugment, ShiftFlip
from compression.data.dataset import Dataset, Split
from compression.distill import plain_step
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.train import Hardware, TrainConfig, fit
from compression.train.batches import Batches
from compression.train.loop import one_cycle
from compression.train.step_checkpoint import load_state
from compression.types import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Hardware(accelerator="cpu")
ROOT = Path(__file__).resolve().parents[2]


def bars(count: int, first_id: int, *, classes: int = 4, size: int = 8) -> Split:
    """Images with a bright row whose place is the class: easy, and the same in every process."""
    generator = torch.Generator().manual_seed(first_id)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 120, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), 0, labels * 2] += 100
    return Split(images=images, labels=labels, ids=torch.arange(first_id, first_id + count))


def make_dataset(count: int = 96) -> Dataset:
    return Dataset(
        name="bars",
        class_names=("a", "b", "c", "d"),
        preprocessing=Preprocessing(scale=255.0, mean=(0.3,), std=(0.2,)),
        train=bars(count, 0),
        validation=bars(40, 1000),
        calibration=bars(8, 2000),
        test=bars(8, 3000),
        hashes={"train": f"bars-{count}"},
    )


def make_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(128, 4),
        )


def train(model: nn.Module, config: TrainConfig, **options):
    options = {"seed": 0, "augment": NoAugment(), "hardware": CPU} | options
    step = options.pop("step", plain_step())
    return fit(model, step, options.pop("dataset", make_dataset()), config, **options)


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    other = right.state_dict()
    for name, value in left.state_dict().items():
        assert torch.equal(value, other[name]), name


class Stop(BaseException):
    """Ends a training as a kill would, but in this process."""


def stop_at(step: int):
    def on_step(done: int, total: int) -> None:
        del total
        if done == step:
            raise Stop

    return on_step


# ---------------------------------------------------------------- learning


def test_learns_and_reports_one_row_per_epoch():
    model, rows, steps = make_net(), [], []
    config = TrainConfig(epochs=4, batch_size=16, learning_rate=0.02)
    history = train(model, config, on_epoch=rows.append, on_step=lambda done, total: steps.append((done, total)))
    assert history.rows == rows
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert list(rows[0]) == [
        "epoch",
        "loss",
        "cross_entropy",
        "validation_accuracy",
        "validation_nll",
        "seconds",
        "learning_rate",
    ]
    assert steps == [(done, 24) for done in range(1, 25)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation_accuracy"] > 0.9
    assert not model.training
    dataset = make_dataset()
    measured = evaluate(model, dataset.validation, dataset.preprocessing)
    assert measured.accuracy == rows[-1]["validation_accuracy"]
    assert measured.nll == pytest.approx(rows[-1]["validation_nll"])
    json.dumps(rows)


def test_same_seed_same_bits_other_seed_other_weights():
    config = TrainConfig(epochs=1, batch_size=16)
    first, second, third = make_net(), make_net(), make_net()
    train(first, config, augment=ShiftFlip(pad=1))
    torch.manual_seed(99)
    train(second, config, augment=ShiftFlip(pad=1))
    train(third, config, augment=ShiftFlip(pad=1), seed=1)
    assert_same_weights(first, second)
    assert not torch.equal(first[5].weight, third[5].weight)


def test_random_state_of_the_process_is_given_back():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(make_net(), TrainConfig(epochs=1, batch_size=32))
    assert torch.equal(torch.rand(3), expected)


def test_equals_a_loop_written_by_hand():
    """The whole of fit against twenty plain lines: same batches, schedule and decay give the same weights."""
    dataset, config = make_dataset(), TrainConfig(epochs=2, batch_size=16)
    ours, plain = make_net(), make_net()
    for net in (ours, plain):
        net[3].p = 0.0
    train(ours, config, dataset=dataset)

    batches = Batches(dataset.train, dataset.preprocessing, NoAugment(), 0, 0, None, 16, None, torch.device("cpu"))
    plain.to(memory_format=torch.channels_last).train()
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}], lr=3e-3
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=12, pct_start=0.2)
    for epoch in range(2):
        order = batches.permutation(epoch)
        for start in range(0, 96, 16):
            rows = order[start : start + 16]
            images = (dataset.train.images[rows].float() / 255 - 0.3) / 0.2
            optimizer.zero_grad()
            F.cross_entropy(plain(images), dataset.train.labels[rows]).backward()
            optimizer.step()
            scheduler.step()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


class Helper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def test_frozen_parameters_stay_and_helpers_move():
    model, helper = make_net(), Helper()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()

    def step(net, batch):
        return {"fit": F.cross_entropy(net(batch.images), batch.labels), "extra": helper.scale.square().sum()}

    history = train(model, TrainConfig(epochs=1, batch_size=16), step=step, helpers=helper)
    assert torch.equal(model[0].weight, before)
    assert (helper.scale < 1).all()
    row = history.rows[0]
    assert row["loss"] == pytest.approx(row["fit"] + row["extra"])


def test_set_training_decides_what_training_means():
    calls = []

    def keep_norms_still(model: nn.Module, training: bool) -> None:
        calls.append(training)
        model.train(training)
        model[1].eval()

    model = make_net()
    train(model, TrainConfig(epochs=2, batch_size=16), set_training=keep_norms_still)
    assert calls == [True, False, True, False, False]
    assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_bfloat16_learns_and_keeps_float32_weights():
    model = make_net()
    history = train(model, TrainConfig(epochs=3, batch_size=16, learning_rate=0.02, precision="bf16-mixed"))
    assert history.rows[-1]["validation_accuracy"] > 0.7
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- schedule


def test_max_steps_cuts_an_epoch():
    steps = []
    config = TrainConfig(epochs=2, batch_size=16, max_steps_per_epoch=2)
    train(make_net(), config, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("total", [1, 2, 3, 5, 10, 100])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.99])
def test_one_cycle_rises_and_falls_at_every_length(total, share):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    config = TrainConfig(epochs=1, learning_rate=0.5, warmup_share=share)
    scheduler = one_cycle(optimizer, config, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.5 / 25)
    assert max(rates) <= 0.5 + 1e-9
    if total >= 10:
        assert max(rates) > 0.45


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1, "learning_rate": -1},
        {"epochs": 1, "batchsize": 3},
        {"epochs": 1, "precision": "8"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainConfig(**wrong)


# ---------------------------------------------------------------- failure


def test_poisoned_sample_is_named_with_step_term_and_layer(tmp_path):
    dataset = make_dataset()
    images = dataset.train.images.float()
    images[17, 0, 3, 3] = float("nan")
    poisoned = Dataset(**{**dataset.__dict__, "train": Split(images, dataset.train.labels, dataset.train.ids)})
    with pytest.raises(CompressionError) as caught:
        train(make_net(), TrainConfig(epochs=1, batch_size=16), dataset=poisoned, checkpoint_dir=tmp_path)
    message = str(caught.value)
    assert "'cross_entropy' has value nan" in message
    assert "epoch 0, step" in message
    assert "sample ids 17, expected" in message
    assert "first layer with non-finite output is '0'" in message


def test_non_finite_targets_are_told_from_a_broken_model():
    def step(net, batch):
        logits = net(batch.images)
        return {"good": logits.square().mean(), "kd": logits.mean() * float("inf")}

    with pytest.raises(CompressionError, match=r"'kd' has value .*look at the targets") as caught:
        train(make_net(), TrainConfig(epochs=1, batch_size=16), step=step)
    assert "'good'" not in str(caught.value)


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    plain = plain_step()

    def step(net, batch):
        terms = plain(net, batch)
        return {"cross_entropy": terms["cross_entropy"] * (float("nan") if batch.step == 4 else 1.0)}

    config = TrainConfig(epochs=1, batch_size=16, checkpoint_every_steps=2)
    with pytest.raises(CompressionError, match="step 4"):
        train(make_net(), config, step=step, checkpoint_dir=tmp_path)
    state = load_state(tmp_path)
    assert state is not None
    assert state["step_in_epoch"] == 4
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_step_without_terms_and_model_without_parameters_are_refused():
    with pytest.raises(CompressionError, match="0 loss terms"):
        train(make_net(), TrainConfig(epochs=1), step=lambda net, batch: {})
    with pytest.raises(CompressionError, match="0 trainable parameters"):
        train(make_net().requires_grad_(False), TrainConfig(epochs=1))


# ---------------------------------------------------------------- resume


RESUMED = {"augment": ShiftFlip(pad=1), "views": 2}


@pytest.fixture(scope="module")
def unbroken():
    """Weights and history of 18 steps in three epochs that nobody interrupted."""
    torch.set_num_threads(1)
    model = make_net()
    history = train(model, TrainConfig(epochs=3, batch_size=16, checkpoint_every_steps=2), **RESUMED)
    return model, history


@pytest.mark.parametrize("stop", [3, 6, 7, 12, 18])
def test_stopped_training_goes_on_to_the_same_bits(tmp_path, unbroken, stop):
    whole, expected = unbroken
    config = TrainConfig(epochs=3, batch_size=16, checkpoint_every_steps=2)
    with pytest.raises(Stop):
        train(make_net(), config, checkpoint_dir=tmp_path, on_step=stop_at(stop), **RESUMED)
    again, steps = make_net(seed=5), []
    found = train(again, config, checkpoint_dir=tmp_path, on_step=lambda done, total: steps.append(done), **RESUMED)
    assert_same_weights(again, whole)
    assert len(steps) <= 18 - stop + config.checkpoint_every_steps
    numbers = [[v for k, v in row.items() if k != "seconds"] for row in found.rows]
    assert numbers == [[v for k, v in row.items() if k != "seconds"] for row in expected.rows]


def test_finished_training_is_not_repeated(tmp_path):
    config, steps = TrainConfig(epochs=2, batch_size=16), []
    model, again = make_net(), make_net(seed=3)
    first = train(model, config, checkpoint_dir=tmp_path)
    second = train(again, config, checkpoint_dir=tmp_path, on_step=lambda done, total: steps.append(done))
    assert steps == []
    assert_same_weights(model, again)
    assert len(second.rows) == len(first.rows) == 2


def test_parameters_and_buffers_of_helpers_are_restored(tmp_path):
    config = TrainConfig(epochs=1, batch_size=16, checkpoint_every_steps=2)

    def run(**options) -> tuple[torch.Tensor, torch.Tensor]:
        helper = Helper()

        def step(net, batch):
            helper.seen += len(batch.labels)
            return {"fit": F.cross_entropy(net(batch.images), batch.labels), "extra": helper.scale.square().sum()}

        train(make_net(), config, step=step, helpers=helper, **options)
        return helper.scale.detach(), helper.seen

    with pytest.raises(Stop):
        run(checkpoint_dir=tmp_path, on_step=stop_at(5))
    resumed, unbroken = run(checkpoint_dir=tmp_path), run()
    assert torch.equal(resumed[0], unbroken[0])
    assert int(resumed[1]) == int(unbroken[1]) > 0


def test_only_two_checkpoints_stay(tmp_path):
    train(make_net(), TrainConfig(epochs=1, batch_size=8, checkpoint_every_steps=1), checkpoint_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_state_of_another_run_is_refused(tmp_path):
    train(make_net(), TrainConfig(epochs=1, batch_size=16), checkpoint_dir=tmp_path)
    with pytest.raises(CompressionError, match=r"state of another run.*Remove the folder"):
        train(make_net(), TrainConfig(epochs=1, batch_size=16), checkpoint_dir=tmp_path, seed=1)


def test_all_checkpoints_damaged_means_a_fresh_start(tmp_path):
    config = TrainConfig(epochs=1, batch_size=16, checkpoint_every_steps=2)
    with pytest.raises(Stop):
        train(make_net(), config, checkpoint_dir=tmp_path, on_step=stop_at(5))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    whole, again = make_net(), make_net()
    train(whole, config)
    train(again, config, checkpoint_dir=tmp_path)
    assert_same_weights(whole, again)


KILLED = textwrap.dedent(
    """
    import importlib.util, os, signal, sys
    from pathlib import Path
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("test_train", sys.argv[1])
    here = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(here)

    def on_step(done, total):
        print(done, flush=True)
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    here.long_training(here.make_net(), checkpoint_dir=Path(sys.argv[2]), on_step=on_step)
    """
)


def long_training(model: nn.Module, **options) -> None:
    """36 steps in three epochs, a checkpoint after every fifth."""
    config = TrainConfig(epochs=3, batch_size=8, checkpoint_every_steps=5)
    train(model, config, augment=ShiftFlip(pad=1), **options)


def steps_until_killed(folder: Path, kill_at: int) -> list[int]:
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__)), str(folder), str(kill_at)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    return [int(line) for line in process.stdout.split() if line.isdigit()]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_sigkill_in_mid_epoch_ends_with_the_same_bits(tmp_path):
    """Killed at step 18, in mid-epoch; started again, killed at 28; newest file cut in half; started again."""
    steps = steps_until_killed(tmp_path, 18)
    assert (steps[0], steps[-1]) == (1, 18)
    steps = steps_until_killed(tmp_path, 28)
    assert (steps[0], steps[-1]) == (16, 28)
    newest = sorted(tmp_path.iterdir())[-1]
    assert newest.name.startswith("step-0000000025")
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    cut, whole, steps = make_net(seed=4), make_net(), []
    long_training(cut, checkpoint_dir=tmp_path, on_step=lambda done, total: steps.append(done))
    assert (steps[0], steps[-1]) == (21, 36)
    long_training(whole)
    assert_same_weights(cut, whole)
