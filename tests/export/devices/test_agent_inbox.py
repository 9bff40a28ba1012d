"""What the key of a forced command can do, and that it can do nothing else."""

import io
from pathlib import Path

import pytest

from export.devices.agent import inbox
from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_device import new_device


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return new_device(tmp_path / "device")


def enter(device: Device, command: str, data: bytes = b"") -> object:
    return inbox.enter(device, command, io.BytesIO(data))


def test_a_bundle_is_handed_in_in_parts_and_installed(device: Device, tmp_path: Path) -> None:
    data = made_up.write(tmp_path / "x.edgepkg").read_bytes()
    assert enter(device, "size digits-1.edgepkg") == {"size": 0}
    assert enter(device, "put digits-1.edgepkg 0", data[:700]) == {"size": 700}
    with pytest.raises(Refused, match="expected 700|has 700"):
        enter(device, "put digits-1.edgepkg 0", data)
    assert enter(device, "size digits-1.edgepkg") == {"size": 700}
    assert enter(device, "put digits-1.edgepkg 700", data[700:]) == {"size": len(data)}
    assert enter(device, "install digits-1.edgepkg")["phase"] == "committed"  # type: ignore[index]
    assert enter(device, "size digits-1.edgepkg") == {"size": 0}
    (report,) = enter(device, "reports")  # type: ignore[misc]
    assert report["phase"] == "committed"
    assert enter(device, f"forget {report['file']}") == {}
    assert enter(device, "reports") == []
    assert enter(device, "status")["active"]["seq"] == 1  # type: ignore[index]


def test_it_goes_back_when_asked(device: Device, tmp_path: Path) -> None:
    for seq in (1, 2):
        device.install(made_up.write(tmp_path / f"{seq}.edgepkg", made_up.members(seq), seq=seq))
    assert enter(device, "rollback")["active"]["seq"] == 1  # type: ignore[index]


@pytest.mark.parametrize(
    "command",
    [
        *(
            "",
            "sh",
            "bash -i",
            "scp -t /etc",
            "status; rm -rf x",
            "status --all",
            "install",
            "put x",
            "put x -1",
            "put x a",
        ),
        *(
            "install ../x",
            "install /etc/passwd",
            "size $(id)",
            "size `id`",
            "put a/b 0",
            "forget ../state.json",
            "size x|y",
        ),
        *("install .hidden", "internal-sftp", "rollback now", "reports x", "size a b", "INSTALL x", "size \u0430"),
    ],
)
def test_everything_else_is_refused_and_nothing_is_written(device: Device, command: str) -> None:
    before = sorted(path.name for path in device.root.rglob("*") if path.is_file())
    with pytest.raises(Refused) as caught:
        enter(device, command, b"evil")
    assert caught.value.code == "command"
    assert sorted(path.name for path in device.root.rglob("*") if path.is_file()) == before


def test_a_bundle_that_nobody_signed_is_refused_and_taken_away(device: Device, tmp_path: Path) -> None:
    data = made_up.write(tmp_path / "x.edgepkg", keys=(made_up.key(9),)).read_bytes()
    enter(device, "put x.edgepkg 0", data)
    with pytest.raises(Refused, match="trusted key"):
        enter(device, "install x.edgepkg")
    assert enter(device, "size x.edgepkg") == {"size": 0}
