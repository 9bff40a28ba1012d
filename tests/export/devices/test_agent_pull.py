"""Pulling from a real TUF repository over a real HTTP server: what comes, what is refused, what is fetched twice."""

import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from securesystemslib.signer import CryptoSigner

from export.devices import repository as repositories
from export.devices.agent import durable, pull
from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from export.devices.repository import Order, Repository
from tests.export.devices import made_up_bundle as made_up


class Web(SimpleHTTPRequestHandler):
    """Serves a folder with ranges and entity tags; ``cuts`` are the bytes after which connections end, one each."""

    protocol_version = "HTTP/1.1"
    folder: Path
    cuts: list[int]
    sent: list[tuple[str, int, int]]
    """(path, from, bytes) of every answer."""
    ranges = True
    mutate: Callable[[str, bytes], bytes]
    headers_more: dict[str, str]

    def do_GET(self) -> None:
        place = self.folder / self.path.lstrip("/")
        if not place.is_file():
            self.send_error(404)
            return
        content = type(self).mutate(self.path, place.read_bytes())
        tag = f'"{hash(content)}"'
        start, asked = 0, self.headers.get("range")
        partial = self.ranges and asked is not None and self.headers.get("if-range", tag) == tag
        if partial:
            start = int(str(asked).removeprefix("bytes=").rstrip("-"))
        body = content[start:]
        self.send_response(206 if partial else 200)
        self.send_header("etag", tag)
        self.send_header("content-length", str(len(body)))
        for name, value in self.headers_more.items():
            self.send_header(name, value)
        if partial:
            self.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cut = self.cuts.pop(0) if self.cuts and self.path.endswith("edgepkg") else None
        body = body if cut is None else body[:cut]
        self.wfile.write(body)
        self.sent.append((self.path, start, len(body)))
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def served(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, type[Web]]]:
    fields: dict[str, Any] = {"folder": folder, "cuts": [], "sent": [], "mutate": lambda path, data: data}
    fields |= {"headers_more": {}}
    fields["mutate"] = staticmethod(fields["mutate"])
    web = type("Bound", (Web,), fields)
    with ThreadingHTTPServer(("127.0.0.1", 0), web) as server:
        server.daemon_threads = True
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}", web
        server.shutdown()


class Fleet:
    """A repository, the server it lies on, and one device."""

    def __init__(self, folder: Path, address: str, web: type[Web], threshold: int = 2) -> None:
        self.folder, self.web = folder, web
        self.keys = {role: [CryptoSigner.generate_ed25519()] for role in repositories.EXPIRY}
        self.keys["root"] = [CryptoSigner.generate_ed25519() for _ in range(3)]
        self.repository = Repository.new(folder / "repository", self.keys, root_threshold=threshold)
        root = folder / "device"
        (root / "slots").mkdir(parents=True)
        durable.write_json(root / "config.json", {"device": "lab-1", "repository": address})
        durable.write_json(root / "trust.json", made_up.trust())
        durable.write(root / "root.json", (folder / "repository" / "metadata" / "1.root.json").read_bytes())
        self.device = Device(root)

    def order(self, seq: int, padding: int = 0, files: dict[str, bytes] | None = None) -> Path:
        bundle = self.folder / f"digits-{seq}.edgepkg"
        made_up.write(bundle, files or made_up.members(seq, padding), seq=seq)
        self.repository.publish(bundle, {"lab-1": Order(bundle=bundle.name, name="digits", seq=seq)})
        return bundle

    def active(self) -> int | None:
        found = self.device.status()["active"]
        return found["seq"] if found else None

    def saved(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "repository" / "metadata").iterdir()}

    def restore(self, saved: dict[str, bytes]) -> None:
        for path in (self.folder / "repository" / "metadata").iterdir():
            path.unlink()
        for name, content in saved.items():
            (self.folder / "repository" / "metadata" / name).write_bytes(content)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "repository").mkdir()
    with served(tmp_path / "repository") as (address, web):
        yield Fleet(tmp_path, address, web)


def test_a_device_takes_what_was_ordered_for_it_and_nothing_twice(fleet: Fleet) -> None:
    assert pull.poll(fleet.device)["phase"] == "nothing"
    fleet.order(1)
    assert pull.poll(fleet.device)["phase"] == "committed"
    assert pull.poll(fleet.device)["phase"] == "nothing"
    fleet.order(2)
    assert pull.poll(fleet.device)["phase"] == "committed"
    assert fleet.active() == 2
    assert [path for path, _, _ in fleet.web.sent if path.endswith("edgepkg")] != []
    assert list((fleet.device.root / "inbox").glob("*.edgepkg")) == []


def test_an_order_that_is_taken_back_during_the_download_is_not_followed(fleet: Fleet) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    fleet.order(2)

    def taken_back(path: str, content: bytes) -> bytes:
        if path.endswith("edgepkg"):
            fleet.repository.publish(orders={"lab-1": None})
        return content

    fleet.web.mutate = staticmethod(taken_back)
    assert "taken back" in pull.poll(fleet.device)["text"]
    assert fleet.active() == 1
    fleet.web.mutate = staticmethod(lambda path, content: content)
    fleet.repository.publish(orders={"lab-1": Order(bundle="digits-2.edgepkg", name="digits", seq=2)})
    fleet.web.sent.clear()
    assert pull.poll(fleet.device)["phase"] == "committed"
    assert [path for path, _, _ in fleet.web.sent if path.endswith("edgepkg")] == []  # it was kept


def test_an_order_for_another_device_is_none_of_its_business(fleet: Fleet) -> None:
    fleet.order(1)
    fleet.repository.publish(orders={"lab-1": None, "lab-2": Order(bundle="digits-1.edgepkg", name="digits", seq=1)})
    assert pull.poll(fleet.device)["phase"] == "nothing"
    assert set(fleet.repository.orders) == {"lab-2"}


def test_a_download_that_is_cut_goes_on_where_it_was(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    bundle = fleet.order(1, padding=2_000_000)
    fleet.web.cuts += [100_000, 1, 700_000, 0, 64 << 10, 333_333]
    assert pull.poll(fleet.device)["phase"] == "committed"
    rows = [(start, count) for path, start, count in fleet.web.sent if path.endswith("edgepkg")]
    assert len(rows) == 7
    assert sum(count for _, count in rows) == bundle.stat().st_size
    assert [start for start, _ in rows] == [sum(count for _, count in rows[:place]) for place in range(len(rows))]


def test_a_part_outlives_the_agent(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fleet.order(1, padding=500_000)
    fleet.web.cuts += [200_000, 0, 0, 0]
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    with pytest.raises(Refused, match="200000 of"):
        pull.poll(fleet.device, patience_s=0.001)
    fleet.web.cuts.clear()
    assert pull.poll(Device(fleet.device.root))["phase"] == "committed"
    last = [(start, count) for path, start, count in fleet.web.sent if path.endswith("edgepkg")][-1]
    assert last == (200_000, bundle.stat().st_size - 200_000)


def test_a_server_without_ranges_is_asked_from_the_start(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    fleet.order(1, padding=300_000)
    fleet.web.cuts += [100_000]
    fleet.web.ranges = False
    assert pull.poll(fleet.device)["phase"] == "committed"


@pytest.mark.parametrize(
    ("mutate", "says"),
    [
        (lambda data: data[:-1] + b"?", "other content"),
        (lambda data: data[:-9], "in time"),
    ],
)
def test_another_file_than_the_repository_signed_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[bytes], bytes], says: str
) -> None:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    fleet.order(1)
    fleet.web.mutate = staticmethod(lambda path, data: mutate(data) if path.endswith("edgepkg") else data)
    with pytest.raises(Refused, match=says):
        pull.poll(fleet.device, patience_s=0.2)
    assert fleet.active() is None


def test_no_more_is_read_than_the_repository_signed(fleet: Fleet) -> None:
    bundle = fleet.order(1)
    fleet.web.mutate = staticmethod(lambda path, data: data + b"?" * 9_000_000 if path.endswith("edgepkg") else data)
    assert pull.poll(fleet.device)["phase"] == "committed"
    assert bundle.stat().st_size < 9_000_000


def test_an_encoded_answer_is_not_taken_for_the_file(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "PAUSES", (0.01,))
    fleet.order(1)
    fleet.web.headers_more = {"content-encoding": "gzip"}
    with pytest.raises(Refused, match="encoded"):
        pull.poll(fleet.device, patience_s=0.1)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "STALL_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (tmp_path / "repository").mkdir()
        fleet = Fleet(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", Web)
        started = time.monotonic()
        with pytest.raises(Refused, match="cannot be trusted now"):
            pull.poll(fleet.device)
        assert time.monotonic() - started < 5


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine that nobody else has signed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    signed = made.add_extension(here, critical=False).sign(key, hashes.SHA256())
    pem, secret = folder / "server.pem", folder / "server.key"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return pem, secret


def test_over_tls_a_certificate_must_be_trusted_and_nobody_keeps_us_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    pem, secret = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem, secret)

    def in_drops(web: Web) -> None:
        with suppress(OSError):
            for place in range(1000):
                web.wfile.write(b"HTTP/1.1 200 OK\r\nx: "[place : place + 1] or b"y")
                time.sleep(0.01)
        web.close_connection = True

    with served(tmp_path / "repository", tls) as (address, web):
        fleet = Fleet(tmp_path, address, web)
        fleet.order(1)
        with pytest.raises(Refused, match="CERTIFICATE_VERIFY_FAILED"):
            pull.poll(fleet.device)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert pull.poll(fleet.device)["phase"] == "committed"
        monkeypatch.setattr(web, "do_GET", in_drops)
        monkeypatch.setattr(pull, "ANSWER_SECONDS", 0.3)
        started = time.monotonic()
        with pytest.raises(Refused, match="took more than"):
            pull.poll(fleet.device)
        assert time.monotonic() - started < 5


# --- metadata that are not to be trusted ---


def test_old_metadata_are_refused(fleet: Fleet) -> None:
    fleet.order(1)
    old = fleet.saved()
    pull.poll(fleet.device)
    fleet.order(2)
    pull.poll(fleet.device)
    fleet.restore(old)
    with pytest.raises(Refused):
        pull.poll(fleet.device)
    assert fleet.active() == 2


def lose_metadata(fleet: Fleet) -> None:
    """As a power cut may leave the files that tuf does not flush: there, and empty."""
    for path in (fleet.device.root / "metadata").glob("*.json"):
        path.unlink()
        path.write_bytes(b"")


def test_old_metadata_are_refused_after_a_power_cut_that_took_the_newer_ones(fleet: Fleet) -> None:
    fleet.order(1)
    fleet.order(2)
    old = fleet.saved()
    fleet.order(3)
    pull.poll(fleet.device)
    lose_metadata(fleet)
    fleet.restore(old)
    with pytest.raises(Refused) as caught:
        pull.poll(fleet.device)
    assert caught.value.code == "replay"
    assert fleet.active() == 3


def test_without_a_floor_of_its_own_it_would_take_them(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above says something only if the guard is needed."""
    fleet.order(1)
    old = fleet.saved()
    fleet.order(3)
    pull.poll(fleet.device)
    lose_metadata(fleet)
    fleet.restore(old)
    monkeypatch.setattr(pull, "_keep_floor", lambda device: None)
    assert pull.poll(fleet.device)["phase"] == "nothing"  # taken; the bundle's own floor is what is left


def test_after_the_refusal_the_true_repository_is_taken_again(fleet: Fleet) -> None:
    fleet.order(1)
    old = fleet.saved()
    fleet.order(2)
    new = fleet.saved()
    pull.poll(fleet.device)
    lose_metadata(fleet)
    fleet.restore(old)
    with pytest.raises(Refused):
        pull.poll(fleet.device)
    fleet.restore(new)
    fleet.order(3)
    assert pull.poll(fleet.device)["phase"] == "committed"


def test_expired_metadata_are_refused_and_the_model_goes_on(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    monkeypatch.setitem(repositories.EXPIRY, "timestamp", timedelta(seconds=-1))
    fleet.order(2)
    with pytest.raises(Refused, match="Expired"):
        pull.poll(fleet.device)
    assert fleet.active() == 1


def other_keys(fleet: Fleet, role: str) -> None:
    fleet.repository.signers = {**fleet.keys, role: [CryptoSigner.generate_ed25519()]}


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_metadata_signed_by_a_stranger_are_refused(fleet: Fleet, role: str) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    other_keys(fleet, role)
    fleet.order(2)
    with pytest.raises(Refused, match=r"Unsigned|cannot be trusted"):
        pull.poll(fleet.device)
    assert fleet.active() == 1


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", "root"])
def test_changed_and_endless_metadata_are_refused(fleet: Fleet, role: str) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    if role == "root":
        fleet.repository.rotate_root({}, fleet.keys["root"][:2])
    fleet.order(2)
    for mutate in (lambda data: data.replace(b"-", b"1-", 1), lambda data: data + b" " * 6_000_000):
        fleet.web.mutate = staticmethod(
            lambda path, data, mutate=mutate: mutate(data) if path.endswith(f"{role}.json") else data
        )
        with pytest.raises(Refused):
            pull.poll(fleet.device)
        assert fleet.active() == 1


def test_a_mix_of_old_and_new_metadata_is_refused(fleet: Fleet) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    old = fleet.saved()
    fleet.order(2)
    newest = max(int(name.partition(".")[0]) for name in fleet.saved() if name.endswith(".targets.json"))
    place = fleet.folder / "repository" / "metadata" / f"{newest}.targets.json"
    place.write_bytes(old[f"{newest - 1}.targets.json"])
    with pytest.raises(Refused):
        pull.poll(fleet.device)
    assert fleet.active() == 1


def test_a_root_signed_by_too_few_is_refused(fleet: Fleet) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    keys = [CryptoSigner.generate_ed25519() for _ in range(2)]
    fleet.repository.rotate_root({"root": keys}, fleet.keys["root"][:1])
    fleet.order(2)
    with pytest.raises(Refused):
        pull.poll(fleet.device)


def test_a_device_that_slept_through_ten_rotations_of_all_keys_finds_its_way(fleet: Fleet) -> None:
    fleet.order(1)
    pull.poll(fleet.device)
    for _ in range(10):
        before = fleet.repository.signers["root"]
        fresh = {role: [CryptoSigner.generate_ed25519()] for role in ("targets", "snapshot", "timestamp")}
        fresh["root"] = [CryptoSigner.generate_ed25519() for _ in range(3)]
        fleet.repository.rotate_root(fresh, before[:2])
    fleet.order(2)
    assert pull.poll(fleet.device)["phase"] == "committed"
    assert fleet.device.floor["repository"]["root"] == 11


def test_the_inner_signature_counts_too(fleet: Fleet) -> None:
    """Whoever holds all keys of the repository still cannot have a bundle installed that nobody signed."""
    bundle = fleet.folder / "digits-1.edgepkg"
    made_up.write(bundle, seq=1, keys=(made_up.key(66),))
    fleet.repository.publish(bundle, {"lab-1": Order(bundle=bundle.name, name="digits", seq=1)})
    with pytest.raises(Refused, match="expected a trusted key"):
        pull.poll(fleet.device)
    assert pull.poll(fleet.device)["phase"] == "nothing"  # not fetched again and again


def test_reports_are_delivered_with_a_proof_and_wait_while_nobody_takes_them(fleet: Fleet) -> None:
    got: list[tuple[dict[str, Any], str]] = []

    class Takes(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((json.loads(body), self.headers["x-stillhouse-proof"]))
            self.send_response(200 if len(got) > 1 else 500)
            self.send_header("content-length", "13")
            self.end_headers()
            self.wfile.write(b'{"new": true}')

        def log_message(self, format: str, *args: object) -> None: ...

    fleet.order(1)
    pull.poll(fleet.device)
    with ThreadingHTTPServer(("127.0.0.1", 0), Takes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fleet.device.config |= {"report_to": f"http://127.0.0.1:{server.server_port}/", "secret": "s"}
        assert pull.deliver(fleet.device) == 0
        assert pull.deliver(fleet.device) == 1
        server.shutdown()
    assert got[0] == got[1]
    assert got[0][0]["key"] == "lab-1/digits/1/committed"
    assert fleet.device.reports() == []
