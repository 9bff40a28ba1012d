"""Deployments: what the Prefect server knows of this store's flows, its work pool and its interrupted runs."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compression.errors import InputError
from flows import children

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

logger = logging.getLogger(__name__)

POOL = "stillhouse"
TRAINING_TAG = "training"
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"  # Prefect sets it in the process of every deployed run


def read_recipe(path: str) -> dict[str, Any]:
    """``{"recipe": values}`` of a recipe file: a build step of prefect.yaml, so that the run form is filled."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise InputError(
            f"Recipe '{path}' of prefect.yaml does not exist in '{Path.cwd()}'. "
            "Restore it, or name another in the build step `flows.deployments.read_recipe`."
        ) from error
    return {"recipe": recipe}


def connect(api: str) -> "SyncPrefectClient":
    """A client of the server at ``api``, whatever the environment says."""
    from prefect.client.orchestration import SyncPrefectClient

    return SyncPrefectClient(api)


def prepare_pool(client: "SyncPrefectClient") -> None:
    """Make the work pool if it is absent, and let one training task run at a time."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", description="Flows run as processes here."))
    client.create_concurrency_limit(tag=TRAINING_TAG, concurrency_limit=1)


def registration_command(deployments: Path) -> list[str]:
    """The command that registers a deployments file, to be run in the folder the flows are loaded from.

    The file holds no pull step; Prefect then records the working folder itself.
    """
    return [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        str(deployments),
    ]


def worker_command() -> list[str]:
    """The command of the worker of this machine."""
    name = f"{POOL}-{os.uname().nodename}"
    return [
        sys.executable,
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        POOL,
        "--type",
        "process",
        "--name",
        name,
    ]


def worker_is_online(client: "SyncPrefectClient", *, since: datetime) -> bool:
    """Whether a worker of the pool has reported after ``since``."""
    return any(
        worker.last_heartbeat_time is not None and worker.last_heartbeat_time >= since
        for worker in client.read_workers_for_work_pool(POOL)
    )


def settle_interrupted_runs(client: "SyncPrefectClient", *, reason: str) -> list[str]:
    """Names of the pool's runs that were under way without a process; they are set to CRASHED (or CANCELLED).

    Call it while no worker runs: then nobody else would ever end them. A run whose process outlived its worker is
    left alone.
    """
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import Cancelled, Crashed

    live = children.live_values(FLOW_RUN_VARIABLE)
    under_way = FlowRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    settled = []
    for run in client.read_flow_runs(flow_run_filter=under_way, work_pool_filter=pool):
        if str(run.id) in live:
            logger.warning("Run '%s' goes on without its worker; it is left alone.", run.name)
            continue
        cancelling = run.state is not None and run.state.is_cancelling()
        state = Cancelled(message=reason) if cancelling else Crashed(message=reason)
        client.set_flow_run_state(run.id, state, force=True)
        settled.append(run.name)
    return settled
