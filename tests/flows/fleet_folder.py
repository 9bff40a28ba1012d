"""A project of its own with keys, a registry and a repository, for tests of devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from export.bundle.content import archive, measure
from tasks.settings import settings
from tests.export.devices import made_up_bundle as made_up


@dataclass(frozen=True)
class FleetFolder:
    """Where everything is, and the key that devices trust."""

    root: Path
    key: Ed25519PrivateKey

    def bundle(self, seq: int, *, bad: bool = False, padding: int = 0) -> Path:
        """A signed bundle; a bad one has the golden answers of another network."""
        files = made_up.members(seq, padding)
        if bad:
            files["golden.npz"] = made_up.members(seq + 50)["golden.npz"]
        folder = self.root / "bundles"
        folder.mkdir(exist_ok=True)
        path = folder / f"digits-{seq}.edgepkg"
        content = b"".join(archive(measure(files)))  # byte for byte as our own reader wants it
        return made_up.write(path, files, content=content, keys=(self.key,), seq=seq, lineage=LINEAGE)


LINEAGE = {
    **{"run": "20260131T021105Z-1a2b3c4d", "mlflow_run": None, "recipe_sha256": "0" * 64, "data_sha256": "0" * 64},
    **{"teachers": {}, "commit": None, "flow_run": None},
}


@contextmanager
def fleet_folder(root: Path, **variables: str) -> Iterator[FleetFolder]:
    from export.bundle.keys import load_key
    from flows import fleet
    from flows.bundling import new_keys

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "STILLHOUSE_ROOT": str(root),
            "STILLHOUSE_HOME": str(root / ".stillhouse"),
            "STILLHOUSE_KEYS": str(root / "keys"),
            **variables,
        }.items():
            patch.setenv(name, value)
        for name in ("STILLHOUSE_MLFLOW_URI", "STILLHOUSE_FLEET", "STILLHOUSE_DEVICE_REGISTRY"):
            patch.delenv(name, raising=False)
        settings.cache_clear()
        new_keys(Console(quiet=True), settings().keys_dir, ["release"], threshold=1, unencrypted=True)
        fleet.set_up(unencrypted=True)
        yield FleetFolder(root, load_key(settings().keys_dir / "release.pem", lambda path: b""))
    settings.cache_clear()
