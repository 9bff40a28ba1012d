"""A real OpenSSH server on a free port of this machine, whose one key leads into an agent."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.export.devices.cuts import ROOT

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@dataclass(frozen=True)
class SshServer:
    folder: Path
    port: int
    host_key: str
    key: Path

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text()


def available() -> bool:
    return os.access(SSHD, os.X_OK) and shutil.which("ssh-keygen") is not None


def new_key(path: Path) -> str:
    """A key pair; the public half as ``ssh-ed25519 AAAA...``."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


@contextmanager
def ssh_server(folder: Path, agent_root: Path) -> Iterator[SshServer]:
    folder.mkdir(parents=True, exist_ok=True)
    host_key, public = new_key(folder / "host"), new_key(folder / "operator")
    start = folder / "entry.sh"
    start.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={ROOT}\n"
        f"exec {sys.executable} -m export.devices.agent --root {agent_root} ssh-entry\n"
    )
    start.chmod(0o755)
    (folder / "authorized_keys").write_text(f'command="{start}",restrict {public}\n')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile {folder / 'sshd.pid'}\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\nPasswordAuthentication no\nUsePAM no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin forced-commands-only\nLogLevel VERBOSE\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("w") as log:
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while "Server listening" not in (folder / "sshd.log").read_text():
            assert process.poll() is None, (folder / "sshd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield SshServer(folder, port, host_key, folder / "operator")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
