"""A bundle to the devices, ring by ring, as a flow: started in the Prefect UI, by a new champion, or by command.

Everything it knows is in the device registry, under the flow run's own id: killed and started again, it goes on where
it was, and no device is given the bundle twice. A pause waits in the UI as a form; to cancel the run is to abort the
rollout, and orders that devices have not followed yet are taken back.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tasks.settings import prepare_prefect

prepare_prefect()

from prefect import flow  # noqa: E402
from prefect.artifacts import (  # noqa: E402
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.exceptions import TerminationSignal  # noqa: E402
from prefect.flow_runs import suspend_flow_run  # noqa: E402
from prefect.input import RunInput  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed  # noqa: E402
from pydantic import Field  # noqa: E402

from compression.types import Slug  # noqa: E402
from export.devices.controller import carry_out, stop, summary  # noqa: E402
from export.devices.errors import DeviceError  # noqa: E402
from export.devices.registry import LEASE, Registry, Rollout  # noqa: E402
from export.devices.rollout import OPEN, Decision, Placement, RolloutPolicy  # noqa: E402
from export.devices.table import rows_of  # noqa: E402
from flows import fleet  # noqa: E402
from flows.cancelling import cancellable  # noqa: E402
from flows.deployments import FLOW_RUN_VARIABLE  # noqa: E402
from flows.progress import show  # noqa: E402

if TYPE_CHECKING:
    from export.bundle.statement import Statement
    from export.devices.couriers import MixedCourier

logger = logging.getLogger(__name__)

Policy = Annotated[RolloutPolicy | None, Field(description="Sizes of the rings, and what stops the rollout.")]


class GoOn(RunInput):
    """The form of a rollout that waits."""

    go_on: bool = Field(default=False, description="On: the rollout goes on. Off: it is aborted.")
    reason: str = Field(default="", description="Kept in the log.")
    by: str = Field(default="", description="Your name, for the log.")


def _run_name() -> str:
    asked = flow_run.parameters
    return f"rollout-{asked.get('model') or Path(asked.get('bundle') or 'again').stem}"


@flow(name="rollout", flow_run_name=_run_name, validate_parameters=True)
def rollout(
    model: Slug | None = None,
    bundle: str | None = None,
    devices: list[Slug] | None = None,
    policy: Policy = None,
    go_on_with: str | None = None,
) -> State[dict[str, Any]]:
    """Roll a bundle out to devices in rings, with a gate between them; a bad one stops at the canaries.

    Args:
        model: Registered model whose champion is bundled and rolled out, when no bundle is named.
        bundle: Path of an .edgepkg file; then this is rolled out, and model may be left out.
        devices: Names of the devices; without any, all of the registry.
        policy: Sizes of the rings, and what stops the rollout; without one the usual ones.
        go_on_with: Id of a rollout that was paused or left behind, instead of a new one.

    The state says how it ended: RolledOut, Aborted, Unchanged, or Paused where nobody can be asked.
    """
    registry = fleet.open_registry()
    name = go_on_with or str(flow_run.id).replace("-", "")
    try:
        with cancellable():
            found = _found(registry, name) or _begin(registry, name, model, bundle, devices, policy or RolloutPolicy())
            if found is None:
                text = f"The devices have the champion of {model}."
                return Completed(name="Unchanged", message=text, data={"outcome": "unchanged"})
            return _carry_on(registry, found)
    except TerminationSignal:
        _abort_if_cancelled(registry, name)
        raise
    finally:
        registry.close()


def _found(registry: Registry, name: str) -> Rollout | None:
    """The rollout of that id, if this is not its beginning."""
    whole = len(name) == 32
    known = {each.id for each in registry.rollouts()}
    return None if whole and name not in known else registry.rollout(name)


def _begin(
    registry: Registry,
    name: str,
    model: str | None,
    bundle: str | None,
    devices: Sequence[str] | None,
    policy: RolloutPolicy,
) -> Rollout | None:
    """A new rollout; None when there is nothing to do. Refuses what devices would refuse, before any is asked."""
    from export.bundle.package import open_package

    if model is None and bundle is None:
        raise DeviceError("Rollout has no source, expected a model or a bundle. Name one of them.")
    if not registry.devices():
        raise DeviceError("The registry has no devices, expected some. Add one: stillhouse devices add NAME")
    if bundle is not None:
        file = Path(bundle)
        if not file.is_file():
            raise DeviceError(f"Bundle '{file}' has no file, expected an .edgepkg. Make one: stillhouse bundle RUN")
    else:
        file = bundle_of_champion(registry, str(model))
        if file is None:
            return None
    statement = open_package(file, fleet.open_trust()).statement
    if model not in (None, statement.name):
        raise DeviceError(
            f"Bundle '{file.name}' has model '{statement.name}', expected '{model}'. Name that model, or none."
        )
    earlier = [each for each in registry.rollouts() if each.model == statement.name and each.seq >= statement.seq]
    if earlier:
        raise DeviceError(
            f"Bundle '{file.name}' has number {statement.seq}, expected more than {max(each.seq for each in earlier)}, "
            "which was rolled out: devices take no number twice. Give it a new one: stillhouse bundle --again "
            f"{file}"
        )
    kept = str(fleet.keep_bundle(file))
    fleet.courier_for(registry, devices or [each.id for each in registry.devices()]).close()  # its keys open
    return registry.start(
        model=statement.name, seq=statement.seq, bundle=kept, policy=policy, devices=devices or None, id=name
    )


def bundle_of_champion(registry: Registry, model: str) -> Path | None:
    """A new bundle of a model's champion; None when the newest rollout brought that version to every device.

    Raises:
        InputError: there is no champion, its run folder is gone, or keys do not open.
    """
    from export.bundle.build import Order, accepted_run, build_bundle, next_seq
    from export.bundle.package import open_package
    from flows.bundling import engine_sources, flow_run_of, golden_images, now, signing_keys
    from tasks import registry as models

    champion = models.champion(model)
    if champion is None:
        raise DeviceError(f"Model '{model}' has no champion, expected one. Promote it: stillhouse promote {model}")
    latest = next((each for each in registry.rollouts() if each.model == model), None)
    if latest is not None and latest.state == "done" and fleet.bundle_of(latest).is_file():
        brought = open_package(fleet.bundle_of(latest), fleet.open_trust()).statement.version
        has_all = {each.device for each in registry.placements(latest.id) if each.outcome == "committed"}
        if brought == str(champion.version) and has_all >= {each.id for each in registry.devices()}:
            return None
    folder = Path(champion.tags.get("run_folder", ""))
    if not champion.tags.get("run_folder") or not folder.is_dir():
        raise DeviceError(
            f"Champion {champion.version} of {model} has no run folder here, expected one to bundle. Bundle it where "
            "it was made: stillhouse bundle RUN"
        )
    accepted = accepted_run(folder)
    keys, _ = signing_keys([], None, None)
    highest = max((each.seq for each in registry.rollouts() if each.model == accepted.name), default=0)
    seq = max(next_seq(fleet.bundles_folder(), accepted.name, accepted.version), highest + 1)
    order = Order(seq=seq, created=now(), keys=keys, flow_run=flow_run_of(folder))
    sources = engine_sources(accepted)
    path, notes = build_bundle(accepted, fleet.bundles_folder(), order, golden_images(accepted), sources)
    for note in notes:
        logger.info("bundle %s: %s", path.name, note)
    return path


def _carry_on(registry: Registry, found: Rollout) -> State[dict[str, Any]]:
    """Go on until it is over; at a pause the flow run waits in the UI, if it has one there."""
    courier = fleet.courier_for(registry, [each.device for each in registry.placements(found.id)])
    shown = Shown(registry, courier)
    try:
        while True:
            done = _held(registry, found.id, courier, shown)
            if done.state != "paused":
                break
            shown(done, registry.placements(done.id))
            record(registry, done)
            if not os.environ.get(FLOW_RUN_VARIABLE):
                message = f"{done.reason} Go on: stillhouse rollout resume {done.id[:8]}"
                return Completed(name="Paused", message=message, data=_outcome(registry, done))
            answer = _ask(registry, done)
            by = answer.by.strip() or f"flow run {flow_run.name}"
            if answer.go_on:
                registry.resume(done.id, by=by)
            else:
                stop(registry, done, courier, answer.reason or "Not approved.", by=by)
    finally:
        courier.close()
    courier.collect()
    placements = registry.placements(done.id)
    shown(done, placements)
    record(registry, done)
    tell(done, summary(done, placements))
    name = "RolledOut" if done.state == "done" else "Aborted"
    return Completed(name=name, message=summary(done, placements), data=_outcome(registry, done))


def _held(registry: Registry, name: str, courier: "MixedCourier", shown: "Shown") -> Rollout:
    """Carry it out, once a controller that has died has lost its hold."""
    holder = f"{flow_run.name or 'rollout'} at {os.uname().nodename}, process {os.getpid()}"
    patience = time.monotonic() + LEASE.total_seconds() + 30
    while not registry.hold(name, holder):
        if time.monotonic() > patience:
            break  # somebody lives; carry_out says who
        time.sleep(1.0)
    return carry_out(registry, name, courier, holder=holder, on_change=shown)


def _ask(registry: Registry, paused: Rollout) -> GoOn:
    """The answer of a person. The first call ends this process; the second, after the answer, returns it."""
    asked = sum(each["event"] == "rollout paused" and each["rollout"] == paused.id for each in registry.audit())
    text = f"{summary(paused, registry.placements(paused.id))}\n\nOn: go on. Off: abort."
    return suspend_flow_run(wait_for_input=GoOn.with_initial_data(description=text), key=f"pause-{asked}")


class Shown:
    """What people see of a rollout while it goes on: a bar and a table in the UI, a bar or lines in the terminal."""

    def __init__(self, registry: Registry, courier: "MixedCourier") -> None:
        self._registry, self._courier = registry, courier
        self._bar: Any = None
        self._last: Any = None

    def __call__(self, done: Rollout, placements: Sequence[Placement], decision: Decision | None = None) -> None:
        """Show where it stands, if that is news."""
        news = (done.state, done.reason, [each.outcome for each in placements])
        if news == self._last:
            return
        self._last = news
        settled = sum(each.outcome not in OPEN for each in placements)
        text = f"{done.model} {done.seq} on devices"
        show(text, settled, len(placements))
        percent = 100.0 * settled / max(1, len(placements))
        if self._bar is None:
            self._bar = create_progress_artifact(
                progress=percent, key=f"rollout-progress-{done.model}", description=text
            )
        else:
            update_progress_artifact(self._bar, progress=percent)
        rows = rows_of(
            done, placements, self._registry.outcomes(done.id), self._registry.devices(), self._courier.problems
        )
        said = summary(done, placements)
        create_table_artifact(key=f"rollout-{done.model}", table=rows, description=said)
        logger.info("%s%s", said, f" {decision.reason}" if decision and decision.reason != done.reason else "")


def record(registry: Registry, done: Rollout) -> None:
    """What devices measured, to the latency model and MLflow; what cannot be reached is not the rollout's failure."""
    from export.bundle.package import open_package
    from tasks import feedback

    statement: Statement = open_package(fleet.bundle_of(done), fleet.open_trust()).statement
    devices = registry.devices()
    reports = [report for each in devices for report in registry.reports(each.id)]
    for place, write in (
        ("the latency model", lambda: feedback.feed_latency(statement, reports, devices)),
        ("MLflow", lambda: feedback.record(statement, done, reports, devices, registry.placements(done.id))),
    ):
        try:
            write()
        except Exception as error:
            logger.warning("%s was not told what the devices measured: %s: %s", place, type(error).__name__, error)


def tell(done: Rollout, text: str) -> None:
    """The event ``stillhouse.rollout.done`` or ``stillhouse.rollout.aborted``, on which automations act."""
    resource = {"prefect.resource.id": f"stillhouse.rollout.{done.id}", "prefect.resource.name": done.model}
    payload = {"model": done.model, "seq": done.seq, "text": text}
    emit_event(event=f"stillhouse.rollout.{done.state}", resource=resource, payload=payload)


def _outcome(registry: Registry, done: Rollout) -> dict[str, Any]:
    placements = registry.placements(done.id)
    rows = rows_of(done, placements, registry.outcomes(done.id), registry.devices())
    return {"rollout": done.id, "outcome": done.state, "summary": summary(done, placements), "rows": rows}


def _abort_if_cancelled(registry: Registry, name: str) -> None:
    """A run that was cancelled aborts; one whose worker ends is started again, and goes on."""
    from prefect import get_client

    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    if state is not None and (state.is_cancelling() or state.is_cancelled()):
        abort(registry, name, reason="Its flow run was cancelled.", by="Prefect")


def abort(registry: Registry, name: str, *, reason: str, by: str) -> Rollout | None:
    """Abort a rollout that is not done; None when there is none of that id."""
    if name not in {each.id for each in registry.rollouts()}:
        return None
    found = registry.rollout(name)
    if found.state != "done":  # also one whose controller died in the middle of it
        courier = fleet.courier_for(registry, [each.device for each in registry.placements(found.id)])
        try:
            stop(registry, found, courier, reason, by=by)
        finally:
            courier.close()
    return registry.rollout(name)


@rollout.on_cancellation
def _aborted(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Also where the process was killed before it could do it itself."""
    registry = fleet.open_registry()
    try:
        abort(registry, str(flow_run.id).replace("-", ""), reason="Its flow run was cancelled.", by="Prefect")
    finally:
        registry.close()
