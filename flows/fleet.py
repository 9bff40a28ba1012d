"""The devices of this project: where registry, repository, bundles and keys are, and how to open them.

``<home>/devices`` holds ``registry.db``, ``repository`` (what devices pull from) and ``bundles`` (every one that was
rolled out). Keys are elsewhere, in the key folder: ``repository/<role>.pem`` and ``ssh/operator.pem`` beside the keys
that sign bundles.
"""

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.devices.errors import DeviceError
from export.devices.registry import Registry
from export.devices.repository import EXPIRY, Repository
from flows.bundling import TRUST, passphrase
from tasks.settings import settings

if TYPE_CHECKING:
    import asyncssh
    from securesystemslib.signer import CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

    from export.bundle.trust import Trust
    from export.devices.couriers import MixedCourier
    from export.devices.registry import Rollout

ONLINE = ("targets", "snapshot", "timestamp")
"""Roles whose keys a rollout needs; root's belongs into a drawer."""
SHORT_LIVED = ("snapshot", "timestamp")
OPERATOR = "operator.pem"
SETUP = "Set them up: stillhouse devices setup"


def repository_folder() -> Path:
    """What the device server serves."""
    return settings().devices_dir / "repository"


def bundles_folder() -> Path:
    """Every bundle that was rolled out, so that a fleet can go back to it."""
    return settings().devices_dir / "bundles"


def bundle_of(rollout: "Rollout") -> Path:
    """The file of a rollout, also when the project was moved since."""
    written = Path(rollout.bundle)
    return written if written.is_file() else bundles_folder() / written.name


def is_set_up() -> bool:
    """Whether there is a repository that devices may pull from."""
    return (repository_folder() / "metadata").is_dir()


def open_registry() -> Registry:
    """Devices and rollouts; close it."""
    settings().devices_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Registry(settings().device_registry_url)


def open_trust() -> "Trust":
    """Whose signatures count, for devices and so for us.

    Raises:
        BundleError: there is no trust.json.
    """
    from export.bundle.trust import read_trust

    return read_trust(settings().keys_dir / TRUST)


def open_repository(roles: Sequence[str] = ONLINE) -> Repository:
    """The repository with the keys of some roles.

    Raises:
        DeviceError: there is none.
        BundleError: a key is not there, or does not open.
    """
    if not is_set_up():
        raise DeviceError(f"Folder '{settings().devices_dir}' has no repository to pull from, expected one. {SETUP}")
    return Repository(repository_folder(), {role: [_signer(role)] for role in roles})


def _signer(role: str) -> "CryptoSigner":
    from securesystemslib.signer import CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

    from export.bundle.keys import load_key

    return CryptoSigner(load_key(settings().keys_dir / "repository" / f"{role}.pem", passphrase))


def operator_key() -> "asyncssh.SSHKey":
    """The key that hands bundles in over SSH.

    Raises:
        DeviceError: there is none, or it does not open.
    """
    import asyncssh

    path = settings().keys_dir / "ssh" / OPERATOR
    try:
        data = path.read_text(encoding="utf-8")
        secret = passphrase(path).decode() if "ENCRYPTED" in data else None
        return asyncssh.import_private_key(data, secret)
    except (OSError, asyncssh.KeyImportError) as error:
        raise DeviceError(f"Key '{path}' has not opened ({error}), expected the operator's SSH key. {SETUP}") from error


def operator_public() -> str:
    """Its public half, as authorized_keys has it."""
    return (settings().keys_dir / "ssh" / OPERATOR).with_suffix(".pub").read_text(encoding="utf-8").strip()


def set_up(*, unencrypted: bool = False) -> list[Path]:
    """Make the registry, the repository with a key for each role, and the operator's SSH key; what is there stays.

    Returns:
        The files that were made.

    Raises:
        DeviceError: devices would trust nobody.
    """
    keys, made = settings().keys_dir, []
    if not (keys / TRUST).exists():
        raise DeviceError(
            f"Folder '{keys}' has no trust.json, expected a key that signs bundles before there are devices. Make one: "
            "stillhouse keys new release"
        )
    open_registry().close()
    for role in EXPIRY:
        path = keys / "repository" / f"{role}.pem"
        if not path.exists():
            _new_key(path, unencrypted=unencrypted)
            made.append(path)
    if not is_set_up():
        Repository.new(repository_folder(), {role: [_signer(role)] for role in EXPIRY})
        made.append(repository_folder())
    path = keys / "ssh" / OPERATOR
    if not path.exists():
        _new_ssh_key(path, unencrypted=unencrypted)
        made.append(path)
    return made


def _new_key(path: Path, *, unencrypted: bool) -> None:
    from export.bundle.keys import new_key

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new_key(path, None if unencrypted else passphrase(path, confirm=True), unencrypted=unencrypted)


def _new_ssh_key(path: Path, *, unencrypted: bool) -> None:
    import asyncssh

    from export.bundle.durable import write_durably

    key = asyncssh.generate_private_key("ssh-ed25519", comment="stillhouse")
    secret = None if unencrypted else passphrase(path, confirm=True).decode()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(path, key.export_private_key("pkcs8-pem", secret), mode=0o600)
    write_durably(path.with_suffix(".pub"), key.export_public_key("openssh"))


def courier_for(registry: Registry, devices: Sequence[str]) -> "MixedCourier":
    """Who brings orders to these devices; opens only the keys that it takes. Close it.

    Raises:
        DeviceError: there is no repository, or no SSH key, for devices that need it.
    """
    from export.devices.couriers import MixedCourier, PullCourier, PushCourier

    transports = {device.transport for device in registry.devices(devices)}
    pull = PullCourier(open_repository()) if "pull" in transports else None
    return MixedCourier(pull, PushCourier(registry, [operator_key()] if "ssh" in transports else []))


def keep_bundle(file: Path) -> Path:
    """A copy of a bundle that stays, for couriers and for the day when the fleet must go back."""
    from export.bundle.durable import durable_file

    kept = bundles_folder() / file.name
    if file.resolve() == kept.resolve():
        return kept
    if kept.exists():
        if not filecmp.cmp(kept, file, shallow=False):
            raise DeviceError(
                f"Bundle '{file.name}' has other content than the one of that name that was rolled out, expected the "
                "same. A number is given once: make it again with --seq."
            )
        return kept
    with file.open("rb") as source, durable_file(kept) as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return kept
