"""The pulling agent and the real server, and between them a network with faults: what comes, and what comes twice."""

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.devices.agent import durable, pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from export.devices.registry import DeviceEntry, Registry, tables
from export.devices.rollout import RolloutPolicy
from export.devices.server import device_app
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.cuts import ROOT, environment
from tests.export.devices.faulty_proxy import HALF_OPEN, LOST_REPLY, Fault, FaultyProxy, running
from tests.export.devices.test_agent_pull import Fleet, Web

SIZE = 400_000
"""Bytes of padding in the bundle that is fetched."""


def answer(status: str, *head: str, body: bytes = b"") -> Fault:
    """The server's place is taken by something that answers so."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *head, "", ""]
    return Fault(instead="\r\n".join(lines).encode() + body)


def changed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Replaces a line of a head; says so when there is none."""

    def change(head: bytes) -> bytes:
        lines = head.split(b"\r\n")
        places = [n for n, line in enumerate(lines) if line.lower().startswith(old)]
        return b"\r\n".join(new if n in places else line for n, line in enumerate(lines))

    return change


def add(line: bytes) -> Callable[[bytes], bytes]:
    return lambda head: head.replace(b"\r\n", b"\r\n" + line + b"\r\n", 1)


PORTAL = answer("200 OK", "content-type: text/html", body=b"<html>Please sign in to the network.</html>")
STRANGE = {
    "an error": answer("500 Internal Server Error", body=b"oops"),
    "no room for more": answer("503 Service Unavailable", "retry-after: 1"),
    "not found": answer("404 Not Found"),
    "416": answer("416 Range Not Satisfiable", "content-range: bytes */5"),
    "a redirect loop": Fault(head=lambda head: b"HTTP/1.1 302 Found\r\nlocation: ?again\r\ncontent-length: 0\r\n\r\n"),
    "a portal": PORTAL,
    "nothing": answer("200 OK"),
    "no content": answer("204 No Content"),
    "garbage": Fault(instead=b"\x16\x03\x01 this is not HTTP\r\n\r\n"),
    "endless head": Fault(instead=b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n"),
    "gzip": Fault(head=add(b"content-encoding: gzip")),
    "another range": Fault(head=changed(b"content-range:", b"content-range: bytes 0-9/10")),
    "lost reply": LOST_REPLY,
    "half-open": HALF_OPEN,
    "reset at once": Fault(instead=b"", after=0, then="reset"),
}

HEAD_IN_DROPS = Fault(after=20, then="drip")


def in_time(seconds: float, act: Callable[..., Any], *arguments: Any) -> Any:
    """Carry out in this process; a test that waits for ever says where."""

    def ring(*_: object) -> None:
        raise AssertionError(f"it has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return act(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Site:
    """One device with number 1 active and number 2 ordered, and the server behind a network that may fail."""

    device: Device
    proxy: FaultyProxy
    registry: Registry
    bundle: Path

    @property
    def active(self) -> int | None:
        found = self.device.status()["active"]
        return found["seq"] if found else None

    def fetch(self, patience_s: float = 0.5) -> bytes:
        """The bundle as the agent fetches it."""
        content = self.bundle.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        url = f"{self.proxy.address}/targets/{digest}.{self.bundle.name}"
        return pull.fetch(url, self.device.root / "inbox", len(content), digest, patience_s).read_bytes()

    @property
    def head(self) -> int:
        """Bytes of the head of the server's answer."""
        self.fetch()
        found = self.proxy.exchanges.pop().head
        next((self.device.root / "inbox").glob("*.edgepkg")).unlink()
        return found

    def refused_bundles(self, count: int) -> list[str]:
        """Keys of so many reports that wait now: of bundles that expired long ago."""
        for seq in range(10, 10 + count):
            path = self.device.root / f"digits-{seq}.edgepkg"
            made_up.write(path, seq=seq, created="2020-01-01T00:00:00Z", not_after="2020-01-02T00:00:00Z")
            with pytest.raises(Refused, match="to be installed until"):
                self.device.install(path)
        return [f"lab-1/digits/{seq}/refused" for seq in range(10, 10 + count)]

    @property
    def waiting(self) -> list[str]:
        return [json.loads(path.read_bytes())["key"] for path in self.device.reports()]

    @property
    def taken(self) -> list[str]:
        return [each["key"] for each in self.registry.reports("lab-1")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "repository").mkdir()
    fleet = Fleet(folder, "http://127.0.0.1:1", Web)
    fleet.device.install(fleet.order(1))
    shutil.rmtree(fleet.device.root / "reports")
    (fleet.device.root / "inbox").mkdir()
    fleet.order(2, padding=SIZE)
    return folder


@pytest.fixture(scope="module")
def server(prepared: Path) -> Iterator[tuple[tuple[str, int], Registry]]:
    registry = Registry(f"sqlite:///{prepared / 'devices.db'}")
    with running(device_app(prepared / "repository", registry)) as address:
        yield address, registry
    registry.close()


@pytest.fixture
def site(
    prepared: Path,
    server: tuple[tuple[str, int], Registry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Site]:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    silent = any(word in request.node.name for word in ("silence", "half-open"))
    monkeypatch.setattr(pull, "STALL_SECONDS", 0.3 if silent else 10.0)  # a busy machine is no fault
    shutil.copytree(prepared / "device", tmp_path / "device", symlinks=True)
    address, registry = server
    with registry.engine.begin() as connection:
        for table in reversed(tables.sorted_tables):
            connection.execute(table.delete())
    registry.add(DeviceEntry(id="lab-1", transport="pull", secret="s3"))
    with FaultyProxy(address) as proxy:
        settings = {"repository": proxy.address, "report_to": f"{proxy.address}/reports", "secret": "s3"}
        durable.write_json(tmp_path / "device" / "config.json", {"device": "lab-1", **settings})
        yield Site(Device(tmp_path / "device"), proxy, registry, prepared / "digits-2.edgepkg")


# --- a download ---


@pytest.mark.parametrize("then", ["cut", "reset", "silence"])
def test_a_connection_may_end_at_any_byte_and_nothing_comes_twice(site: Site, then: Any) -> None:
    head = site.head
    places = [0, 1, 17, head - 1, head, head + 1, head + 4095, head + (64 << 10) - 1, head + (64 << 10) + 1]
    site.proxy.plan("edgepkg", *[Fault(after=place, then=then) for place in places])
    assert site.fetch(patience_s=5) == site.bundle.read_bytes()
    rows = site.proxy.of("edgepkg")
    assert len(rows) == len(places) + 1
    assert rows[-1].start == sum(row.came for row in rows[:-1]) > 130_000
    assert max(site.proxy.sent_twice("edgepkg")) == 0


@pytest.mark.parametrize("strange", list(STRANGE))
def test_a_strange_answer_in_the_middle_of_a_download_costs_nothing_of_it(site: Site, strange: str) -> None:
    times = 5 if strange == "a redirect loop" else 1
    site.proxy.plan("edgepkg", Fault(after=250_000), *[STRANGE[strange]] * times)
    assert site.fetch(patience_s=5) == site.bundle.read_bytes()
    first, *others = site.proxy.of("edgepkg")
    assert first.came > 249_000
    assert len(others) > 1, "the strange answer was not asked for"
    assert others[-1].start >= first.came - pull.CHUNK


@pytest.mark.parametrize("strange", list(STRANGE))
def test_strange_answers_for_ever_end_in_a_refusal_that_keeps_the_part(site: Site, strange: str) -> None:
    site.proxy.plan("edgepkg", Fault(after=250_000))
    site.proxy.always("edgepkg", STRANGE[strange])
    started = time.monotonic()
    with pytest.raises(Refused, match=r"2\d+ of 4\d+ bytes in time"):
        site.fetch(patience_s=0.3)
    assert time.monotonic() - started < 4
    site.proxy.heal()
    assert site.fetch() == site.bundle.read_bytes()
    assert site.proxy.exchanges[-1].start > 249_000


def test_another_entity_tag_starts_the_download_anew(site: Site) -> None:
    """The part may be of another file, which its digest would tell only at the end."""
    site.proxy.plan("edgepkg", Fault(after=250_000, head=changed(b"etag:", b'etag: "of-another-file"')))
    assert site.fetch() == site.bundle.read_bytes()
    first, second = site.proxy.of("edgepkg")
    assert first.came > 249_000
    assert second.start == first.came  # asked for, and not given
    assert second.came == site.bundle.stat().st_size


def no_range(request: bytes) -> bytes:
    return b"\r\n".join(line for line in request.split(b"\r\n") if not line.lower().startswith((b"range", b"if-range")))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(after=200_000, request=no_range),
        Fault(after=200_000, then="reset", request=no_range),
        Fault(after=200_000, head=lambda head: changed(b"etag:", b'etag: "%d"' % time.time_ns())(head)),
    ],
    ids=["no ranges", "no ranges, reset", "another entity tag each time"],
)
def test_a_download_that_always_starts_anew_and_never_ends_is_given_up(site: Site, fault: Fault) -> None:
    site.proxy.always("edgepkg", fault)
    with pytest.raises(Refused, match="in time"):
        in_time(6, site.fetch, 0.3)
    assert len(site.proxy.of("edgepkg")) < 60  # with pauses between


@pytest.mark.parametrize(
    "length", [b"content-length: 100000", b"content-length: 90000000", b"content-length: -5", b"content-length: many"]
)
def test_a_wrong_length_neither_ends_nor_prolongs_a_download(site: Site, length: bytes) -> None:
    site.proxy.plan("edgepkg", Fault(head=changed(b"content-length:", length)))
    assert site.fetch(patience_s=3) == site.bundle.read_bytes()
    assert max([0, *site.proxy.sent_twice("edgepkg")]) <= SIZE + 2000  # at worst it came twice


def test_a_part_of_the_wrong_place_is_not_glued_on(site: Site) -> None:
    """The server answers with a range that was not asked for, and says so."""
    site.proxy.plan("edgepkg", Fault(after=250_000))
    site.proxy.plan("edgepkg", Fault(request=changed(b"range:", b"range: bytes=1000-")))
    assert site.fetch() == site.bundle.read_bytes()
    assert len(site.proxy.of("edgepkg")) == 3


def test_a_slow_network_is_no_fault(site: Site) -> None:
    site.proxy.plan("edgepkg", *[Fault(delay_s=0.15, after=100_000)] * 4)
    assert site.fetch() == site.bundle.read_bytes()
    assert len(site.proxy.of("edgepkg")) == 5


def test_a_download_of_drops_is_given_up_and_its_part_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "STALL_SECONDS", 0.3)
    site.proxy.plan("edgepkg", Fault(after=100_000, then="drip"))
    site.proxy.always("edgepkg", Fault(after=400, then="drip"))
    with pytest.raises(Refused, match="in time"):
        in_time(6, site.fetch, 0.3)
    site.proxy.heal()
    assert site.fetch() == site.bundle.read_bytes()
    assert max(site.proxy.sent_twice("edgepkg")) <= pull.CHUNK


def test_an_answer_whose_head_comes_in_drops_is_given_up_and_the_part_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.proxy.plan("edgepkg", Fault(after=250_000))
    site.proxy.always("edgepkg", STRANGE["no room for more"])
    with pytest.raises(Refused, match="in time"):
        site.fetch()
    site.proxy.heal()
    site.proxy.always("edgepkg", HEAD_IN_DROPS)
    with monkeypatch.context() as patch:
        patch.setattr(pull, "STALL_SECONDS", 0.3)
        with pytest.raises(Refused, match=r"2\d+ of 4\d+ bytes in time.*took more than"):
            in_time(4, site.fetch, 0.3)
    site.proxy.heal()
    assert site.fetch() == site.bundle.read_bytes()
    assert site.proxy.exchanges[-1].start > 249_000


def test_what_came_whole_before_a_kill_is_not_fetched_again_and_what_nobody_wants_any_more_goes(site: Site) -> None:
    """A kill in the installation leaves the file; an order that was replaced leaves a part."""
    other = site.device.root / "inbox" / f"{'0' * 64}.part"
    other.write_bytes(b"of another bundle")
    assert site.fetch() == site.fetch() == site.bundle.read_bytes()
    assert len(site.proxy.of("edgepkg")) == 1
    assert not other.exists()


# --- metadata ---

INSIDE = 285
"""Of any answer with metadata so many bytes are the head and a part of the body."""
PLACES = ("2.root.json", "timestamp.json", "snapshot.json", "targets.json", "lab-1.json")
FAULTS = {
    **{name: fault for name, fault in STRANGE.items() if name not in ("gzip", "another range")},
    **{then: Fault(after=INSIDE, then=then) for then in ("cut", "reset", "silence", "drip")},
    "a head in drops": HEAD_IN_DROPS,
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_metadata_that_do_not_come_are_refused_in_time_and_taken_the_next_time(
    site: Site, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(pull, "ANSWER_SECONDS", 0.3)
    for place in PLACES:
        if place == "2.root.json" and (fault == "not found" or FAULTS[fault].after == INSIDE):
            continue  # that there is no newer root is said with 404, and a few bytes
        for name in ("metadata", "inbox"):
            shutil.rmtree(site.device.root / name, ignore_errors=True)  # what is there already is not asked for
        site.proxy.always(place, FAULTS[fault])
        with pytest.raises(Refused) as caught:
            in_time(5, pull.poll, site.device, 0.0)
        assert caught.value.code == "repository"
        found = site.proxy.of(place)[-1]
        assert FAULTS[fault].after != INSIDE or found.head < INSIDE <= found.passed
        assert site.active == 1
        site.proxy.heal()
        site.proxy.always("edgepkg", answer("503 Service Unavailable"))
        with pytest.raises(Refused) as caught:
            pull.poll(site.device, 0.0)
        assert caught.value.code == "network"  # it has come to the bundle


def test_an_update_over_a_network_that_fails_everywhere_ends_with_the_new_model_and_one_report(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "STALL_SECONDS", 1.0)
    for place, inside in (*((place, INSIDE) for place in PLACES[1:]), ("/reports", 20)):
        site.proxy.plan(place, LOST_REPLY, Fault(after=inside, then="reset"))
    site.proxy.plan("edgepkg", Fault(after=100_000), HALF_OPEN, Fault(after=200_000, then="reset"), LOST_REPLY)
    phases = []
    while not phases or phases[-1] != "committed":
        assert len(phases) < 20
        assert site.active == 1
        try:
            phases.append(pull.poll(site.device, 5.0)["phase"])
        except Refused as error:
            phases.append(error.code)
    assert site.active == 2
    assert set(phases[:-1]) == {"repository"}
    assert sum(site.proxy.sent_twice("edgepkg")) == 0
    assert [pull.deliver(site.device) for _ in range(4)] == [0, 0, 1, 0]
    assert site.taken == ["lab-1/digits/2/committed"]


# --- reports ---


def outcomes(site: Site) -> list[str]:
    """What the log says of devices, line by line."""
    events = [each["event"] for each in site.registry.audit()]
    return [event for event in events if event in ("device refused", "device committed")]


@pytest.mark.parametrize(
    "fault",
    [
        LOST_REPLY,
        Fault(after=0, then="reset"),
        Fault(after=0, then="silence"),
        Fault(after=7),
        Fault(head=changed(b"http/1.1", b"HTTP/1.1 502 Bad Gateway")),
    ],
    ids=["cut", "reset", "silence", "half a word", "502"],
)
def test_a_report_whose_reply_is_lost_is_told_again_and_counts_once(site: Site, fault: Fault) -> None:
    keys = site.refused_bundles(3)
    rollout = site.registry.start(model="digits", seq=10, bundle="digits-10.edgepkg", policy=RolloutPolicy()).id
    site.registry.mark(rollout, ["lab-1"], "ordered")
    site.proxy.plan("/reports", fault, Fault(), fault)
    assert pull.deliver(site.device) == 0
    assert (site.waiting, site.taken) == (keys, keys[:1])
    pull.deliver(site.device)
    assert (site.waiting, site.taken) == (keys[1:], keys[:2])
    assert pull.deliver(site.device) == 2
    assert (site.waiting, site.taken) == ([], keys)
    assert outcomes(site) == ["device refused"] * 3
    assert [each.outcome for each in site.registry.placements(rollout)] == ["refused"]
    assert len(site.proxy.of("/reports")) == 5 + 1  # the last one is the status


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "502 Bad Gateway"])
def test_a_reply_that_comes_in_drops_is_not_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setattr(pull, "ANSWER_SECONDS", 0.3)
    keys = site.refused_bundles(2)
    slow = f"HTTP/1.1 {status}\r\ncontent-length: 1000\r\n\r\n".encode() + b'{"new": true, "error": ""}'.ljust(1000)
    for after in (20, 100):
        site.proxy.plan("/reports", Fault(instead=slow, after=after, then="drip"))
        assert in_time(4, pull.deliver, site.device) == 0
        assert site.waiting == keys
    assert pull.deliver(site.device) == 2
    assert (site.waiting, site.taken) == ([], keys)


NOBODY = {
    **{name: STRANGE[name] for name in ("an error", "no room for more", "not found", "garbage", "endless head")},
    **{name: STRANGE[name] for name in ("a portal", "nothing", "no content", "half-open", "reset at once")},
    "a wrong proof": answer("401 Unauthorized"),
    "a redirect to a portal": answer("302 Found", "location: /portal"),
}


@pytest.mark.parametrize("fault", list(NOBODY))
def test_reports_wait_in_order_while_somebody_else_answers_or_nobody(site: Site, fault: str) -> None:
    keys = site.refused_bundles(3)
    site.proxy.always("/reports", NOBODY[fault])
    site.proxy.always("/portal", PORTAL)
    for _ in range(3):
        assert in_time(5, pull.deliver, site.device) == 0
        assert (site.waiting, site.taken) == (keys, [])
    site.proxy.heal()
    assert pull.deliver(site.device) == 3
    assert (site.waiting, site.taken) == ([], keys)
    assert site.registry.device("lab-1").last_seen is not None


def test_a_report_that_the_network_brings_twice_counts_once(site: Site) -> None:
    """What was sent once arrives again, word for word, when its outcome is no longer the last word."""
    site.refused_bundles(2)
    bodies: list[bytes] = []
    site.proxy.plan("/reports", Fault(request=lambda data: bodies.append(data) or data))
    assert pull.deliver(site.device) == 2
    for _ in range(3):
        with socket.create_connection(site.proxy.server) as again:
            again.sendall(bodies[0])
            assert b'{"new":false}' in b"".join(iter(lambda: again.recv(4096), b""))
    assert len(site.taken) == len(outcomes(site)) == 2


def test_the_queue_survives_kills_and_every_report_counts_once(site: Site) -> None:
    keys = site.refused_bundles(5)
    site.proxy.always("timestamp.json", answer("503 Service Unavailable"))
    command = [sys.executable, "-m", "export.devices.agent", "--root", str(site.device.root), "poll"]
    options: dict[str, Any] = {"env": environment(), "cwd": ROOT, "stdout": subprocess.DEVNULL}
    for passed, held in ((0, HALF_OPEN), (0, Fault(after=0, then="silence")), (2, Fault(after=0, then="silence"))):
        before = len(site.proxy.of("/reports"))
        site.proxy.plan("/reports", *[Fault()] * passed, held)
        with subprocess.Popen(command, **options) as agent:
            wait_until(lambda before=before + passed: len(site.proxy.of("/reports")) > before)
            if held is not HALF_OPEN:
                wait_until(lambda: set(site.waiting[:1]) <= set(site.taken))
            agent.send_signal(signal.SIGKILL)
        assert agent.returncode == -signal.SIGKILL
        assert set(site.waiting) | set(site.taken) == set(keys)
    assert (site.waiting, site.taken) == (keys[2:], keys[:3])  # one was taken, and nobody heard of it
    subprocess.run(command, check=False, timeout=60, **options)
    assert (site.waiting, site.taken) == ([], keys)
    assert outcomes(site) == ["device refused"] * 5


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
