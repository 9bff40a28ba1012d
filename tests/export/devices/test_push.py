"""Bundles over SSH into a real OpenSSH server: installed, resumed, refused; and a key that opens nothing else."""

import asyncio
import getpass
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from export.devices import push
from export.devices.agent import durable
from export.devices.agent.device import Device
from export.devices.errors import DeviceError
from export.devices.push import UnreachableError
from export.devices.registry import DeviceEntry
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.ssh_server import SshServer, available, new_key, ssh_server

pytestmark = pytest.mark.skipif(not available(), reason="needs openssh-server (Debian package)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    folder = tmp_path_factory.mktemp("ssh")
    with ssh_server(folder, folder / "device") as found:
        yield found


@pytest.fixture
def device(server: SshServer) -> Device:
    """A fresh device behind the server."""
    root = server.folder / "device"
    durable.erase(root) if root.exists() else None
    (root / "slots").mkdir(parents=True)
    durable.write_json(root / "config.json", {"device": "lab-1"})
    durable.write_json(root / "trust.json", made_up.trust())
    return Device(root)


def entry(server: SshServer, **changes: Any) -> DeviceEntry:
    fields = {"id": "lab-1", "transport": "ssh", "address": f"127.0.0.1:{server.port}", "user": getpass.getuser()}
    return DeviceEntry(**{**fields, "host_key": server.host_key, **changes})


def test_a_bundle_is_sent_and_installed(server: SshServer, device: Device, tmp_path: Path) -> None:
    bundle = made_up.write(tmp_path / "digits-1.edgepkg", made_up.members(1, 2_000_000), seq=1)
    told: list[tuple[int, int]] = []
    report = asyncio.run(push.push(entry(server), bundle, [str(server.key)], on_progress=lambda *at: told.append(at)))
    assert report["phase"] == "committed"
    assert told[-1] == (bundle.stat().st_size, bundle.stat().st_size)
    assert asyncio.run(push.status(entry(server), [str(server.key)]))["active"]["seq"] == 1
    got: list[dict[str, Any]] = []
    assert asyncio.run(push.collect(entry(server), [str(server.key)], got.append)) == 1
    assert got[0]["key"] == "lab-1/digits/1/committed"
    assert asyncio.run(push.collect(entry(server), [str(server.key)], got.append)) == 0


def test_what_was_sent_is_not_sent_again(server: SshServer, device: Device, tmp_path: Path) -> None:
    bundle = made_up.write(tmp_path / "digits-1.edgepkg", made_up.members(1, 3_000_000), seq=1)

    def cut(done: int, total: int) -> None:
        if done > 1_500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(push.push(entry(server), bundle, [str(server.key)], on_progress=cut))
    have = (device.root / "inbox" / "digits-1.edgepkg.part").stat().st_size
    first: list[int] = []
    report = asyncio.run(
        push.push(entry(server), bundle, [str(server.key)], on_progress=lambda done, total: first.append(done))
    )
    assert report["phase"] == "committed"
    assert have > 0
    assert first[0] >= have


def test_a_refusal_comes_back_as_a_report(server: SshServer, device: Device, tmp_path: Path) -> None:
    bundle = made_up.write(tmp_path / "digits-1.edgepkg", keys=(made_up.key(9),))
    report = asyncio.run(push.push(entry(server), bundle, [str(server.key)]))
    assert (report["phase"], report["code"]) == ("refused", "signature")


def test_another_host_key_than_known_is_refused(server: SshServer, device: Device, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other")
    with pytest.raises(DeviceError, match="another host key"):
        asyncio.run(push.status(entry(server, host_key=other), [str(server.key)]))


def test_without_a_known_host_key_nothing_is_tried(server: SshServer) -> None:
    with pytest.raises(DeviceError, match="no host key"):
        asyncio.run(push.status(entry(server, host_key=""), [str(server.key)]))


def test_another_key_does_not_get_in(server: SshServer, tmp_path: Path) -> None:
    new_key(tmp_path / "mine")
    with pytest.raises(DeviceError, match="authorized_keys"):
        asyncio.run(push.status(entry(server), [str(tmp_path / "mine")]))


def test_a_device_that_is_off_is_unreachable(server: SshServer) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        asyncio.run(push.status(entry(server, address="127.0.0.1:9"), [str(server.key)]))


@pytest.mark.parametrize("command", ["id", "sh -c id", "status; id", "put ../x 0", "cat /etc/passwd"])
def test_the_key_opens_no_shell(server: SshServer, device: Device, command: str) -> None:
    async def run() -> Any:
        known = asyncssh.import_known_hosts(f"[127.0.0.1]:{server.port} {server.host_key}")
        options = {
            "username": getpass.getuser(),
            "client_keys": [str(server.key)],
            "known_hosts": known,
            "config": None,
        }
        async with asyncssh.connect("127.0.0.1", server.port, **options) as connection:
            with pytest.raises(asyncssh.Error):
                await connection.start_sftp_client()
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_connection("127.0.0.1", server.port)
            return await connection.run(command, input="")

    done = asyncio.run(run())
    assert "uid=" not in str(done.stdout)
    assert '"code": "command"' in str(done.stdout)
    assert done.exit_status == 2
