"""``stillhouse rollout``: bundles to devices in rings, and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from flows.devices import NONE, ago, opened

if TYPE_CHECKING:
    from export.devices.registry import Registry, Rollout
    from export.devices.rollout import RolloutPolicy

app = typer.Typer(help="Bundles to devices in rings, and back. Without a command: a list.")
console = Console()

ABORTED, PAUSED = 1, 4
"""Exit codes; 0: every device that was asked and answered has it."""

RolloutArgument = Annotated[str, typer.Argument(help="Id of a rollout, or its beginning.", show_default=False)]
ReasonOption = Annotated[str, typer.Option(help="Why; kept in the log.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A value of the policy, may be repeated: canary, shares, concurrency, max_failures, min_reported, "
        "abort_fraction, deadline_minutes, silent, bake_minutes, min_success, approve. See docs/devices.md.",
    ),
]


@app.callback(invoke_without_command=True)
def list_(
    context: typer.Context, json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False
) -> None:
    """List rollouts, newest first."""
    if context.invoked_subcommand is None:
        show_rollouts(console, as_json=json_)


@app.command(
    epilog="Examples: stillhouse rollout start bundles/digits-7.edgepkg; stillhouse rollout start --model digits "
    "--device lab-1 --device lab-2 --set canary=1 --set shares='[0.5, 1.0]' --set approve=canary"
)
def start(
    bundle: Annotated[Path | None, typer.Argument(help="An .edgepkg file.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Bundle and roll out the champion of this model instead.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Only this device; may be repeated. Default: all.")] = None,
    set_: SetOption = None,
) -> None:
    """Roll a bundle out: canaries first, then ring by ring; a bad one stops there and devices go back."""
    policy = policy_of(set_ or [])
    check_source(bundle, model)
    asked = {"model": model, "bundle": None if bundle is None else str(bundle), "devices": device or None}
    raise typer.Exit(carry_out_here(console, {**asked, "policy": policy}))


@app.command(epilog="Example: stillhouse rollout show 3f2a")
def show(rollout: RolloutArgument) -> None:
    """Show every device of a rollout."""
    with opened() as registry:
        show_rollout(console, registry, registry.rollout(rollout))


@app.command(epilog="Example: stillhouse rollout pause 3f2a --reason 'the line is running'")
def pause(rollout: RolloutArgument, reason: ReasonOption = "") -> None:
    """Order nobody else for now; devices that are at it come to their end."""
    from flows.models import person

    with opened() as registry:
        found = registry.rollout(rollout)
        done = found.state == "running" and registry.set_state(found.id, "paused", reason or "Paused.", person())
    console.print(f"Rollout {found.id[:8]} is paused." if done else f"Rollout {found.id[:8]} is {found.state}.")


@app.command(epilog="Example: stillhouse rollout resume 3f2a")
def resume(rollout: RolloutArgument) -> None:
    """Go on with a rollout that was paused, or whose controller died."""
    raise typer.Exit(resume_rollout(console, rollout))


@app.command(epilog="Example: stillhouse rollout abort 3f2a --reason 'wrong labels'")
def abort(rollout: RolloutArgument, reason: ReasonOption = "") -> None:
    """Order nobody else, and take orders back that devices have not followed; those that have it keep it."""
    from flows.models import person
    from flows.rollout import abort as stop

    with opened() as registry:
        found = registry.rollout(rollout)
        done = stop(registry, found.id, reason=reason or "Aborted.", by=person()) or found
        show_rollout(console, registry, done)
    _wake(found.id, go_on=False, reason=reason)


@app.command(
    epilog="Examples: stillhouse rollout back digits --reason 'misreads the new labels'; "
    "stillhouse rollout back digits --to 5 --reason 'the last good one'"
)
def back(
    model: Annotated[str, typer.Argument(help="Name of the model.", show_default=False)],
    to: Annotated[int | None, typer.Option(help="Number of the bundle to go back to; default: the one before.")] = None,
    reason: ReasonOption = "",
    set_: SetOption = None,
) -> None:
    """Bring the whole fleet back to an earlier bundle: it is issued again under a new number, and rolled out."""
    policy = policy_of(["shares=[1.0]", *(set_ or [])])  # a canary, then all: what comes has been everywhere
    file = issue_again(console, model, to)
    console.print(f"Going back to what {file.name} holds. {reason}".rstrip(), markup=False, highlight=False)
    raise typer.Exit(carry_out_here(console, {"bundle": str(file), "policy": policy}))


def check_source(bundle: Path | None, model: str | None) -> None:
    """Refuse what needs no server to be refused.

    Raises:
        InputError: there is no bundle, or not one that the trusted keys have signed, or no device.
    """
    from export.devices.errors import DeviceError
    from flows import fleet
    from flows.bundling import check_bundle

    if bundle is None and model is None:
        raise DeviceError("Rollout has no source, expected a bundle or --model. Name one of them.")
    with opened() as registry:
        if not registry.devices():
            raise DeviceError("The registry has no devices, expected some. Add one: stillhouse devices add NAME")
    if bundle is not None:
        check_bundle(bundle, fleet.open_trust())


def policy_of(changes: Sequence[str]) -> "RolloutPolicy":
    """The usual policy with changes such as ``canary=2``.

    Raises:
        DeviceError: a value is none that the policy takes.
    """
    import yaml
    from pydantic import ValidationError

    from export.devices.errors import DeviceError
    from export.devices.rollout import RolloutPolicy

    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise DeviceError(f"Policy '{change}' has no value, expected NAME=VALUE such as canary=2.")
        values[name] = yaml.safe_load(text)
    try:
        return RolloutPolicy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(RolloutPolicy.model_fields)
        raise DeviceError(
            f"Policy '{'.'.join(map(str, first['loc']))}' has {first['input']!r} ({first['msg']}), expected one of its "
            f"fields with a value it takes: {known}. Correct it."
        ) from error


def carry_out_here(console: Console, parameters: dict[str, Any]) -> int:
    """Run the flow in this process, ask at its pauses if there is somebody to ask; the exit code."""
    import os

    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # the program says it in its own words
    from flows.progress import terminal_progress
    from flows.server import prefect_server

    with prefect_server(console, "rollout"):
        from flows.models import person
        from flows.rollout import abort as stop
        from flows.rollout import rollout as flow

        while True:
            with terminal_progress(console):
                done: Any = flow(**parameters)
            if done["outcome"] == "unchanged":
                console.print("The devices have this champion; nothing was done.")
                return 0
            with opened() as registry:
                found = registry.rollout(done["rollout"])
                show_rollout(console, registry, found)
                if found.state != "paused":
                    return 0 if found.state == "done" else ABORTED
                if not console.is_terminal:
                    console.print(f"Go on: stillhouse rollout resume {found.id[:8]}", highlight=False)
                    return PAUSED
                if Confirm.ask("Go on?", console=console):
                    registry.resume(found.id, by=person())
                elif Confirm.ask("Abort it? (No: it stays paused)", console=console):
                    stop(registry, found.id, reason="Not approved.", by=person())
                else:
                    return PAUSED
            parameters = {"go_on_with": found.id}


def resume_rollout(console: Console, name: str) -> int:
    """Let a rollout go on: in the flow run that waits in Prefect, if there is one, else here."""
    from flows.models import person

    with opened() as registry:
        found = registry.rollout(name)
        if found.state in ("done", "aborted"):
            console.print(f"Rollout {found.id[:8]} is {found.state}; nothing was done.", highlight=False)
            return 0
        registry.resume(found.id, by=person())
    if _wake(found.id, go_on=True):
        console.print(f"Rollout {found.id[:8]} goes on in its flow run.", highlight=False)
        return 0
    return carry_out_here(console, {"go_on_with": found.id})


def _wake(rollout: str, *, go_on: bool, reason: str = "") -> bool:
    """Answer the form of the flow run that waits for this rollout; whether there is one."""
    from uuid import UUID

    from flows.server import use_running_server

    if use_running_server() is None:
        return False
    from prefect import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.models import person

    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(UUID(rollout))
        except ObjectNotFound:
            return False
        if run.state is None or not run.state.is_paused():
            return False
        client.resume_flow_run(run.id, run_input={"go_on": go_on, "reason": reason, "by": person()})
    return True


def issue_again(console: Console, model: str, to: int | None) -> Path:
    """An earlier bundle's content under a number above all that were given out.

    Raises:
        DeviceError: there is no such earlier bundle, or it is not kept.
    """
    from export.bundle.build import Order, next_seq, reissue
    from export.devices.errors import DeviceError
    from flows import fleet
    from flows.bundling import check_bundle, now, signing_keys

    with opened() as registry:
        rollouts = [each for each in registry.rollouts() if each.model == model]
    if not rollouts:
        raise DeviceError(f"Model '{model}' has no rollouts, expected one to go back from. `stillhouse rollout` lists.")
    newest = max(each.seq for each in rollouts)
    good = [each.seq for each in rollouts if each.state == "done" and each.seq < newest]
    wanted = to if to is not None else max(good, default=0)
    chosen = next((each for each in rollouts if each.seq == wanted), None)
    if chosen is None or not fleet.bundle_of(chosen).is_file():
        known = ", ".join(map(str, sorted(good))) or "none"
        raise DeviceError(
            f"Model '{model}' has no bundle {wanted or 'before'} to go back to, expected one of: {known}."
        )
    keys, trust = signing_keys([], None, None)
    trust = trust or fleet.open_trust()
    old = check_bundle(fleet.bundle_of(chosen), trust)
    order = Order(seq=max(newest + 1, next_seq(fleet.bundles_folder(), model)), created=now(), keys=keys)
    path, notes = reissue(old, fleet.bundles_folder(), order, trust)
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    return path


def show_rollouts(console: Console, *, as_json: bool = False) -> None:
    """Every rollout in one line."""
    from export.devices.controller import summary

    with opened() as registry:
        rollouts = [(each, summary(each, registry.placements(each.id))) for each in registry.rollouts()]
    if as_json:
        shown = [{**each.model_dump(mode="json"), "summary": text} for each, text in rollouts]
        console.out(json.dumps(shown, indent=1), highlight=False)
        return
    if not rollouts:
        console.print("There are no rollouts. Start one: stillhouse rollout start bundles/digits-1.edgepkg")
        return
    table = Table("rollout", "model", "state", "begun", "how it stands", title="Rollouts", box=SIMPLE_HEAD)
    for each, text in rollouts:
        table.add_row(each.id[:8], f"{each.model} {each.seq}", each.state, ago(each.created), text)
    console.print(table)


def show_rollout(console: Console, registry: "Registry", found: "Rollout") -> None:
    """Every device of a rollout, and one sentence."""
    from export.devices.controller import summary
    from export.devices.table import rows_of

    placements = registry.placements(found.id)
    rows = rows_of(found, placements, registry.outcomes(found.id), registry.devices())
    table = Table(title=f"{found.model} {found.seq}: rollout {found.id[:8]}, {found.state}", box=SIMPLE_HEAD)
    columns = [name for name in rows[0] if name != "why" and any(row[name] != NONE for row in rows)] if rows else []
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    console.print(table)
    for row in rows:
        if row["why"]:
            console.print(f"{row['device']}: {row['why']}", markup=False, highlight=False, soft_wrap=True)
    console.print(summary(found, placements), markup=False, highlight=False, soft_wrap=True)
