"""What MLflow holds after interruptions, locked databases and lost answers; the stores and servers are real."""

import http.client
import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from tasks import tracking
from tasks.owner import Owner
from tasks.running import running
from tasks.settings import settings

PARAMS = {"recipe": {"name": "digits", "seed": 0, "teachers": [{"name": "a"}, {"name": "b"}]}}


def start(**tags: str) -> str:
    """Begin and finish a recipe run; its id."""
    with tracking.recipe_run("digits", PARAMS, tags) as run:
        run.log_metrics({"accuracy": 0.5})
        return run.id


def kill(run_id: str, status: str | None = None, **tags: str) -> None:
    """Make a run look as one does whose process was killed."""
    dead = {"stillhouse.created": "1.5", **tags}
    tracking.Run(run_id).tag(dead)
    tracking.client().update_run(run_id, status=status or "RUNNING")


def parents() -> list[Any]:
    return tracking._search({"stage": "recipe"})


def values(run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracking.client().get_metric_history(run_id, key)]


def test_a_killed_recipe_goes_on_in_its_own_run(home: Path) -> None:
    first = start(**{"prefect.flow_run_id": "flow-1", "recipe": "digits"})
    kill(first)
    again = start(**{"prefect.flow_run_id": "flow-2", "recipe": "digits"})
    assert again == first
    (parent,) = parents()
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["stillhouse.flow_runs"] == "flow-1,flow-2"
    assert parent.data.tags["prefect.flow_run_id"] == "flow-2"
    assert float(parent.data.tags["stillhouse.created"]) == Owner.me().created
    assert values(first, "accuracy") == [(0, 0.5)]
    assert parent.data.params["recipe.teachers.1.name"] == "b"


def test_an_interrupted_recipe_is_marked_killed_and_goes_on(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.recipe_run("digits", PARAMS, {}) as run:
        raise KeyboardInterrupt
    (parent,) = parents()
    assert (parent.info.status, parent.data.tags["error"]) == ("KILLED", "KeyboardInterrupt")
    assert start() == run.id
    (parent,) = parents()
    assert parent.info.status == "FINISHED"
    assert "error" not in parent.data.tags


@pytest.mark.parametrize("end", ["FINISHED", "FAILED"])
def test_a_recipe_that_came_to_its_own_end_gets_a_new_run(home: Path, end: str) -> None:
    first = start()
    kill(first, end)
    assert start() != first


def test_what_another_process_works_on_is_left_to_it(home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = Owner.of(process.pid)
        assert owner is not None
        first = start()
        kill(first, **{"stillhouse.pid": str(owner.pid), "stillhouse.created": repr(owner.created)})
        assert start() != first
    finally:
        process.kill()
        process.wait()


def test_other_content_or_another_restart_is_another_run(home: Path) -> None:
    first = start()
    kill(first)
    with tracking.recipe_run("digits", {"recipe": {"name": "digits", "seed": 1}}, {}) as other:
        pass
    forced = start(**{tracking.RESTART_FROM: "distill"})
    assert len({first, other.id, forced}) == 3
    kill(forced)
    assert start(**{tracking.RESTART_FROM: "distill"}) == forced
    assert start() not in (first, forced), "what was killed before a run that ended is history"


def test_the_same_flow_run_tried_again_is_one_run_even_after_a_failure(home: Path) -> None:
    with pytest.raises(ValueError, match="no"), tracking.recipe_run("a", {}, {"prefect.flow_run_id": "flow"}) as run:
        raise ValueError("no")
    with tracking.recipe_run("a", {}, {"prefect.flow_run_id": "flow"}) as again:
        assert again.id == run.id


def test_a_run_of_another_machine_goes_on_when_its_lease_here_is_dead(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    kill(first, **{"stillhouse.host": "elsewhere"})
    assert start() != first
    second = start()
    kill(second, **{"stillhouse.host": "elsewhere"})
    with running("digits") as held:
        held.note(mlflow_run=second)
        monkeypatch.setattr("tasks.running.Lease.is_alive", lambda lease: False)
        assert start() == second


def test_runs_of_dead_processes_are_marked_killed_and_no_others(home: Path) -> None:
    ended, dead, unknown, complete = start(), start(), start(), start(run_folder=str(home))
    (home / "summary.json").write_text("{}")
    kill(complete)
    kill(dead)
    kill(unknown)
    for tag in ("stillhouse.boot", "stillhouse.created"):
        tracking.client().delete_tag(unknown, tag)
    with tracking.recipe_run("alive", {}, {}) as alive:
        killed = tracking.kill_runs(lambda owner: owner.is_alive() is False)
        states = {run: tracking.client().get_run(run).info.status for run in (ended, dead, unknown, complete, alive.id)}
    assert [run.id for run in killed] == [dead]
    assert [states[run] for run in (ended, complete)] == ["FINISHED", "FINISHED"]
    assert [states[run] for run in (dead, unknown, alive.id)] == ["KILLED", "RUNNING", "RUNNING"]
    assert "is gone (process" in tracking.client().get_run(dead).data.tags["error"]
    assert tracking.kill_runs(lambda owner: owner.is_alive() is False) == []


def test_nothing_is_there_twice_however_often_it_is_written(home: Path) -> None:
    rows = [{"epoch": epoch, "loss": float(epoch), "accuracy": 0.5} for epoch in range(1000)]
    with tracking.recipe_run("digits", PARAMS, {}) as run:
        run.log_series(rows[:400], prefix="train/")
        run.log_dataset("digits", "0123456789", "digits", {"num_rows": 3}, "train")
        tracking.log_candidate(run, "trial-1", params={"width": 1}, metrics={"accuracy": 0.1})
    kill(run.id)
    with tracking.recipe_run("digits", PARAMS, {}) as again:
        again.log_series(rows, prefix="train/")
        again.log_dataset("digits", "0123456789", "digits", {"num_rows": 3}, "train")
        tracking.log_candidate(again, "trial-1", params={"width": 1}, metrics={"accuracy": 0.1})
        tracking.log_candidate(again, "trial-2", params={"width": 2}, metrics={"accuracy": 0.2})
    assert again.id == run.id
    assert sorted(values(run.id, "train/loss")) == [(epoch, float(epoch)) for epoch in range(1000)]
    assert sorted(str(child.info.run_name) for child in tracking.children(run.id)) == ["trial-1", "trial-2"]
    inputs = tracking.client().get_run(run.id).inputs
    assert inputs is not None
    assert len(inputs.dataset_inputs) == 1


LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
input()
"""


@pytest.mark.slow
def test_a_locked_database_is_waited_for_and_loses_nothing(home: Path) -> None:
    """MLflow itself gives up after 20 s."""
    with tracking.recipe_run("digits", PARAMS, {}) as run:
        database = home / "mlruns" / "mlflow.db"
        process = subprocess.Popen(
            [sys.executable, "-c", LOCK, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "locked\n"
        release = threading.Timer(23, process.stdin.close)
        release.start()
        started = time.monotonic()
        run.log_series([{"epoch": epoch, "loss": float(epoch)} for epoch in range(50)])
        assert time.monotonic() - started > 20, "it was not locked"
        process.wait()
        tracking.log_candidate(run, "trial-1", params={}, metrics={"accuracy": 0.1})
    assert sorted(values(run.id, "loss")) == [(epoch, float(epoch)) for epoch in range(50)]
    assert len(tracking.children(run.id)) == 1
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


class LosingProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, and loses the answers to the first ones of some paths."""

    daemon_threads = True

    def __init__(self, port: int, losing: Mapping[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.losing, self.lost = port, dict(losing), list[str]()
        self.guard = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def loses(self, path: str) -> bool:
        with self.guard:
            for end, left in self.losing.items():
                if left and path.partition("?")[0].endswith(end):
                    self.losing[end] -= 1
                    self.lost.append(end)
                    return True
        return False


class _Handler(http.server.BaseHTTPRequestHandler):
    def _pass(self) -> None:
        proxy = cast("LosingProxy", self.server)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        connection.request(self.command, self.path, body, {**headers, "host": f"127.0.0.1:{proxy.port}"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if proxy.loses(self.path):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer.status)
        self.send_header("content-type", answer.headers.get("content-type", "application/json"))
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _pass  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Be silent."""


@pytest.fixture
def mlflow_server(home: Path) -> Iterator[int]:
    """The port of a real MLflow server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{home / 'server.db'}", "--default-artifact-root", str(home / "files")]
    process = subprocess.Popen(
        [*command, *store],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    try:
        while True:
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("retries", ["0", "2"])
def test_what_a_server_did_before_its_answer_was_lost_is_not_done_twice(
    mlflow_server: int, monkeypatch: pytest.MonkeyPatch, retries: str
) -> None:
    """Whether MLflow's own client asks again (2) or gives up at once (0)."""
    losing = {"runs/create": 3, "runs/log-batch": 3, "runs/update": 2}
    proxy = LosingProxy(mlflow_server, losing)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("STILLHOUSE_MLFLOW_URI", f"http://127.0.0.1:{proxy.server_port}")
    for cache in (settings, tracking.client, tracking.experiment_id):
        cache.cache_clear()
    try:
        with tracking.recipe_run("digits", PARAMS, {"prefect.flow_run_id": "flow"}) as parent:
            with tracking.stage_run(parent, stage="teacher", name="a", key="key", params={"epochs": 3}) as run:
                run.log_series([{"epoch": epoch, "loss": float(epoch)} for epoch in range(30)])
            tracking.log_candidate(parent, "trial-1", params={"width": 1}, metrics={"accuracy": 0.1})
        assert sorted(proxy.lost) == sorted(end for end, times in losing.items() for _ in range(times))
        assert sorted(values(run.id, "loss")) == [(epoch, float(epoch)) for epoch in range(30)]
        every = tracking.client().search_runs([tracking.experiment_id()])
        assert sorted(str(found.info.run_name) for found in every) == ["digits", "teacher/a", "trial-1"]
        assert {found.info.status for found in every} == {"FINISHED"}
    finally:
        proxy.shutdown()
        proxy.server_close()
