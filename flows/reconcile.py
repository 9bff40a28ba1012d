"""Reconciler: finds what died without a word, says so in Prefect and MLflow, and starts again what should go on.

Nobody else does: Prefect leaves a run whose worker died with it RUNNING for ever. A pass is cheap and may be made by
several at once: a thread of ``stillhouse up``, the flow ``reconcile``, ``stillhouse reconcile``.
"""

import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import psutil
from filelock import FileLock, Timeout
from rich.console import Console

from compression.types import Frozen
from flows import children
from flows.approvals import close_overdue
from flows.deployments import POOL, TRAINING_TAG, worker_name
from flows.flow_processes import engine_processes, processes_of
from tasks.running import Lease, leases, release
from tasks.settings import prepare_prefect, settings

prepare_prefect()

from prefect import flow  # noqa: E402
from prefect.exceptions import ObjectNotFound  # noqa: E402

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

logger = logging.getLogger(__name__)

STARTING_SECONDS = 30.0
"""A PENDING run younger than this may not have its process yet."""
SETTLING_SECONDS = 5.0
"""A worker that lives says itself that its run has died; it is given this long."""
CANCELLED_SECONDS = 2.0
"""The worker's own word about a cancelled run comes late, after its hooks; nobody needs to wait for it."""
CANCEL_SECONDS = 8.0
"""A cancelled run whose process still lives after this is killed; its last checkpoint is on disk."""
RESTART_HOURS = 24.0
"""A crash older than this is history: nobody waits for that run any more."""
RESTARTED = ("compress", "nightly", "rollout")
"""Deployments whose crashed runs are started again."""
UNDER_WAY = ("RUNNING", "PENDING", "CANCELLING")

Action = Literal["crashed", "cancelled", "scheduled again", "killed", "released"]


class Settled(Frozen):
    """What was done about one run that nobody carried on."""

    action: Action
    what: str
    """Name of the flow run, of the recipe whose lease was released, or id of the MLflow run."""
    flow_run_id: str | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.action}. {self.reason}".rstrip()


def reconcile(client: "SyncPrefectClient | None", *, starting: bool = False) -> list[Settled]:
    """One pass; what was done. Without a client only MLflow and the leases of runs without a flow run are settled.

    Runs of other machines are left alone unless their lease was not touched for long; paused and suspended runs are
    left alone (the server itself ends those whose time is over), but for approvals that nobody gave in time.

    Args:
        client: A client of the Prefect server, if there is one.
        starting: No worker of this machine runs yet, so that nothing can be about to start.
    """
    with _alone() as alone:
        if not alone:
            return []
        now = leases()
        dead = [lease for lease in now if not lease.is_alive()]
        living = {lease.flow_run_id for lease in now if lease.is_alive()}
        settled = _kill_mlflow_runs(dead) if dead else []
        if client is None:
            return [*settled, *_release(lease for lease in dead if lease.flow_run_id is None)]
        engines = engine_processes()
        for lease in dead:
            if lease.flow_run_id and lease.flow_run_id not in {*living, *engines}:
                _end_tasks(client, UUID(lease.flow_run_id))
                settled += _settle(client, _read(client, lease.flow_run_id), _gone(lease))
        settled += _release(dead)
        settled += _settle_pool(client, living, engines, starting=starting)
        settled += _close_approvals(client)
        return settled + _start_again(client, living, engines)


@flow(name="reconcile")
def reconcile_flow() -> list[dict[str, Any]]:
    """Settle what died without a word: mark it in Prefect and MLflow, and start again what should go on.

    ``stillhouse up`` does the same every few seconds; schedule this where workers run without it.
    """
    from prefect import get_client, get_run_logger

    with get_client(sync_client=True) as client:
        settled = reconcile(client)
    for each in settled:
        get_run_logger().warning("%s", each)
    return [each.model_dump() for each in settled]


def show_reconciled(console: Console) -> None:
    """One pass for the command line, with whatever server of this project runs."""
    from flows.deployments import connect
    from flows.server import running_server
    from flows.temporary_server import living_server

    up = running_server()
    api = living_server() if up is None else up.prefect_api
    settled = reconcile(None if api is None else connect(api))
    for each in settled:
        console.print(str(each), markup=False, highlight=False)
    if not settled:
        console.print("Nothing to settle: whatever is marked as running has a living process.")
    if api is None:
        console.print("No Prefect server runs here; `stillhouse up` also settles flow runs and starts them again.")


def settle_before(recipe: str, flow_run_id: str) -> list[Settled]:
    """Called by a flow run that goes on with a recipe: those of its forerunners that died are marked so now."""
    dead = [lease for lease in leases() if lease.recipe == recipe and not lease.is_alive()]
    if not dead:
        return []
    from prefect import get_client

    settled = []
    with get_client(sync_client=True) as client:
        for lease in dead:
            if lease.flow_run_id and lease.flow_run_id != flow_run_id:
                settled += _settle(client, _read(client, lease.flow_run_id), _gone(lease))
    return [*settled, *_release(dead)]


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether no other process of this home reconciles now."""
    folder = settings().home_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "reconcile.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _kill_mlflow_runs(dead: Sequence[Lease]) -> list[Settled]:
    from tasks import tracking

    owners = [lease.owner for lease in dead]
    killed = tracking.kill_runs(lambda owner: owner in owners or owner.is_alive() is False)
    return [Settled(action="killed", what=f"MLflow run {run.id}", reason="Its process is gone.") for run in killed]


def _gone(lease: Lease) -> str:
    return f"Its {lease.owner} is gone."


def _release(dead: Iterator[Lease] | Sequence[Lease]) -> list[Settled]:
    settled = []
    for lease in dead:
        release(lease)
        what = f"recipe {lease.recipe}"
        settled.append(Settled(action="released", what=what, flow_run_id=lease.flow_run_id, reason=_gone(lease)))
    return settled


def _settle_pool(
    client: "SyncPrefectClient", living: set[str | None], engines: dict[str, psutil.Process], *, starting: bool
) -> list[Settled]:
    """Deployed runs of this machine that are under way without a process, or cancelled with one that does not end."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

    under_way = FlowRunFilter.model_validate({"state": {"type": {"any_": list(UNDER_WAY)}}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    settled = []
    for run in client.read_flow_runs(flow_run_filter=under_way, work_pool_filter=pool):
        engine, state = engines.get(str(run.id)), run.state
        if state is None or not _is_here(run):
            continue
        if engine is not None:
            if state.is_cancelling() and _stop(engine, _age(state)):
                settled += _settle(client, run, "It did not end by itself when it was cancelled.")
        elif str(run.id) not in living and (starting or _age(state) > _patience(state)):
            settled += _settle(client, run, "It has no process any more.")
    return settled


def _close_approvals(client: "SyncPrefectClient") -> list[Settled]:
    reason = "Nobody answered in time."
    runs = close_overdue(client)
    return [Settled(action="cancelled", what=run.name, flow_run_id=str(run.id), reason=reason) for run in runs]


def _patience(state: "State") -> float:
    if state.is_cancelling():
        return CANCELLED_SECONDS
    return STARTING_SECONDS if state.is_pending() else SETTLING_SECONDS


def _age(state: "State") -> float:
    return (datetime.now(UTC) - state.timestamp).total_seconds()


def _is_here(run: "FlowRun") -> bool:
    """Whether a worker of this machine took it; one that says nothing is taken for ours."""
    return run.labels.get("prefect.worker.name", worker_name()) == worker_name()


def _stop(engine: psutil.Process, cancelled_seconds: float) -> bool:
    """End the process of a cancelled run; whether it is gone.

    A worker asks its runs to end. Runs whose worker died are asked here, and what does not follow is killed.
    """
    if cancelled_seconds < CANCEL_SECONDS:
        if not _has_worker(engine):
            children.end_processes([engine], patience=CANCEL_SECONDS)
        return not engine.is_running()
    with suppress(psutil.Error, OSError):
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait(timeout=2.0)
    return not engine.is_running()


def _has_worker(engine: psutil.Process) -> bool:
    with suppress(psutil.Error):
        parent = engine.parent()
        return parent is not None and "worker" in parent.cmdline()
    return False


def _read(client: "SyncPrefectClient", flow_run_id: str) -> "FlowRun | None":
    with suppress(ObjectNotFound):
        return client.read_flow_run(UUID(flow_run_id))
    return None


def _settle(client: "SyncPrefectClient", run: "FlowRun | None", reason: str) -> list[Settled]:
    """Mark a run under way as crashed, or as cancelled if that was wanted, and the runs it had started below it."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Cancelled, Crashed

    if run is None or run.state is None or run.state.type.value not in UNDER_WAY:
        return []
    cancelled = run.state.is_cancelling()
    state = Cancelled(message=reason) if cancelled else Crashed(message=reason)
    client.set_flow_run_state(run.id, state, force=True)
    _end_tasks(client, run.id)
    settled = [
        Settled(action="cancelled" if cancelled else "crashed", what=run.name, flow_run_id=str(run.id), reason=reason)
    ]
    below = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run.id]}})
    for child in client.read_flow_runs(flow_run_filter=below):
        if child.deployment_id is None:
            settled += _settle(client, child, f"It was part of {run.name}, which is gone.")
    return settled


def _end_tasks(client: "SyncPrefectClient", run: UUID) -> None:
    """Mark the tasks of a dead run, and free the place in training that they hold: it would be kept for a minute."""
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run]}}),
        task_run_filter=TaskRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}),
    )
    for task in tasks:
        if TRAINING_TAG in task.tags:
            client.decrement_v1_concurrency_slots([TRAINING_TAG], task.id, occupancy_seconds=0.0)
        client.set_task_run_state(task.id, Crashed(message="Its process is gone."), force=True)


_seen_at_work: dict[str, float] = {}


def _is_at_work_on(run: str) -> bool:
    """Whether a worker still runs something for the dead run, say its hooks, or did so a moment ago.

    It has its last word after them, and would overrule a state that was set before.
    """
    now = time.monotonic()
    for process in processes_of(run):
        with suppress(psutil.Error):
            if process.ppid() != 1:
                _seen_at_work[run] = now
    return now - _seen_at_work.get(run, -SETTLING_SECONDS) < SETTLING_SECONDS


def _start_again(
    client: "SyncPrefectClient", living: set[str | None], engines: dict[str, psutil.Process]
) -> list[Settled]:
    """Schedule crashed runs of the deployments in ``RESTARTED`` again, as the same flow runs, so often and no more."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter, WorkPoolFilter

    since = datetime.now(UTC) - timedelta(hours=RESTART_HOURS)
    crashed = FlowRunFilter.model_validate({"state": {"type": {"any_": ["CRASHED"]}}, "end_time": {"after_": since}})
    deployments = DeploymentFilter.model_validate({"name": {"any_": list(RESTARTED)}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    settled = []
    for run in client.read_flow_runs(flow_run_filter=crashed, deployment_filter=deployments, work_pool_filter=pool):
        if run.state is None or _age(run.state) < SETTLING_SECONDS or str(run.id) in {*living, *engines}:
            continue
        if _is_at_work_on(str(run.id)):
            continue
        settled += _schedule(client, run)
    return settled


def _schedule(client: "SyncPrefectClient", run: "FlowRun") -> list[Settled]:
    from prefect.states import AwaitingRetry, Cancelled

    history = sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    starts = [place for place, state in enumerate(history) if state.is_scheduled()]
    if any(state.is_cancelling() for state in history[starts[-1] if starts else 0 :]):
        client.set_flow_run_state(run.id, Cancelled(message="It crashed when it was cancelled."), force=True)
        return [Settled(action="cancelled", what=run.name, flow_run_id=str(run.id), reason="It crashed on the way.")]
    done = _restarts(history)
    allowed = settings().restarts
    latest = history[-1]
    if done >= allowed or not latest.is_crashed():
        return []
    children.end_processes(processes_of(str(run.id)), patience=3.0)  # they would work on beside the next attempt
    reason = f"Started again after a crash ({done + 1} of {allowed}): {latest.message or 'no message'}"
    client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=datetime.now(UTC), message=reason), force=True)
    return [Settled(action="scheduled again", what=run.name, flow_run_id=str(run.id), reason=reason)]


def _restarts(history: "Sequence[State]") -> int:
    """How often the run was started again; a start that came to nothing before a worker took it does not count."""
    return sum(state.name == "AwaitingRetry" and not after.is_crashed() for state, after in itertools.pairwise(history))


def wait_and_reconcile(api: str, seconds: float, stop: Any, say: Any) -> None:
    """Passes until ``stop`` is set; a server that does not answer is tried again in the next one."""
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.deployments import connect

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        while not stop.wait(seconds):
            started = time.monotonic()
            try:
                with connect(api) as client:
                    for each in reconcile(client):
                        say(each)
            except Exception as error:
                logger.warning("Reconciling failed after %.1f s: %s", time.monotonic() - started, error)
