import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks import running as module
from tasks.owner import Owner
from tasks.running import AlreadyRunning, Lease, holder, leases, release, running
from tasks.settings import settings

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from tasks.running import running
with running(sys.argv[1], flow_run_id="flow-1") as held:
    held.note(mlflow_run="mlflow-1")
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process(recipe: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the recipe until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, recipe],
        env={**os.environ, "STILLHOUSE_ROOT": str(home), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def soon(ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    return ready()


def test_this_process_is_alive_and_an_ended_one_is_not() -> None:
    assert Owner.me().is_alive() is True
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of(process.pid)
    assert owner is not None
    assert owner.is_alive() is True
    process.kill()
    assert soon(lambda: owner.is_alive() is False), "a zombie is not alive"
    process.wait()
    assert owner.is_alive() is False
    assert Owner.of(process.pid) is None


def test_a_pid_that_was_given_to_another_process_or_boot_is_not_the_owner() -> None:
    me = Owner.me()
    assert me.model_copy(update={"created": me.created - 5}).is_alive() is False
    assert me.model_copy(update={"boot_id": "another start of the machine"}).is_alive() is False


def test_nobody_can_tell_about_another_machine() -> None:
    assert Owner.me().model_copy(update={"host": "elsewhere"}).is_alive() is None


def test_a_lease_is_there_while_the_recipe_runs_and_gone_afterwards(home: Path) -> None:
    with running("digits", flow_run_id="flow") as held:
        held.note(mlflow_run="abc")
        (lease,) = leases()
        assert (lease.recipe, lease.flow_run_id, lease.mlflow_run) == ("digits", "flow", "abc")
        assert lease.owner == Owner.me()
        assert not lease.waiting
        assert lease.is_alive()
        assert holder("digits") == lease
        assert holder("other") is None
    assert leases() == []
    assert list((settings().home_dir / "running").iterdir()) == []


def test_a_lease_goes_even_when_the_recipe_fails(home: Path) -> None:
    with pytest.raises(ValueError, match="broken"), running("digits"):
        raise ValueError("broken")
    assert leases() == []


def test_the_lease_of_a_killed_process_stays_names_its_runs_and_frees_the_lock(home: Path) -> None:
    with another_process("digits", home) as process:
        (lease,) = leases()
        assert lease.owner == Owner.of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (lease,) = leases()
        assert not lease.is_alive()
        assert (lease.flow_run_id, lease.mlflow_run) == ("flow-1", "mlflow-1")
        with running("digits", if_running="leave"):
            pass
    release(lease)
    release(lease)
    assert leases() == []


def test_a_second_run_leaves_and_says_who_holds_the_recipe(home: Path) -> None:
    with another_process("digits", home) as process:
        with (
            pytest.raises(AlreadyRunning, match=rf"process {process.pid} on .*flow run flow-1"),
            running("digits", if_running="leave"),
        ):
            raise AssertionError("two runs of one recipe")
        with running("another-recipe", if_running="leave"):
            assert len(leases()) == 2
        assert [lease.owner.pid for lease in leases()] == [process.pid]


def test_a_second_run_waits_and_shows_that_it_does(home: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    got = threading.Event()

    def second() -> None:
        with running("digits", report=lambda *report: reports.append(report)):
            got.set()

    with another_process("digits", home) as process:
        thread = threading.Thread(target=second)
        thread.start()
        assert soon(lambda: bool(reports))
        assert not got.is_set()
        assert [lease.waiting for lease in leases()] == [False, True]
        shown = holder("digits")
        assert shown is not None
        assert shown.owner.pid == process.pid
        process.kill()
        process.wait()
        assert got.wait(10)
    thread.join()
    text = f"waiting for process {process.pid} on {shown.owner.host}"
    assert [(each[0].startswith(text), each[1:]) for each in reports] == [(True, (0, 1)), (True, (1, 1))]
    assert [lease.owner.pid for lease in leases()] == [process.pid]


def test_the_heartbeat_touches_the_file_and_puts_it_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    with running("digits") as held:
        path = settings().home_dir / "running" / f"{held.lease.id}.json"
        os.utime(path, (0, 0))
        assert leases()[0].heartbeat.year == 1970
        assert soon(lambda: leases()[0].heartbeat.year > 1970)
        path.unlink()
        assert soon(lambda: bool(leases()))
        assert leases()[0].id == held.lease.id
    assert leases() == []


def test_a_lease_of_another_machine_is_judged_by_its_heartbeat(home: Path) -> None:
    with running("digits") as held:
        owner = held.lease.owner.model_copy(update={"host": "elsewhere"})
        far: Lease = leases()[0].model_copy(update={"owner": owner})
    assert far.is_alive()
    old = far.heartbeat.replace(year=far.heartbeat.year - 1)
    assert not far.model_copy(update={"heartbeat": old}).is_alive()


def test_a_damaged_lease_is_passed_over(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running("digits"):
        (settings().home_dir / "running" / "broken.json").write_text(json.dumps({"id": "broken"}))
        assert [lease.recipe for lease in leases()] == ["digits"]
    assert "broken.json" in caplog.text
