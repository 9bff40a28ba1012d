"""Promotion and rollback as flows, and what a run does with its candidate at the end.

A person decides in the Prefect UI: the flow run is *suspended* with a form. Its process ends meanwhile, so that neither
a restart of the worker nor of the server loses the question; the answer starts the run again.
"""

import datetime as dt
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tasks.settings import prepare_prefect

prepare_prefect()

from prefect import flow, get_client  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.exceptions import ObjectNotFound  # noqa: E402
from prefect.flow_runs import suspend_flow_run  # noqa: E402
from prefect.input import RunInput  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Cancelled, Completed  # noqa: E402
from pydantic import Field  # noqa: E402

from compression.errors import InputError  # noqa: E402
from export.promotion import Promotion, PromotionDecision  # noqa: E402
from flows.approvals import DEPLOYMENT, came_too_late, not_approved, open_runs  # noqa: E402
from flows.models import describe, promoted  # noqa: E402
from tasks import registry  # noqa: E402
from tasks.promotion import POLICY, decide  # noqa: E402
from tasks.registry import Version  # noqa: E402

Hours = Annotated[float, Field(gt=0, le=24 * 30)]


class Approval(RunInput):
    """The form that a person fills in."""

    approve: bool = Field(default=False, description="On: this version becomes the champion. Off: it is declined.")
    reason: str = Field(default="", description="Kept with the version.")
    by: str = Field(default="", description="Your name, for the record.")


class ApprovalWithReason(Approval):
    """The form for what is too strange to be taken without a word."""

    reason: str = Field(min_length=1, description="Required: why the anomalies are none, or why it is declined.")


def _run_name() -> str:
    asked = flow_run.parameters
    return f"promote-{asked['model']}-{asked.get('version') or 'candidate'}"


@flow(name="promote", flow_run_name=_run_name, validate_parameters=True)
def promote(
    model: str,
    version: int | None = None,
    approval: Literal["ask", "given"] = "ask",
    reason: str = "",
    approval_hours: Hours = 24.0,
) -> State[dict[str, Any]]:
    """Make a version of a registered model its champion.

    Args:
        model: Name of the registered model, which is the recipe's name.
        version: Number of the version; without one the candidate.
        approval: ask: the run waits with a form that shows what would change. given: it is done at once.
        reason: Why, kept with the version. Anomalies need one.
        approval_hours: How long the form waits. Without an answer by then nothing is promoted.
    """
    found = registry.find(model, version)
    if registry.CHAMPION in found.aliases:
        return Completed(
            message=f"Version {found.version} is the champion.", name="Promoted", data=promoted(found, None)
        )
    decision = decide(found)
    by = f"flow run {flow_run.name}"
    if approval == "ask":
        answer = _ask(found, decision, reason, approval_hours)
        if isinstance(answer, State):
            return answer
        reason, by = answer.reason, answer.by.strip() or by
        if not answer.approve:
            said = {"declined_because": reason or "no reason given", "declined_by": by, "declined_at": _now()}
            registry.tag(found, said)
            return Completed(name="Declined", message=f"Version {found.version}: {said['declined_because']}")
    if decision.anomalies and not reason.strip():
        raise InputError(
            f"Version '{found.version}' of {model} has anomalies ({' '.join(decision.anomalies)}), expected a reason "
            "to take it all the same. Start again with one."
        )
    done = promote_now(found, by=by, reason=reason or "approved")
    return Completed(name="Promoted", message=f"Version {found.version} is the champion.", data=done)


def _ask(found: Version, decision: PromotionDecision, reason: str, hours: float) -> "Approval | State[Any]":
    """The answer of a person, or the state to end with when it came too late.

    The first call ends this process; the second, after the answer, returns it. A form belongs to one version and one
    champion: when either has changed meanwhile, the person is asked anew.
    """
    champion = registry.champion(found.name)
    question = describe(found, decision)
    question += f"\n\nPlease answer within {hours:g} hours; without an answer nothing is promoted."
    create_markdown_artifact(key=f"promotion-{found.name}", markdown=question, description="What would change")
    key = f"version-{found.version}-for-{champion.version if champion else 'none'}"
    kind = ApprovalWithReason if decision.anomalies else Approval
    initial = {"reason": reason} if reason else {}
    answer = suspend_flow_run(wait_for_input=kind.with_initial_data(description=question, **initial), key=key)
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run.id)
    return not_approved(hours) if came_too_late(states, hours) else answer


@flow(name="rollback", flow_run_name="rollback-{model}", validate_parameters=True)
def rollback(model: str, reason: str) -> State[dict[str, Any]]:
    """Make the previous champion the champion again. Policy does not promote the bad version again.

    Args:
        model: Name of the registered model, which is the recipe's name.
        reason: What is wrong with the champion of now, kept with it.
    """
    bad = registry.champion(model)
    after = registry.rollback(model, by=f"flow run {flow_run.name}", reason=reason)
    done = {"model": model, "version": after.version, "rolled_back": bad.version if bad else None, "reason": reason}
    tell_rolled_back(done, by=f"flow run {flow_run.name}")
    return Completed(name="RolledBack", message=f"Version {after.version} is the champion again.", data=done)


def promote_now(version: Version, *, by: str, reason: str) -> dict[str, Any]:
    """Make it the champion and say so to whoever listens."""
    before = registry.champion(version.name)
    done = promoted(registry.promote(version.name, version.version, by=by, reason=reason), before)
    if before is None or before.version != version.version:
        tell_promoted(done)
    return done


def tell_promoted(done: dict[str, Any]) -> None:
    """The event ``stillhouse.model.promoted``, on which automations act."""
    _tell("promoted", done["model"], {key: done[key] for key in ("version", "replaced", "reason", "by")})


def tell_rolled_back(done: dict[str, Any], *, by: str) -> None:
    """The event ``stillhouse.model.rolled-back``."""
    _tell("rolled-back", done["model"], {**{key: done[key] for key in ("version", "rolled_back", "reason")}, "by": by})


def _tell(what: str, model: str, payload: dict[str, Any]) -> None:
    resource = {"prefect.resource.id": f"stillhouse.model.{model}", "prefect.resource.name": model}
    emit_event(event=f"stillhouse.model.{what}", resource=resource, payload=payload)


def promote_candidate(name: str, config: Promotion, run_folder: Path) -> dict[str, Any]:
    """Decide on the version that a finished run registered: promote it, ask a person, or keep the champion.

    Doing it again changes nothing: a version is asked about once at a time, and not again once it was declined. An
    older version that still waits for its answer is superseded.

    Returns:
        ``decision`` (promote, ask, hold), ``version``, ``reasons``; when a person must decide, ``approval`` (name and
        id of the waiting flow run) where a server with the deployment is there, else ``command`` to type.
    """
    registered = json.loads((run_folder / "summary.json").read_text(encoding="utf-8")).get("registered") or {}
    if not registered:
        return {"decision": "hold", "version": None, "reasons": ["This run registered nothing."]}
    version = registry.find(name, int(registered["version"]))
    registry.tag(version, {"run_folder": str(run_folder), POLICY: config.model_dump_json()})
    version = registry.find(name, version.version)
    decision = decide(version, config)
    done: dict[str, Any] = {
        "decision": decision.action,
        "version": version.version,
        "reasons": list(decision.reasons),
        "checks": [check.model_dump(mode="json") for check in decision.checks],
    }
    if decision.action == "promote":
        promote_now(version, by=f"policy of recipe {name}", reason=" ".join(decision.reasons))
    elif decision.action == "ask":
        approval = ask_for(version, config)
        reason = " --yes --reason TEXT" if decision.anomalies else ""
        command = f"stillhouse promote {name} --version {version.version}{reason}"
        done |= {"approval": approval} if approval else {"command": command}
    return done


def ask_for(version: Version, config: Promotion) -> dict[str, str] | None:
    """Start the flow run that asks a person, unless it is there; None without a server that has the deployment."""
    with registry.locked(f"{version.name}-approval"), get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"promote/{DEPLOYMENT}")
        except ObjectNotFound:
            return None
        waiting = None
        for run in open_runs(client):
            if run.parameters.get("model") != version.name:
                continue
            number = run.parameters.get("version")
            if number == version.version:
                waiting = run
            elif number is not None and number < version.version:
                message = f"Version {version.version} is newer; the question is about that one now."
                client.set_flow_run_state(run.id, Cancelled(name="Superseded", message=message), force=True)
        if waiting is None:
            parameters = {
                "model": version.name,
                "version": version.version,
                "approval": "ask",
                "approval_hours": config.approval_hours,
            }
            name = f"promote-{version.name}-{version.version}"
            waiting = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, name=name)
        return {"flow_run": str(waiting.id), "name": waiting.name}


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
