"""``stillhouse devices`` and ``stillhouse rollout``: the inventory, kits, what is refused, the way back."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compression.errors import ArtifactError, StillhouseError
from export.bundle.package import open_package
from export.devices.errors import DeviceError
from export.devices.kit import unpack_kit
from export.devices.registry import DeviceEntry, Rollout
from export.devices.rollout import RolloutPolicy
from flows import devices, fleet, rollouts
from flows.devices import opened
from tasks import feedback
from tests.flows.fleet_folder import FleetFolder, fleet_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetFolder]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with fleet_folder(tmp_path) as found:
        yield found


def devices_command(*words: str) -> str:
    done = CliRunner().invoke(devices.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def rollout_command(*words: str) -> str:
    done = CliRunner().invoke(rollouts.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def started(folder: FleetFolder, seq: int, state: Any = "running") -> Rollout:
    with opened() as registry:
        kept = fleet.keep_bundle(folder.bundle(seq))
        made = registry.start(model="digits", seq=seq, bundle=str(kept), policy=RolloutPolicy())
        if state != "running":
            registry.set_state(made.id, state)
        return registry.rollout(made.id)


def add(*names: str) -> None:
    with opened() as registry:
        for name in names:
            registry.add(DeviceEntry(id=name, transport="pull", secret="s"))


# --- devices ---


def test_set_up_a_second_time_changes_nothing(folder: FleetFolder) -> None:
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    assert "Everything is there" in devices_command("setup", "--unencrypted")
    assert {path: path.read_bytes() for path in before} == before


def test_private_keys_are_their_owners_alone(folder: FleetFolder) -> None:
    private = list((folder.root / "keys").rglob("*.pem"))
    assert len(private) == 6
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_setting_up_without_a_key_that_signs_bundles_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet_folder(tmp_path) as found:
        (found.root / "keys" / "trust.json").unlink()
        with pytest.raises(DeviceError, match="stillhouse keys new"):
            fleet.set_up(unencrypted=True)


def test_a_pulling_devices_kit_makes_a_device_that_trusts_our_keys(folder: FleetFolder, tmp_path: Path) -> None:
    devices_command("add", "gate-1", "--server", "http://127.0.0.1:1/")
    kit = folder.root / "gate-1-kit.tar.gz"
    assert kit.stat().st_mode & 0o777 == 0o600
    unpacked = unpack_kit(kit, tmp_path / "there")
    place = {"PREFIX": str(tmp_path / "opt"), "ROOT": str(tmp_path / "var"), "PYTHON": sys.executable}
    environment = {**os.environ, **place, "NO_SERVICES": "1"}
    for _ in range(2):  # a second time renews the agent and keeps the device
        subprocess.run(["sh", str(unpacked / "install.sh")], env=environment, check=True, capture_output=True)
    config = json.loads((tmp_path / "var" / "config.json").read_text())
    with opened() as registry:
        entry = registry.device("gate-1")
    assert config == {
        **{"device": "gate-1", "repository": "http://127.0.0.1:1", "report_to": "http://127.0.0.1:1/reports"},
        "secret": entry.secret,
    }
    done = subprocess.run(
        [tmp_path / "opt" / "agent", "install", str(folder.bundle(1))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "var" / "root.json").is_file()


def test_an_ssh_devices_kit_lets_the_operators_key_in_and_needs_the_hosts(folder: FleetFolder) -> None:
    with pytest.raises(DeviceError, match="no host key"):
        devices.add_device(
            "lab-1", ssh="10.0.0.7:22", user="u", host_key="", first=False, server="", kit=Path("k.tar.gz")
        )
    devices_command("add", "lab-1", "--ssh", "10.0.0.7:22", "--host-key", "ssh-ed25519 AAAA comment", "--first")
    with opened() as registry:
        entry = registry.device("lab-1")
    assert (entry.transport, entry.host_key, entry.first) == ("ssh", "ssh-ed25519 AAAA", True)
    with tarfile.open(folder.root / "lab-1-kit.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        member = archive.extractfile("stillhouse-agent-lab-1/authorized_keys")
        assert isinstance(member, io.BufferedReader)
        line = member.read().decode()
    assert "root.json" not in names
    assert "stillhouse-agent-poll.service" not in names
    assert line.startswith('command="@PREFIX@/agent ssh-entry",restrict ssh-ed25519 ')
    assert fleet.operator_public().split()[1] in line


def test_a_kit_is_written_again_with_the_same_secret(folder: FleetFolder, tmp_path: Path) -> None:
    devices_command("add", "gate-1")
    devices_command("kit", "gate-1", "--out", "again.tar.gz")
    kits = [unpack_kit(folder.root / name, tmp_path / name[:3]) for name in ("gate-1-kit.tar.gz", "again.tar.gz")]
    first, again = ({path.name: path.read_bytes() for path in kit.rglob("*") if path.is_file()} for kit in kits)
    assert first == again
    with pytest.raises(DeviceError, match="not in the registry"):
        devices.write_kit_of("gate-9", "", Path("x.tar.gz"))


def test_a_kit_is_never_written_over_another_nor_a_device_entered_without_one(folder: FleetFolder) -> None:
    Path("gate-1-kit.tar.gz").write_text("something else")
    with pytest.raises(StillhouseError, match="has been there before"):
        devices_command("add", "gate-1")
    with opened() as registry:
        assert registry.devices() == []


def test_devices_are_listed_with_what_they_run_and_never_their_secrets(folder: FleetFolder) -> None:
    assert "There are no devices" in devices_command()
    add("gate-1", "gate-2")
    with opened() as registry:
        active = {"name": "digits", "seq": 4, "version": "2"}
        registry.seen("gate-1", {"active": active, "facts": {"system": "linux-x86_64"}})
    shown = devices_command()
    assert re.search(r"gate-1 +pull +digits 4 +linux-x86_64 +\d+ s ago", shown)
    assert re.search(r"gate-2 +pull +- +- +never", shown)
    rows = json.loads(devices_command("--json"))
    assert [row["id"] for row in rows] == ["gate-1", "gate-2"]
    assert all("secret" not in row for row in rows)
    assert "gate-1 runs digits 4 (version 2)" in devices_command("status", "gate-1")


def test_a_removed_device_gets_no_more_orders(folder: FleetFolder) -> None:
    from export.devices.repository import Order

    add("gate-1")
    bundle = folder.bundle(1)
    fleet.open_repository().publish(bundle, {"gate-1": Order(bundle=bundle.name, name="digits", seq=1)})
    (folder.root / "keys" / "repository" / "targets.pem").rename(folder.root / "elsewhere")
    with pytest.raises(StillhouseError):
        devices_command("remove", "gate-1")
    assert "gate-1" in devices_command()  # nothing was done by halves
    (folder.root / "elsewhere").rename(folder.root / "keys" / "repository" / "targets.pem")
    devices_command("remove", "gate-1")
    assert fleet.open_repository(()).orders == {}
    assert "device removed  device=gate-1" in devices_command("log")


@pytest.mark.usefixtures("folder")
def test_a_device_is_removed_also_when_mlflow_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(device: str) -> int:
        raise ArtifactError(f"MLflow does not answer of {device}.")

    add("gate-1")
    monkeypatch.setattr(feedback, "forget", away)
    said = devices_command("remove", "gate-1")
    assert "Note: MLflow's tags name it as before. MLflow does not answer of gate-1." in said
    assert "gate-1" not in devices_command()


# --- rollouts ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("canary", "has no value"),
        ("canary=0", "Policy 'canary' has 0"),
        ("canery=1", "Policy 'canery' has 1"),
        ("shares=[0.5, 0.2]", "does not ascend"),
        ("silent=maybe", "Policy 'silent' has 'maybe'"),
    ],
)
def test_a_wrong_policy_names_the_field_and_what_it_takes(change: str, words: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(words)):
        rollouts.policy_of([change])


def test_what_needs_no_server_is_refused_without_one(folder: FleetFolder) -> None:
    stranger = folder.bundle(1)
    stranger.write_bytes(stranger.read_bytes() + b"x")
    with pytest.raises(StillhouseError, match="no devices"):
        rollouts.check_source(stranger, None)
    add("gate-1")
    for bundle, words in ((None, "has no source"), (Path("nowhere.edgepkg"), "nowhere"), (stranger, "digits-1")):
        with pytest.raises(StillhouseError, match=words):
            rollouts.check_source(bundle, None)
    rollouts.check_source(folder.bundle(2), None)


def test_changes_of_the_policy_are_read_as_yaml() -> None:
    policy = rollouts.policy_of(["shares=[0.5, 1.0]", "approve=canary", "abort_fraction=0.2"])
    assert (policy.shares, policy.approve, policy.abort_fraction) == ((0.5, 1.0), "canary", 0.2)


def test_rollouts_are_listed_paused_and_aborted(folder: FleetFolder) -> None:
    assert "There are no rollouts" in rollout_command()
    add("gate-1", "gate-2")
    made = started(folder, 1)
    assert "is paused" in rollout_command("pause", made.id[:6], "--reason", "the line is running")
    assert re.search(rf"{made.id[:8]} +digits 1 +paused", rollout_command())
    shown = rollout_command("abort", made.id[:6], "--reason", "wrong labels")
    assert "wrong labels" in shown
    assert shown.count("withdrawn") >= 2
    assert json.loads(rollout_command("--json"))[0]["state"] == "aborted"
    assert "is aborted; nothing was done" in rollout_command("resume", made.id)


def test_going_back_issues_the_content_of_the_last_good_bundle_under_a_new_number(folder: FleetFolder) -> None:
    add("gate-1")
    for seq, state in ((1, "done"), (2, "aborted"), (3, "done"), (4, "aborted")):
        started(folder, seq, state)
    path = rollouts.issue_again(devices.console, "digits", None)
    trust = fleet.open_trust()
    again = open_package(path, trust).statement
    old = open_package(fleet.bundles_folder() / "digits-3.edgepkg", trust).statement
    assert again.seq == 5
    assert again.files == old.files
    assert open_package(rollouts.issue_again(devices.console, "digits", 1), trust).statement.seq == 6


def test_going_back_to_what_is_not_there_names_what_is(folder: FleetFolder) -> None:
    with pytest.raises(DeviceError, match="has no rollouts"):
        rollouts.issue_again(devices.console, "digits", None)
    add("gate-1")
    started(folder, 1, "done")
    with pytest.raises(DeviceError, match="no bundle before to go back to, expected one of: none"):
        rollouts.issue_again(devices.console, "digits", None)
    started(folder, 2, "done")
    with pytest.raises(DeviceError, match="no bundle 7 to go back to, expected one of: 1"):
        rollouts.issue_again(devices.console, "digits", 7)


def test_a_number_belongs_to_one_content(folder: FleetFolder) -> None:
    path = folder.bundle(1)
    kept = fleet.keep_bundle(path)
    assert fleet.keep_bundle(path) == kept
    path.unlink()
    folder.bundle(1, padding=10)
    with pytest.raises(DeviceError, match="has other content"):
        fleet.keep_bundle(path)
