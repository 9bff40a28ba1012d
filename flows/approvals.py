"""Promotions that wait for a person's answer: which there are, and the end of those whose time is over.

Prefect's own time limit would end them as failed; here they end as ``NotApproved``, which alarms nobody.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

DEPLOYMENT = "promote"
DEFAULT_HOURS = 24.0


def close_overdue(client: "SyncPrefectClient") -> list["FlowRun"]:
    """End every approval that was not answered in time, and return their runs."""
    closed = []
    now = datetime.now(UTC)
    for run in open_runs(client, "PAUSED"):
        hours = float(run.parameters.get("approval_hours") or DEFAULT_HOURS)
        if run.state is not None and now > run.state.timestamp + timedelta(hours=hours):
            client.set_flow_run_state(run.id, not_approved(hours), force=True)
            closed.append(run)
    return closed


def open_runs(client: "SyncPrefectClient", *states: str) -> list["FlowRun"]:
    """Runs of the promote deployment that have not ended, or those in some states."""
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter

    wanted = states or ("SCHEDULED", "PENDING", "RUNNING", "PAUSED")
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [DEPLOYMENT]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": list(wanted)}}}),
        limit=200,
    )


def came_too_late(history: "Sequence[State]", hours: float) -> bool:
    """Whether the answer to the last question came after its time, by the states of the run.

    The answer counts, not when a worker was there to go on.
    """
    asked = max(state.timestamp for state in history if state.is_paused())
    answered = min(state.timestamp for state in history if state.timestamp > asked)
    return answered > asked + timedelta(hours=hours)


def not_approved(hours: float) -> "State[Any]":
    """The state of an approval that nobody gave."""
    from prefect.states import Cancelled

    return Cancelled(name="NotApproved", message=f"Nobody answered within {hours:g} hours; the champion stays.")
