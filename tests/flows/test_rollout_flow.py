"""Rollouts with everything real: Prefect server and worker, device server, agents from their kits, kills and forms."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from export.devices.agent import durable
from flows import fleet
from flows.demo_devices import LocalDevice
from flows.devices import add_device, opened
from flows.ports import any_port
from tests.flows.fleet_folder import FleetFolder, fleet_folder
from tests.flows.running_up import ROOT, RunningUp, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.timeout(900)]

DEPLOYMENTS = """
name: test
deployments:
  - name: rollout
    entrypoint: flows/rollout.py:rollout
    tags: [stillhouse]
    work_pool: {name: stillhouse}
"""
NAMES = ("gate-1", "gate-2", "gate-3")
POLICY = {"canary": 1, "shares": [0.6, 1.0], "concurrency": 1}


class World:
    """A running `stillhouse up`, and three devices that pull from its device server."""

    def __init__(self, folder: FleetFolder, up: RunningUp, devices: dict[str, LocalDevice]) -> None:
        self.folder, self.up, self.devices = folder, up, devices
        self._seq = 0

    def bundle(self, *, bad: bool = False) -> tuple[int, str]:
        self._seq += 1
        return self._seq, str(self.folder.bundle(self._seq, bad=bad))

    def start(self, bundle: str, **policy: Any) -> str:
        return self.up.start("rollout", bundle=bundle, policy={**POLICY, **policy})

    def ended(self, run: str, name: str) -> dict[str, Any]:
        found = self.up.reaches(run, "COMPLETED", "FAILED", "CANCELLED", seconds=240)
        assert found["state"]["name"] == name, found["state"]["message"]
        return found

    def outcomes(self, run: str) -> dict[str, str]:
        with opened() as registry:
            return {each.device: each.outcome for each in registry.placements(run.replace("-", ""))}

    def until(self, run: str, ready: Callable[[dict[str, str]], bool], what: str) -> None:
        def is_ready() -> bool:
            with opened() as registry:
                known = {each.id for each in registry.rollouts()}
            return run.replace("-", "") in known and ready(self.outcomes(run))

        wait_for(is_ready, 120, what)

    def active(self) -> dict[str, int]:
        return {
            name: durable.read_json(device.root / "current" / "statement.json", {"seq": 0})["seq"]
            for name, device in self.devices.items()
        }

    def installs(self, seq: int) -> dict[str, int]:
        """How often each device committed that number, by what it reported."""
        with opened() as registry:
            found = {name: registry.reports(name) for name in self.devices}
        return {
            name: sum(each["seq"] == seq and each["phase"] == "committed" for each in reports)
            for name, reports in found.items()
        }

    def silence(self, *names: str) -> None:
        """The polls of these devices stop; they are not dead."""
        for name in names:
            os.killpg(self.devices[name].processes[0].process.pid, signal.SIGSTOP)

    def wake(self, *names: str) -> None:
        for name in names:
            os.killpg(self.devices[name].processes[0].process.pid, signal.SIGCONT)

    def flow_processes(self, run: str) -> list[int]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"PREFECT__FLOW_RUN_ID={run}".encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("rollouts")
    (root / "prefect.yaml").write_text(DEPLOYMENTS)
    address = f"127.0.0.1:{any_port()}"
    with fleet_folder(root, STILLHOUSE_DEVICE_ADDRESS=address) as folder:
        devices = {name: LocalDevice(name, root / name) for name in NAMES}
        up = RunningUp(root, source=ROOT, deployments=root / "prefect.yaml")
        try:
            for name, device in devices.items():
                kit = root / f"{name}.tar.gz"
                place = {"ssh": None, "user": "", "host_key": "", "server": "", "first": name == NAMES[0]}
                device.folder.mkdir()
                device.install(add_device(name, kit=kit, **place))
                device.start("poll", "--every", "0.5")
            yield World(folder, up, devices)
        finally:
            for device in devices.values():
                device.end()
            up.end()


def test_a_bundle_goes_ring_by_ring_and_everybody_can_see_it(world: World) -> None:
    seq, bundle = world.bundle()
    run = world.start(bundle)
    found = world.ended(run, "RolledOut")
    assert f"3 of 3 devices have digits {seq}" in found["state"]["message"]
    assert set(world.active().values()) == {seq}
    rows = json.loads(world.up.artifact("rollout-digits")["data"])
    assert rows[0]["device"] == "gate-1"
    assert {(row["outcome"], row["runs"]) for row in rows} == {("committed", f"digits {seq}")}
    assert all(row["p50"].endswith(" ms") and not row["why"] for row in rows)
    assert world.up.artifact("rollout-progress-digits")["data"] == 100.0
    with opened() as registry:
        assert {device.active["seq"] for device in registry.devices()} == {seq}
        rings = {each.device: each.ring for each in registry.placements(run.replace("-", ""))}
    assert rings["gate-1"] == 0
    assert sorted(rings.values()) == [0, 1, 2]


def test_a_bad_bundle_stops_at_the_canary(world: World) -> None:
    before = world.active()
    _, bundle = world.bundle(bad=True)
    run = world.start(bundle)
    found = world.ended(run, "Aborted")
    assert "1 of 1 devices failed" in found["state"]["message"]
    assert world.outcomes(run) == {"gate-1": "refused", "gate-2": "withdrawn", "gate-3": "withdrawn"}
    assert world.active() == before
    assert {name: order.seq for name, order in fleet.open_repository(()).orders.items()} == before


def test_a_person_is_asked_after_the_canary_and_a_no_aborts(world: World) -> None:
    for go_on, name, has in ((True, "RolledOut", 3), (False, "Aborted", 1)):
        seq, bundle = world.bundle()
        run = world.start(bundle, approve="canary")
        world.up.reaches(run, "PAUSED", seconds=120)
        assert sorted(world.outcomes(run).values()) == ["committed", "waiting", "waiting"]
        wait_for(lambda run=run: not world.flow_processes(run), 60, "the end of the waiting run's process")
        world.up.api(f"/flow_runs/{run}/resume", {"run_input": {"go_on": go_on, "reason": "seen", "by": "somebody"}})
        world.ended(run, name)
        assert list(world.active().values()).count(seq) == has


def test_a_killed_run_is_started_again_and_nobody_installs_twice(world: World) -> None:
    seq, bundle = world.bundle()
    world.silence("gate-2", "gate-3")
    run = world.start(bundle, concurrency=3)
    try:
        world.until(run, lambda now: list(now.values()).count("ordered") == 1, "an order for a silent device")
        for pid in world.flow_processes(run):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "AwaitingRetry" in world.up.states(run), 90, "a second start")
    finally:
        world.wake("gate-2", "gate-3")
    world.ended(run, "RolledOut")
    assert world.installs(seq) == dict.fromkeys(NAMES, 1)


def test_a_cancelled_run_takes_its_orders_back(world: World) -> None:
    before = world.active()
    _, bundle = world.bundle()
    world.silence(*NAMES)
    run = world.start(bundle)
    try:
        world.until(run, lambda now: "ordered" in now.values(), "an order")
        world.up.cancel(run)
        world.up.reaches(run, "CANCELLED", seconds=60)
        wait_for(lambda: set(world.outcomes(run).values()) == {"withdrawn"}, 60, "the orders being taken back")
        with opened() as registry:
            assert registry.rollout(run.replace("-", "")).state == "aborted"
    finally:
        world.wake(*NAMES)
    time.sleep(3)
    assert world.active() == before


def test_what_devices_would_refuse_is_refused_before_any_is_asked(world: World) -> None:
    _, bundle = world.bundle()
    world.ended(world.start(bundle), "RolledOut")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bundle": bundle}, "expected more than"),
        ({"bundle": "/nowhere.edgepkg"}, "has no file"),
        ({}, "has no source"),
        ({"bundle": bundle, "model": "shapes"}, "has model 'digits', expected 'shapes'"),
        ({"bundle": world.bundle()[1], "devices": ["gate-9"]}, "gate-9"),
        ({"model": "digits"}, "has no champion"),
    )
    runs = [world.up.start("rollout", **parameters) for parameters, _ in cases]
    for run, (_, words) in zip(runs, cases, strict=True):
        assert words in world.ended(run, "Failed")["state"]["message"]


def test_the_commands_start_pause_and_bring_the_whole_fleet_back(world: World) -> None:
    def stillhouse(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "flows.cli", *words]
        done = subprocess.run(command, cwd=ROOT, env=world.up.environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def content() -> dict[str, Any]:
        found = {}
        for name, device in world.devices.items():
            statement = durable.read_json(device.root / "current" / "statement.json", {})
            found[name] = [each["sha256"] for each in statement["files"]]
        return found

    (seq, good), (_, newer) = world.bundle(), world.bundle()
    code, said = stillhouse("rollout", "start", good, "--set", "shares=[1.0]")
    assert (code, f"3 of 3 devices have digits {seq}" in said) == (0, True), said
    before = content()
    code, said = stillhouse("rollout", "start", newer, "--set", "approve=canary")
    assert (code, "waits for approval" in said) == (4, True), said
    paused = said.split("rollout resume ")[-1].split()[0]
    assert stillhouse("rollout", "resume", paused)[0] == 0
    assert content() != before
    code, said = stillhouse("rollout", "back", "digits", "--reason", "misreads the new labels")
    assert (code, f"holds what digits-{seq}.edgepkg holds" in said) == (0, True), said
    assert content() == before
    world._seq = max(world.active().values())
    code, said = stillhouse("rollout", "start", world.bundle(bad=True)[1])
    assert (code, "1 of 1 devices failed" in said) == (1, True), said
    assert content() == before
    assert f"runs digits {world._seq - 1}" in stillhouse("devices", "status", "gate-2")[1]


def test_a_new_champion_starts_a_rollout_once_that_is_switched_on(world: World) -> None:
    automations = world.up.api("/automations/filter", {})
    (found,) = [each for each in automations if each["name"] == "stillhouse: a new champion goes to the devices"]
    assert found["enabled"] is False
    world.up.api(f"/automations/{found['id']}", {"enabled": True}, method="PATCH")

    def started() -> list[dict[str, Any]]:
        event = {
            **{"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": "stillhouse.model.promoted"},
            "resource": {"prefect.resource.id": "stillhouse.model.gauges"},
            "payload": {"version": 3, "reason": "r", "by": "b"},
        }
        world.up.api("/events", [event])  # again and again: it takes a moment until the switch counts
        time.sleep(2)
        runs = world.up.runs("SCHEDULED", "PENDING", "RUNNING", "FAILED", "COMPLETED", deployment="rollout")
        return [run for run in runs if run["parameters"].get("model") == "gauges"]

    run, *_ = wait_for(started, 60, "a rollout of the new champion")
    assert "Model 'gauges' has no champion" in world.ended(run["id"], "Failed")["state"]["message"]


def test_the_device_server_of_up_serves_the_repository(world: World) -> None:
    address = world.up.state["devices_url"]
    with urllib.request.urlopen(f"{address}/metadata/1.root.json") as response:
        assert response.headers["etag"]
    assert "Device server" in world.up.children()
