"""The device server: files with ranges, reports of those who prove who they are, and nothing else."""

import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from export.devices import server
from export.devices.registry import DeviceEntry, Registry
from export.devices.server import device_app


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    found = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    for name, secret in (("gate-1", "secret of 1"), ("gate-2", "secret of 2"), ("lab-1", "")):
        found.add(DeviceEntry(id=name, transport="pull", secret=secret))
    yield found
    found.close()


@pytest.fixture
def client(tmp_path: Path, registry: Registry) -> Iterator[TestClient]:
    for name in ("metadata", "targets"):
        (tmp_path / "repository" / name).mkdir(parents=True)
    (tmp_path / "repository" / "targets" / "file").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("nobody's business")
    with TestClient(device_app(tmp_path / "repository", registry)) as found:
        yield found


def report(device: str = "gate-1", phase: str = "committed", **more: Any) -> dict[str, Any]:
    key = f"{device}/digits/3/{phase}"
    return {"key": key, "device": device, "phase": phase, "name": "digits", "seq": 3, "version": "1", **more}


def send(client: TestClient, body: Any, device: str = "gate-1", secret: str = "secret of 1") -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    proof = hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()
    return client.post("/reports", content=data, headers={"x-stillhouse-device": device, "x-stillhouse-proof": proof})


def test_a_report_counts_once(client: TestClient, registry: Registry) -> None:
    assert [send(client, report()).json()["new"] for _ in range(3)] == [True, False, False]
    assert len(registry.reports("gate-1")) == 1
    assert registry.device("gate-1").active["seq"] == 3


def test_a_status_shows_what_a_device_runs_and_is(client: TestClient, registry: Registry) -> None:
    said = {"phase": "status", "device": "gate-1", "active": {"name": "digits", "seq": 9}, "facts": {"isa": "arm"}}
    assert send(client, said).status_code == 200
    device = registry.device("gate-1")
    assert (device.active["seq"], device.facts["isa"], registry.reports("gate-1")) == (9, "arm", [])
    assert device.last_seen is not None


@pytest.mark.parametrize(
    ("device", "secret", "body", "status"),
    [
        ("gate-1", "another", report(), 401),
        ("gate-1", "secret of 2", report(), 401),
        ("gate-2", "secret of 2", report("gate-1"), 401),
        ("lab-1", "", report("lab-1"), 401),
        ("gate-9", "secret of 1", report("gate-9"), 404),
        ("", "", report(), 404),
        ("gate-1", "secret of 1", b"{", 400),
        ("gate-1", "secret of 1", b"[]", 400),
        ("gate-1", "secret of 1", {"device": "gate-1"}, 400),
        ("gate-1", "secret of 1", {"device": "gate-1", "phase": "committed"}, 400),
    ],
)
def test_what_is_not_proven_or_cannot_be_read_changes_nothing(
    client: TestClient, registry: Registry, device: str, secret: str, body: Any, status: int
) -> None:
    answer = send(client, body, device, secret)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert all(registry.reports(name) == [] and not registry.device(name).active for name in ("gate-1", "gate-2"))


def test_a_report_without_end_is_not_read(client: TestClient) -> None:
    assert send(client, b"x" * (server.MAX_REPORT + 1)).status_code == 413
    pieces = (b"x" * 1000 for _ in range(10))
    assert client.post("/reports", content=pieces).status_code == 413  # says no length


def test_files_come_in_ranges_and_only_the_repositorys(client: TestClient) -> None:
    whole = client.get("/targets/file")
    part = client.get("/targets/file", headers={"range": "bytes=4-", "if-range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, b"456789")
    assert part.headers["content-range"] == "bytes 4-9/10"
    assert client.get("/targets/file", headers={"range": "bytes=4-", "if-range": '"other"'}).status_code == 200
    for path in ("/targets/../../secret", "/targets/%2e%2e/%2e%2e/secret", "/secret", "/", "/registry.db"):
        assert client.get(path).status_code == 404
    assert client.put("/targets/file", content=b"x").status_code == 405


def test_what_signs_anew_is_called_at_the_start_and_its_failure_is_not_the_servers(
    tmp_path: Path, registry: Registry
) -> None:
    calls: list[int] = []

    def refresh() -> None:
        calls.append(1)
        raise OSError("no disk")

    for name in ("metadata", "targets"):
        (tmp_path / "repository" / name).mkdir(parents=True)
    with TestClient(device_app(tmp_path / "repository", registry, refresh)) as found:
        assert found.get("/health").status_code == 200
    assert calls == [1]
