"""One PostgreSQL server behind everything: Prefect's server, MLflow's tracking server, and a study of two workers."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.compression import postgres
from tests.flows.test_fan_out import two_of_each

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.servers,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(postgres.programs() is None, reason="PostgreSQL is not installed (apt-get install postgresql)"),
]

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Servers:
    """Where everything answers; the three keep their tables in databases of their own."""

    dsn: str
    """Of PostgreSQL, without the name of a database."""
    prefect: str
    mlflow: str

    def ask(self, database: str, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(f"{self.dsn}/{database}") as connection:
            return connection.execute(query).fetchall()  # type: ignore[arg-type]

    def environment(self, place: Path) -> dict[str, str]:
        return {
            **os.environ,
            "STILLHOUSE_ROOT": str(place),
            "STILLHOUSE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            "PREFECT_HOME": str(place / "prefect"),
            "PREFECT_API_URL": f"{self.prefect}/api",
            "STILLHOUSE_MLFLOW_URI": self.mlflow,
            "STILLHOUSE_STUDY_STORAGE": self.dsn.replace("postgresql:", "postgresql+psycopg:") + "/studies",
        }


@contextmanager
def program(log: Path, command: list[str], health: str, environment: dict[str, str]) -> Iterator[None]:
    """A server until the end of the block; entered when it answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while not answers(health):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    place = tmp_path_factory.mktemp("servers")
    with postgres.server() as url:
        dsn = url.replace("postgresql+psycopg:", "postgresql:").removesuffix("/postgres")
        with psycopg.connect(f"{dsn}/postgres", autocommit=True) as connection:
            for name in ("prefect", "mlflow", "studies"):
                connection.execute(f"create database {name}")  # type: ignore[arg-type]
        ports = free_port(), free_port()
        found = Servers(dsn, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")
        environment = {
            **os.environ,
            "PREFECT_HOME": str(place / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": dsn.replace("postgresql:", "postgresql+asyncpg:") + "/prefect",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        environment.pop("PREFECT_API_URL", None)
        place_of_files = (place / "artifacts").as_uri()
        store = dsn.replace("postgresql:", "postgresql+psycopg:") + "/mlflow"
        mlflow = ["mlflow", "server", "--backend-store-uri", store, "--artifacts-destination", place_of_files]
        mlflow += ["--host", "127.0.0.1", "--port", str(ports[1]), "--workers", "1"]
        prefect = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(ports[0])]
        with (
            program(place / "mlflow.log", mlflow, f"{found.mlflow}/health", environment),
            program(place / "prefect.log", prefect, f"{found.prefect}/api/health", environment),
        ):
            yield found


@pytest.fixture(scope="module")
def runs(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two homes, as of two machines, that ran the same recipe at the same time and share nothing but the servers.

    Both let processes do their teachers ahead.
    """
    raw = two_of_each()
    raw["search"] |= {
        "trials": TRIALS,
        "finalists": 1,
        "train": {"epochs": 30, "batch_size": 16},
        "max_macs_share": None,
    }
    raw["search"]["spaces"][0] |= {"widths": [0.5, 1.0, 1.5, 2.0], "depths": [0, 1]}
    places = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    processes = []
    for place in places:
        (place / "recipe.yaml").write_text(yaml.safe_dump(raw))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "compress", "recipe.yaml"],
                env=servers.environment(place) | {"STILLHOUSE_FAN_OUT": "processes"},
                cwd=place,
                stdout=(place / "out").open("wb"),
                stderr=subprocess.STDOUT,
            )
        )
    codes = [process.wait(timeout=1200) for process in processes]
    assert codes == [0, 0], "\n".join((place / "out").read_text()[-4000:] for place in places)
    return places


def test_prefect_keeps_its_runs_in_postgresql(servers: Servers, runs: list[Path]) -> None:
    states = servers.ask("prefect", "select state_type::text, count(*) from flow_run group by 1")
    assert states == [("COMPLETED", len(runs))]
    (flows,) = servers.ask("prefect", "select count(*) from flow where name = 'compress'")
    assert flows == (1,)
    teachers = servers.ask(
        "prefect", "select state_name, count(*) from task_run where name like 'teacher/%' group by 1"
    )
    assert teachers == [("Cached", 2 * len(runs))], "what workers did ahead is shown as kept"


def test_mlflow_keeps_its_runs_in_postgresql(servers: Servers, runs: list[Path]) -> None:
    parents = servers.ask(
        "mlflow",
        "select r.status from runs r join tags t on t.run_uuid = r.run_uuid "
        "where t.key = 'stage' and t.value = 'recipe'",
    )
    assert parents == [("FINISHED",)] * len(runs)
    teachers = servers.ask(
        "mlflow",
        "select count(distinct m.run_uuid) from metrics m join tags t on t.run_uuid = m.run_uuid "
        "where t.key = 'stage' and t.value = 'teacher' and m.key = 'accuracy'",
    )
    assert teachers == [(2 * len(runs),)]
    versions = servers.ask("mlflow", "select count(*) from model_versions where name = 'digits'")
    assert versions == [(len(runs),)]
    for place in runs:
        assert not (place / "mlruns" / "mlflow.db").exists(), "nothing went to a local store"


def test_two_workers_shared_one_study(servers: Servers, runs: list[Path]) -> None:
    assert servers.ask("studies", "select count(*) from studies") == [(1,)]
    states = servers.ask("studies", "select state::text, count(*) from trials where state <> 'PRUNED' group by 1")
    assert states == [("COMPLETE", TRIALS)], "each candidate once, whoever trained it; repeated ones are pruned"
    tables = []
    for place in runs:
        with sorted(place.glob("runs/digits/*/trials.csv"))[-1].open(newline="") as file:
            tables.append(
                [[row[key] for key in ("number", "space", "state", "accuracy")] for row in csv.DictReader(file)]
            )
    assert tables[0] == tables[1], "both ended with the same study"
    shares = servers.ask(
        "mlflow",
        "select parent.value, count(*) from tags parent join params state on state.run_uuid = parent.run_uuid "
        "where parent.key = 'mlflow.parentRunId' and state.key = 'state' and state.value = 'complete' group by 1",
    )
    assert len(shares) == len(runs), "each of the two trained something"
    assert sum(count for _, count in shares) == TRIALS


def test_a_tracking_server_that_is_down_is_said_at_once(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(two_of_each()))
    gone = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "compress", "recipe.yaml"],
        env=servers.environment(tmp_path) | {"STILLHOUSE_MLFLOW_URI": gone},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert time.monotonic() - started < 120, "most of it is imports on a loaded machine"
    assert done.returncode == 2, done.stdout + done.stderr
    text = " ".join((done.stdout + done.stderr).split())
    assert f"MLflow store '{gone}' does not answer" in text
    assert "set STILLHOUSE_MLFLOW_URI" in text
    assert not (tmp_path / ".stillhouse" / "store" / "stages").exists(), "no stage was begun"


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_prefect_takes_the_templates_of_our_work_pools(servers: Servers, tmp_path: Path, kind: str) -> None:
    template = ROOT / "deploy" / "pools" / f"{kind}.json"
    command = ["work-pool", "create", kind, "--type", kind, "--base-job-template", str(template)]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command],
        env=servers.environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ((kept,),) = servers.ask("prefect", f"select base_job_template from work_pool where name = '{kind}'")
    assert kept == json.loads(template.read_text())
