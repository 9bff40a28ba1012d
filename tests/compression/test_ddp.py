"""Several processes that train one model: the same result as one, resumed as one, ended together.

What may differ is rounding: the gradient of a batch is the mean of its halves' gradients, and float32 sums in another
order. Over the 64 steps here that came to 6e-8 in a weight (of up to 0.6) and 2e-7 of the loss; the tolerances leave
two orders for processors that sum otherwise. A training on half of each batch, which is what forgetting to exchange
gradients comes to, is 0.08 away: four orders more, which a test checks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compression.errors import CompressionError
from compression.train import Hardware, launcher
from compression.train.ranks import refuse_for_ranks, replace_batch_norms
from tests.compression.ranks_training import train

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = {"epochs": 8, "batch_size": 16, "learning_rate": 0.01, "checkpoint_every_steps": 10}
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5


def job(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "net": "plain", "train": SCHEDULE, "folder": str(folder)} | more


def on_ranks(folder: Path, jobs: list[dict[str, Any]], count: int = 2) -> list[dict[str, Any]]:
    """Do the jobs in ``count`` processes; returns what the first rank said."""
    request = folder / "jobs.json"
    request.write_text(json.dumps(jobs))
    said: list[dict[str, Any]] = []
    launcher.launch(
        [sys.executable, "-m", "tests.compression.ranks_training", str(request)],
        count,
        what="tiny net",
        logs=folder / "logs",
        on_message=lambda message: said.append(dict(message)),
        environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return said


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)


# ---------------------------------------------------------------- two real processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every training of the comparisons: ``two-*`` by two processes, ``one-*`` by this one."""
    folder = tmp_path_factory.mktemp("ddp")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    longer = SCHEDULE | {"epochs": 20}
    kinds = [
        {"name": "plain"},
        {"name": "helpers", "helpers": True},
        {"name": "norm", "net": "norm", "train": longer},
        {"name": "stopped", "stops_after": 3},
    ]
    saved = {"norm": {"checkpoints": str(folder / "steps")}}
    two = [job(folder, **(kind | {"name": f"two-{kind['name']}"} | saved.get(kind["name"], {}))) for kind in kinds]
    on_ranks(folder, two)
    for kind in kinds:
        train(job(folder, **(kind | {"name": f"one-{kind['name']}"})), Hardware(accelerator="cpu"))
    half = SCHEDULE | {"batch_size": 8, "max_steps_per_epoch": 8}
    train(job(folder, "one-half", train=half), Hardware(accelerator="cpu"))
    torch.set_num_threads(before)
    return folder


class TestTwoProcesses:
    pytestmark = pytest.mark.slow

    def test_the_same_weights_and_learning_curve_as_one(self, trained: Path) -> None:
        one, two = rows(trained, "one-plain"), rows(trained, "two-plain")
        assert len(one) == len(two) == SCHEDULE["epochs"]
        for left, right in zip(one, two, strict=True):
            assert right["loss"] == pytest.approx(left["loss"], rel=LOSS_TOLERANCE)
            assert right["validation_nll"] == pytest.approx(left["validation_nll"], rel=LOSS_TOLERANCE)
            assert right["learning_rate"] == left["learning_rate"]
        assert furthest(weights(trained, "one-plain"), weights(trained, "two-plain")) < WEIGHT_TOLERANCE

    def test_the_tolerance_tells_half_a_batch_from_a_whole_one(self, trained: Path) -> None:
        assert furthest(weights(trained, "one-plain"), weights(trained, "one-half")) > 1000 * WEIGHT_TOLERANCE

    def test_what_is_trained_beside_the_model_is_averaged_too(self, trained: Path) -> None:
        one, two = weights(trained, "one-helpers"), weights(trained, "two-helpers")
        buffer = "helpers.seen"  # the last batch as one rank saw it: the first rank's counts
        assert not torch.equal(one.pop(buffer), two.pop(buffer))
        assert furthest(one, two) < WEIGHT_TOLERANCE
        assert torch.equal(two["helpers.unused.weight"], one["helpers.unused.weight"]), "no gradient, no decay"

    def test_all_ranks_end_with_the_same_bits(self, trained: Path) -> None:
        for name in ("plain", "helpers", "norm", "stopped"):
            first, second = weights(trained, f"two-{name}"), weights(trained, f"two-{name}.rank-1")
            assert furthest(first, second) == 0.0, name

    def test_batch_norm_sees_half_a_batch_and_ends_as_accurate(self, trained: Path) -> None:
        """Each rank normalises with the statistics of its own 8 of the 16 images, since SyncBatchNorm is CUDA's alone.

        That is another training, with noisier statistics, and so other weights; what it must keep is the accuracy:
        within 5 points, 3 of the 64 validation images.
        """
        one, two = rows(trained, "one-norm"), rows(trained, "two-norm")
        assert furthest(weights(trained, "one-norm"), weights(trained, "two-norm")) > 1000 * WEIGHT_TOLERANCE
        assert one[-1]["validation_accuracy"] > 0.9
        assert two[-1]["validation_accuracy"] == pytest.approx(one[-1]["validation_accuracy"], abs=0.05)

    def test_the_first_rank_decides_when_to_stop(self, trained: Path) -> None:
        assert len(rows(trained, "two-stopped")) == 3

    def test_killed_and_started_again_it_ends_with_the_same_bits(self, trained: Path, tmp_path: Path) -> None:
        again = job(tmp_path, "again", net="norm", train=SCHEDULE | {"epochs": 20}, checkpoints=str(tmp_path / "steps"))
        with pytest.raises(CompressionError, match="signal 9"):
            on_ranks(tmp_path, [again | {"dies_at": 35, "rank": 0}])
        said = on_ranks(tmp_path, [again])
        assert said[0]["done"] == 31, "it goes on behind the checkpoint of step 30"
        assert furthest(weights(tmp_path, "again"), weights(trained, "two-norm")) == 0.0
        left, right = rows(tmp_path, "again"), rows(trained, "two-norm")
        assert [row["loss"] for row in left] == [row["loss"] for row in right]

    def test_a_rank_that_dies_ends_the_training_and_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CompressionError, match=r"lost process 1 of 2: it was ended by signal 9") as caught:
            on_ranks(tmp_path, [job(tmp_path, "dying", dies_at=5, rank=1)])
        assert "rank-1.log" in str(caught.value)

    def test_the_error_of_a_rank_is_the_error_of_the_training(self, tmp_path: Path) -> None:
        with pytest.raises(CompressionError, match="^Rank '1' has had enough"):
            on_ranks(tmp_path, [job(tmp_path, "failing", fails_at=5, rank=1)])


# ---------------------------------------------------------------- the launcher, without torch


def launched(tmp_path: Path, code: str, count: int = 2, **options: Any) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    launcher.launch(
        [sys.executable, "-c", code],
        count,
        what="nothing",
        logs=tmp_path,
        on_message=options.get("on_message", lambda message: said.append(dict(message))),
    )
    return said


def test_ranks_meet_at_one_address_and_the_first_ones_messages_arrive(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps({k: os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'MASTER_PORT')}))"
    (message,) = launched(tmp_path, code, 3)
    assert message["RANK"] == "0"
    assert message["WORLD_SIZE"] == "3"


def test_a_rank_that_ends_badly_ends_the_others(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('no more')\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    with pytest.raises(CompressionError, match="lost process 1 of 2: it has ended with exit code 1") as caught:
        launched(tmp_path, code)
    assert "no more" in str(caught.value)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text() or 0))


def test_interrupted_it_lets_the_first_rank_end_in_order_before_the_others(tmp_path: Path) -> None:
    code = (
        "import json, os, signal, sys, time\n"
        f"place = {str(tmp_path)!r} + '/ended-' + os.environ['RANK']\n"
        "def leave(*_):\n"
        "    open(place, 'w').write(repr(time.time()))\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        f"open({str(tmp_path)!r} + '/ready-' + os.environ['RANK'], 'w').close()\n"
        f"while not os.path.exists({str(tmp_path)!r} + '/ready-1'): time.sleep(0.01)\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "time.sleep(600)"
    )

    def interrupt(_message: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launched(tmp_path, code, on_message=interrupt)
    first, second = (float((tmp_path / f"ended-{rank}").read_text()) for rank in (0, 1))
    assert first < second


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    ranks = "import os, time; from compression.train import launcher; "
    ranks += f"open({str(tmp_path)!r} + '/pid-' + os.environ['RANK'], 'w').write(str(os.getpid())); "
    ranks += "launcher.serve(lambda: time.sleep(600))"
    starter = (
        "import sys; from pathlib import Path; from compression.train import launcher\n"
        f"launcher.launch([sys.executable, '-c', {ranks!r}], 2, what='x', logs=Path({str(tmp_path)!r}),"
        " on_message=print)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", starter], env=environment) as process:
        files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
        wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
        started = [psutil.Process(int(file.read_text())) for file in files]
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=90)
    assert not alive


def wait_for(ready: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- what several ranks ask


def test_batch_norms_are_synchronised_in_place_over_the_same_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    before = dict(model.state_dict(keep_vars=True))
    replaced = replace_batch_norms(model)
    assert [type(module) for _, _, module in replaced] == [nn.BatchNorm2d]
    assert isinstance(model[1][0], nn.SyncBatchNorm)  # type: ignore[index]
    during = model.state_dict(keep_vars=True)
    assert all(during[key] is value for key, value in before.items())


def test_parts_that_would_train_apart_are_refused_for_several_ranks_only() -> None:
    own = [nn.Parameter(torch.zeros(1))]
    refuse_for_ranks(1, self_trained=own, has_backward=True)
    refuse_for_ranks(2, self_trained=[], has_backward=False)
    with pytest.raises(CompressionError, match="STILLHOUSE_DEVICES=1"):
        refuse_for_ranks(2, self_trained=own, has_backward=False)
    with pytest.raises(CompressionError, match="aligns gradients"):
        refuse_for_ranks(2, self_trained=[], has_backward=True)
