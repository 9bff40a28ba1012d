"""Servers that lie or keep us waiting, and what must go well whatever is served: over a real HTTP server."""

# pyright: reportPrivateImportUsage=false

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Targets

from export.devices.agent import pull
from export.devices.agent.errors import Refused
from export.devices.repository import Order
from tests.export.devices.test_agent_pull import Fleet, Web
from tests.export.devices.tuf_attacker import (
    ONLINE,
    Attacker,
    Change,
    both,
    committed,
    copied,
    evil_bundle,
    fields,
    fleet_with_bundle_2,
    padded,
    refers,
    stranger,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, dict[str, bytes]]]:
    """A fleet whose device has bundle 2, to be copied, and its repository of before."""
    yield from fleet_with_bundle_2(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def attacker(start: tuple[Fleet, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attacker:
    return copied(start, tmp_path, monkeypatch)


def requests(attacker: Attacker) -> list[str]:
    return [path for path, _, _ in attacker.fleet.web.sent]


def meta_of(name: str) -> Change:
    return lambda snapshot: snapshot.signed.meta.update({name: MetaFile(1)})


def test_metadata_are_kept_byte_by_byte_as_they_came(attacker: Attacker) -> None:
    attacker.fleet.order(3)
    attacker.edit("timestamp", lambda data: data + b" \n ")
    committed(attacker, 3)
    assert (attacker.device.root / "metadata" / "timestamp.json").read_bytes() == attacker.path(
        "timestamp"
    ).read_bytes()


def test_a_timestamp_of_the_same_version_with_other_content_is_passed_over(attacker: Attacker) -> None:
    before = attacker.read("timestamp").signed.version
    attacker.publish({"timestamp": fields(version=before)})
    assert pull.poll(attacker.device)["phase"] == "nothing"
    assert attacker.fleet.active() == 2
    attacker.must_recover(*ONLINE)


@pytest.mark.parametrize("name", ["more", "?", "#", "/more", "../more", "../../root"])
def test_a_delegated_role_is_not_followed(attacker: Attacker, name: str) -> None:
    """Of orders and bundles only the top-level targets speak: we use no delegations.

    So what goes wrong between delegating roles elsewhere (a role cached for one delegator and taken for another, which
    tuf-conformance lists as an expected failure of python-tuf; roles taken out of the snapshot; odd names) is moot.
    """
    key, delegated = stranger(), Metadata(Targets(expires=datetime.now(UTC) + timedelta(days=9)))
    attacker.order_evil(delegated)
    delegated.sign(key)
    (attacker.metadata / f"1.{quote(name, '')}.json").write_bytes(delegated.to_bytes())

    def delegate(targets: Metadata) -> None:
        del targets.signed.targets["devices/lab-1.json"]
        role = DelegatedRole(name, [key.public_key.keyid], 1, True, paths=["*", "*/*"])
        targets.signed.delegations = Delegations({key.public_key.keyid: key.public_key}, {name: role})

    attacker.publish({"targets": delegate, "snapshot": meta_of(f"{name}.json")})
    assert pull.poll(attacker.device)["text"] == "The repository has nothing for this device."
    assert not any(quote(name, "") in path for path in requests(attacker) if "root" not in path)
    assert attacker.fleet.active() == 2
    attacker.must_recover(*ONLINE)


def test_fields_hashes_and_names_that_nobody_knows_do_no_harm(attacker: Attacker) -> None:
    """Lengths and hashes of metadata, where they are given, are right here."""

    def size(role: str) -> dict[str, Any]:
        data = attacker.path(role).read_bytes()
        return {"length": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}

    def list_odd_names(targets: Metadata) -> None:
        for path in ("../../slots/a", "/etc/passwd", "a/../b", "a b?c#d", "\u00e9"):
            attacker.put(path, b"x")(targets)

    attacker.fleet.order(3)
    attacker.publish(
        {
            "targets": list_odd_names,
            "snapshot": lambda snapshot: both(refers("targets.json", **size("targets")), meta_of("../x.json"))(
                snapshot
            ),
            "timestamp": lambda timestamp: both(refers("snapshot.json", **size("snapshot")), padded(9))(timestamp),
        }
    )
    committed(attacker, 3)


@pytest.mark.parametrize("wrong", ["", "zz", "00" * 64])
def test_one_wrong_signature_beside_enough_right_ones_does_no_harm(attacker: Attacker, wrong: str) -> None:
    attacker.fleet.order(3)
    content = json.loads(attacker.path("timestamp").read_bytes())
    content["signatures"].append({"keyid": "0" * 64, "sig": wrong})
    attacker.path("timestamp").write_bytes(json.dumps(content).encode())
    committed(attacker, 3)


def unsigned(root: bytes) -> bytes:
    return json.dumps({**json.loads(root), "signatures": []}).encode()


@pytest.mark.parametrize("spoil", [unsigned, lambda root: b"", lambda root: root[:-9]])
def test_without_a_root_to_begin_with_nothing_is_asked_for(attacker: Attacker, spoil: Callable[[bytes], bytes]) -> None:
    place = attacker.device.root / "root.json"
    right = place.read_bytes()
    place.write_bytes(spoil(right))
    attacker.must_fail("root.json' is no root of a repository")
    assert requests(attacker) == []
    place.write_bytes(right)
    attacker.must_recover()


def test_an_order_that_was_wrong_does_not_stand_in_the_way_of_the_right_one(attacker: Attacker) -> None:
    bundle = attacker.fleet.order(3)
    order = Order(bundle=bundle.name, name="digits", seq=4)
    attacker.fleet.repository.publish(orders={"lab-1": order})
    attacker.must_fail("is digits 3, expected digits 4 as ordered")
    attacker.fleet.repository.publish(orders={"lab-1": order.model_copy(update={"seq": 3})})
    committed(attacker, 3)


def test_a_download_spliced_of_two_is_refused_and_made_anew(attacker: Attacker) -> None:
    """The first half comes from the attacker, under the tag of the right file."""
    attacker.fleet.order(3)
    attacker.fleet.web.cuts += [700]
    attacker.fleet.web.mutate = staticmethod(
        lambda path, data: Same(evil_bundle(data)[:700] + data[700:], data) if path.endswith("edgepkg") else data
    )
    with pytest.raises(Refused, match="other content"):
        pull.poll(attacker.device)
    attacker.fleet.web.mutate = staticmethod(lambda path, data: data)
    committed(attacker, 3)


class Same(bytes):
    """Bytes with the tag of other bytes."""

    tag: int

    def __new__(cls, content: bytes, like: bytes) -> "Same":
        made = super().__new__(cls, content)
        made.tag = hash(like)
        return made

    def __hash__(self) -> int:
        return self.tag


def test_a_tag_too_long_to_be_sent_back_does_not_end_a_download(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent back would make a line that servers refuse, now and at each next attempt."""

    def begins(web: Web) -> None:
        web.send_response(200)
        web.send_header("etag", f'"{"x" * 65_525}"')
        web.send_header("content-length", "1000000")
        web.end_headers()
        web.wfile.write(b"EDGEPKG1")
        web.close_connection = True

    attacker.fleet.order(3)
    with monkeypatch.context() as patch:
        patch.setattr(attacker.fleet.web, "do_GET", answer("edgepkg", begins))
        with pytest.raises(Refused, match="in time"):
            pull.poll(attacker.device, patience_s=0.1)
    assert next((attacker.device.root / "inbox").glob("*.part")).read_bytes() == b"EDGEPKG1"
    assert pull.poll(attacker.device, patience_s=2.0)["phase"] == "committed"


@pytest.mark.parametrize("status", [500, 503, 302])
@pytest.mark.parametrize("role", ["root", "timestamp"])
def test_a_server_in_trouble_is_asked_again_later(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch, role: str, status: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(attacker.fleet.web, "do_GET", answer(f"{role}.json", lambda web: web.send_error(status)))
        attacker.must_fail(f"status {status}")
    attacker.must_recover()


def answer(ending: str, act: Callable[[Web], None]) -> Callable[[Web], None]:
    def do_get(web: Web) -> None:
        if web.path.endswith(ending):
            act(web)
        else:
            Web.do_GET(web)

    return do_get


def stops(web: Web) -> None:
    web.send_response(200)
    web.send_header("content-length", "100")
    web.end_headers()
    web.wfile.write(b"{")
    time.sleep(0.6)
    web.close_connection = True


def drips(web: Web) -> None:
    web.send_response(200)
    web.end_headers()
    with suppress(OSError):
        for _ in range(2000):
            web.wfile.write(b" ")
            time.sleep(0.01)
    web.close_connection = True


def breaks_off(web: Web) -> None:
    web.send_response(200)
    web.send_header("transfer-encoding", "chunked")
    web.end_headers()
    web.wfile.write(b"5\r\n{")
    web.close_connection = True


@pytest.mark.parametrize(
    ("act", "says"), [(stops, "timed out"), (drips, "took more than"), (breaks_off, "IncompleteRead")]
)
@pytest.mark.parametrize(
    "role",
    ["timestamp", "lab-1", *(pytest.param(role, marks=pytest.mark.slow) for role in ("root", "snapshot", "targets"))],
)
def test_a_server_that_keeps_us_waiting_is_left(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch, role: str, act: Callable[[Web], None], says: str
) -> None:
    attacker.fleet.order(3)
    attacker.honest = attacker.files()
    with monkeypatch.context() as patch:
        patch.setattr(pull, "STALL_SECONDS", 0.2)
        patch.setattr(pull, "ANSWER_SECONDS", 0.2 if act is drips else 10.0)
        patch.setattr(attacker.fleet.web, "do_GET", answer(f"{role}.json", act))
        started = time.monotonic()
        with pytest.raises(Refused, match=says):
            pull.poll(attacker.device)
        assert time.monotonic() - started < 10
    attacker.must_recover()
