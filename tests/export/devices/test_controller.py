"""Rollouts carried out to real agents: rings, a bad bundle stopped at the canary, a controller killed and followed."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from export.devices.agent import durable, pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused
from export.devices.controller import carry_out, stop, summary
from export.devices.couriers import PullCourier
from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry, Registry, Rollout
from export.devices.rollout import Placement, RolloutPolicy
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_pull import Fleet, served


class Killed(BaseException):
    """What a SIGKILL is to a controller in this process."""


class Lab:
    """A repository on a real HTTP server, a registry, and devices that poll in threads."""

    def __init__(self, folder: Path, address: str, web: Any, count: int) -> None:
        self.folder = folder
        self.fleet = Fleet(folder, address, web)
        self.registry = Registry(f"sqlite:///{folder / 'devices.db'}")
        self.devices: dict[str, Device] = {}
        self.installs: list[tuple[str, int]] = []
        first_root = (folder / "repository" / "metadata" / "1.root.json").read_bytes()
        for number in range(count):
            name = f"lab-{number}"
            root = folder / name
            (root / "slots").mkdir(parents=True)
            durable.write_json(root / "config.json", {"device": name, "repository": address})
            durable.write_json(root / "trust.json", made_up.trust())
            durable.write(root / "root.json", first_root)
            self.devices[name] = Device(root)
            self.registry.add(DeviceEntry(id=name, transport="pull"))

    def poll(self, name: str) -> None:
        """One poll of a device; its reports go straight into the registry."""
        device = self.devices[name]
        try:
            found = pull.poll(device)
            if found["phase"] == "committed":
                self.installs.append((name, found["seq"]))
        except (Refused, Failed):
            pass
        device.send(lambda report: self.registry.receive(report))

    def bundle(self, seq: int, *, bad: bool = False) -> Path:
        files = made_up.members(seq) | ({"golden.npz": made_up.members(99)["golden.npz"]} if bad else {})
        return made_up.write(self.folder / f"digits-{seq}.edgepkg", files, seq=seq)

    def active(self) -> dict[str, int | None]:
        found = {name: device.status()["active"] for name, device in self.devices.items()}
        return {name: each["seq"] if each else None for name, each in found.items()}

    def roll_out(self, seq: int, *, bad: bool = False, **policy: Any) -> Rollout:
        made = self.registry.start(
            model="digits", seq=seq, bundle=str(self.bundle(seq, bad=bad)), policy=RolloutPolicy(**policy)
        )
        return self.carry_out(made.id)

    def carry_out(self, rollout: str, holder: str = "one", **more: Any) -> Rollout:
        """With every device polling each time the controller sleeps."""

        def sleep(_seconds: float) -> None:
            for name in self.devices:
                self.poll(name)

        courier = PullCourier(self.fleet.repository)
        return carry_out(self.registry, rollout, courier, holder=holder, sleep=sleep, **more)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    (tmp_path / "repository").mkdir()
    with served(tmp_path / "repository") as (address, web):
        found = Lab(tmp_path, address, web, 4)
        yield found
        found.registry.close()


def test_a_good_bundle_reaches_every_device_ring_by_ring(lab: Lab) -> None:
    seen: list[dict[str, str]] = []

    def watch(_rollout: Rollout, placements: Sequence[Placement], _decision: Any) -> None:
        seen.append({each.device: each.outcome for each in placements})

    made = lab.registry.start(model="digits", seq=1, bundle=str(lab.bundle(1)), policy=RolloutPolicy())
    done = lab.carry_out(made.id, on_change=watch)
    assert done.state == "done"
    assert set(lab.active().values()) == {1}
    assert [list(each.values()).count("ordered") for each in seen][:1] == [1]
    assert max(list(each.values()).count("ordered") for each in seen) <= 2
    assert "4 of 4 devices have digits 1" in summary(done, lab.registry.placements(done.id))


def test_a_bad_bundle_stops_at_the_canary_which_goes_back(lab: Lab) -> None:
    lab.roll_out(1)
    done = lab.roll_out(2, bad=True)
    assert done.state == "aborted"
    assert "1 of 1 devices failed" in done.reason
    assert set(lab.active().values()) == {1}
    outcomes = sorted(each.outcome for each in lab.registry.placements(done.id))
    assert outcomes == ["refused", "withdrawn", "withdrawn", "withdrawn"]
    for name in lab.devices:  # the orders are taken back
        lab.poll(name)
    assert set(lab.active().values()) == {1}
    assert lab.roll_out(3).state == "done"


class Falters(PullCourier):
    """Dies at some point of an order or of collecting."""

    def __init__(self, repository: Any, point: int) -> None:
        super().__init__(repository)
        self.left = point

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def order(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        self._count()
        super().order(rollout, devices)
        self._count()

    def collect(self) -> None:
        self._count()


@pytest.mark.parametrize("point", range(1, 9))
def test_a_controller_that_dies_anywhere_is_followed_by_another_and_nobody_installs_twice(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    made = lab.registry.start(model="digits", seq=1, bundle=str(lab.bundle(1)), policy=RolloutPolicy())

    def sleep(_seconds: float) -> None:
        for name in lab.devices:
            lab.poll(name)

    with monkeypatch.context() as dead, pytest.raises(Killed):
        dead.setattr(lab.registry, "let_go", lambda *_: None)  # a dead one gives nothing back
        courier = Falters(lab.fleet.repository, point)
        carry_out(lab.registry, made.id, courier, holder="dead", sleep=sleep)
    with pytest.raises(DeviceError, match="carried out by 'dead'"):
        lab.carry_out(made.id, "two")
    lab.registry.let_go(made.id, "dead")  # as a minute later
    assert lab.carry_out(made.id, "two").state == "done"
    assert sorted(lab.installs) == [(name, 1) for name in sorted(lab.devices)]


def test_two_controllers_never_work_at_once(lab: Lab) -> None:
    made = lab.registry.start(model="digits", seq=1, bundle=str(lab.bundle(1)), policy=RolloutPolicy())
    outcomes: list[str] = []

    def control(name: str) -> None:
        try:
            outcomes.append(carry_out(lab.registry, made.id, PullCourier(lab.fleet.repository), holder=name).state)
        except DeviceError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=control, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for name in lab.devices:
            lab.poll(name)
        time.sleep(0.1)
    assert outcomes.count("done") == 1
    assert sum("expected no other controller" in each for each in outcomes) == 2


def test_a_paused_rollout_waits_and_a_stopped_one_ends(lab: Lab) -> None:
    made = lab.registry.start(model="digits", seq=1, bundle=str(lab.bundle(1)), policy=RolloutPolicy())
    lab.registry.set_state(made.id, "paused")
    assert lab.carry_out(made.id).state == "paused"
    assert set(lab.active().values()) == {None}
    lab.registry.set_state(made.id, "running")
    stop(lab.registry, made, PullCourier(lab.fleet.repository), "not today")
    assert lab.carry_out(made.id).state == "aborted"
    assert set(lab.active().values()) == {None}
