"""The commands of ``stillhouse`` that keep things running: servers, nights, models, notifications, copies."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True)
console = Console()

SERVERS, MODELS, KEEPING = "Servers and nights", "Registered models", "Keeping"

ModelArgument = Annotated[
    str, typer.Argument(help="Registered model, named like its recipe, for example digits.", show_default=False)
]
ReasonOption = Annotated[str, typer.Option(help="Why; kept with the version.")]


@app.command(
    rich_help_panel=SERVERS,
    epilog="Examples: stillhouse up; stillhouse up --prefect-port 4200 --mlflow-port 5000; "
    "PREFECT_SERVER_API_AUTH_STRING=admin:secret stillhouse up --host 0.0.0.0",
)
def up(
    prefect_port: Annotated[int | None, typer.Option(help="Port of the Prefect server; default: a free one.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of the MLflow UI; default: a free one.")] = None,
    host: Annotated[
        str, typer.Option(help="Address the Prefect server listens at; one open to others needs a password.")
    ] = "127.0.0.1",
) -> None:
    """Start the Prefect server, a worker and the MLflow UI, register the deployments, and keep them running."""
    from flows.server import up as start

    raise typer.Exit(start(prefect_port, mlflow_port, host=host))


@app.command(rich_help_panel=SERVERS, epilog="Example: stillhouse reconcile")
def reconcile() -> None:
    """Settle runs whose process is gone, as `stillhouse up` does every few seconds."""
    from flows.reconcile import show_reconciled

    show_reconciled(console)


@app.command(
    rich_help_panel=SERVERS,
    epilog="Examples: stillhouse regression digits; "
    "stillhouse regression digits/20261126T020000Z-1a2b3c4d --against digits/20261120T020000Z-5e6f7a8b",
)
def regression(
    run: Annotated[str, typer.Argument(help="A run folder, <recipe>/<run-id>, or a recipe for its newest run.")],
    against: Annotated[
        str | None, typer.Option(help="Another run; default: the last good one and the champion's.")
    ] = None,
) -> None:
    """Say what became better or worse since another run, and which stage is to blame; exit code 1 for a regression."""
    from flows.comparing import resolve_run
    from tasks.regression import show_regression

    other = None if against is None else resolve_run(against)
    raise typer.Exit(show_regression(console, resolve_run(run), other))


@app.command(rich_help_panel=MODELS, epilog="Examples: stillhouse models; stillhouse models digits")
def models(
    model: Annotated[str | None, typer.Argument(help="One model, with its history.", show_default=False)] = None,
) -> None:
    """List registered models: versions, aliases, what was measured, who promoted them and when."""
    from flows.models import show_models

    show_models(console, model)


@app.command(
    rich_help_panel=MODELS,
    epilog="Examples: stillhouse promote digits; "
    "stillhouse promote digits --version 3 --yes --reason 'checked by hand'",
)
def promote(
    model: ModelArgument,
    version: Annotated[int | None, typer.Option(help="Number of the version; default: the candidate.")] = None,
    reason: ReasonOption = "",
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; a version with anomalies also needs --reason.")
    ] = False,
) -> None:
    """Compare a version with the champion, ask, and make it the champion."""
    from flows.models import promote_model
    from flows.promotion import tell_promoted
    from flows.server import use_running_server

    done = promote_model(console, model, version=version, reason=reason, yes=yes)
    if done is None:
        raise typer.Exit(1)
    if done["version"] != done["replaced"] and use_running_server():
        tell_promoted(done)


@app.command(
    rich_help_panel=MODELS, epilog="Example: stillhouse rollback digits --reason 'misses the digit 7 on the new camera'"
)
def rollback(model: ModelArgument, reason: ReasonOption = "") -> None:
    """Make the previous champion the champion again; policy does not promote the bad version again."""
    from flows.models import person, rollback_model
    from flows.promotion import tell_rolled_back
    from flows.server import use_running_server

    done = rollback_model(console, model, reason=reason)
    if use_running_server():
        tell_rolled_back(done, by=person())


@app.command(rich_help_panel=MODELS, epilog="Example: stillhouse card digits")
def card(
    run: Annotated[str, typer.Argument(help="A run folder, <recipe>/<run-id>, or a recipe for its newest run.")],
) -> None:
    """Write and print the model card of an accepted run."""
    from flows.comparing import show_card

    show_card(console, run)


@app.command(rich_help_panel=KEEPING, epilog="Example: stillhouse backup stillhouse-backup.tar")
def backup(file: Annotated[Path, typer.Argument(help="The tar file to write.", show_default=False)]) -> None:
    """Copy databases, store, runs and models into one file, also while recipes run."""
    from flows.backup import backup_command

    backup_command(console, file)


@app.command(
    rich_help_panel=KEEPING,
    epilog="Examples: stillhouse restore stillhouse-backup.tar; "
    "stillhouse restore stillhouse-backup.tar --into /srv/other",
)
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `stillhouse backup` wrote.", show_default=False)],
    into: Annotated[Path | None, typer.Option(help="Root to restore to; default: this project's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Move aside what is there.")] = False,
) -> None:
    """Put a backup back; every file is verified before anything is put into place."""
    from flows.backup import restore_command

    restore_command(console, file, into, force=force)


@app.command(rich_help_panel=KEEPING, epilog="Example: stillhouse prune --keep 10 --dry-run")
def prune(
    keep: Annotated[int, typer.Option(min=1, help="Newest runs of each recipe whose artifacts stay.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Free disk: drop kept stages that only older runs need. Reports, MLflow and registered models stay."""
    from flows.prune import prune_command

    prune_command(console, keep, dry_run=dry_run)


notify = typer.Typer(no_args_is_help=True, help="Who is told of rejections, regressions, crashes and promotions.")
app.add_typer(notify, name="notify", rich_help_panel=KEEPING)

AddressArgument = Annotated[
    str | None, typer.Argument(help="The address; left out, it is asked for and not shown.", show_default=False)
]
NameOption = Annotated[str | None, typer.Option(help="Name of the block; several places need several names.")]


@notify.command(epilog="Example: stillhouse notify webhook   (asks for the address without showing it)")
def webhook(url: AddressArgument = None, name: NameOption = None) -> None:
    """Send news to a webhook as JSON; the address is kept in a Prefect block."""
    from flows.notify import save

    save(console, "webhook", url, name)


@notify.command(epilog="Example: stillhouse notify email 'mailtos://USER:PASSWORD@HOST:587?from=A&to=B'")
def email(url: AddressArgument = None, name: NameOption = None) -> None:
    """Send news by e-mail; the address (Apprise's mailto form) is kept in a Prefect block."""
    from flows.notify import save

    save(console, "email", url, name)


@notify.command("list", epilog="Example: stillhouse notify list")
def list_() -> None:
    """List the saved places and what they are told."""
    from flows.notify import show

    show(console)


@notify.command(epilog="Example: stillhouse notify test")
def test() -> None:
    """Send a test message everywhere, as real ones go."""
    from flows.notify import test as send

    raise typer.Exit(send(console))


@notify.command(epilog="Example: stillhouse notify remove webhook")
def remove(name: Annotated[str, typer.Argument(help="As `stillhouse notify list` shows it.")]) -> None:
    """Delete a saved place."""
    from flows.notify import remove as forget

    forget(console, name)
