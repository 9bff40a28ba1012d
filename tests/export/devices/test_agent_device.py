"""Install, refuse, roll back, recover: what is active afterwards, and what is said about it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.devices.agent import durable
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused
from tests.export.devices import made_up_bundle as made_up


def new_device(root: Path, **config: Any) -> Device:
    (root / "slots").mkdir(parents=True)
    durable.write_json(root / "config.json", {"device": "lab-1", **config})
    durable.write_json(root / "trust.json", made_up.trust())
    return Device(root)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return new_device(tmp_path / "device")


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    def made(seq: int, files: dict[str, bytes] | None = None, **more: Any) -> Path:
        return made_up.write(tmp_path / f"{seq}.edgepkg", files or made_up.members(seq), seq=seq, **more)

    return made


def active(device: Device) -> int | None:
    found = device.status()["active"]
    return found["seq"] if found else None


def test_the_first_bundle_becomes_the_active_one(device: Device, bundle: Callable[..., Path]) -> None:
    report = device.install(bundle(3))
    assert report["phase"] == "committed"
    assert report["p50_ms"] > 0
    assert active(device) == 3
    assert device.floor["seq"] == {"digits": 3}
    assert device.status()["last"]["key"] == "lab-1/digits/3/committed"


def test_slots_take_turns_and_older_numbers_are_refused(device: Device, bundle: Callable[..., Path]) -> None:
    slots = []
    for seq in (1, 2, 5):
        device.install(bundle(seq))
        slots.append(device.active)
    assert slots == ["a", "b", "a"]
    for seq in (1, 4):
        with pytest.raises(Refused, match="expected more than 5"):
            device.install(bundle(seq))
    with pytest.raises(Refused, match="expected more than 5"):
        device.install(bundle(5, made_up.members(99)))  # another bundle with the number of the active one
    assert device.install(bundle(5))["phase"] == "committed"  # the active one itself: nothing to do
    assert active(device) == 5


def wrong_outputs() -> dict[str, bytes]:
    return made_up.members(7) | {"golden.npz": made_up.members(8)["golden.npz"]}


def no_model() -> dict[str, bytes]:
    return made_up.members(7) | {"model.onnx": b"no model"}


def not_finite() -> dict[str, bytes]:
    return made_up.members(7) | {"model.onnx": made_up.net(np.full((16, 3), np.nan, np.float32))}


@pytest.mark.parametrize(
    ("files", "change", "code"),
    [
        (wrong_outputs, None, "golden"),
        (no_model, None, "crash"),
        (not_finite, None, "not finite"),
        (made_up.members, lambda said: said["variants"][0]["limits"].update(p50_ms=1e-6), "limit"),
        (made_up.members, lambda said: said["variants"][0]["limits"].update(memory_mib=0.01), "limit"),
    ],
)
def test_a_model_that_does_not_prove_itself_never_becomes_active(
    device: Device, bundle: Callable[..., Path], files: Callable[[], dict[str, bytes]], change: Any, code: str
) -> None:
    device.install(bundle(1))
    with pytest.raises(Failed) as caught:
        device.install(bundle(2, files(), change=change or (lambda said: None)))
    assert caught.value.code == code
    assert active(device) == 1
    assert device.floor["seq"] == {"digits": 1}
    with pytest.raises(Refused, match="refused before"):
        device.install(bundle(2, files(), change=change or (lambda said: None)))
    assert not device.slot("b").exists()
    phases = [json.loads(path.read_text())["phase"] for path in device.reports()]
    assert phases == ["committed", "refused"]


def test_a_model_that_fails_after_the_swap_is_rolled_back(
    device: Device, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device.install(bundle(1))

    def probe(digest: str) -> dict[str, Any]:
        assert active(device) == 2  # it is in place when the server is asked
        raise Failed("serving", "The server does not serve it.")

    monkeypatch.setattr(device, "_probe", probe)
    with pytest.raises(Failed):
        device.install(bundle(2))
    assert active(device) == 1
    assert device.status()["last"]["phase"] == "rolled back"
    assert device.status()["last"]["rollback_s"] < 5


def test_asked_for_it_goes_back_to_the_model_before(device: Device, bundle: Callable[..., Path]) -> None:
    device.install(bundle(1))
    with pytest.raises(Refused, match="other slot"):
        device.roll_back("nobody likes it")
    device.install(bundle(2))
    device.roll_back("nobody likes it")
    assert active(device) == 1
    assert device.floor["seq"] == {"digits": 2}
    with pytest.raises(Refused):
        device.install(bundle(2))
    device.install(bundle(3))
    assert active(device) == 3


def test_a_damaged_slot_is_not_gone_back_to(device: Device, bundle: Callable[..., Path]) -> None:
    device.install(bundle(1))
    device.install(bundle(2))
    (device.slot("a") / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(Refused, match="other bytes"):
        device.roll_back("try it")
    assert active(device) == 2


@pytest.mark.parametrize("tries", [1, 2])
def test_a_trial_that_was_cut_short_is_made_once_more_and_then_given_up(
    device: Device, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    device.install(bundle(1))

    def cut(digest: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "_probe", cut)
    with pytest.raises(KeyboardInterrupt):
        device.install(bundle(2))
    if tries == 2:
        with pytest.raises(KeyboardInterrupt):
            device.recover()
    again = Device(device.root)
    again.recover()
    assert active(again) == (2 if tries == 1 else 1)
    assert again.journal["state"] == "idle"
    assert again.status()["last"]["phase"] == ("committed" if tries == 1 else "rolled back")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("isa", "arm", "isa is x86, expected arm"),
        ("system", "linux-riscv64", "expected linux-riscv64"),
        ("compute_capability", "SM87", "compute_capability is None, expected SM87"),
        ("runtime_versions", ">=99", "expected >=99"),
        ("cpu_features", ["dot_product"], "expected ['dot_product']"),
        ("min_memory_mib", 10**9, "at least 1000000000"),
        ("runtime", "tensorrt", "no tensorrt"),
    ],
)
def test_a_bundle_for_other_devices_is_refused_with_the_field_that_differs(
    device: Device, bundle: Callable[..., Path], field: str, value: Any, says: str
) -> None:
    device.config["facts"] = {"isa": "x86", "compute_capability": None, "cpu_features": [], "memory_mib": 4096}

    def other(said: dict[str, Any]) -> None:
        said["variants"][0][field] = value

    with pytest.raises(Refused) as caught:
        device.install(bundle(1, change=other))
    assert caught.value.code == "device"
    assert says in str(caught.value)
    (waiting,) = device.reports()
    assert json.loads(waiting.read_text())["code"] == "device"  # whoever ordered it is told
    assert active(device) is None


def test_the_first_variant_that_fits_is_taken(device: Device, bundle: Callable[..., Path]) -> None:
    def two(said: dict[str, Any]) -> None:
        (cpu,) = said["variants"]
        engine = {**cpu, "id": "gpu", "compute_capability": "SM87", "rebuild_from": None}
        said["variants"] = [engine, cpu]

    assert device.install(bundle(1, change=two))["variant"] == "cpu"


def test_an_expired_bundle_is_refused_whatever_the_clock_says(
    device: Device, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device.install(bundle(1, created="2026-06-01T00:00:00Z"))
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock without battery says 1970
    with pytest.raises(Refused, match="was to be installed until"):
        device.install(bundle(2, created="2026-01-01T00:00:00Z", not_after="2026-05-01T00:00:00Z"))
    assert device.install(bundle(3, created="2026-06-02T00:00:00Z", not_after="2026-07-01T00:00:00Z"))
    assert device.status()["clock_skew_s"] > 10**9


def test_a_clock_far_ahead_refuses_what_expires_and_harms_nothing(
    device: Device, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: 2e9)
        with pytest.raises(Refused, match="until"):
            device.install(bundle(1, not_after="2027-01-01T00:00:00Z"))
        device.install(bundle(2))
    assert device.install(bundle(3, not_after="2099-01-01T00:00:00Z"))["phase"] == "committed"


def test_without_room_nothing_is_written(
    device: Device, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device.install(bundle(1))
    monkeypatch.setattr("shutil.disk_usage", lambda place: os.statvfs_result([0] * 10) and _Usage())
    with pytest.raises(Refused, match="Free some space"):
        device.install(bundle(2))
    monkeypatch.undo()
    assert active(device) == 1
    assert device.install(bundle(2))["phase"] == "committed"


class _Usage:
    free = 1000


def test_a_server_that_keeps_crashing_is_given_the_model_before(device: Device, bundle: Callable[..., Path]) -> None:
    device.install(bundle(1))
    device.install(bundle(2))
    assert [device.crashed() for _ in range(4)] == [False, False, False, True]
    assert active(device) == 1
    assert device.crashed() is False


def test_starts_after_an_orderly_end_are_no_crashes(device: Device, bundle: Callable[..., Path]) -> None:
    device.install(bundle(1))
    device.install(bundle(2))
    for _ in range(6):
        assert device.crashed() is False
        device.ran_well()
    assert active(device) == 2


def test_reports_wait_in_order_until_they_are_delivered(device: Device, bundle: Callable[..., Path]) -> None:
    for seq in (1, 2, 3):
        device.install(bundle(seq))
    got: list[int] = []

    def deliver(report: dict[str, Any]) -> None:
        if report["seq"] == 2 and not got.count(2) and len(got) == 1 and not getattr(deliver, "failed", False):
            deliver.failed = True  # type: ignore[attr-defined]
            raise ConnectionError
        got.append(report["seq"])

    with pytest.raises(ConnectionError):
        device.send(deliver)
    assert len(device.reports()) == 2
    device.send(deliver)
    assert got == [1, 2, 3]
    assert device.reports() == []
