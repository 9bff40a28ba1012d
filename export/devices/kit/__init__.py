"""One archive that makes a machine a device: the agent, the keys it trusts, its settings, a script and its services."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from export.bundle.durable import durable_file
from export.devices.registry import DeviceEntry

HERE = Path(__file__).parent
AGENT = HERE.parent / "agent"
PACKAGE = "stillhouse_agent"
REQUIREMENTS = ("onnxruntime>=1.18", "numpy", "cryptography>=42")
README = """\
Makes a machine the device '{name}' of Stillhouse. As root:

    ./install.sh          # Variables at the top of the script say where things go.

Afterwards: /opt/stillhouse-agent/agent status
This folder holds what proves the device's reports: delete it when the device is set up.
"""


def write_kit(
    path: Path, device: DeviceEntry, *, trust: bytes, root: bytes | None = None, server: str = "", operator: str = ""
) -> Path:
    """Write the archive; only its owner can read it, since it holds the device's secret.

    Args:
        path: The ``.tar.gz`` to write; never over another file.
        device: Whom it is for.
        trust: ``trust.json``, whose keys sign bundles.
        root: The repository's root metadata, for devices that pull.
        server: Address of the device server, for devices that pull.
        operator: Public key that may hand bundles in, as ``ssh-ed25519 AAAA...``, for devices of transport ssh.
    """
    config: dict[str, Any] = {"device": device.id}
    pulls = device.transport == "pull"
    if pulls:
        base = server.rstrip("/")
        config |= {"repository": base, "report_to": f"{base}/reports", "secret": device.secret}
    files = {
        "README.txt": README.format(name=device.id).encode(),
        "config.json": json.dumps(config, indent=1).encode(),
        "trust.json": trust,
        "requirements.txt": "\n".join([*REQUIREMENTS, *(["tuf>=6"] if pulls else []), ""]).encode(),
        "install.sh": (HERE / "install.sh").read_bytes(),
        "stillhouse-agent-serve.service": (HERE / "stillhouse-agent-serve.service").read_bytes(),
    }
    if pulls and root is not None:
        files |= {"root.json": root}
        files |= {"stillhouse-agent-poll.service": (HERE / "stillhouse-agent-poll.service").read_bytes()}
    if operator:
        files["authorized_keys"] = f'command="@PREFIX@/agent ssh-entry",restrict {operator} operator\n'.encode()
    for source in sorted(AGENT.glob("*.py")):
        files[f"{PACKAGE}/{source.name}"] = source.read_bytes()
    with durable_file(path, mode=0o600) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"stillhouse-agent-{device.id}/{name}")
            member.size, member.mode = len(content), 0o755 if name.endswith(".sh") else 0o600
            archive.addfile(member, io.BytesIO(content))
    return path


def unpack_kit(path: Path, folder: Path) -> Path:
    """The folder that an archive of ``write_kit`` unpacks to, below ``folder``."""
    shutil.unpack_archive(path, folder, "gztar", filter="data")
    return next(folder.glob("stillhouse-agent-*"))
