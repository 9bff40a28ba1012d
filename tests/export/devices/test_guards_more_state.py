"""One test for each guard of state, of the network and of rollouts that no other test needs."""

import asyncio
import hashlib
import hmac
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from export.devices import push
from export.devices.agent import device as devices
from export.devices.agent import durable, package, pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused
from export.devices.controller import stop
from export.devices.couriers import PullCourier
from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry, Registry
from export.devices.repository import Order, Repository
from export.devices.rollout import RolloutPolicy
from tests.export.devices import cuts
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_device import active, new_device
from tests.export.devices.test_agent_pull import Fleet, served
from tests.export.devices.test_guards_more import ONE, made


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return new_device(tmp_path / "device")


# --- kills ---

KILLED_AT = "import os, signal; from export.devices.agent import durable, package, device; "
"""Code that runs before the agent, to have it killed at one place."""
AFTER_THE_SWAP = (
    KILLED_AT + "point = durable.point; "
    "durable.point = lambda link, target: (point(link, target), os.kill(os.getpid(), signal.SIGKILL))"
)
WHILE_UNPACKING = (
    KILLED_AT + "verify = package.verify; "
    "package.verify = lambda slot, said: (verify(slot, said), os.kill(os.getpid(), signal.SIGKILL))"
)


def install_killed(device: Device, bundle: Path, code: str) -> None:
    command = cuts.agent(device.root, "install", str(bundle), code=code)
    done = subprocess.run(command, env=cuts.environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_what_was_swapped_before_a_kill_is_tested_and_committed_after_it(device: Device, tmp_path: Path) -> None:
    device.install(made(tmp_path, 1))
    install_killed(device, made(tmp_path, 2), AFTER_THE_SWAP)
    assert (active(device), device.journal["state"], device.floor["seq"]) == (2, "trial", {"digits": 1})
    device.recover()
    assert (active(device), device.journal["state"], device.floor["seq"]) == (2, "idle", {"digits": 2})
    assert device.journal["last"]["phase"] == "committed"


def test_what_was_unpacked_before_a_kill_is_erased_after_it(device: Device, tmp_path: Path) -> None:
    device.install(made(tmp_path, 1))
    install_killed(device, made(tmp_path, 2), WHILE_UNPACKING)
    assert device.slot("b").exists()
    device.recover()
    assert not device.slot("b").exists()
    assert active(device) == 1
    assert device.journal["state"] == "idle"


def test_a_bundle_that_was_rolled_back_is_not_tried_again(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(digest: str) -> dict[str, Any]:
        raise Failed("serving", "The server does not serve it.")

    device.install(made(tmp_path, 1))
    monkeypatch.setattr(device, "_probe", probe)
    with pytest.raises(Failed):
        device.install(made(tmp_path, 2))
    monkeypatch.undo()
    with pytest.raises(Refused) as caught:
        device.install(made(tmp_path, 2))
    assert caught.value.code == "refused before"
    assert device.install(made(tmp_path, 2), again=True)["phase"] == "committed"


def test_starts_that_are_far_apart_are_no_crashes(device: Device, tmp_path: Path) -> None:
    for seq in (1, 2):
        device.install(made(tmp_path, seq))
    for _ in range(6):
        assert device.crashed() is False
        starts = json.loads((device.root / "starts.json").read_text())
        aged = [[slot, at - devices.CRASH_SECONDS] for slot, at in starts]
        durable.write_json(device.root / "starts.json", aged)
    assert active(device) == 2


def test_two_commands_change_a_device_one_after_the_other(device: Device, tmp_path: Path) -> None:
    device.install(made(tmp_path, 1))
    with device.locked():
        command = cuts.agent(device.root, "recover")
        other = subprocess.Popen(command, env=cuts.environment(), stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1)
    assert other.wait(timeout=20) == 0


def test_reports_do_not_fill_the_disk(device: Device, tmp_path: Path) -> None:
    (device.root / "reports").mkdir()
    for number in range(devices.MAX_REPORTS):
        (device.root / "reports" / f"{number:020d}-x.json").write_bytes(b"{}")
    assert device.install(made(tmp_path, 1))["phase"] == "committed"
    assert len(device.reports()) == devices.MAX_REPORTS


# --- durable ---


def test_at_every_moment_a_name_stands_for_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, file = tmp_path / "current", tmp_path / "floor.json"
    durable.point(link, "slots/a")
    durable.write(file, b"old")
    seen: list[tuple[str, str, bytes | None]] = []

    def watched(name: str) -> Any:
        call = getattr(os, name)

        def after(*arguments: Any, **more: Any) -> Any:
            done = call(*arguments, **more)
            seen.append((name, str(link.readlink()) if link.is_symlink() else "", file.read_bytes()))
            return done

        return after

    for name in ("open", "fsync", "replace", "rename", "unlink", "symlink"):
        monkeypatch.setattr(os, name, watched(name))
    durable.point(link, "slots/b")
    durable.write(file, b"new")
    monkeypatch.undo()
    assert {target for _, target, _ in seen} == {"slots/a", "slots/b"}
    assert {content for _, _, content in seen} == {b"old", b"new"}
    assert seen[-1][1:] == ("slots/b", b"new")


WORST = "noauto_da_alloc,data=writeback,commit=300"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[cuts.Disk, Path]]:
    """A file system on which nothing lasts but what was flushed."""
    reason = cuts.can_mount(tmp_path)
    if reason:
        pytest.skip(reason)
    found = cuts.Disk(tmp_path / "disk.img", WORST)
    found.make()
    with found.mounted(tmp_path / "disk") as place:
        yield found, place


def after_a_cut(disk: cuts.Disk, folder: Path, look: Any) -> Any:
    with disk.as_cut(folder / "cut.img").mounted(folder / "after") as place:
        return look(place)


def test_what_was_written_pointed_or_erased_outlives_a_power_cut(disk: tuple[cuts.Disk, Path], tmp_path: Path) -> None:
    image, place = disk
    (place / "slot").mkdir()
    durable.write(place / "file", b"old")
    durable.point(place / "link", "old")
    durable.write(place / "file", b"new")
    assert after_a_cut(image, tmp_path, lambda at: (at / "file").read_bytes()) == b"new"
    durable.point(place / "link", "new")
    assert after_a_cut(image, tmp_path, lambda at: (at / "link").readlink()) == Path("new")
    durable.erase(place / "slot")
    assert after_a_cut(image, tmp_path, lambda at: sorted(path.name for path in at.iterdir())) == [
        *("file", "link", "lost+found"),
    ]


def test_an_unpacked_slot_outlives_a_power_cut(disk: tuple[cuts.Disk, Path], tmp_path: Path) -> None:
    image, place = disk
    (place / "slots").mkdir()
    bundle = package.read(made(tmp_path, 1, made_up.members(1, 200_000)), ONE)
    package.unpack(bundle, place / "slots" / "a")
    after_a_cut(image, tmp_path, lambda at: package.verify(at / "slots" / "a", bundle.statement))


# --- pull ---


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    (tmp_path / "repository").mkdir()
    with served(tmp_path / "repository") as (address, web):
        yield Fleet(tmp_path, address, web)


def test_a_part_of_another_file_is_not_gone_on_with(fleet: Fleet) -> None:
    """The server had another file under that name when the first part came; its entity tag says so."""
    bundle = fleet.order(1, padding=300_000)
    wrong, asked = bundle.read_bytes()[::-1], []

    def mutate(path: str, data: bytes) -> bytes:
        if path.endswith("edgepkg"):
            asked.append(path)
            return wrong if len(asked) == 1 else data
        return data

    fleet.web.mutate = staticmethod(mutate)
    fleet.web.cuts += [100_000]
    assert pull.poll(fleet.device)["phase"] == "committed"
    assert [start for path, start, _ in fleet.web.sent if path.endswith("edgepkg")] == [0, 0]


def test_another_signed_bundle_than_the_one_ordered_is_refused(fleet: Fleet) -> None:
    """The web server alone cannot choose what a device runs, even among what its makers have signed."""
    fleet.order(1)
    other = made_up.write(fleet.folder / "other.edgepkg", made_up.members(5), seq=1).read_bytes()
    assert len(other) == (fleet.folder / "digits-1.edgepkg").stat().st_size
    fleet.web.mutate = staticmethod(lambda path, data: other if path.endswith("edgepkg") else data)
    with pytest.raises(Refused) as caught:
        pull.poll(fleet.device)
    assert caught.value.code == "digest"
    assert fleet.active() is None


def test_a_range_that_was_not_asked_for_is_not_taken(fleet: Fleet) -> None:
    bundle = fleet.order(1, padding=300_000)
    fleet.web.cuts += [100_000]
    answer, lies = fleet.web.send_header, [f"bytes 5-{bundle.stat().st_size - 1}/{bundle.stat().st_size}"]

    def send_header(self: Any, name: str, value: str) -> None:
        answer(self, name, lies.pop() if name == "content-range" and lies else value)

    fleet.web.send_header = send_header  # type: ignore[method-assign]
    assert pull.poll(fleet.device)["phase"] == "committed"
    starts = [start for path, start, _ in fleet.web.sent if path.endswith("edgepkg")]
    assert starts[:3] == [0, 100_000, 100_000]  # the answer with the wrong range was not written


def test_a_report_is_proved_with_the_secret_of_its_device(fleet: Fleet) -> None:
    got: list[tuple[bytes, str]] = []

    class Takes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((body, self.headers["x-stillhouse-proof"]))
            self.send_response(200)
            self.send_header("content-length", "13")
            self.end_headers()
            self.wfile.write(b'{"new": true}')

        def log_message(self, format: str, *args: object) -> None: ...

    fleet.order(1)
    pull.poll(fleet.device)
    with ThreadingHTTPServer(("127.0.0.1", 0), Takes) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        fleet.device.config |= {"report_to": f"http://127.0.0.1:{server.server_port}/", "secret": "s"}
        assert pull.deliver(fleet.device) == 1
        server.shutdown()
    assert [proof for _, proof in got] == [hmac.new(b"s", body, hashlib.sha256).hexdigest() for body, _ in got]


# --- the server's side ---


def test_an_order_for_a_bundle_that_is_not_published_is_refused(fleet: Fleet) -> None:
    with pytest.raises(DeviceError, match=r"expected it to be published"):
        fleet.repository.publish(orders={"lab-1": Order(bundle="absent.edgepkg", name="digits", seq=1)})
    assert fleet.repository.orders == {}
    assert pull.poll(fleet.device)["phase"] == "nothing"


def test_a_repository_is_not_made_over_another_one(fleet: Fleet) -> None:
    fleet.order(1)
    with pytest.raises(DeviceError, match="has a repository already"):
        Repository.new(fleet.folder / "repository", fleet.keys)
    assert set(fleet.repository.orders) == {"lab-1"}


def test_stopping_takes_back_the_orders_that_nobody_has_followed(fleet: Fleet) -> None:
    registry = Registry(f"sqlite:///{fleet.folder / 'devices.db'}")
    try:
        registry.add(DeviceEntry(id="lab-1", transport="pull"))
        bundle = made(fleet.folder, 1)
        rollout = registry.start(model="digits", seq=1, bundle=str(bundle), policy=RolloutPolicy())
        courier = PullCourier(fleet.repository)
        registry.mark(rollout.id, ["lab-1"], "ordered")
        courier.order(rollout, [registry.device("lab-1")])
        stop(registry, rollout, courier, "not today")
        assert fleet.repository.orders == {}
        assert pull.poll(fleet.device)["phase"] == "nothing"
        assert [each.outcome for each in registry.placements(rollout.id)] == ["withdrawn"]
    finally:
        registry.close()


def test_a_push_needs_an_address_and_the_key_of_the_host(tmp_path: Path) -> None:
    for entry in (
        DeviceEntry(id="lab-1", transport="pull", address="127.0.0.1:9", user="u", host_key="ssh-ed25519 AAAA"),
        DeviceEntry(id="lab-1", transport="ssh", address="127.0.0.1", user="u", host_key="ssh-ed25519 AAAA"),
        DeviceEntry(id="lab-1", transport="ssh", address="127.0.0.1:9", user="u"),
    ):
        started = time.monotonic()
        with pytest.raises(DeviceError, match="Enter it anew"):
            asyncio.run(push.push(entry, made(tmp_path, 1), []))
        assert time.monotonic() - started < 2
