"""``make demo-deploy``, on a small recipe; and the parts of it that stand in for what a machine may lack."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import asyncssh
import numpy as np
import onnxruntime
import pytest
import yaml

from export.devices import push
from export.devices.registry import DeviceEntry
from flows import demo_devices
from flows.demo_deploy import failing_on_black
from flows.ports import HOST, any_port
from tests.export.devices import made_up_bundle as made_up
from tests.flows.running_up import ROOT
from tests.flows.tiny_recipe import tiny_recipe


def test_the_bad_model_answers_as_before_and_fails_on_a_black_image() -> None:
    good = made_up.net(np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32))
    sessions = [onnxruntime.InferenceSession(data) for data in (good, failing_on_black(good))]
    images = np.random.default_rng(1).normal(size=(5, 1, 4, 4)).astype(np.float32)
    images = np.concatenate([images, np.zeros_like(images[:1])])
    before, after = (session.run(None, {"images": images})[0] for session in sessions)
    np.testing.assert_array_equal(before, after)
    with pytest.raises(Exception, match="out of data bounds"):
        sessions[1].run(None, {"images": np.full((1, 1, 4, 4), -0.8, np.float32)})


@pytest.mark.parametrize("program", ["openssh", "asyncssh"])
def test_either_ssh_server_leads_into_the_agent_alone(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program == "asyncssh":
        monkeypatch.setattr(demo_devices, "SSHD", "/nowhere/sshd")
    elif not os.access(demo_devices.SSHD, os.X_OK):
        pytest.skip("OpenSSH's server is not installed (apt-get install openssh-server)")
    trust = tmp_path / "trust.json"
    trust.write_bytes(made_up.canonical(made_up.trust()))
    agent = tmp_path / "agent"
    root = tmp_path / "var"
    command = f'PYTHONPATH={ROOT} exec {sys.executable} -m export.devices.agent --root {root} "$@"'
    agent.write_text(f"#!/bin/sh\n{command}\n")
    agent.chmod(0o755)
    subprocess.run([agent, "init", "--device", "lab-1", "--trust", str(trust)], check=True, capture_output=True)
    key, port = asyncssh.generate_private_key("ssh-ed25519"), any_port()
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    host_key = demo_devices.new_host_key(tmp_path / "ssh")
    device = DeviceEntry(
        id="lab-1", transport="ssh", address=f"{HOST}:{port}", user="root" if os.geteuid() == 0 else os.environ["USER"],
        host_key=host_key,
    )  # fmt: skip
    operator = key.export_public_key("openssh").decode().strip()
    with demo_devices.ssh_server(tmp_path / "ssh", port, agent, operator) as found:
        assert program in found.lower()
        report = asyncio.run(push.push(device, made_up.write(tmp_path / "digits-1.edgepkg"), [key]))
        assert report["phase"] == "committed"
        assert asyncio.run(push.status(device, [key]))["active"]["seq"] == 1
        with pytest.raises(push.DeviceError):
            asyncio.run(push.status(device, [stranger]))


@pytest.mark.e2e
@pytest.mark.servers
@pytest.mark.timeout(600)
def test_the_demo_stops_the_bad_bundle_at_the_canary(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe()))
    mine = {"STILLHOUSE_ROOT": str(tmp_path), "PREFECT_HOME": str(tmp_path / ".stillhouse" / "prefect")}
    environment = {**os.environ, **mine, "STILLHOUSE_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    for name in ("STILLHOUSE_HOME", "STILLHOUSE_KEYS", "STILLHOUSE_FLEET", "PREFECT_API_URL"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "flows.demo_deploy", str(recipe)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("yes ") >= 3
    assert "rolled back" in done.stdout
    assert "Aborted" in done.stdout or "aborted" in done.stdout
    the_champion_can_be_bundled_and_rolled_out(tmp_path)
    left = [place for place in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(place)]
    assert left == []


def the_champion_can_be_bundled_and_rolled_out(root: Path) -> None:
    """What a promotion starts: a new bundle of the champion, or nothing where every device has it."""
    from export.bundle.package import open_package
    from export.devices.registry import Registry
    from export.devices.rollout import RolloutPolicy
    from flows import fleet
    from flows.rollout import bundle_of_champion
    from tasks import tracking
    from tasks.settings import settings

    caches = (settings, tracking.client, tracking.experiment_id)
    demo = root / ".stillhouse" / "demo-deploy"
    with pytest.MonkeyPatch.context() as patch:
        for name, place in {"ROOT": root, "KEYS": demo / "keys", "FLEET": demo / "fleet"}.items():
            patch.setenv(f"STILLHOUSE_{name}", str(place))
        for cache in caches:
            cache.cache_clear()
        registry: Registry = fleet.open_registry()
        path = bundle_of_champion(registry, "tiny")
        assert path is not None
        statement = open_package(path, fleet.open_trust()).statement
        assert (statement.name, statement.version, statement.seq) == ("tiny", "1", 3)
        made = registry.start(model="tiny", seq=3, bundle=str(path), policy=RolloutPolicy())
        for device in registry.devices():
            report = {"device": device.id, "phase": "committed", "name": "tiny", "seq": 3, "version": "1"}
            registry.receive({**report, "sha256": statement.content.sha256, "key": f"{device.id}/tiny/3"})
        registry.set_state(made.id, "done")
        assert bundle_of_champion(registry, "tiny") is None
        registry.close()
    for cache in caches:
        cache.cache_clear()


def _read(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError:
        return b""
