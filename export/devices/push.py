"""Hands bundles to devices over SSH, into the agent behind a forced command: bytes, never trust.

The host has to show the one key that the registry knows. What was sent before a connection broke is not sent again.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import asyncssh

from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry

CHUNK = 256 << 10
CONNECT_SECONDS = 15.0
KEEPALIVE_SECONDS = 10
"""A device that is silent for three times as long, below the connection, is gone."""
ENDS = ("committed", "refused", "rolled back")

OnProgress = Callable[[int, int], None]
Keys = Sequence[str | asyncssh.SSHKey]
"""Private keys to log in with, as paths or opened."""


class UnreachableError(DeviceError):
    """The device did not answer, or went away; what it has is kept, and it can be tried again."""


async def push(
    device: DeviceEntry,
    bundle: Path,
    keys: Keys,
    *,
    on_progress: OnProgress = lambda done, total: None,
    patience_s: float = 900.0,
) -> dict[str, Any]:
    """Send a bundle and have it installed; the agent's report.

    Args:
        device: Where to; of transport ssh.
        bundle: The file.
        keys: Private keys to log in with, as paths or opened.
        on_progress: Is told bytes sent and all bytes.
        patience_s: For the installation, its self-tests included.

    Raises:
        UnreachableError: no connection, or it broke.
        DeviceError: the host showed another key than the registry has, or the agent answers otherwise than agents do.
    """
    async with _connected(device, keys) as connection:
        size, answer = bundle.stat().st_size, await _ask(connection, f"size {bundle.name}")
        have = answer.get("size", 0)
        if answer.get("phase") == "refused":
            raise DeviceError(f"Device '{device.id}' does not take '{bundle.name}': {answer.get('text')}")
        if have > size:
            raise DeviceError(f"Device '{device.id}' has {have} bytes of '{bundle.name}', expected at most {size}.")
        if have < size:
            await _send(connection, bundle, have, size, on_progress)
        report = await _ask(connection, f"install {bundle.name}", patience_s)
    if report.get("phase") not in ENDS:
        raise DeviceError(f"Device '{device.id}' has answered {report!r}, expected a report. Look at its agent.")
    return {"device": device.id, **report}


async def status(device: DeviceEntry, keys: Keys) -> dict[str, Any]:
    """What the agent of a device says of itself."""
    async with _connected(device, keys) as connection:
        return await _ask(connection, "status")


async def roll_back(device: DeviceEntry, keys: Keys) -> dict[str, Any]:
    """Have a device go back to the model in its other slot; its status then."""
    async with _connected(device, keys) as connection:
        return await _ask(connection, "rollback", 60.0)


async def collect(device: DeviceEntry, keys: Keys, receive: Callable[[dict[str, Any]], Any]) -> int:
    """Take over the reports that wait on a device; each is taken away there only when ``receive`` has returned."""
    async with _connected(device, keys) as connection:
        waiting = await _ask(connection, "reports")
        for report in waiting:
            receive({name: value for name, value in report.items() if name != "file"})
            await _ask(connection, f"forget {report['file']}")
    return len(waiting)


class _connected:  # noqa: N801  (reads as what it does in a with statement)
    """A connection to the one host that has the key of the registry."""

    def __init__(self, device: DeviceEntry, keys: Keys) -> None:
        self._device, self._keys = device, keys
        self._connection: asyncssh.SSHClientConnection | None = None

    async def __aenter__(self) -> asyncssh.SSHClientConnection:
        device = self._device
        host, _, port = device.address.rpartition(":")
        if device.transport != "ssh" or not host or not port.isdigit() or not device.host_key:
            raise DeviceError(
                f"Device '{device.id}' has address '{device.address}' and {'a' if device.host_key else 'no'} host key, "
                "expected transport ssh, host:port and the host's key. Enter it anew."
            )
        try:
            self._connection = await asyncssh.connect(
                host,
                int(port),
                username=device.user,
                client_keys=list(self._keys),
                known_hosts=asyncssh.import_known_hosts(f"[{host}]:{port} {device.host_key}"),
                agent_path=None,
                config=None,
                connect_timeout=CONNECT_SECONDS,
                keepalive_interval=KEEPALIVE_SECONDS,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise DeviceError(
                f"Device '{device.id}' at {device.address} shows another host key than the registry has, expected that "
                "one. If it was set up anew, enter its new key; else somebody sits between."
            ) from error
        except asyncssh.PermissionDenied as error:
            raise DeviceError(
                f"Device '{device.id}' at {device.address} does not take our key for user '{device.user}', expected it "
                "in authorized_keys."
            ) from error
        except (OSError, asyncssh.Error, TimeoutError) as error:
            raise UnreachableError(f"Device '{device.id}' at {device.address} cannot be reached: {error}.") from error
        return self._connection

    async def __aexit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if self._connection is not None:
            self._connection.abort() if error is not None else self._connection.close()
            await self._connection.wait_closed()
        if isinstance(error, (OSError, asyncssh.Error, TimeoutError)):
            raise UnreachableError(f"Device '{self._device.id}' went away: {error}. It can be tried again.") from error


async def _ask(connection: asyncssh.SSHClientConnection, command: str, patience_s: float = 30.0) -> Any:
    done = await asyncio.wait_for(connection.run(command), patience_s)
    try:
        return json.loads(str(done.stdout))
    except ValueError as error:
        raise DeviceError(
            f"The other side has answered '{command}' with {str(done.stdout)[:200]!r} {str(done.stderr)[-300:]!r}, "
            "expected JSON. Is the key's command the agent's ssh-entry?"
        ) from error


async def _send(
    connection: asyncssh.SSHClientConnection, bundle: Path, have: int, size: int, on_progress: OnProgress
) -> None:
    async with connection.create_process(f"put {bundle.name} {have}", encoding=None) as process:
        with bundle.open("rb") as file:
            file.seek(have)
            while chunk := file.read(CHUNK):
                process.stdin.write(chunk)
                await process.stdin.drain()
                have += len(chunk)
                on_progress(have, size)
        process.stdin.write_eof()
        done = await process.wait()
    answer = json.loads(done.stdout or b"{}")
    if answer.get("size") != size:
        raise DeviceError(f"'{bundle.name}' has {answer} on the device, expected {size} bytes. Try again.")
