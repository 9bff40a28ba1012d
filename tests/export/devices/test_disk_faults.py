"""Full disks, D8 of docs/reliability.md: in every phase the old model is left, and room for the next update."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from export.devices.agent import device as devices
from export.devices.agent import durable, inbox, package, pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from tests.export.devices import cuts
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_device import active, new_device
from tests.export.devices.test_agent_pull import Fleet, served
from tests.export.devices.test_device_faults import answers, made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("needs leave to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    """Somebody else takes all that is left."""
    with (place / "filler").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert shutil.disk_usage(place).free == 0


def _written(name: str, words: bytes = b"") -> Callable[..., bool]:
    return lambda path, data, *rest: name in (path.name, path.parent.name) and words in data


PHASES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "unpacking": (package, "_copy", lambda member, place, length: place.name == "model.onnx"),
    "the statement": (durable, "write", _written("statement.json")),
    "the choice": (durable, "write", _written("choice.json")),
    "the journal of the trial": (durable, "write", _written("state.json", b'"trial"')),
    "the swap": (durable, "point", lambda link, target: True),
    "the journal of the commit": (durable, "write", _written("state.json", b'"commit"')),
    "the floor": (durable, "write", _written("floor.json")),
    "the report": (durable, "write", _written("reports")),
    "the end": (durable, "write", _written("state.json", b'"idle"')),
}


@contextmanager
def filled_at(phase: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The disk is full from the moment on that an installation comes to a phase."""
    owner, name, is_it = PHASES[phase]
    call, reached = getattr(owner, name), list[str]()

    def watched(*arguments: Any) -> Any:
        if not reached and is_it(*arguments):
            fill(place)
            reached.append(phase)
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield reached


@pytest.mark.parametrize(
    "phase",
    [*PHASES][:1] + [pytest.param(phase, marks=pytest.mark.slow) for phase in [*PHASES][1:]],
)
def test_a_disk_that_fills_up_leaves_the_old_model_and_room_for_the_next(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    device = new_device(small / "device")
    device.install(made(tmp_path, 1, made_up.members(1, 1_000_000)))
    with filled_at(phase, small, monkeypatch) as reached, pytest.raises((Refused, OSError)) as caught:
        device.install(made(tmp_path, 2, made_up.members(2, 1_000_000)))
    assert "disk" in (getattr(caught.value, "code", ""), "disk" if caught.value.args[0] == errno.ENOSPC else "")
    assert reached == [phase]
    assert cuts.faults(device.root, 1, 2) == ""
    now = active(device)
    assert now is not None
    assert answers(device.root, now)
    if phase in ("unpacking", "the statement", "the choice"):
        assert not device.slot("b").exists()  # what was written of it is given back at once
    (small / "filler").unlink()
    device.recover()
    assert device.journal["state"] == "idle"
    assert cuts.faults(device.root, now, now) == ""
    assert device.install(made(tmp_path, 3))["phase"] == "committed"
    assert answers(device.root, 3)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_a_byte_is_written(small: Path, tmp_path: Path) -> None:
    device = new_device(small / "device")
    device.install(made(tmp_path, 1))
    with pytest.raises(Refused, match="Free some space"):
        device.install(made(tmp_path, 2, made_up.members(2, 20_000_000)))
    assert not device.slot("b").exists()
    assert device.install(made(tmp_path, 3))["phase"] == "committed"


def test_what_is_handed_in_leaves_a_reserve_on_the_disk(small: Path, tmp_path: Path) -> None:
    device = new_device(small / "device")
    data = made(tmp_path, 1, made_up.members(1, 22_000_000)).read_bytes()
    with (tmp_path / "1.edgepkg").open("rb") as stream, pytest.raises(Refused, match="no room"):
        inbox.enter(device, "put x.edgepkg 0", stream)
    assert shutil.disk_usage(small).free >= devices.SPARE_BYTES
    assert inbox.enter(device, "size x.edgepkg", stream)["size"] < len(data)
    with pytest.raises(Refused):
        inbox.enter(device, "install x.edgepkg", stream)  # it is not whole; what there is of it is taken away
    assert list((device.root / "inbox").iterdir()) == []
    assert device.install(made(tmp_path, 2))["phase"] == "committed"


@pytest.mark.slow
def test_a_download_that_does_not_fit_is_no_end_of_updates(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    (tmp_path / "repository").mkdir()
    with served(tmp_path / "repository") as (address, web):
        fleet = Fleet(tmp_path, address, web)
        shutil.move(fleet.device.root, small / "device")
        fleet.device = Device(small / "device")
        fleet.order(1)
        assert pull.poll(fleet.device)["phase"] == "committed"
        fleet.order(2, padding=30_000_000)
        with pytest.raises(Refused):
            pull.poll(fleet.device, patience_s=0.2)
        assert answers(fleet.device.root, 1)
        fleet.order(3)
        assert pull.poll(fleet.device, patience_s=0.2)["phase"] == "committed"


@pytest.mark.slow
def test_a_part_of_a_bundle_that_is_ordered_no_more_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    (tmp_path / "repository").mkdir()
    with served(tmp_path / "repository") as (address, web):
        fleet = Fleet(tmp_path, address, web)
        fleet.order(1, padding=500_000)
        web.cuts += [200_000, 0, 0, 0]
        with pytest.raises(Refused, match="200000 of"):
            pull.poll(fleet.device, patience_s=0.001)
        web.cuts.clear()
        fleet.order(2)
        assert pull.poll(fleet.device)["phase"] == "committed"
        assert [path.name for path in (fleet.device.root / "inbox").iterdir() if path.stat().st_size > 100_000] == []


@pytest.mark.slow
def test_on_a_full_disk_the_command_says_so(small: Path, tmp_path: Path) -> None:
    device = new_device(small / "device")
    device.install(made(tmp_path, 1))
    fill(small)
    command = cuts.agent(device.root, "install", str(made(tmp_path, 2)))
    done = subprocess.run(command, env=cuts.environment(), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (done.returncode, json.loads(done.stdout)["code"]) == (2, "disk")
    assert answers(device.root, 1)


@pytest.mark.slow
def test_a_server_starts_on_a_full_disk(small: Path, tmp_path: Path) -> None:
    device = new_device(small / "device")
    device.install(made(tmp_path, 1))
    fill(small)
    command = cuts.agent(device.root, "serve", "--port", "0")
    process = subprocess.Popen(
        command, env=cuts.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "Serving on" in process.stdout.readline(), process.stderr.read()[-500:]
    finally:
        process.terminate()
        process.communicate(timeout=20)
