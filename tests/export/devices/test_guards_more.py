"""One test for each guard that no other test needs: what would be taken, lost or left half done without it."""

import base64
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.devices.agent import package
from export.devices.agent.device import Device
from export.devices.agent.envelope import TRUST, Trust
from export.devices.agent.errors import Failed, Refused
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.crafted_archives import CENTRAL, header
from tests.export.devices.test_agent_device import active, new_device

ONE = Trust(made_up.trust())


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return new_device(tmp_path / "device")


def made(folder: Path, seq: int, files: dict[str, bytes] | None = None, **more: Any) -> Path:
    return made_up.write(folder / f"{seq}.edgepkg", files or made_up.members(seq), seq=seq, **more)


# --- the file ---


def rewrapped(path: Path, change: Any) -> Path:
    """The bundle with other bytes as its envelope."""
    data = path.read_bytes()
    size = int.from_bytes(data[8:12], "big")
    envelope = change(data[12 : 12 + size])
    path.write_bytes(data[:8] + len(envelope).to_bytes(4, "big") + envelope + data[12 + size :])
    return path


def spaced(envelope: bytes) -> bytes:
    return json.dumps(json.loads(envelope), sort_keys=True).encode()


def twice(envelope: bytes) -> bytes:
    value = json.loads(envelope)
    return made_up.canonical({**value, "signatures": value["signatures"] * 2})


def unsigned(envelope: bytes) -> bytes:
    return made_up.canonical({**json.loads(envelope), "signatures": []})


def loose_base64(envelope: bytes) -> bytes:
    """Four bits of the last digit of 64 bytes do not count: another file with the same meaning."""
    value = json.loads(envelope)
    row = value["signatures"][0]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = row["sig"][-3]
    row["sig"] = row["sig"][:-3] + digits[digits.index(last) + 1] + "=="
    return made_up.canonical(value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spaced, "canonical"),
        (twice, "twice"),
        (unsigned, "0 signatures, expected 1"),
        (loose_base64, "one form of base64"),
    ],
)
def test_an_envelope_in_another_form_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    path = made(tmp_path, 1)
    package.read(path, ONE)
    with pytest.raises(Refused, match=says):
        package.read(rewrapped(path, change), ONE)


def test_one_signature_is_not_enough_where_two_are_asked_for(tmp_path: Path) -> None:
    two = Trust(made_up.trust(made_up.key(1), made_up.key(2), threshold=2))
    with pytest.raises(Refused, match="1 signatures, expected 2"):
        package.read(made(tmp_path, 1, keys=(made_up.key(1),)), two)
    with pytest.raises(Refused, match="twice"):
        package.read(rewrapped(made(tmp_path, 1, keys=(made_up.key(1),)), twice), two)
    assert package.read(made(tmp_path, 1, keys=(made_up.key(1), made_up.key(2))), two)


def test_a_stranger_beside_a_trusted_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="expected a trusted key"):
        package.read(made(tmp_path, 1, keys=(made_up.key(1), made_up.key(9))), ONE)


def test_a_file_longer_than_its_signed_length_is_refused_by_that(tmp_path: Path) -> None:
    def short(said: dict[str, Any]) -> None:
        said["content"]["length"] -= 1

    with pytest.raises(Refused) as caught:
        package.read(made(tmp_path, 1, change=short), ONE)
    assert caught.value.code == "length"


def test_an_endless_envelope_is_refused_though_it_is_signed(tmp_path: Path) -> None:
    assert package.read(made(tmp_path, 1, lineage={"note": "a" * (700 << 10)}), ONE)
    with pytest.raises(Refused, match="at most 1 MiB"):
        package.read(made(tmp_path, 1, lineage={"note": "a" * (1 << 20)}), ONE)


def test_more_files_than_an_agent_takes_are_refused(tmp_path: Path) -> None:
    def many(count: int) -> dict[str, bytes]:
        return made_up.members() | {f"more/{number:03}": b"" for number in range(count)}

    assert package.read(made(tmp_path, 1, many(253)), ONE)
    with pytest.raises(Refused, match="files"):
        package.read(made(tmp_path, 1, many(254)), ONE)


def test_a_member_that_says_it_is_a_link_becomes_a_plain_file(tmp_path: Path) -> None:
    files = {**made_up.members(), "a": b"/etc/passwd"}
    content = made_up.archive(files)
    place = header(content, CENTRAL)  # of the first one: 'a'
    marked = bytearray(content)
    marked[place + 38 : place + 42] = (0o120777 << 16).to_bytes(4, "little")
    path = made(tmp_path, 1, files, content=bytes(marked))
    (tmp_path / "slots").mkdir()
    with suppress(Refused):  # that would be right as well
        package.unpack(package.read(path, ONE), tmp_path / "slots" / "a")
    assert not any(each.is_symlink() for each in (tmp_path / "slots").rglob("*"))


# --- trust ---

OLD, NEW = (made_up.key(1), made_up.key(2)), (made_up.key(3), made_up.key(4))
BEFORE = made_up.trust(*OLD, threshold=2)


def successor(
    *keys: Ed25519PrivateKey, version: int = 2, threshold: int = 2, signers: tuple[Ed25519PrivateKey, ...] = OLD + NEW
) -> bytes:
    value = made_up.trust(*(keys or NEW), threshold=threshold, version=version)
    return made_up.envelope(value, *signers, kind=TRUST)


def test_new_trust_needs_the_keys_before_and_its_own(tmp_path: Path) -> None:
    after = Trust(BEFORE).next(successor())
    assert (after.version, sorted(after.keys)) == (2, sorted(map(made_up.key_id, NEW)))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (successor(version=1), "expected 2"),
        (successor(version=3), "expected 2"),
        (successor(signers=NEW), "by the trust before"),
        (successor(signers=(OLD[0], *NEW)), "by the trust before"),
        (successor(signers=OLD), "by the trust itself"),
        (successor(signers=(*OLD, NEW[0])), "by the trust itself"),
        (successor(signers=(*OLD, *NEW, made_up.key(9))), "expected known keys"),
        (made_up.envelope(made_up.trust(*NEW, threshold=2, version=2), *OLD, *NEW), "has type"),
        (successor(threshold=3), "asks for 3 of 2 keys"),
    ],
)
def test_trust_that_does_not_follow_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says):
        Trust(BEFORE).next(data)


def test_a_wrong_signature_under_new_trust_is_refused_though_there_are_enough_others() -> None:
    value = json.loads(successor(threshold=1))
    (row,) = [row for row in value["signatures"] if row["keyid"] == made_up.key_id(NEW[1])]
    row["sig"] = base64.b64encode(bytes(64)).decode()
    with pytest.raises(Refused, match="wrong signature"):
        Trust(BEFORE).next(made_up.canonical(value))


# --- does it work here ---


def with_golden(seed: int, outputs: Any, weights: np.ndarray | None = None) -> dict[str, bytes]:
    """Members whose golden outputs are what ``outputs`` makes of the right ones."""
    files = made_up.members(seed)
    with np.load(io.BytesIO(files["golden.npz"])) as arrays:
        inputs, right = arrays["inputs"], arrays["outputs-cpu"]
    if weights is not None:
        files["model.onnx"], right = made_up.net(weights), inputs.reshape(len(inputs), -1) @ weights
    golden = io.BytesIO()
    np.savez(golden, inputs=inputs, **{"outputs-cpu": outputs(right)})
    return files | {"golden.npz": golden.getvalue()}


def second_best(right: np.ndarray) -> np.ndarray:
    """Answers next to the right ones, in which another class is ahead."""
    row = right.copy()
    order = row[0].argsort()
    row[0, order[-2]] = row[0, order[-1]] + 1e-3
    return row


LOOSE = {"rtol": 0.0, "atol": 100.0}


@pytest.mark.parametrize(
    ("files", "tolerance", "code"),
    [
        (with_golden(2, lambda right: right + np.float32(0.01)), None, "golden"),  # the same classes, other numbers
        (with_golden(2, second_best), LOOSE, "golden"),  # numbers within what is allowed, another class
        (with_golden(2, lambda right: right[:, :1], np.zeros((16, 3), np.float32)), LOOSE, "shape"),
    ],
    ids=["numbers", "class", "shape"],
)
def test_answers_are_compared_in_numbers_in_class_and_in_shape(
    device: Device, tmp_path: Path, files: dict[str, bytes], tolerance: dict[str, float] | None, code: str
) -> None:
    device.install(made(tmp_path, 1))

    def allow(said: dict[str, Any]) -> None:
        if tolerance is not None:
            said["variants"][0]["tolerance"] = tolerance

    with pytest.raises(Failed) as caught:
        device.install(made(tmp_path, 2, files, change=allow))
    assert caught.value.code == code
    assert active(device) == 1


@pytest.mark.parametrize("field", ["p50_ms", "p95_ms", "memory_mib", "startup_s"])
def test_every_limit_counts(device: Device, tmp_path: Path, field: str) -> None:
    with pytest.raises(Failed) as caught:
        device.install(made(tmp_path, 1, change=lambda said: said["variants"][0]["limits"].update({field: 1e-6})))
    assert caught.value.code == "limit"
    assert ("load_s" if field == "startup_s" else field) in str(caught.value)
