"""Recipes that are started in processes of their own, watched from outside, killed, and looked at afterwards.

As a program it is one such process: ``python -m benchmarks.killing RECIPE EVENTS`` runs the flow `compress` and adds a
line to EVENTS when work on a stage begins, moves on or ends. A line is with the kernel at once: SIGKILL loses none.
"""

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DETERMINISTIC = (
    *("data", "teacher", "teacher_outputs", "select", "distill", "sparsify"),
    *("sensitivity", "quantize", "calibrate", "export"),
)
"""Stages that give equal bytes from equal inputs on one thread; the others measure times."""
FOLDER = "run-folder"
"""Written after the last stage; counted as work like one."""


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """A Prefect server of our own for as long as the block runs; gives the address of its API."""
    from flows import children
    from flows.ports import answers, any_port
    from flows.temporary_server import server_command, server_environment

    folder.mkdir(parents=True, exist_ok=True)
    api = f"http://127.0.0.1:{any_port()}/api"
    environment = {**server_environment(api), "PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    server = children.start(
        "Prefect server", server_command(api), environment=environment, folder=folder, log=folder / "server.log"
    )
    try:
        deadline = time.monotonic() + 240
        while not answers(f"{api}/health"):
            server.require_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer from {api}\n{children.tail(server.log)}")
            time.sleep(0.2)
        yield api
    finally:
        children.end([server])


class Place:
    """A folder with a store, runs and an MLflow database of its own, in which one recipe is run."""

    def __init__(self, folder: Path, recipe: Path, api: str) -> None:
        self.folder, self.recipe, self.api = folder, recipe, api
        self.events = folder / "events.jsonl"
        self.log = folder / "output.log"
        self._read, self._seen = 0, list[dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A process that runs the recipe, in a session of its own."""
        environment = {
            **os.environ,
            "STILLHOUSE_ROOT": str(self.folder),
            "STILLHOUSE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_LOGGING_LEVEL": "WARNING",
        }
        environment.pop("STILLHOUSE_HOME", None)
        command = [sys.executable, "-m", "benchmarks.killing", str(self.recipe), str(self.events), *arguments]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def seen(self) -> list[dict[str, Any]]:
        """What has happened so far, in order."""
        if self.events.exists():
            with self.events.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read += len(whole)
            self._seen += [json.loads(line) for line in whole.splitlines()]
        return self._seen

    def lineage(self) -> list[dict[str, Any]]:
        """Every stage of the newest finished run."""
        folders = sorted(path.parent for path in (self.folder / "runs").glob("*/*/summary.json"))
        return json.loads((folders[-1] / "lineage.json").read_text(encoding="utf-8"))


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def faults(place: Path) -> list[str]:
    """What a recipe left behind that must not be: doubles in MLflow, unfinished runs, scratch, leases, drafts."""
    found: list[str] = []
    home = place / ".stillhouse"
    for kind, pattern in (("lease", "running/*"), ("scratch", "scratch/*"), ("draft", "store/partial/*")):
        found += [f"{kind} left: {path.name}" for path in home.glob(pattern)]
    with closing(sqlite3.connect(place / "mlruns" / "mlflow.db")) as database:

        def rows(query: str) -> list[tuple[Any, ...]]:
            return database.execute(query).fetchall()

        tags: dict[str, dict[str, str]] = {}
        for run, key, value in rows("SELECT run_uuid, key, value FROM tags"):
            tags.setdefault(run, {})[key] = value
        runs = rows("SELECT run_uuid, name, status FROM runs WHERE lifecycle_stage = 'active'")
        found += [f"run '{name}' is {status}" for _, name, status in runs if status != "FINISHED"]
        shown = Counter()
        for run, name, _ in runs:
            facts = tags.get(run, {})
            within = facts.get("mlflow.parentRunId")
            if within is not None:  # of whole recipes there may be several
                shown[(within, facts.get("stage_key") or f"{facts.get('stage')}/{name}")] += 1
        found += [f"shown {count} times: {what}" for what, count in shown.items() if count > 1]
        twice = "SELECT run_uuid, key, step, COUNT(*) FROM metrics GROUP BY run_uuid, key, step HAVING COUNT(*) > 1"
        found += [f"metric '{key}' of step {step} is there {count} times" for _, key, step, count in rows(twice)]
        versions = rows("SELECT name, COUNT(*) FROM model_versions GROUP BY name, run_id HAVING COUNT(*) > 1")
        found += [f"model '{name}' has {count} versions of one run" for name, count in versions]
    return found


def parents(place: Path) -> int:
    """MLflow runs of whole recipes."""
    with closing(sqlite3.connect(place / "mlruns" / "mlflow.db")) as database:
        query = "SELECT COUNT(*) FROM tags WHERE key = 'stage' AND value = 'recipe'"
        return int(database.execute(query).fetchone()[0])


def is_complete(place: Path) -> bool:
    """Whether a recipe was done, so that a kill has come too late for it."""
    if not list((place / "runs").glob("*/*/summary.json")):
        return False
    with closing(sqlite3.connect(place / "mlruns" / "mlflow.db")) as database:
        query = "SELECT COUNT(*) FROM runs WHERE status <> 'FINISHED'"
        return database.execute(query).fetchone()[0] == 0


def artifacts(place: Place) -> dict[tuple[str, str], tuple[str, str]]:
    """(stage, name) -> (key, digest of what came out) of the stages that equal inputs decide."""
    return {
        (row["stage"], row["name"]): (row["key"], row["output"])
        for row in place.lineage()
        if row["stage"] in DETERMINISTIC
    }


def finalists(place: Place) -> str:
    """Digest of the students that the search has chosen, without what it has measured."""
    from tasks.artifacts import tree_digest

    (found,) = (row["output"] for row in place.lineage() if row["stage"] == "search")
    objects = place.folder / ".stillhouse" / "store" / "objects"
    return tree_digest(objects / found[:2] / found / "finalists")[0]


def differing(place: Place, reference: Place) -> tuple[int, list[tuple[str, str]]]:
    """How many stages can be compared with the reference's, and those of them that gave something else.

    A search decides by measured latency. Where it chose other students, only stages with the very same inputs count.
    """
    wanted, found = artifacts(reference), artifacts(place)
    same_students = finalists(place) == finalists(reference)
    compared = [each for each in found if each in wanted and (same_students or wanted[each][0] == found[each][0])]
    return len(compared), [each for each in compared if wanted[each][1] != found[each][1]]


class Events:
    """The lines about one process."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "time": time.time(), **facts})
        os.write(self.file, f"{line}\n".encode())

    @contextmanager
    def around(self, stage: str, name: str) -> Iterator[None]:
        self.add("begin", stage=stage, name=name)
        yield
        self.add("end", stage=stage, name=name)


def run(recipe: Path, events: Path, restart_from: str | None, if_running: str) -> None:
    """The flow `compress`, with a line for everything that happens; prints its summary."""
    from tasks.settings import prepare_prefect

    prepare_prefect()
    from flows import compress
    from flows.recipe import load_recipe

    log = Events(events)
    log.add("start")
    write = compress.write_run_folder

    class Watched(compress.PrefectRunner):
        def _fresh(self, stage: Any, name: str, key: str, inputs: Mapping[str, Any]) -> Any:
            with log.around(stage.name, name):
                return super()._fresh(stage, name, key, inputs)

    def write_run_folder(*arguments: Any) -> Any:
        with log.around(FOLDER, ""):
            return write(*arguments)

    def show(text: str, done: int, total: int) -> None:
        log.add("step", text=text, done=done, total=total)

    for part in (Watched, write_run_folder, show):
        setattr(compress, {"Watched": "PrefectRunner"}.get(part.__name__, part.__name__), part)
    flow: Any = compress.compress
    print(json.dumps(flow(load_recipe(recipe), restart_from=restart_from, if_running=if_running)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("events", type=Path)
    parser.add_argument("--from", dest="restart_from")
    parser.add_argument("--if-running", default="wait")
    arguments = parser.parse_args()
    run(arguments.recipe, arguments.events, arguments.restart_from, arguments.if_running)


if __name__ == "__main__":
    main()
