"""The TUF repository that devices pull from: bundles, and for each device an order which one it shall have.

Four roles with keys of their own (TUF 1.0): ``root`` (offline, several of several), ``targets`` (whoever may order a
device), ``snapshot`` and ``timestamp`` (online, short-lived). The files are static: any web server serves them.
"""

# pyright: reportPrivateImportUsage=false

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from compression.types import Frozen
from export.devices.errors import DeviceError

EXPIRY = {
    "root": timedelta(days=365),
    "targets": timedelta(days=90),
    "snapshot": timedelta(days=14),
    "timestamp": timedelta(days=3),
}
"""How long a role's metadata are good. A device that is off for longer than the last takes nothing until it is signed
anew; it goes on with what it has."""


class Order(Frozen):
    """What one device shall have."""

    bundle: str
    """Name of the file in the repository."""
    name: str
    """The model's name."""
    seq: int
    """The bundle's number."""


class Repository:
    """A folder with ``metadata`` and ``targets``, as ``tuf`` clients read them.

    Args:
        folder: Where it lies.
        signers: Role -> keys that sign for it. Those that are not at hand may be absent as long as the role does not
            change: publishing asks for targets, snapshot and timestamp.
    """

    def __init__(self, folder: Path, signers: Mapping[str, Sequence[CryptoSigner]]) -> None:
        self.folder, self.signers = folder, signers

    @classmethod
    def new(
        cls, folder: Path, signers: Mapping[str, Sequence[CryptoSigner]], *, root_threshold: int = 1
    ) -> "Repository":
        """An empty repository; ``metadata/1.root.json`` is what devices are given at first.

        Raises:
            DeviceError: there is one already, or keys for a role are absent.
        """
        if (folder / "metadata").exists():
            raise DeviceError(f"Folder '{folder}' has a repository already, expected none. Use it, or another folder.")
        absent = [role for role in EXPIRY if not signers.get(role)]
        if absent:
            raise DeviceError(f"Repository '{folder}' has no key for {', '.join(absent)}, expected one for each role.")
        for place in ("metadata", "targets"):
            (folder / place).mkdir(parents=True)
        made = cls(folder, signers)
        root = Root(expires=_expiry("root"), consistent_snapshot=True)
        for role in EXPIRY:
            for signer in signers[role]:
                root.add_key(signer.public_key, role)
        root.roles["root"].threshold = root_threshold
        made._write("root", Metadata(root))
        targets, snapshot = Targets(expires=_expiry("targets")), Snapshot(expires=_expiry("snapshot"))
        made._write("targets", Metadata(targets))
        made._write("snapshot", Metadata(snapshot))
        made._write("timestamp", Metadata(Timestamp(expires=_expiry("timestamp"))))
        return made

    @property
    def orders(self) -> dict[str, Order]:
        """Device -> what it shall have."""
        found = {}
        for path in self._read("targets").signed.targets:
            if path.startswith("devices/"):
                found[path.removeprefix("devices/").removesuffix(".json")] = self._order(path)
        return found

    def _order(self, path: str) -> Order:
        info = self._read("targets").signed.targets[path]
        return Order.model_validate_json(self._place(path, info.hashes["sha256"]).read_bytes())

    @property
    def bundles(self) -> set[str]:
        """Names of the bundles that devices can fetch."""
        return {path for path in self._read("targets").signed.targets if not path.startswith("devices/")}

    @property
    def expiries(self) -> dict[str, datetime]:
        """Role -> until when devices take its metadata."""
        return {role: self._read(role).signed.expires for role in EXPIRY}

    def publish(self, bundle: Path | None = None, orders: Mapping[str, Order | None] | None = None) -> None:
        """Add a bundle and change orders (None takes one back), in one step that devices see whole or not at all.

        Raises:
            DeviceError: an order names a bundle that is not there.
        """
        with self._locked():
            self._publish(bundle, orders or {})

    def _publish(self, bundle: Path | None, orders: Mapping[str, Order | None]) -> None:
        targets = self._read("targets")
        if bundle is not None:
            self._add(targets.signed, bundle.name, bundle)
        for device, order in orders.items():
            path = f"devices/{device}.json"
            if order is None:
                targets.signed.targets.pop(path, None)
                continue
            if order.bundle not in targets.signed.targets:
                raise DeviceError(f"Repository '{self.folder}' has no '{order.bundle}', expected it to be published.")
            file = self.folder / f".{device}.json"
            file.write_text(json.dumps(order.model_dump(), sort_keys=True), encoding="utf-8")
            self._add(targets.signed, path, file)
            file.unlink()
        self._bump("targets", targets)
        self._refresh()

    def refresh(self) -> None:
        """Sign snapshot and timestamp anew, for what the targets are now. To be done before the timestamp expires."""
        with self._locked():
            self._refresh()

    def _refresh(self) -> None:
        targets, snapshot = self._read("targets"), self._read("snapshot")
        if self.signers.get("targets") and _is_old(targets, "targets"):
            self._bump("targets", targets)
        version = targets.signed.version
        if snapshot.signed.meta["targets.json"].version != version or _is_old(snapshot, "snapshot"):
            snapshot.signed.meta["targets.json"] = MetaFile(version=version)
            self._bump("snapshot", snapshot)
        timestamp = self._read("timestamp")
        timestamp.signed.snapshot_meta = MetaFile(version=self._read("snapshot").signed.version)
        self._bump("timestamp", timestamp)

    def rotate_root(
        self,
        signers: Mapping[str, Sequence[CryptoSigner]],
        before: Sequence[CryptoSigner],
        *,
        root_threshold: int | None = None,
    ) -> None:
        """Other keys for some roles; signed by the root keys of before and of after.

        Args:
            signers: Role -> its keys from now on; roles that are absent keep theirs.
            before: Root keys of before, enough of them.
            root_threshold: How many root keys are needed from now on.
        """
        root = deepcopy(self._read("root"))
        for role, keys in signers.items():
            for key_id in list(root.signed.roles[role].keyids):
                root.signed.revoke_key(key_id, role)
            for signer in keys:
                root.signed.add_key(signer.public_key, role)
        if root_threshold is not None:
            root.signed.roles["root"].threshold = root_threshold
        self.signers = {**self.signers, **signers}
        root.signed.version += 1
        root.signed.expires = _expiry("root")
        root.signatures.clear()
        for signer in [*before, *self.signers["root"]]:
            root.sign(signer, append=True)
        with self._locked():
            self._store("root", root)
            for role in ("targets", "snapshot"):
                if role in signers:
                    self._bump(role, self._read(role))
            self._refresh()

    # --- files ---

    def _locked(self) -> FileLock:
        """A rollout publishes while the device server signs anew."""
        return FileLock(self.folder / ".lock")

    def _add(self, targets: Targets, path: str, file: Path) -> None:
        info = TargetFile.from_file(path, str(file), ["sha256"])
        place = self._place(path, info.hashes["sha256"])
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            aside = place.with_name(f".{place.name}.new")
            shutil.copyfile(file, aside)
            aside.replace(place)
        targets.targets[path] = info

    def _place(self, path: str, digest: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self.folder / "targets" / folder / f"{digest}.{name}"

    def _read(self, role: str) -> Metadata:
        folder = self.folder / "metadata"
        if role == "timestamp":
            return Metadata.from_file(str(folder / "timestamp.json"))
        newest = max(int(path.name.partition(".")[0]) for path in folder.glob(f"*.{role}.json"))
        return Metadata.from_file(str(folder / f"{newest}.{role}.json"))

    def _bump(self, role: str, metadata: Metadata) -> None:
        metadata.signed.version += 1
        metadata.signed.expires = _expiry(role)
        self._write(role, metadata)

    def _write(self, role: str, metadata: Metadata) -> None:
        signers = self.signers.get(role)
        if not signers:
            raise DeviceError(f"Repository '{self.folder}' has no key for role '{role}' at hand, expected one.")
        metadata.signatures.clear()
        for signer in signers:
            metadata.sign(signer, append=True)
        self._store(role, metadata)

    def _store(self, role: str, metadata: Metadata) -> None:
        folder = self.folder / "metadata"
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        aside = folder / f".{name}.new"
        with aside.open("wb") as file:
            file.write(metadata.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / name)


def _expiry(role: str) -> datetime:
    return (datetime.now(UTC) + EXPIRY[role]).replace(microsecond=0)


def _is_old(metadata: Metadata, role: str) -> bool:
    """Whether half of its time is over."""
    return metadata.signed.expires - datetime.now(UTC) < EXPIRY[role] / 2
