"""Several workers at one study in a real PostgreSQL database."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from compression.errors import CompressionError
from compression.search import Scale
from tests.compression import postgres
from tests.compression.test_study import BASE, config_of, search

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(postgres.programs() is None, reason="PostgreSQL is not installed (apt-get install postgresql)"),
]

WORKER = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from compression.search import ledger
ledger.HEARTBEAT_SECONDS, ledger.GRACE_SECONDS = 1, 3
from tests.compression.test_study import Trainer, config_of, search
from tests.compression.test_shared_study import SPACES

url, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
folder.mkdir(parents=True)
train = Trainer()

def slow(model, number, scratch, on_epoch):
    with (folder / "calls").open("a") as file:
        file.write(f"{{number}}\\n")
    time.sleep(120 if name == "doomed" else 0.4)
    return train(model, number, scratch, on_epoch)

result = search(folder, config_of(spaces=SPACES, trials=6), train=slow, storage=url)
loaded = [(place / "spec.json").is_file() for place in result.finalists]
rows = [[t.number, t.space, t.choices, t.state, t.accuracy] for t in result.trials]
(folder / "result.json").write_text(json.dumps({{"rows": rows, "chosen": [t.number for t in result.chosen],
    "loaded": loaded, "hypervolume": result.hypervolume}}))
"""

SPACES = (Scale(base=BASE, widths=(0.5, 1.0, 1.5, 2.0), depths=(0, 1)),)


def start(tmp_path: Path, url: str, name: str) -> subprocess.Popen[bytes]:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER.format(root=str(Path(__file__).parents[2]))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, script, url, tmp_path / name, name], env=environment)


def calls_of(folder: Path) -> list[int]:
    place = folder / "calls"
    return [int(line) for line in place.read_text().split()] if place.exists() else []


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_two_workers_share_the_trials_and_agree_on_the_result(tmp_path):
    with postgres.server() as url:
        workers = [start(tmp_path, url, name) for name in ("one", "two")]
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    calls = [calls_of(tmp_path / name) for name in ("one", "two")]
    assert all(calls), "both trained something"
    assert not set(calls[0]) & set(calls[1]), "no trial was trained twice"
    results = [result_of(tmp_path / name) for name in ("one", "two")]
    assert results[0] == results[1]
    assert sum(row[3] == "complete" for row in results[0]["rows"]) >= 6
    assert results[0]["loaded"] == [True], "the finalist is at hand for the worker that did not train it too"


def test_the_trial_of_a_killed_worker_is_done_by_another(tmp_path):
    with postgres.server() as url:
        doomed = start(tmp_path, url, "doomed")
        deadline = time.monotonic() + 120
        while not calls_of(tmp_path / "doomed"):
            assert doomed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        doomed.send_signal(signal.SIGKILL)
        doomed.wait()
        other = start(tmp_path, url, "other")
        assert other.wait(timeout=240) == 0
    rows = result_of(tmp_path / "other")["rows"]
    assert sum(row[3] == "complete" for row in rows) == 6
    trained = [(row[1], json.dumps(row[2], sort_keys=True)) for row in rows if row[3] == "complete"]
    assert len(set(trained)) == 6, "nothing was trained twice"
    assert 0 not in [row[0] for row in rows], "the abandoned attempt itself has no outcome"
    assert trained.count(("scale-plain_cnn", json.dumps({"depth": 1, "width": 1.5}, sort_keys=True))) == 1, (
        "its candidate, the middle of the space, has one"
    )


def test_a_database_that_does_not_answer_is_an_error_with_a_way_out(tmp_path):
    url = f"postgresql+psycopg://stillhouse@127.0.0.1:{postgres.free_port()}/postgres"
    with pytest.raises(CompressionError, match=r"setting study_storage cannot be opened .*Check the file, or address"):
        search(tmp_path, config_of(), storage=url)
