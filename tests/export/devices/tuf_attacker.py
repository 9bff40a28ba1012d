"""Whoever has the web server, and some of the keys: writes any metadata into a repository, signed by any keys.

What the attacker wants is that the device installs bundle 66. It is signed by a key that devices trust, so only the
metadata stand in the way. Nothing of it may be seen on the device, and afterwards the honest repository, with other
keys for the roles whose keys were stolen, must be followed again.
"""

# pyright: reportPrivateImportUsage=false

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from export.devices.agent import package, pull, selftest
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused
from export.devices.repository import Repository
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_pull import Fleet, served

ONLINE = ("targets", "snapshot", "timestamp")
EVIL = 66

Change = Callable[[Metadata], None]


def stranger() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def past(days: int = 1) -> datetime:
    return (datetime.now(UTC) - timedelta(days=days)).replace(microsecond=0)


def self_test_here(slot: Path, threads: int = 0) -> dict[str, Any]:
    """The self-test without a process of its own, whose start is most of what an installation takes."""
    found = selftest.measure(slot.resolve(), threads)
    if found.get("code"):
        raise Failed(found["code"], found["text"])
    return found


class CopiedFleet(Fleet):
    """A fleet as another one was, in another folder that its server serves from now on."""

    def __init__(self, like: Fleet, folder: Path) -> None:
        shutil.copytree(like.folder, folder, symlinks=True, dirs_exist_ok=True)
        self.folder, self.web, self.keys = folder, like.web, like.keys
        self.repository = Repository(folder / "repository", like.keys)
        self.device = Device(folder / "device")
        self.web.folder, self.web.mutate = folder / "repository", staticmethod(lambda path, data: data)
        self.web.cuts.clear()
        self.web.sent.clear()


def fleet_with_bundle_2(folder: Path) -> Iterator[tuple[Fleet, dict[str, bytes]]]:
    """A fleet whose device has taken bundles 1 and 2, and its repository as it was before the second."""
    (folder / "repository").mkdir()
    with served(folder / "repository") as (address, web), pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "try_out", self_test_here)
        fleet = Fleet(folder, address, web)
        fleet.order(1)
        assert pull.poll(fleet.device)["phase"] == "committed"
        older = files(fleet.folder / "repository")
        fleet.order(2)
        assert pull.poll(fleet.device)["phase"] == "committed"
        yield fleet, older


def copied(start: tuple[Fleet, dict[str, bytes]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Attacker":
    """An attacker of a copy, whose device tests itself in this process and does not wait between attempts."""
    monkeypatch.setattr(selftest, "try_out", self_test_here)
    monkeypatch.setattr(pull, "PAUSES", (0.001,))
    return Attacker(CopiedFleet(start[0], folder), start[1])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Attacker:
    """A device that has bundle 2, its repository, and what is done to that repository."""

    def __init__(self, fleet: Fleet, older: dict[str, bytes]) -> None:
        self.fleet, self.device, self.older = fleet, fleet.device, older
        self.repository = fleet.folder / "repository"
        self.metadata, self.targets = self.repository / "metadata", self.repository / "targets"
        self.honest = self.files()
        self.signers: dict[str, Sequence[CryptoSigner]] = dict(fleet.keys)
        """What metadata are signed with; to be changed before ``publish``."""

    # --- the repository ---

    def files(self) -> dict[str, bytes]:
        return files(self.repository)

    def restore(self, files: Mapping[str, bytes], only: str = "") -> None:
        """Serve these files instead; ``only``: those whose name ends so, and leave the others."""
        for name in self.files():
            if name.endswith(only):
                (self.repository / name).unlink()
        for name, content in files.items():
            if name.endswith(only):
                (self.repository / name).write_bytes(content)

    def path(self, role: str) -> Path:
        """The newest file of a role."""
        if role == "timestamp":
            return self.metadata / "timestamp.json"
        return max(self.metadata.glob(f"*.{role}.json"), key=lambda path: int(path.name.partition(".")[0]))

    def read(self, role: str) -> Metadata:
        return Metadata.from_file(str(self.path(role)))

    def place(self, role: str, version: int) -> Path:
        return self.metadata / ("timestamp.json" if role == "timestamp" else f"{version}.{role}.json")

    def store(self, role: str, metadata: Metadata, signers: Sequence[CryptoSigner], version: int | None = None) -> None:
        """Sign and write; ``version``: as a file of that version, whatever its content says."""
        metadata.signatures.clear()
        for signer in signers:
            metadata.sign(signer, append=True)
        self.place(role, version or metadata.signed.version).write_bytes(metadata.to_bytes())

    def edit(self, role: str, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of the newest file of a role."""
        path = self.path(role)
        path.write_bytes(change(path.read_bytes()))

    def put(self, path: str, content: bytes, **fields: Any) -> Change:
        """Store a target; the change that lists it, with some fields of what is said about it replaced."""
        info = TargetFile.from_data(path, content, ["sha256"])
        for field, value in fields.items():
            setattr(info, field, value)
        if package.path_is_plain(path):
            folder, _, name = path.rpartition("/")
            place = self.targets / folder / f"{next(iter(info.hashes.values()))}.{name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        return lambda targets: targets.signed.targets.update({path: info})

    def order_evil(self, targets: Metadata) -> None:
        """List bundle 66, and order this device to have it."""
        bundle = f"digits-{EVIL}.edgepkg"
        path = made_up.write(self.fleet.folder / "evil.edgepkg", made_up.members(EVIL), seq=EVIL)
        self.put(bundle, path.read_bytes())(targets)
        order = made_up.canonical({"bundle": bundle, "name": "digits", "seq": EVIL})
        self.put("devices/lab-1.json", order)(targets)

    def publish(self, changes: Mapping[str, Change] | None = None, first: str = "targets") -> None:
        """Targets with the attacker's order, and the snapshot and the timestamp that follow.

        Each is changed by what is given for its role before it is signed; for targets, instead of the order. Roles
        before the first one stay as they are.
        """
        changes = {"targets": self.order_evil, **(changes or {})}
        versions = {role: self.read(role).signed.version for role in ONLINE}
        for role in ONLINE[ONLINE.index(first) :]:
            metadata = self.read(role)
            metadata.signed.version += 1
            if role == "snapshot":
                metadata.signed.meta["targets.json"] = MetaFile(versions["targets"])
            if role == "timestamp":
                metadata.signed.snapshot_meta = MetaFile(versions["snapshot"])
            if role in changes:
                changes[role](metadata)
            versions[role] = metadata.signed.version
            self.store(role, metadata, self.signers[role])

    def rotate(self, *roles: str) -> None:
        """What the owner does when keys are stolen."""
        if roles:
            self.fleet.repository.rotate_root({role: [stranger()] for role in roles}, self.fleet.keys["root"][:2])

    # --- the device ---

    def picture(self) -> dict[str, Any]:
        """All that an attack must not change: what runs, what is trusted, and which other files there are."""
        root, found = self.device.root, {}
        own = (self.repository, root / "metadata", root / "inbox", root / "reports")
        for path in self.fleet.folder.rglob("*"):
            if path.is_file() and not any(path.is_relative_to(folder) for folder in own):
                fixed = path.is_relative_to(root / "slots") or path.name in ("trust.json", "root.json", "config.json")
                found[str(path.relative_to(self.fleet.folder))] = path.read_bytes() if fixed else None
        for name in ("device/tried.json", "device/refused.json"):
            found.pop(name, None)
        return found | {"current": self.device.active, "seq": self.device.floor["seq"]}

    def must_fail(self, says: str) -> None:
        """Refused for that reason, and nothing of it is left; asked once more, it is not taken either."""
        before = self.picture()
        with pytest.raises(Refused, match=says):
            pull.poll(Device(self.device.root), patience_s=0.1)
        assert self.picture() == before
        try:
            again = str(pull.poll(Device(self.device.root), patience_s=0.1)["text"])
        except Refused as error:
            again = str(error)
        assert re.search(f"{says}|was tried here, and is not taken", again), again
        assert self.picture() == before
        assert self.fleet.active() == 2
        assert self.device.journal["state"] == "idle"
        assert list((self.device.root / "inbox").glob("*.edgepkg")) == []

    def must_recover(self, *stolen: str) -> None:
        """The honest repository is back, stolen keys are replaced: the device takes the next bundle."""
        self.fleet.web.mutate = staticmethod(lambda path, data: data)
        self.restore(self.honest)
        self.rotate(*stolen)
        self.fleet.order(3)
        assert pull.poll(Device(self.device.root))["phase"] == "committed"
        assert self.fleet.active() == 3


@dataclass(frozen=True)
class Attack:
    """What is done, what the refusal must say, and the roles whose keys it needs."""

    act: Callable[[Attacker], None]
    says: str
    stolen: tuple[str, ...] = ()
    slow: bool = False


# --- kinds of attacks ---


GARBAGE = {
    "cut_short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "nested": lambda data: b"[" * 9000,
    "of_another_kind_of_json": lambda data: b"[1, 2]",
    "not_utf_8": lambda data: b"\xff\xfe" + data,
    "with_an_endless_number": lambda data: data.replace(b'"version":', b'"version":' + b"9" * 9000, 1),
    "with_a_flipped_bit": lambda data: data.replace(b"-", b",", 1),
}


def garbage(role: str, change: Callable[[bytes], bytes]) -> Callable[[Attacker], None]:
    def act(attacker: Attacker) -> None:
        attacker.publish()
        attacker.edit(role, change)

    return act


def resigned(role: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Attacker], None]:
    """The list of signatures, changed."""

    def act(attacker: Attacker) -> None:
        attacker.publish()
        content = json.loads(attacker.path(role).read_bytes())
        change(content)
        attacker.path(role).write_bytes(json.dumps(content).encode())

    return act


def signatures(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["signatures"][0].update(fields)


def signed_by(role: str, other: str) -> Callable[[Attacker], None]:
    def act(attacker: Attacker) -> None:
        attacker.signers[role] = attacker.fleet.keys[other] if other else [stranger()]
        attacker.publish()

    return act


def of_type(role: str, other: str) -> Callable[[Attacker], None]:
    """What the keys of a role have signed, but it is the content of another role."""

    def act(attacker: Attacker) -> None:
        attacker.publish()
        wrong = attacker.read(other)
        attacker.store(role, wrong, attacker.fleet.keys[role], attacker.read(role).signed.version)

    return act


def changed(role: str, change: Change) -> Callable[[Attacker], None]:
    def act(attacker: Attacker) -> None:
        attacker.publish({role: both(attacker.order_evil, change) if role == "targets" else change})

    return act


def both(one: Change, other: Change) -> Change:
    def change(metadata: Metadata) -> None:
        one(metadata)
        other(metadata)

    return change


def fields(**values: Any) -> Change:
    def change(metadata: Metadata) -> None:
        for name, value in values.items():
            setattr(metadata.signed, name, value)

    return change


def refers(file: str, **values: Any) -> Change:
    """The reference to another file, with some fields replaced."""

    def change(metadata: Metadata) -> None:
        signed = metadata.signed
        meta: MetaFile = signed.snapshot_meta if file == "snapshot.json" else signed.meta[file]
        for name, value in values.items():
            setattr(meta, name, value)

    return change


def padded(size: int) -> Change:
    return lambda metadata: metadata.signed.unrecognized_fields.update(padding="x" * size)


def of_version(role: str, by: int) -> Callable[[Attacker], None]:
    """The file has the name of one version, and another one in it."""

    def act(attacker: Attacker) -> None:
        attacker.publish()
        metadata = attacker.read(role)
        metadata.signed.version += by
        attacker.store(role, metadata, attacker.fleet.keys[role], metadata.signed.version - by)

    return act


def absent(role: str) -> Callable[[Attacker], None]:
    def act(attacker: Attacker) -> None:
        attacker.publish()
        attacker.path(role).unlink()

    return act


def older_file(role: str) -> Callable[[Attacker], None]:
    """An older file under the name of the newest."""

    def act(attacker: Attacker) -> None:
        before = sorted(attacker.metadata.glob(f"*.{role}.json"))[0].read_bytes()
        attacker.publish()
        attacker.edit(role, lambda data: before)

    return act


def sent(ending: str, change: Callable[[bytes], bytes]) -> Callable[[Attacker], None]:
    """The honest repository has something new, and the web server sends something else."""

    def act(attacker: Attacker) -> None:
        attacker.fleet.order(3)
        attacker.honest = attacker.files()
        attacker.fleet.web.mutate = staticmethod(lambda path, data: change(data) if path.endswith(ending) else data)

    return act


def not_there(ending: str) -> Callable[[Attacker], None]:
    def act(attacker: Attacker) -> None:
        attacker.publish()
        for path in attacker.targets.rglob(f"*.{ending}"):
            path.unlink()

    return act


def ordered(content: bytes | Any, **changes: Any) -> Callable[[Attacker], None]:
    def act(attacker: Attacker) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()

        def change(targets: Metadata) -> None:
            attacker.order_evil(targets)
            attacker.put("devices/lab-1.json", data, **changes)(targets)

        attacker.publish({"targets": change})

    return act


def listed(**changes: Any) -> Callable[[Attacker], None]:
    """The attacker's bundle, with something else said about it."""

    def act(attacker: Attacker) -> None:
        def change(targets: Metadata) -> None:
            attacker.order_evil(targets)
            info = targets.signed.targets[f"digits-{EVIL}.edgepkg"]
            for name, value in changes.items():
                setattr(info, name, value)

        attacker.publish({"targets": change})

    return act


def evil_bundle(data: bytes) -> bytes:
    """As good as bundle 3: signed, and of the same length."""
    members = made_up.members(EVIL)
    content = made_up.archive(members)
    signed = made_up.envelope(made_up.statement(members, content, seq=3))
    return b"EDGEPKG1" + len(signed).to_bytes(4, "big") + signed + content


def committed(attacker: Attacker, seq: int) -> None:
    assert pull.poll(Device(attacker.device.root))["phase"] == "committed"
    assert attacker.fleet.active() == seq


def lose_copies(attacker: Attacker) -> None:
    """As a power cut may take what tuf does not flush."""
    for path in (attacker.device.root / "metadata").rglob("*.json"):
        path.unlink()
