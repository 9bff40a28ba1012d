"""Prefect automations: who is told what about rejections, regressions, crashes, promotions; and a guard for zombies.

``prepare`` makes them what they should be, by name (prefix ``stillhouse: ``), as often as it is called. Each sends one
message to every saved webhook and e-mail address (``flows.blocks``); with none saved only the guard is there.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from compression.errors import StillhouseError
from flows import blocks
from flows.blocks import Channel

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.actions import CallWebhook, SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

PREFIX = "stillhouse: "
TAG = "stillhouse"
"""Every deployment of prefect.yaml has it, and so has each of their runs."""
TEST_EVENT = "stillhouse.notify.test"
GUARD = f"{PREFIX}a run without heartbeat is crashed"
CHAMPION_TO_DEVICES = f"{PREFIX}a new champion goes to the devices"
SILENCE = timedelta(minutes=9)
"""Prefect's flow runs give a sign of life every three minutes (PREFECT_FLOWS_HEARTBEAT_FREQUENCY); after three missed
ones a run counts as dead. Our reconciler is far quicker; this is for the day when it does not run either."""

HINT = "Nobody is told of rejections and crashes yet: `stillhouse notify webhook` or `stillhouse notify email`."

RUN_LINES = """\
{{ flow_run.state.message or event.resource['prefect.state-message'] or 'No message.' }}

{% if flow_run.parameters.recipe.name %}Recipe:   {{ flow_run.parameters.recipe.name }}
{% endif %}Flow run: {{ flow_run.name }}
{{ flow_run | ui_url }}"""

MODEL_LINES = """\
{{ event.payload.reason }}

Model:   {{ event.resource.id | replace('stillhouse.model.', '') }} version {{ event.payload.version }}
By:      {{ event.payload.by }}"""

MODEL = "{{ event.resource.id | replace('stillhouse.model.', '') }}"


@dataclass(frozen=True)
class Notice:
    """One kind of message: what it is called, when it is sent, what it says."""

    name: str
    trigger: "EventTrigger"
    subject: str
    body: str


def notices() -> list[Notice]:
    """Everything that people are told."""
    # A recipe that fails within a night has no deployment of its own: the night says it, once.
    deployed = [{"prefect.resource.id": f"prefect.tag.{TAG}"}, {"prefect.resource.role": "deployment"}]
    return [
        Notice(
            "rejected",
            _on({"prefect.flow-run.Rejected"}, related=_flow("compress")),
            "Stillhouse: {{ flow_run.parameters.recipe.name or flow_run.name }} was rejected by the gate",
            RUN_LINES,
        ),
        Notice(
            "regressed",
            _on({"prefect.flow-run.Regressed"}, related=_flow("nightly")),
            "Stillhouse: the night got worse",
            RUN_LINES,
        ),
        Notice(
            "failed or crashed",
            _on({"prefect.flow-run.*"}, {"prefect.state-type": ["FAILED", "CRASHED"]}, related=deployed),
            "Stillhouse: {{ flow_run.name }} {{ event.resource['prefect.state-name'] | lower }}",
            RUN_LINES,
        ),
        Notice(
            "a person must decide",
            _on({"prefect.flow-run.Paused", "prefect.flow-run.Suspended"}, related=deployed),
            "Stillhouse: {{ flow_run.name }} waits for your decision",
            RUN_LINES,
        ),
        Notice(
            "promoted",
            _on({"stillhouse.model.promoted"}),
            f"Stillhouse: {MODEL} version {{{{ event.payload.version }}}} is champion",
            MODEL_LINES,
        ),
        Notice(
            "rolled back",
            _on({"stillhouse.model.rolled-back"}),
            f"Stillhouse: {MODEL} was rolled back to version {{{{ event.payload.version }}}}",
            MODEL_LINES,
        ),
        Notice(
            "a rollout was stopped",
            _on({"stillhouse.rollout.aborted"}),
            "Stillhouse: {{ event.payload.model }} {{ event.payload.seq }} was stopped on its way to devices",
            "{{ event.payload.text }}",
        ),
        Notice(
            "test",
            _on({TEST_EVENT}),
            "Stillhouse: test",
            "This is a test of the notifications, asked for by {{ event.payload.by }}.",
        ),
    ]


def _on(expect: set[str], labels: dict[str, Any] | None = None, related: Any = None) -> "EventTrigger":
    from prefect.events.schemas.automations import EventTrigger, Posture

    return EventTrigger.model_validate(
        {
            "expect": expect,
            "match": labels or {},
            "match_related": related or {},
            "for_each": {"prefect.resource.id"},
            "posture": Posture.Reactive,
            "threshold": 1,
            "within": 0,
        }
    )


def _flow(name: str) -> dict[str, str]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": name}


def guard(silence: timedelta = SILENCE) -> "AutomationCore":
    """Sets a run of ours to CRASHED that has given no sign of life for ``silence``, and did not end or pause.

    Any event of the run counts as its end, since states have names of our own (Accepted, Rejected, ...).
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    trigger = EventTrigger.model_validate(
        {
            "after": {"prefect.flow-run.heartbeat"},
            "expect": {"prefect.flow-run.*"},
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": {"prefect.resource.id": f"prefect.tag.{TAG}"},
            "for_each": {"prefect.resource.id"},
            "posture": Posture.Proactive,
            "threshold": 1,
            "within": silence,
        }
    )
    message = f"No sign of life for {silence.total_seconds() / 60:.0f} minutes. Start it again to resume."
    action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message, force=False)
    return AutomationCore(
        name=GUARD, description="A second net beside `stillhouse reconcile`.", trigger=trigger, actions=[action]
    )


def prepare(client: "SyncPrefectClient") -> list[str]:
    """Make the automations what they should be, as often as called; returns what to tell the person who starts it.

    Addresses in the environment (``blocks.VARIABLES``) are saved first. An automation that was switched off in the UI
    stays off.
    """
    blocks.take_from_environment(client)
    saved = blocks.channels(client)
    wanted = [guard(), *_rollouts(client), *_messages(saved)]
    existing: dict[str, Any] = {}
    for automation in _ours(client):
        if automation.name in existing or automation.name not in {each.name for each in wanted}:
            client.delete_automation(automation.id)
        else:
            existing[automation.name] = automation
    for automation in wanted:
        before = existing.get(automation.name)
        if before is None:
            client.create_automation(automation)  # one of the kind that starts something is off at first
        else:
            content = automation.model_dump(exclude={"owner_resource"}) | {"enabled": before.enabled}
            client.update_automation(before.id, type(automation).model_validate(content))
    told = ", ".join(f"{channel.name} ({channel.shown})" for channel in saved)
    return [f"Notifications go to {told}." if saved else HINT]


def _rollouts(client: "SyncPrefectClient") -> "list[AutomationCore]":
    """Every new champion to the devices; off until somebody switches it on, and only where the deployment is."""
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment_by_name("rollout/rollout")
    except ObjectNotFound:
        return []
    model = {"__prefect_kind": "jinja", "template": MODEL}
    action = RunDeployment(
        source="selected", deployment_id=deployment.id, parameters={"model": model}, job_variables=None
    )
    return [
        AutomationCore(
            name=CHAMPION_TO_DEVICES,
            description="Switch it on here, in the list, and every promotion starts the deployment 'rollout'.",
            enabled=False,
            trigger=_on({"stillhouse.model.promoted"}),
            actions=[action],
        )
    ]


def _ours(client: "SyncPrefectClient") -> list[Any]:
    return [each for each in client.read_automations() if each.name.startswith(PREFIX)]


def _messages(saved: Sequence[Channel]) -> "list[AutomationCore]":
    from prefect.events.schemas.automations import AutomationCore

    if not saved:
        return []
    return [
        AutomationCore(
            name=PREFIX + notice.name,
            description="Made by `stillhouse up`; see `stillhouse notify list`.",
            trigger=notice.trigger,
            actions=[_send(notice, channel) for channel in saved],
        )
        for notice in notices()
    ]


def _send(notice: Notice, channel: Channel) -> "CallWebhook | SendNotification":
    """A JSON of ``subject`` and ``text`` for a webhook (chat services read ``text``), a mail for an address."""
    from prefect.events.actions import CallWebhook, SendNotification

    if channel.kind == "email":
        return SendNotification(block_document_id=channel.id, subject=notice.subject, body=notice.body)
    parts = f"{{% set subject %}}{notice.subject}{{% endset %}}{{% set body %}}{notice.body}{{% endset %}}"
    fields = '{"subject": {{ subject | tojson }}, "text": {{ (subject ~ "\\n" ~ body) | tojson }}}'
    return CallWebhook(block_document_id=channel.id, payload=parts + fields)


@dataclass(frozen=True)
class Delivery:
    """What became of a test message to one place."""

    channel: Channel
    problem: str | None
    """Why it did not go out; None when it did."""


def try_out(client: "SyncPrefectClient", *, by: str, patience: float = 60.0) -> list[Delivery]:
    """Send a test message the way real ones go: event, automation, the server's own process; one row per place.

    Raises:
        StillhouseError: the server did not act within ``patience`` seconds.
    """
    prepare(client)
    saved = blocks.channels(client)
    event_id = str(uuid4())
    event = {
        "id": event_id,
        "occurred": datetime.now(UTC).isoformat(),
        "event": TEST_EVENT,
        "resource": {"prefect.resource.id": f"stillhouse.notify.{event_id}"},
        "payload": {"by": by},
    }
    client.request("POST", "/events", json=[event]).raise_for_status()
    query = {
        "event": {"name": ["prefect.automation.action.executed", "prefect.automation.action.failed"]},
        "related": {"id": [f"prefect.event.{event_id}"]},
    }
    deadline = time.monotonic() + patience
    done: dict[int, str | None] = {}
    while saved and len(done) < len(saved):
        if time.monotonic() > deadline:
            raise StillhouseError(
                f"The Prefect server sent {len(done)} of {len(saved)} test messages within {patience:.0f} s. "
                "See its log: .stillhouse/logs/prefect-server.log."
            )
        time.sleep(0.5)
        for found in client.request("POST", "/events/filter", json={"filter": query}).json()["events"]:
            done[found["payload"]["action_index"]] = _problem(found["event"], found["payload"])
    return [Delivery(channel, done[index]) for index, channel in enumerate(saved)]


def _problem(event: str, payload: Mapping[str, Any]) -> str | None:
    if event.endswith("failed"):
        return f"{payload.get('reason', '')} {payload.get('notification_log', '').strip()}".strip()
    status = payload.get("status_code", 200)
    return None if status < 400 else f"It answered with status {status}: {payload.get('response_body', '')[:200]}"
