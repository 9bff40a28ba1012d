"""A variant for OpenVINO, installed and served by the agent; needs the extra ``openvino``."""

from pathlib import Path
from typing import Any

import pytest

from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_device import new_device

openvino: Any = pytest.importorskip("openvino")


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return new_device(tmp_path / "device")


def members(folder: Path) -> dict[str, bytes]:
    found = made_up.members()
    (folder / "model.onnx").write_bytes(found.pop("model.onnx"))
    openvino.save_model(openvino.convert_model(str(folder / "model.onnx")), str(folder / "model.xml"), False)
    return found | {name: (folder / name).read_bytes() for name in ("model.xml", "model.bin")}


def for_openvino(said: dict[str, Any]) -> None:
    said["variants"][0] |= {"runtime": "openvino", "runtime_versions": ">=2024", "file": "model.xml"}


def test_the_agent_runs_a_variant_for_openvino(device: Device, tmp_path: Path) -> None:
    bundle = made_up.write(tmp_path / "x.edgepkg", members(tmp_path), change=for_openvino)
    report = device.install(bundle)
    assert report["phase"] == "committed"
    assert report["max_abs"] < 1e-4
    assert report["p50_ms"] > 0


def test_wrong_answers_are_noticed_there_too(device: Device, tmp_path: Path) -> None:
    files = members(tmp_path) | {"golden.npz": made_up.members(7)["golden.npz"]}
    with pytest.raises(Exception, match="golden"):
        device.install(made_up.write(tmp_path / "x.edgepkg", files, change=for_openvino))
    assert device.status()["active"] is None


def test_another_version_than_the_bundle_is_for_is_refused(device: Device, tmp_path: Path) -> None:
    def older(said: dict[str, Any]) -> None:
        for_openvino(said)
        said["variants"][0]["runtime_versions"] = "<2024"

    with pytest.raises(Refused, match="runtime_versions"):
        device.install(made_up.write(tmp_path / "x.edgepkg", members(tmp_path), change=older))
