"""Old metadata replayed after a power cut, on ext4 with options under which renamed files lose their bytes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.devices.agent import pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from tests.export.devices import cuts
from tests.export.devices.test_agent_cuts import WORST
from tests.export.devices.test_agent_pull import Fleet, served

pytestmark = pytest.mark.slow


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    reason = cuts.can_mount(tmp_path)
    if reason:
        pytest.skip(reason)
    (tmp_path / "repository").mkdir()
    with served(tmp_path / "repository") as (address, web):
        yield Fleet(tmp_path, address, web)


def cut_after_an_update(fleet: Fleet) -> tuple[cuts.Disk, dict[str, bytes]]:
    """A device that had taken number 1, then 2, when its power was cut; and the repository of number 1."""
    disk, place = cuts.Disk(fleet.folder / "disk.img", WORST), fleet.folder / "disk"
    disk.make()
    with disk.mounted(place):
        shutil.copytree(fleet.device.root, place / "device")
        device = Device(place / "device")
        fleet.order(1)
        assert pull.poll(device)["phase"] == "committed"
        old = fleet.saved()
        os.sync()
        fleet.order(2)
        assert pull.poll(device)["phase"] == "committed"
        return disk.as_cut(fleet.folder / "cut.img"), old


def leave_tufs_files_unflushed(patch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def forgetful(file: int) -> None:
        if "/metadata" not in str(Path(f"/proc/self/fd/{file}").readlink()):
            real(file)

    patch.setattr(os, "fsync", forgetful)


def kept(device: Device) -> bool:
    """Whether tuf's own copy of the newest timestamp outlived the cut."""
    try:
        return b'"timestamp"' in (device.root / "metadata" / "timestamp.json").read_bytes()
    except OSError:
        return False


def test_tufs_files_outlive_the_cut_and_the_replay_is_refused(fleet: Fleet) -> None:
    disk, old = cut_after_an_update(fleet)
    fleet.restore(old)
    with disk.mounted(fleet.folder / "again") as place:
        device = Device(place / "device")
        assert kept(device)
        with pytest.raises(Refused):
            pull.poll(device)
        assert device.status()["active"]["seq"] == 2


def test_where_tufs_files_are_lost_our_floor_refuses_the_replay(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        leave_tufs_files_unflushed(patch)
        disk, old = cut_after_an_update(fleet)
    new = fleet.saved()
    fleet.restore(old)
    with disk.mounted(fleet.folder / "again") as place:
        device = Device(place / "device")
        assert not kept(device)  # else this test says nothing
        with pytest.raises(Refused) as caught:
            pull.poll(device)
        assert caught.value.code == "replay"
        assert device.status()["active"]["seq"] == 2
        fleet.restore(new)
        assert pull.poll(device)["phase"] == "nothing"  # no brick


def test_without_our_floor_it_would_be_taken(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        leave_tufs_files_unflushed(patch)
        disk, old = cut_after_an_update(fleet)
    fleet.restore(old)
    monkeypatch.setattr(pull, "_keep_floor", lambda device: None)
    with disk.mounted(fleet.folder / "again") as place:
        assert "installed here before" in pull.poll(Device(place / "device"))["text"]
