"""What Prefect, MLflow and the store cost: per stage, per run, per MiB; and what a run costs in which nothing is to do.

    .venv/bin/python benchmarks/overhead.py [--recipe recipes/digits.yaml] [--rounds 10] [--json overhead.json]

Trivial stages (one file of 1 KiB each) go through the product's own runners, arm by arm in turn, so that whatever else
the machine does hits all arms alike: the store alone, with MLflow in SQLite, and within Prefect tasks of a real server
(started here, ended here). Everything lies in a folder that is deleted. For plan and no-op the recipe is run once
before; ``--root`` names a folder where that is done already. Figures are medians, with the middle half of the samples.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES_PER_ROUND = 10
MIB = 2**20
SAMPLES: dict[str, list[float]] = {}
"""Name of a figure -> samples, in milliseconds."""


def sample(name: str, seconds: float, per: int = 1) -> None:
    SAMPLES.setdefault(name, []).append(seconds * 1000 / per)


@contextmanager
def timed(name: str, per: int = 1) -> Iterator[None]:
    started = time.perf_counter()
    yield
    sample(name, time.perf_counter() - started, per)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- stages ---


def stages(rounds: int) -> None:
    """Fresh and kept stages in three arms, ``rounds`` times each in turn."""
    from prefect import flow

    from tasks import tracking
    from tasks.artifacts import Store
    from tasks.prefect_runner import PrefectRunner
    from tasks.settings import settings
    from tasks.stage import DirectRunner, StageIndex, StageOutput, Work, stage, use_runner

    @stage("trivial", libraries=())
    def trivial(work: Work, *, name: str, number: int) -> StageOutput:
        with work.store.put("trivial") as draft:
            (draft.folder / "number").write_bytes(number.to_bytes(8, "little") * 128)
        return StageOutput(artifact=draft.done(), metrics={"number": float(number)})

    store = Store(settings().store_dir)
    store.prepare()

    def go(arm: str, runner: DirectRunner, numbers: range) -> None:
        with use_runner(runner):
            for what in ("fresh", "kept"):
                for number in numbers:
                    with timed(f"{what} stage, {arm}"):
                        trivial(name=f"{arm} {number}", number=number)

    def runner_of(kind: type[DirectRunner], run: Any) -> DirectRunner:
        return kind(index=StageIndex(store), parent_run=run)

    @flow(name="overhead")
    def within_prefect(numbers: list[int]) -> None:
        with tracking.recipe_run("overhead", {}, {}) as run:
            go("MLflow and Prefect", runner_of(PrefectRunner, run), range(numbers[0], numbers[-1] + 1))

    @flow(name="overhead-empty")
    def empty() -> None:
        return

    empty()
    for round_ in range(rounds):
        progress(f"stages: round {round_ + 1} of {rounds}")
        first = round_ * STAGES_PER_ROUND
        numbers = range(first, first + STAGES_PER_ROUND)
        with without_mlflow():
            go("store alone", runner_of(DirectRunner, tracking.Run("")), numbers)
        with timed("run opened and closed in MLflow"), tracking.recipe_run("overhead", {}, {}) as run:
            pass
        with tracking.recipe_run("overhead", {}, {}) as run:
            go("MLflow", runner_of(DirectRunner, run), numbers)
        with timed("flow run without a task"):
            empty()
        within_prefect(list(numbers))


@contextmanager
def without_mlflow() -> Iterator[None]:
    """Stages run, and nothing is logged."""
    from tasks import tracking

    class Silent:
        id = ""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    before = tracking.stage_run, tracking.log_cached_stage
    tracking.stage_run = lambda *args, **kwargs: nullcontext(Silent())  # type: ignore[assignment]
    tracking.log_cached_stage = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        tracking.stage_run, tracking.log_cached_stage = before


@contextmanager
def prefect_server(folder: Path) -> Iterator[None]:
    """A server of its own, while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PREFECT_HOME": str(folder / "server")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    try:
        progress("Prefect server: starting")
        with timed("Prefect server, start to answer"):
            while not _answers(f"{os.environ['PREFECT_API_URL']}/health"):
                if process.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text()[-3000:])
                time.sleep(0.2)
        yield
    finally:
        del os.environ["PREFECT_API_URL"]
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


# --- store ---


def store(rounds: int) -> None:
    """One file put, opened (which verifies) and looked at again, per MiB."""
    from tasks.artifacts import Store
    from tasks.settings import settings

    place = Store(settings().store_dir)
    place.prepare()
    for round_ in range(rounds):
        for size in (1, 32):
            content = os.urandom(size * MIB)
            with timed(f"store: put, per MiB of {size}", size), place.put("bench") as draft:
                (draft.folder / "content").write_bytes(content)
            with timed(f"store: open, per MiB of {size}", size):
                place.open(draft.done())
        progress(f"store: round {round_ + 1} of {rounds}")


# --- a run in which nothing is to do ---


def nothing_to_do(recipe: Path, root: Path, repeats: int) -> None:
    """``plan`` and ``compress`` of a recipe that was run, from command line to exit."""
    environment = {**os.environ, "STILLHOUSE_ROOT": str(root), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}

    def call(command: str) -> str:
        line = [sys.executable, "-m", "flows.cli", command, str(recipe.resolve())]
        done = subprocess.run(line, env=environment, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return done.stdout

    progress(f"{recipe.name}: running it once, unless that was done")
    call("compress")
    of_a_run(root)
    for repeat in range(repeats):
        progress(f"nothing to do: {repeat + 1} of {repeats}")
        with timed("plan, all kept, command line to exit"):
            text = call("plan")
        if " kept, 0 to do." not in text:
            raise SystemExit(f"The plan still has something to do:\n{text}")
        with timed("compress, all kept, command line to exit"):
            text = call("compress")
        if "Nothing has changed" not in text:
            raise SystemExit(f"The run did something:\n{text}")


def of_a_run(root: Path) -> None:
    """The first run below ``root``: how long it took as MLflow tells it, and how much of that inside stages."""
    from mlflow import MlflowClient

    folder = min((root / "runs").glob("*/*/summary.json")).parent
    summary_, lineage = (json.loads((folder / name).read_text()) for name in ("summary.json", "lineage.json"))
    info = MlflowClient(f"sqlite:///{root / 'mlruns' / 'mlflow.db'}").get_run(summary_["mlflow_run"]).info
    inside = sum(row["seconds"] for row in lineage if not row["cached"])
    sample(f"run of {len(lineage)} stages, opened to closed", (info.end_time - info.start_time) / 1000)
    sample(f"run of {len(lineage)} stages, inside stages", inside)


def imports(repeats: int) -> None:
    """What a process pays before it does anything."""
    for repeat in range(repeats):
        progress(f"imports: {repeat + 1} of {repeats}")
        for module in ("compression.types", "torch", "mlflow", "prefect", "flows.cli", "flows.compress"):
            with timed(f"python -c 'import {module}'"):
                subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT, capture_output=True)


# --- figures ---


def summary() -> dict[str, dict[str, float]]:
    found = {}
    for name, samples in SAMPLES.items():
        quarters = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        found[name] = {"median_ms": quarters[1], "low_ms": quarters[0], "high_ms": quarters[2], "samples": len(samples)}
    return found


def keep(place: Path | None) -> None:
    """Write what is measured so far, so that a run that is ended early leaves its figures."""
    if place is not None:
        content = {"load": os.getloadavg(), "cores": os.cpu_count(), "figures": summary()}
        place.write_text(json.dumps(content, indent=1))


def show(found: dict[str, dict[str, float]]) -> None:
    width = max(map(len, found))
    print(f"{'':{width}}  {'median':>10}  {'middle half':>23}  samples")
    for name, row in found.items():
        low, high = f"{row['low_ms']:.2f}", f"{row['high_ms']:.2f}"
        print(f"{name:{width}}  {row['median_ms']:7.2f} ms  {low:>10} - {high:>10}  {row['samples']:7.0f}")
    for what in ("fresh", "kept"):
        alone, logged, both = (
            found[f"{what} stage, {arm}"]["median_ms"] for arm in ("store alone", "MLflow", "MLflow and Prefect")
        )
        print(
            f"A {what} stage: {alone:.1f} ms of store, {logged - alone:+.1f} ms of MLflow, "
            f"{both - logged:+.1f} ms of Prefect."
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Largest child process: {peak:.0f} MiB. Load of the last 1, 5, 15 minutes: {load}; cores: {os.cpu_count()}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "digits.yaml")
    parser.add_argument("--root", type=Path, help="STILLHOUSE_ROOT of a finished run of the recipe; else it is run")
    parser.add_argument("--rounds", type=int, default=10, help=f"of {STAGES_PER_ROUND} stages in each arm")
    parser.add_argument("--repeats", type=int, default=3, help="of whole commands and imports")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillhouse-overhead-") as text:
        folder = Path(text)
        os.environ["STILLHOUSE_ROOT"] = str(folder)
        from tasks.settings import prepare_prefect

        prepare_prefect()
        os.environ["PREFECT_LOGGING_LEVEL"] = "ERROR"
        os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
        with prefect_server(folder):
            stages(arguments.rounds)
        keep(arguments.json)
        store(arguments.rounds)
        imports(arguments.repeats)
        keep(arguments.json)
        root = arguments.root or folder / "run"
        root.mkdir(exist_ok=True)
        nothing_to_do(arguments.recipe, root, arguments.repeats)
    keep(arguments.json)
    show(summary())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from benchmarks import overhead  # a stage's code is looked up by the name of its module

    overhead.main()
