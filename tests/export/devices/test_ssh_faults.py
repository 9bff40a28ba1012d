"""Faults of a push, D17 of docs/reliability.md: other hosts, users, names and commands than there should be."""

import asyncio
import getpass
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from export.devices import push
from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices import ssh_server as servers
from tests.export.devices.ssh_server import SshServer
from tests.export.devices.test_agent_device import new_device
from tests.export.devices.test_device_faults import made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    if not servers.available():
        pytest.skip("needs openssh-server (Debian package)")
    folder = tmp_path_factory.mktemp("ssh")
    new_device(folder / "device")
    with servers.ssh_server(folder, folder / "device") as found:
        yield found


def entry(server: SshServer, **changes: Any) -> DeviceEntry:
    fields = {"id": "lab-1", "transport": "ssh", "address": f"127.0.0.1:{server.port}", "user": getpass.getuser()}
    return DeviceEntry(**{**fields, "host_key": server.host_key, **changes})


@pytest.mark.parametrize("user", ["nobody", "no-such-user", "root; id"])
def test_another_user_does_not_get_in(server: SshServer, user: str) -> None:
    with pytest.raises(DeviceError, match="does not take our key"):
        asyncio.run(push.status(entry(server, user=user), [str(server.key)]))


def test_a_host_whose_key_was_changed_gets_not_a_byte(server: SshServer, tmp_path: Path) -> None:
    other = servers.new_key(tmp_path / "other")
    with pytest.raises(DeviceError, match="another host key"):
        asyncio.run(push.push(entry(server, host_key=other), made(tmp_path, 1), [str(server.key)]))
    assert not list(server.folder.rglob("1.edgepkg*"))


@pytest.mark.parametrize(
    "name", ["x; rm -rf y.edgepkg", "$(touch y).edgepkg", "`touch y`.edgepkg", "x\ny.edgepkg", "-rf", "x & y"]
)
def test_a_name_with_a_command_in_it_is_refused_and_nothing_is_run(
    server: SshServer, tmp_path: Path, name: str
) -> None:
    (server.folder / "device" / "y.edgepkg").write_bytes(b"here")
    bundle = made_up.write(tmp_path / name, seq=1)
    with pytest.raises(DeviceError, match="not allowed|no command"):
        asyncio.run(push.push(entry(server), bundle, [str(server.key)]))
    assert (server.folder / "device" / "y.edgepkg").read_bytes() == b"here"
    assert not list(server.folder.rglob("y"))
    inbox_folder = server.folder / "device" / "inbox"
    assert not inbox_folder.exists() or list(inbox_folder.iterdir()) == []


def test_the_forced_command_cannot_be_gone_around(server: SshServer, tmp_path: Path) -> None:
    async def run() -> None:
        known = asyncssh.import_known_hosts(f"[127.0.0.1]:{server.port} {server.host_key}")
        options: dict[str, Any] = {"known_hosts": known, "config": None, "client_keys": [str(server.key)]}
        async with asyncssh.connect("127.0.0.1", server.port, username=getpass.getuser(), **options) as connection:
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.run("status", term_type="xterm")
            with pytest.raises(asyncssh.Error):
                await connection.start_sftp_client()
            with pytest.raises(asyncssh.ChannelListenError):
                await connection.forward_remote_port("", 0, "127.0.0.1", 9)
            spoiled = {"STILLHOUSE_AGENT_ROOT": str(tmp_path), "PYTHONPATH": str(tmp_path), "LD_PRELOAD": "/x.so"}
            done = await connection.run("status", env=spoiled)
            assert json.loads(str(done.stdout))["device"] == "lab-1"
            done = await connection.run("")  # no command: no shell either
            assert json.loads(str(done.stdout))["code"] == "command"

    asyncio.run(run())
