"""``stillhouse devices``: the inventory, the kit that makes a machine a device, and the server that devices talk to."""

import datetime as dt
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tasks.settings import settings

if TYPE_CHECKING:
    from export.devices.registry import Registry

app = typer.Typer(help="Devices: the inventory, their set-up, and the server they talk to. Without a command: a list.")
console = Console()

NONE = "-"


@contextmanager
def opened() -> "Iterator[Registry]":
    """The registry while the block runs."""
    from flows import fleet

    registry = fleet.open_registry()
    try:
        yield registry
    finally:
        registry.close()


NameArgument = Annotated[
    str, typer.Argument(help="Name of the device: lower case, digits, dashes.", show_default=False)
]


@app.callback(invoke_without_command=True)
def list_(
    context: typer.Context, json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False
) -> None:
    """List devices: how they are reached, what they run, when they were last heard of."""
    if context.invoked_subcommand is None:
        show_devices(console, as_json=json_)


@app.command(epilog="Examples: stillhouse devices setup; STILLHOUSE_KEY_PASSPHRASE=... stillhouse devices setup")
def setup(
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="Keep the private keys in the open: whoever reads them can sign.")
    ] = False,
) -> None:
    """Make the registry, the repository that devices pull from and its keys; what is there stays."""
    from flows import fleet

    made = fleet.set_up(unencrypted=unencrypted)
    for path in made:
        console.print(f"Wrote {path}.", highlight=False, soft_wrap=True)
    if not made:
        console.print(f"Everything is there: {settings().devices_dir}, {settings().keys_dir}.", soft_wrap=True)
        return
    root = settings().keys_dir / "repository" / "root.pem"
    console.print(f"Keep {root} offline: it is needed to replace other keys alone.", highlight=False, soft_wrap=True)
    console.print("Next: stillhouse devices add NAME, and stillhouse devices serve (stillhouse up does it too).")


@app.command(
    epilog="Examples: stillhouse devices add gate-1 --server https://devices.example.org; stillhouse devices add lab-1"
    " --ssh 10.0.0.7:22 --user stillhouse-agent --host-key 'ssh-ed25519 AAAA...' --first"
)
def add(
    name: NameArgument,
    ssh: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Bundles are handed in over SSH; without it the device pulls."),
    ] = None,
    user: Annotated[str, typer.Option(help="User at the SSH server.")] = "stillhouse-agent",
    host_key: Annotated[
        str, typer.Option(help="The server's key, 'ssh-ed25519 AAAA...', or a file with it: no other one is accepted.")
    ] = "",
    first: Annotated[bool, typer.Option("--first", help="Among the canaries of every rollout.")] = False,
    server: Annotated[
        str, typer.Option(help="Address at which the device reaches `stillhouse devices serve`.", show_default=False)
    ] = "",
    kit: Annotated[Path | None, typer.Option(help="Where its kit goes; default NAME-kit.tar.gz.")] = None,
) -> None:
    """Enter a device and write its kit: an archive with the agent, its keys, its services and install.sh."""
    path = add_device(
        name, ssh=ssh, user=user, host_key=host_key, first=first, server=server, kit=kit or Path(f"{name}-kit.tar.gz")
    )
    console.print(f"Wrote {path}: it holds a secret, and makes one machine {name}.", highlight=False, soft_wrap=True)
    console.print("There, as root: tar xzf it, and run install.sh in its folder.", markup=False, highlight=False)


@app.command(epilog="Example: stillhouse devices kit gate-1 --server https://devices.example.org")
def kit(
    name: NameArgument,
    server: Annotated[
        str, typer.Option(help="Address at which the device reaches `stillhouse devices serve`.", show_default=False)
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Where it goes; default NAME-kit.tar.gz.")] = None,
) -> None:
    """Write the kit of a device again: with the agent of now, for a machine that takes its place or an upgrade."""
    path = write_kit_of(name, server, out or Path(f"{name}-kit.tar.gz"))
    console.print(f"Wrote {path}: it holds a secret, and makes one machine {name}.", highlight=False, soft_wrap=True)


@app.command(epilog="Example: stillhouse devices remove gate-1")
def remove(name: NameArgument) -> None:
    """Take a device out of the registry and of MLflow's tags; what it reported stays. It goes on with what it has."""
    from compression.errors import StillhouseError
    from flows import fleet
    from tasks import feedback

    has_order = fleet.is_set_up() and name in fleet.open_repository(()).orders
    repository = fleet.open_repository() if has_order else None  # its keys open, or nothing is done
    with opened() as registry:
        registry.remove(name)
    if repository is not None:
        repository.publish(orders={name: None})
    try:
        feedback.forget(name)
    except StillhouseError as error:
        console.print(f"Note: MLflow's tags name it as before. {error}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Removed {name}.", highlight=False)


@app.command(epilog="Examples: stillhouse devices status gate-1; stillhouse devices status lab-1 --json")
def status(
    name: NameArgument,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """What a device says of itself: asked now over SSH, or by its last word."""
    show_status(console, name, as_json=json_)


@app.command(epilog="Example: stillhouse devices log --last 20")
def log(last: Annotated[int, typer.Option(min=1, help="How many lines.")] = 50) -> None:
    """Everything that was decided about devices, from a log whose lines are chained by hashes."""
    with opened() as registry:
        for line in registry.audit()[-last:]:
            rest = "  ".join(f"{key}={value}" for key, value in line.items() if key not in ("at", "event") and value)
            console.print(f"{line['at']}  {line['event']}  {rest}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog="Examples: stillhouse devices serve; stillhouse devices serve --host 0.0.0.0 --port 8420")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen at; default: STILLHOUSE_DEVICE_ADDRESS.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default: STILLHOUSE_DEVICE_ADDRESS.")] = None,
) -> None:
    """Serve the repository to devices, and take their reports, until Ctrl-C."""
    serve_devices(host, port)


def show_devices(console: Console, *, as_json: bool = False) -> None:
    """The inventory as a table or as JSON."""
    with opened() as registry:
        devices = registry.devices()
    if as_json:
        shown = [device.model_dump(mode="json", exclude={"secret"}) for device in devices]
        console.out(json.dumps(shown, indent=1), highlight=False)
        return
    if not devices:
        console.print(
            "There are no devices. Set up, then add one: stillhouse devices setup; stillhouse devices add NAME"
        )
        return
    table = Table("device", "by", "runs", "machine", "last heard of", title="Devices", box=SIMPLE_HEAD)
    for each in devices:
        by = f"ssh {each.address}" if each.transport == "ssh" else "pull"
        runs = f"{each.active['name']} {each.active['seq']}" if each.active.get("name") else NONE
        machine = " ".join(str(each.facts[key]) for key in ("system",) if key in each.facts) or NONE
        name = f"{each.id} (first)" if each.first else each.id
        table.add_row(name, by, runs, machine, ago(each.last_seen))
    console.print(table)


def add_device(name: str, *, ssh: str | None, user: str, host_key: str, first: bool, server: str, kit: Path) -> Path:
    """Enter a device and write its kit; the kit.

    Raises:
        DeviceError: the name is taken, an SSH device has no host key, or devices are not set up.
        BundleError: the kit is there already.
    """
    from export.devices.errors import DeviceError
    from export.devices.registry import DeviceEntry
    from flows import fleet

    if not fleet.is_set_up():
        raise DeviceError(f"Folder '{settings().devices_dir}' has no repository, expected one. {fleet.SETUP}")
    if kit.exists():
        raise DeviceError(f"Kit '{kit}' has been there before, expected a new file. Move it away, or name another.")
    device = DeviceEntry(
        id=name,
        transport="ssh" if ssh else "pull",
        address=ssh or "",
        user=user if ssh else "",
        host_key=_host_key(name, ssh, host_key) if ssh else "",
        first=first,
        secret=secrets.token_hex(32),
    )
    with opened() as registry:
        registry.add(device)
    return write_kit_of(name, server, kit)


def write_kit_of(name: str, server: str, path: Path) -> Path:
    """The kit of a device that is in the registry.

    Raises:
        DeviceError: there is no such device.
        BundleError: the file is there already.
    """
    from export.devices.kit import write_kit
    from flows import fleet
    from flows.bundling import TRUST

    with opened() as registry:
        device = registry.device(name)
    root = (fleet.repository_folder() / "metadata" / "1.root.json").read_bytes()
    return write_kit(
        path,
        device,
        trust=(settings().keys_dir / TRUST).read_bytes(),
        root=root,
        server=server or f"http://{settings().device_address}",
        operator=fleet.operator_public() if device.transport == "ssh" else "",
    )


def _host_key(name: str, address: str, given: str) -> str:
    from export.devices.errors import DeviceError

    text = Path(given).read_text(encoding="utf-8") if given and Path(given).is_file() else given
    words = text.split()
    place = next((place for place, word in enumerate(words) if word.startswith(("ssh-", "ecdsa-"))), None)
    host, _, port = address.rpartition(":")
    if place is None or len(words) < place + 2 or not host or not port.isdigit():
        found = "no host key" if place is None else f"the address '{address}'"
        raise DeviceError(
            f"Device '{name}' has {found}, expected HOST:PORT and the key of that host. Show it there with: cat "
            "/etc/ssh/ssh_host_ed25519_key.pub"
        )
    return " ".join(words[place : place + 2])


def show_status(console: Console, name: str, *, as_json: bool = False) -> None:
    """What a device says of itself, as JSON or as a few lines.

    Raises:
        DeviceError: there is no such device, or it does not answer.
    """
    import asyncio

    from export.devices import push
    from flows import fleet

    with opened() as registry:
        device = registry.device(name)
        if device.transport == "ssh":
            keys = [fleet.operator_key()]
            found = asyncio.run(push.status(device, keys))
            registry.seen(name, found)
            asyncio.run(push.collect(device, keys, registry.receive))
        else:
            found = {"device": name, "active": device.active, "facts": device.facts}
            found |= {"last": (registry.reports(name) or [None])[-1]}
        heard = registry.device(name).last_seen
    if as_json:
        console.out(json.dumps(found, indent=1), highlight=False)
        return
    active, last = found.get("active") or {}, found.get("last") or {}
    runs = f"{active['name']} {active['seq']} (version {active.get('version')})" if active.get("name") else "nothing"
    console.print(f"{name} runs {runs}; heard of {ago(heard)}.", highlight=False)
    if last:
        why = f": {last['text']}" if last.get("text") else ""
        console.print(f"Last: {last['name']} {last['seq']} {last['phase']}{why}", markup=False, highlight=False)
    for key, value in (found.get("facts") or {}).items():
        console.print(f"  {key}: {value}", markup=False, highlight=False)


def ago(moment: dt.datetime | None) -> str:
    """How long ago, in one unit."""
    if moment is None:
        return "never"
    seconds = max(0.0, (dt.datetime.now(dt.UTC) - moment).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def serve_devices(host: str | None = None, port: int | None = None) -> None:
    """Serve until SIGINT or SIGTERM; signs short-lived metadata anew where the keys open.

    Raises:
        DeviceError: devices are not set up.
    """
    import uvicorn

    from export.devices.server import device_app
    from flows import fleet

    own_host, _, own_port = settings().device_address.rpartition(":")
    place = (host or own_host, int(own_port) if port is None else port)
    repository = fleet.open_repository(())
    registry = fleet.open_registry()
    refresh = _refresh()
    app_ = device_app(repository.folder, registry, refresh)
    config = uvicorn.Config(app_, *place, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    console.print(f"Devices: http://{place[0]}:{place[1]} (repository and reports). Ctrl-C ends it.", highlight=False)
    try:
        server.run()
    finally:
        registry.close()


def _refresh() -> Callable[[], None] | None:
    """What signs the repository anew, if the keys open without a person."""
    from compression.errors import StillhouseError
    from flows import fleet

    try:
        repository = fleet.open_repository(fleet.SHORT_LIVED)
    except StillhouseError as error:
        console.print(
            f"Note: nothing is signed anew here, and devices take nothing new in three days: {error}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return None
    return repository.refresh
