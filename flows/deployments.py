"""Deployments: what the Prefect server knows of this store's flows, and its work pool."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

logger = logging.getLogger(__name__)

POOL = "stillhouse"
TRAINING_TAG = "training"
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"  # Prefect sets it in the process of every deployed run


def connect(api: str) -> "SyncPrefectClient":
    """A client of the server at ``api``, whatever address the environment says."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_API_AUTH_STRING

    return SyncPrefectClient(api, auth_string=PREFECT_API_AUTH_STRING.value())


def prepare_pool(client: "SyncPrefectClient") -> None:
    """Make the work pool what it should be, and let one training task run at a time.

    A worker does not stream its runs' output: the pipe would break with the worker, and end the run.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        template = client.read_work_pool(POOL).base_job_template
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(
                name=POOL, type="process", description="Flows run as processes here.", base_job_template=template
            )
        )
    output = template.get("variables", {}).get("properties", {}).get("stream_output", {})
    if output.get("default") is not False:
        output["default"] = False
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
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


def refuse_unknown_parameters(client: "SyncPrefectClient") -> None:
    """Let the server refuse parameters that a flow does not have: it would take them, and the run would crash."""
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.filters import WorkPoolFilter

    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    for deployment in client.read_deployments(work_pool_filter=pool):
        schema = {**(deployment.parameter_openapi_schema or {}), "additionalProperties": False}
        client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))


def worker_name() -> str:
    """What the worker of this machine is called; Prefect labels the runs it takes with it."""
    return f"{POOL}-{os.uname().nodename}"


def worker_command() -> list[str]:
    """The command of the worker of this machine, which lets its runs end in peace."""
    return [
        *(sys.executable, "-m", "flows.drain"),
        *(sys.executable, "-m", "prefect", "worker", "start"),
        *("--pool", POOL, "--type", "process", "--name", worker_name()),
    ]


def worker_is_online(client: "SyncPrefectClient", *, since: datetime) -> bool:
    """Whether a worker of the pool has reported after ``since``."""
    return any(
        worker.last_heartbeat_time is not None and worker.last_heartbeat_time >= since
        for worker in client.read_workers_for_work_pool(POOL)
    )
