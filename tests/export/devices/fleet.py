"""Devices as agent programs that pull from a real server and report to it, and a controller that can be killed."""

# pyright: reportPrivateImportUsage=false

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

from securesystemslib.signer import CryptoSigner

from export.devices import registry as registries
from export.devices import repository as repositories
from export.devices.agent import durable, pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused
from export.devices.controller import carry_out
from export.devices.couriers import PullCourier
from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry, Registry
from export.devices.repository import Repository
from export.devices.rollout import RolloutPolicy
from export.devices.server import device_app
from tests.export.devices import cuts
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.faulty_proxy import running

LEASE_SECONDS = 1.0
"""Of controllers that are killed: nobody waits for a minute."""
Bad = Literal["wrong answers", "crashes after the swap"]
CRASH = """
from export.devices.agent import selftest
whole = selftest.try_out
def try_out(slot, threads=0):
    if slot.name == "current":  # in place, the file is no longer what was tested
        selftest.chosen(slot)[1].write_bytes(b"no model")
    return whole(slot, threads)
selftest.try_out = try_out
"""
"""Breaks an agent so that what it installs passes the first test and crashes in the second."""


def signers() -> dict[str, list[CryptoSigner]]:
    """The repository's keys, the same in every process."""
    return {role: [CryptoSigner(made_up.key(100 + place))] for place, role in enumerate(repositories.EXPIRY)}


def registry_of(folder: Path) -> Registry:
    return Registry(f"sqlite:///{folder / 'devices.db'}")


class Fleet:
    """A repository, a registry, and devices, each a folder of its own; all have ``digits 1`` when ``based``."""

    def __init__(self, folder: Path, address: str, count: int, *, based: bool = False) -> None:
        self.folder = folder
        self.registry = registry_of(folder)
        self.controllers: list[ForkServerProcess] = []
        self.roots = {f"lab-{number}": folder / f"lab-{number}" for number in range(count)}
        base = folder / "base"
        (base / "slots").mkdir(parents=True)
        durable.write_json(base / "trust.json", made_up.trust())
        durable.write(base / "root.json", (folder / "repository" / "metadata" / "1.root.json").read_bytes())
        if based:
            Device(base).install(self.bundle(1))
            shutil.rmtree(base / "reports")
        for name, root in self.roots.items():
            shutil.copytree(base, root, symlinks=True)
            settings = {"device": name, "repository": address, "report_to": f"{address}/reports", "secret": name * 4}
            durable.write_json(root / "config.json", {**settings, "threads": 1})
            self.registry.add(DeviceEntry(id=name, transport="pull", secret=name * 4))

    def bundle(self, seq: int, bad: Bad | None = None) -> Path:
        files = made_up.members(seq)
        if bad == "wrong answers":
            files["golden.npz"] = made_up.members(99)["golden.npz"]
        return made_up.write(self.folder / f"digits-{seq}.edgepkg", files, seq=seq)

    def start(self, seq: int, bad: Bad | None = None, **policy: Any) -> str:
        bundle = str(self.bundle(seq, bad))
        return self.registry.start(model="digits", seq=seq, bundle=bundle, policy=RolloutPolicy(**policy)).id

    def poll(self, name: str, code: str = "") -> str:
        """One poll of a device, as its timer starts it; what came of it, which its journal keeps."""
        root = self.roots[name]
        command = cuts.agent(root, "poll", code=f"exec({code!r})" if code else "")
        done = subprocess.run(command, env=cuts.environment(), capture_output=True, text=True, check=False, timeout=120)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            raise AssertionError(f"{name} has said nothing: {done.stdout}{done.stderr}") from None
        return self._write_down(root, found)

    def poll_here(self, name: str) -> str:
        """The same in this process, which saves a second of imports."""
        device = Device(self.roots[name])
        try:
            found = pull.poll(device)
        except (Failed, Refused) as error:
            found = {"phase": "refused" if isinstance(error, Refused) else "rolled back", "text": str(error)}
        pull.deliver(device)
        return self._write_down(device.root, found)

    def _write_down(self, root: Path, found: dict[str, Any]) -> str:
        if found["phase"] != "nothing":
            with (root / "journal").open("a") as file:
                file.write(json.dumps(found) + "\n")
        return found["phase"]

    def journal(self, name: str) -> list[dict[str, Any]]:
        """What came of each poll of a device."""
        path = self.roots[name] / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def controller(self, rollout: str, holder: str, kill_at: int | None = None) -> ForkServerProcess:
        """Start one; it ends with 0, ``KEPT_OUT``, or by its own SIGKILL at the ``kill_at``-th point."""
        process = processes.Process(target=control, args=(self.folder, rollout, holder, kill_at))
        process.start()
        self.controllers.append(process)
        return process

    def close(self) -> None:
        """Nobody works on it after a test, failed or not."""
        for process in self.controllers:
            process.kill()
            process.join()
        self.registry.close()

    def installs(self, seq: int) -> dict[str, int]:
        """How often each device has installed a number, by its own journal."""
        return {
            name: sum(each["phase"] == "committed" and each["seq"] == seq for each in self.journal(name))
            for name in self.roots
        }

    def active(self) -> dict[str, int | None]:
        statements = {name: (device := Device(root)).statement(device.active) for name, root in self.roots.items()}
        return {name: each["seq"] if each else None for name, each in statements.items()}

    def outcomes(self, rollout: str) -> dict[str, str]:
        return {each.device: each.outcome for each in self.registry.placements(rollout)}

    def ordered(self, rollout: str) -> list[str]:
        return [name for name, outcome in self.outcomes(rollout).items() if outcome == "ordered"]

    def touched(self, seq: int) -> set[str]:
        """Devices that have ever tried a number: it came to their journal, or to what they refuse."""
        found = {name for name, times in self.installs(seq).items() if times}
        for name, root in self.roots.items():
            last = Device(root).journal.get("last") or {}
            if last.get("seq") == seq:
                found.add(name)
        return found


@contextmanager
def fleet_of(folder: Path, count: int, *, based: bool = False) -> Iterator[Fleet]:
    """Devices whose repository and reports are served on loopback while the block runs."""
    repository = Repository.new(folder / "repository", signers())
    registry = registry_of(folder)
    with running(device_app(repository.folder, registry)) as (host, port):
        found = Fleet(folder, f"http://{host}:{port}", count, based=based)
        try:
            yield found
        finally:
            found.close()
    registry.close()


def roll_out_to_fleet(folder: Path, devices: int = 20, bad: Bad | None = None) -> dict[str, Any]:
    """A bundle to devices that have another one, in rings of 1 device, 15 %, 50 % and 100 %.

    Returns:
        ``state`` and ``reason`` of the rollout; ``rings``: devices ordered after each; ``reached``: devices that have
        tried the bundle, ``remaining``: that run it at the end; ``twice``: that have installed it more than once;
        ``outcomes`` by device; ``polls`` and ``seconds``.
    """
    started, polls = time.monotonic(), 0
    with fleet_of(folder, devices, based=True) as fleet, ThreadPoolExecutor(os.cpu_count()) as pool:
        rollout = fleet.start(2, bad, concurrency=devices)
        code = CRASH if bad == "crashes after the swap" else ""

        def poll(names: list[str]) -> None:
            nonlocal polls
            polls += len(names)
            list(pool.map(lambda name: fleet.poll(name, code), names))

        courier = PullCourier(Repository(folder / "repository", signers()))
        done = carry_out(
            fleet.registry, rollout, courier, holder="one", sleep=lambda _: poll(fleet.ordered(rollout)), poll_s=0
        )
        if bad:  # nobody finds an order that was left behind
            poll(list(fleet.roots))
        rings = [each.ring for each in fleet.registry.placements(rollout)]
        return {
            **{"devices": devices, "bad": bad or "", "state": done.state, "reason": done.reason},
            "rings": [sum(ring <= last for ring in rings) for last in sorted(set(rings))],
            "reached": len(fleet.touched(2)),
            "remaining": sum(seq == 2 for seq in fleet.active().values()),
            "working": sum(seq is not None for seq in fleet.active().values()),
            "twice": sum(times > 1 for times in fleet.installs(2).values()),
            "outcomes": fleet.outcomes(rollout),
            **{"polls": polls, "seconds": time.monotonic() - started},
        }


# --- a controller as a process of its own ---

KEPT_OUT = 3
"""Exit code of a controller that finds another one at work."""
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


class KillPoints:
    """Counts the points that the controller passes, and ends it at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.passed = kill_at, 0

    def point(self) -> None:
        if self.passed == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def around(self, call: Callable[..., Any], where: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            if not where(*arguments):
                return call(*arguments, **more)
            self.point()
            found = call(*arguments, **more)
            self.point()
            return found

        return counted


def control(folder: Path, rollout: str, holder: str, kill_at: int | None) -> None:
    """A point is before and after each thing that is written down or done; each file of metadata is one."""
    points = KillPoints(kill_at)
    registries.LEASE = timedelta(seconds=LEASE_SECONDS)
    registry, repository = registry_of(folder), Repository(folder / "repository", signers())
    courier = PullCourier(repository)
    registry.mark = points.around(registry.mark, where=lambda _rollout, devices, *_: bool(devices))
    registry.set_state = points.around(registry.set_state)
    courier.order, courier.withdraw = points.around(courier.order), points.around(courier.withdraw)
    repository._store = points.around(repository._store)
    try:
        carry_out(registry, rollout, courier, holder=holder, poll_s=0.05)
    except DeviceError as error:
        (folder / f"{holder}.error").write_text(str(error))
        sys.exit(KEPT_OUT)


class Polling(threading.Thread):
    """Timers of devices in this process: all poll, again and again, until it is ended; ``only`` some of them."""

    def __init__(self, fleet: Fleet, only: Callable[[], list[str]]) -> None:
        super().__init__(daemon=True)
        self.fleet, self.only, self.stop = fleet, only, threading.Event()
        self.wrong: list[BaseException] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                for name in self.only():
                    self.fleet.poll_here(name)
            except Exception as error:
                self.wrong.append(error)
                return
            self.stop.wait(0.03)

    def __enter__(self) -> "Polling":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join(timeout=60)
        assert self.wrong == []
