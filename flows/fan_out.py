"""Independent parts of a run, done ahead by workers: processes of this machine, Dask or Ray.

The story stays sequential. Before it comes to its teachers, and before it comes to its finalists, workers may do them
ahead through the same store and locks; the story then finds them kept. Only JSON text goes to a worker and comes
back, so the result is the same whatever does the work, and a lost worker costs nothing but time.

Local workers are processes, never threads: a training draws from the random state of its process, and equal results
rest on that state being its own.
"""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import psutil

from compression.errors import InputError, StillhouseError
from compression.types import Frozen
from flows.units import Unit, UnitPlan, UnitRunner, carry_out_unit
from tasks import tracking
from tasks.artifacts import Store, write_durably
from tasks.machine import set_threads
from tasks.settings import settings
from tasks.stage import DirectRunner, StageIndex, current_runner

if TYPE_CHECKING:
    from flows.recipe import Recipe

logger = logging.getLogger(__name__)

EXTRAS = {"dask": "distributed", "ray": "ray"}
"""Back end -> the package it needs; the extra has the back end's name."""
PATIENCE_SECONDS = 8.0
_ONE_AT_A_TIME = threading.Lock()  # a Dask worker may run several threads; a unit wants its process for itself


class Request(Frozen):
    """What a worker is sent."""

    recipe: dict[str, Any]
    unit: Unit
    parent: str
    """MLflow run that the unit's stages are children of."""
    force_from: str | None
    threads: int
    """0: what the worker's own settings say."""
    proof: str
    """A file that the worker must see, or it has another store."""


class Reply(Frozen):
    """What a worker sends back; the results themselves are in the store."""

    unit: Unit
    host: str
    seconds: float
    error: str = ""


Answers = Generator[tuple[int, Reply | str], None, None]
"""(number of the request, reply or why there is none), in the order of arrival."""


def check() -> None:
    """Refuse a back end that is not there.

    Raises:
        InputError: the package is not installed, or the scheduler does not answer.
    """
    chosen = settings().fan_out
    package = EXTRAS.get(chosen)
    if package is not None and find_spec(package) is None:
        raise InputError(
            f"Setting STILLHOUSE_FAN_OUT has '{chosen}', but package '{package}' is not installed. "
            f"Get it with pip install 'stillhouse[{chosen}]', or set STILLHOUSE_FAN_OUT=processes."
        )
    address = settings().dask_scheduler
    if chosen == "dask" and address:
        place = urlsplit(address if "//" in address else f"tcp://{address}")
        try:
            with socket.create_connection((place.hostname or "", place.port or 8786), timeout=5):
                pass
        except (OSError, ValueError) as error:
            raise InputError(
                f"Dask scheduler '{address}' does not answer ({error}), expected one that does. Start it with "
                "`dask scheduler`, or correct STILLHOUSE_DASK_SCHEDULER (empty: a cluster of processes here)."
            ) from error


def ahead(recipe: "Recipe", units: Sequence[Unit]) -> None:
    """Let workers do these units, as far as they are not kept; afterwards the story finds them.

    Nothing happens without the setting, within a plan, within a worker, or where fewer than two units are to do. What
    a worker fails at is left to the caller, who then sees the error itself.
    """
    runner = current_runner()
    if settings().fan_out == "none" or not isinstance(runner, DirectRunner) or isinstance(runner, UnitRunner):
        return
    forcing = runner.force_from
    todo = [unit for unit in units if _is_pending(recipe, unit, runner.index, forcing)]
    if len(todo) < 2:
        return
    report = partial(runner.report, f"units ahead ({todo[0][0]}s)")
    proof = settings().home_dir / "fan_out" / uuid4().hex
    write_durably(proof, "")
    requests = [
        Request(
            recipe=recipe.model_dump(mode="json"),
            unit=unit,
            parent=runner.parent_run.id,
            force_from=forcing,
            threads=_threads(len(todo)),
            proof=str(proof),
        ).model_dump_json()
        for unit in todo
    ]
    logger.info("%d units are done ahead by %s.", len(todo), settings().fan_out)
    report(0, len(todo))
    try:
        with closing(BACK_ENDS[settings().fan_out](requests)) as answers:
            for done, (number, reply) in enumerate(answers, start=1):
                _judge(reply, recipe, todo[number], runner.index, forced=bool(forcing))
                report(done, len(todo))
    except Exception as error:  # a cluster that went away costs time, not the run
        logger.warning("Fan-out '%s' has ended early (%s); this process does the rest.", settings().fan_out, error)
    finally:
        proof.unlink(missing_ok=True)


def _is_pending(recipe: "Recipe", unit: Unit, index: StageIndex, force_from: str | None = None) -> bool:
    plan = UnitPlan(index, unit)
    carry_out_unit(recipe, plan)
    return any(result.is_pending or result.stage == force_from for result in plan.results)


def _judge(reply: Reply | str, recipe: "Recipe", unit: Unit, index: StageIndex, *, forced: bool) -> None:
    what = " ".join(map(str, unit))
    if isinstance(reply, str) or reply.error:
        logger.warning("Unit '%s' is left to this process: %s", what, reply if isinstance(reply, str) else reply.error)
    elif not forced and _is_pending(recipe, unit, index):
        logger.warning(
            "Unit '%s' was done by '%s' and is not found here: that worker has other code, other library versions or "
            "another kind of processor. This process does it again.",
            what,
            reply.host,
        )
    else:
        logger.info("Unit '%s' was done ahead in %.1f s.", what, reply.seconds)


def _threads(units: int) -> int:
    """Of each worker: as set, else its share of the cores; a cluster's workers have settings of their own."""
    outside = {"dask": settings().dask_scheduler, "ray": settings().ray_address}.get(settings().fan_out)
    if settings().threads or outside:
        return settings().threads
    return max(1, (os.cpu_count() or 1) // min(settings().workers, units))


def carry_out(request_json: str) -> str:
    """Do one unit in this process; called in the worker. The reply is JSON too, an error is part of it."""
    request = Request.model_validate_json(request_json)
    started = time.monotonic()
    error = ""
    with _ONE_AT_A_TIME:
        try:
            _do(request)
        except Exception as problem:
            if not isinstance(problem, StillhouseError):
                logger.exception("Unit '%s' failed", request.unit)
            error = f"{type(problem).__name__}: {problem}"
    seconds = time.monotonic() - started
    return Reply(unit=request.unit, host=socket.gethostname(), seconds=seconds, error=error).model_dump_json()


def _do(request: Request) -> None:
    from flows.recipe import Recipe

    if not Path(request.proof).is_file():
        raise InputError(
            f"Worker on '{socket.gethostname()}' does not see '{request.proof}', expected the store of the run. "
            "Workers need the same file system and the same STILLHOUSE_* settings."
        )
    set_threads(request.threads or settings().threads)
    store = Store(settings().store_dir)
    store.prepare(min_free_bytes=settings().min_free_mib * 2**20)
    runner = UnitRunner(
        index=StageIndex(store),
        parent_run=tracking.Run(request.parent),
        force_from=request.force_from,
        unit=request.unit,
    )
    carry_out_unit(Recipe.model_validate(request.recipe), runner)


# --- back ends ---


def on_processes(requests: Sequence[str]) -> Answers:
    """Spawned processes of this machine that read requests and write replies, a line each."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[int, Reply | str]] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    slots = [_Slot(number) for number in range(min(settings().workers, len(requests)))]

    def serve(slot: "_Slot") -> None:
        with suppress(queue.Empty):
            while True:
                number = waiting.get_nowait()
                answers.put((number, slot.ask(requests[number])))

    threads = [threading.Thread(target=serve, args=(slot,), daemon=True) for slot in slots]
    try:
        for thread in threads:
            thread.start()
        for _ in requests:
            yield answers.get()
    finally:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for slot in slots:
            slot.ask_to_end()
        for slot in slots:
            slot.end()


class _Slot:
    """One worker process of this machine; one that died is followed by a fresh one at the next request."""

    def __init__(self, number: int) -> None:
        self.log = settings().home_dir / "logs" / f"fan-out-{number}.log"
        self.process: subprocess.Popen[str] | None = None
        self.ended = False
        self.lock = threading.Lock()

    def ask(self, request: str) -> Reply | str:
        """The worker's reply, or why there is none."""
        try:
            with self.lock:
                if self.ended:
                    return "the run has ended"
                if self.process is None or self.process.poll() is not None:
                    self.process = self.start()
                process = self.process
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if line:
                return Reply.model_validate_json(line)
            return f"its worker has ended with exit code {process.wait()}; see {self.log}"
        except (OSError, ValueError) as error:
            return f"its worker could not be used ({error}); see {self.log}"

    def start(self) -> subprocess.Popen[str]:
        """A worker whose standard output holds replies alone; everything else goes to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # A worker that outlives its run must not look like the run itself.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT__")}
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.fan_out"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the run, which ends its workers in order
            )

    def ask_to_end(self) -> None:
        """Let the worker end: at once when it is idle, with its training's state saved when not."""
        with self.lock:
            self.ended = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def end(self) -> None:
        """Wait for the end that was asked for; kill what does not follow."""
        if self.process is not None:
            try:
                self.process.wait(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def on_dask(requests: Sequence[str]) -> Answers:
    """A Dask cluster: the one at STILLHOUSE_DASK_SCHEDULER, or worker processes of this machine."""
    from distributed import Client, LocalCluster, as_completed

    logging.getLogger("distributed").setLevel(logging.WARNING)
    with ExitStack() as stack:
        address: Any = settings().dask_scheduler
        if not address:
            workers = min(settings().workers, len(requests))
            address = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0")
            )
        client = stack.enter_context(Client(address, timeout=20))
        numbers = {client.submit(carry_out, each, pure=False): number for number, each in enumerate(requests)}
        try:
            for future in as_completed(list(numbers)):
                problem = future.exception()
                yield numbers[future], Reply.model_validate_json(future.result()) if problem is None else str(problem)
        finally:
            client.cancel(list(numbers))


def on_ray(requests: Sequence[str]) -> Answers:
    """A Ray cluster: the one at STILLHOUSE_RAY_ADDRESS, or one of this machine."""
    import ray  # pyright: ignore[reportMissingImports]

    there = ray.is_initialized()
    if not there:
        address = settings().ray_address
        here: Mapping[str, Any] = (
            {"address": address} if address else {"num_cpus": settings().workers, "include_dashboard": False}
        )
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **here)
    try:
        remote = ray.remote(max_retries=2)(carry_out)
        numbers = {remote.remote(each): number for number, each in enumerate(requests)}
        waiting = list(numbers)
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            try:
                yield numbers[ready], Reply.model_validate_json(ray.get(ready))
            except ray.exceptions.RayError as error:
                yield numbers[ready], str(error)
    finally:
        if not there:
            ray.shutdown()


BACK_ENDS = {"processes": on_processes, "dask": on_dask, "ray": on_ray}


def serve() -> None:
    """Answer requests on standard input until it is closed: the worker process of ``on_processes``."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything prints goes to the log
    threading.Thread(target=_end_with, args=(psutil.Process().parent(),), daemon=True).start()
    for line in sys.stdin:
        print(carry_out(line), file=replies, flush=True)


def _end_with(parent: psutil.Process | None) -> None:
    """End this process soon after the one that started it, however that ended."""
    while parent is not None and parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
        time.sleep(1.0)
    os._exit(1)


def _leave(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    from flows import fan_out  # the same module that ``flows.compress`` imports

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, _leave)
    fan_out.serve()
