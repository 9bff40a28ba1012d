"""Devices in network namespaces of their own on one bridge, and links between them that can be cut."""

# pyright: reportPrivateImportUsage=false

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from operator import ne
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner

from export.devices import repository as repositories
from export.devices.agent import durable
from export.devices.agent.device import Device
from export.devices.registry import DeviceEntry, Registry
from export.devices.repository import Order, Repository
from export.devices.server import device_app
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.cuts import ROOT, agent, environment
from tests.export.devices.faulty_proxy import FaultyProxy, running

OFF_SECONDS, ON_SECONDS = 2.0, 1.0
HASTE = "from export.devices.agent import pull; pull.STALL_SECONDS, pull.PAUSES = 1.0, (0.1, 0.2, 0.5)"
"""Time runs faster here; as it is an agent would sit out a link that is away for two seconds."""
SLOW, CRAWL, FAST = "8mbit", "1mbit", "100mbit"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def own_name() -> str:
    """With it the names of all that this process makes begin."""
    return f"sh{os.getpid()}"


def can_separate() -> str:
    """Why there can be no namespaces here; empty when there can."""
    missing = [name for name in ("ip", "tc", "bridge") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        return f"needs root and the programs ip, tc and bridge for network namespaces; absent: {missing}"
    try:
        with network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"needs network namespaces, bridges and tbf: {error.stderr}"


@dataclass(frozen=True)
class Network:
    """Device ``n`` is at ``address_of(n)``; the bridge, in the namespace of the test, at ``address``."""

    name: str
    prefix: str

    @property
    def address(self) -> str:
        return f"{self.prefix}.1"

    def address_of(self, number: int) -> str:
        return f"{self.prefix}.{number + 2}"

    def space(self, number: int) -> str:
        return f"{self.name}-{number}"

    def port(self, number: int) -> str:
        """The device's end of the cable at the bridge."""
        return f"{self.name}p{number}"

    def command(self, number: int, *command: str) -> list[str]:
        """A program as the device would run it."""
        return ["ip", "netns", "exec", self.space(number), *command]

    def plug(self, number: int, on: bool) -> None:
        """Pull the cable, or put it in; the device notices at once."""
        _run("ip", "-n", self.space(number), "link", "set", "eth0", "up" if on else "down")

    def pass_on(self, number: int, on: bool) -> None:
        """The bridge drops everything of and for the device, or not; the device notices nothing."""
        _run("bridge", "link", "set", "dev", self.port(number), "state", "3" if on else "0")

    def throttle(self, number: int, rate: str) -> None:
        """How fast the bridge sends to the device."""
        limits = ("rate", rate, "burst", "32kb", "latency", "100ms")
        _run("tc", "qdisc", "replace", "dev", self.port(number), "root", "tbf", *limits)


@contextmanager
def network(devices: int) -> Iterator[Network]:
    """A bridge with so many devices; nothing of it is left afterwards, neither processes."""
    taken = _run("ip", "-4", "-o", "addr")
    numbers = (f"198.18.{(os.getpid() + more) % 256}" for more in itertools.count())
    made = Network(own_name(), next(prefix for prefix in numbers if f"{prefix}." not in taken))
    hub = f"{made.name}b"
    with ExitStack() as undo:
        _run("ip", "link", "add", hub, "type", "bridge")
        undo.callback(_run, "ip", "link", "del", hub)
        _run("ip", "addr", "add", f"{made.address}/24", "dev", hub)
        _run("ip", "link", "set", hub, "up")
        for number in range(devices):
            space, port = made.space(number), made.port(number)
            _run("ip", "netns", "add", space)
            undo.callback(_remove, space)
            _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            undo.callback(_run, "ip", "link", "del", port)
            _run("ip", "link", "set", port, "master", hub, "up")
            _run("ip", "-n", space, "addr", "add", f"{made.address_of(number)}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", name, "up")
            made.throttle(number, FAST)
        yield made


def _remove(space: str) -> None:
    for process in _run("ip", "netns", "pids", space).split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    _run("ip", "netns", "del", space)


def run_cut_links(folder: Path, devices: int = 8, cycles: int = 6, padding: int = 20 << 20) -> dict[str, Any]:
    """Let devices pull a bundle while their links go away and come back again and again; what came of it.

    Every second device loses its link, the others' packets are dropped in silence. ``in_downloads`` counts the cuts
    that fell into a download which had gone on since the cut before; ``sent_twice`` are, for each new connection, the
    bytes that had reached the device and were sent to it again.
    """
    started = time.monotonic()
    numbers = range(devices)
    bundle = _publish(folder, devices, padding)
    roots = [folder / f"device-{number}" for number in numbers]
    agents: list[subprocess.Popen[bytes]] = []
    registry = Registry(f"sqlite:///{folder / 'devices.db'}")
    with ExitStack() as stack:
        stack.callback(registry.close)
        net = stack.enter_context(network(devices))
        server = stack.enter_context(running(device_app(folder / "repository", registry)))
        proxy = stack.enter_context(FaultyProxy(server, host=net.address))
        stack.callback(_end, agents)
        for number, root in enumerate(roots):
            net.throttle(number, CRAWL)  # until all are so far
            secret = f"secret of {number}"
            registry.add(DeviceEntry(id=f"lab-{number}", transport="pull", secret=secret))
            _make_device(root, number, proxy.address, secret)
            command = net.command(number, *agent(root, "poll", code=HASTE))
            with (root / "log").open("wb") as log:
                agents.append(subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log))
        _wait_until(lambda: all(_came(root) for root in roots), roots, agents)
        for number in numbers:
            net.throttle(number, SLOW)
        in_downloads, sizes = 0, [_came(root) for root in roots]
        for _ in range(cycles):
            before = sizes
            time.sleep(ON_SECONDS)
            _wait_until(lambda: all(map(ne, map(_came, roots), before)), roots, agents)  # noqa: B023
            _switch(net, numbers, on=False)
            time.sleep(OFF_SECONDS)
            sizes = [_came(root) for root in roots]
            in_downloads += sum(old < new for old, new in zip(before, sizes, strict=True))
            _switch(net, numbers, on=True)
        for number in numbers:
            net.throttle(number, FAST)
        codes = [each.wait(150) for each in agents]
        reports = {f"lab-{number}": registry.reports(f"lab-{number}") for number in numbers}
    addresses = [net.address_of(number) for number in numbers]
    return {
        "devices": devices,
        "cycles": cycles,
        "bundle_bytes": bundle.stat().st_size,
        "exit_codes": codes,
        "committed": sum((Device(root).statement("a") or {}).get("seq") == 1 for root in roots),
        "in_downloads": in_downloads,
        "connections": [len(proxy.of("edgepkg", each)) for each in addresses],
        "arrived": [sum(one.came for one in proxy.of("edgepkg", each)) for each in addresses],
        "sent_twice": [count for each in addresses for count in proxy.sent_twice("edgepkg", each)],
        "reports": {name: [each["phase"] for each in found] for name, found in reports.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def _publish(folder: Path, devices: int, padding: int) -> Path:
    keys = {role: [CryptoSigner.generate_ed25519()] for role in repositories.EXPIRY}
    repository = Repository.new(folder / "repository", keys)
    bundle = made_up.write(folder / "digits-1.edgepkg", made_up.members(1, padding))
    order = Order(bundle=bundle.name, name="digits", seq=1)
    repository.publish(bundle, {f"lab-{number}": order for number in range(devices)})
    return bundle


def _make_device(root: Path, number: int, address: str, secret: str) -> None:
    (root / "slots").mkdir(parents=True)
    settings = {"repository": address, "report_to": f"{address}/reports", "secret": secret}
    durable.write_json(root / "config.json", {"device": f"lab-{number}", **settings})
    durable.write_json(root / "trust.json", made_up.trust())
    first = root.parent / "repository" / "metadata" / "1.root.json"
    durable.write(root / "root.json", first.read_bytes())


def _came(root: Path) -> int:
    """Bytes of the bundle that the device has; none when it has all of them."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in root.glob("inbox/*.part"))
    return 0


def _switch(net: Network, numbers: Iterable[int], *, on: bool) -> None:
    for number in numbers:
        (net.plug if number % 2 else net.pass_on)(number, on)


def _wait_until(done: Callable[[], bool], roots: list[Path], agents: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        failed = [root for root, each in zip(roots, agents, strict=True) if each.poll()]
        assert not failed, (failed[0] / "log").read_text()
        assert time.monotonic() < deadline, [_came(root) for root in roots]
        time.sleep(0.02)


def _end(agents: list[subprocess.Popen[bytes]]) -> None:
    for each in agents:
        each.kill()
        each.wait()
