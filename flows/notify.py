"""``stillhouse notify``: save, try, list and remove the places that notifications go to."""

import getpass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from compression.errors import InputError
from flows import automations, blocks, deployments
from flows.automations import HINT
from flows.blocks import VARIABLES, Kind

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def server() -> "SyncPrefectClient":
    """A client of the server of a running ``stillhouse up``, or of the one that PREFECT_API_URL names.

    Raises:
        InputError: there is none.
    """
    from prefect.settings import PREFECT_API_URL

    from flows.server import running_server

    found = running_server()
    api = found.prefect_api if found else PREFECT_API_URL.value()
    if not api:
        raise InputError(
            "Notifications have no Prefect server to be kept in, expected a running one. "
            "Start it with `stillhouse up`, or name yours in PREFECT_API_URL."
        )
    return deployments.connect(api)


def save(console: Console, kind: Kind, url: str | None, name: str | None = None) -> None:
    """Save an address (asked for without showing it when none is given) and make the automations use it."""
    if url is None:
        url = getpass.getpass(f"Address of the {kind} (not shown): ").strip()
    client = server()
    saved = blocks.save(client, kind, url, name=name)
    automations.prepare(client)
    console.print(f"Saved as block '{saved}' of the Prefect server. Try it: stillhouse notify test", markup=False)


def show(console: Console) -> None:
    """List the saved places and what they are told."""
    client = server()
    saved = blocks.channels(client)
    if not saved:
        console.print(HINT, markup=False)
        console.print(f"`stillhouse up` also takes them from {' and '.join(VARIABLES.values())}.", markup=False)
        return
    table = Table("name", "kind", "goes to")
    for channel in saved:
        table.add_row(channel.name, channel.kind, channel.shown)
    console.print(table)
    told = ", ".join(notice.name for notice in automations.notices() if notice.name != "test")
    console.print(f"Each is told: {told}. Switch single ones off in the Prefect UI under Automations.", markup=False)


def remove(console: Console, name: str) -> None:
    """Delete a saved place; the automations forget it."""
    client = server()
    blocks.remove(client, name)
    automations.prepare(client)
    console.print(f"Removed '{name}'.", markup=False)


def test(console: Console) -> int:
    """Send a test message everywhere, through the server as real ones go; 0 when all went out, else 3.

    Raises:
        InputError: nothing is saved.
    """
    client = server()
    if not blocks.channels(client):
        raise InputError(f"There is nobody to send a test to. {HINT}")
    with console.status("Sending"):
        deliveries = automations.try_out(client, by=getpass.getuser())
    for each in deliveries:
        if each.problem is None:
            console.print(f"{each.channel.name}: sent to {each.channel.shown}.", markup=False)
        else:
            console.print(f"{each.channel.name}: not sent. {each.problem}", markup=False, style="red")
    return 3 if any(each.problem for each in deliveries) else 0
