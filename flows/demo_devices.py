"""Devices on this machine for ``make demo-deploy``: each a folder of its own with the agent from its kit.

One gets its bundles over SSH, from OpenSSH's server where it is installed, else from asyncssh's; the others pull.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from compression.errors import StillhouseError
from export.devices.kit import unpack_kit
from flows import children
from flows.children import Child
from flows.ports import HOST, any_port
from tasks.settings import SOURCE_ROOT

START_SECONDS = 60.0
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@dataclass
class LocalDevice:
    """One device: its folder, and the processes of its agent."""

    name: str
    folder: Path
    processes: list[Child] = field(default_factory=list)

    @property
    def agent(self) -> Path:
        """The agent's program."""
        return self.folder / "opt" / "agent"

    @property
    def root(self) -> Path:
        """Where the agent keeps everything."""
        return self.folder / "var"

    def install(self, kit: Path) -> None:
        """Unpack a kit and run its install.sh, with this Python instead of a new environment."""
        unpacked = unpack_kit(kit, self.folder)
        more = {"PREFIX": str(self.agent.parent), "ROOT": str(self.root), "PYTHON": sys.executable, "NO_SERVICES": "1"}
        command = ["sh", str(unpacked / "install.sh")]
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StillhouseError(f"Kit '{kit.name}' was not installed: {done.stderr[-500:]}")
        shutil.rmtree(unpacked)

    def start(self, *command: str) -> None:
        """Run one of the agent's commands until the device ends."""
        program = [str(self.agent), *command]
        log = self.folder / f"{command[0]}.log"
        self.processes.append(children.start(self.name, program, environment=os.environ, folder=self.folder, log=log))

    def ask(self, path: str, body: Any = None) -> dict[str, Any]:
        """What the device's server answers, whatever its status."""
        place = self.root / "serving.json"
        deadline = time.monotonic() + START_SECONDS
        while not place.exists():
            if time.monotonic() > deadline:
                raise StillhouseError(f"Device '{self.name}' does not serve; see {self.folder / 'serve.log'}.")
            time.sleep(0.1)
        port = json.loads(place.read_text(encoding="utf-8"))["port"]
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}{path}", data, timeout=20) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def end(self) -> None:
        """End the agent."""
        children.end(self.processes)


def new_host_key(folder: Path) -> str:
    """A host key for an SSH server; its public half as the registry wants it."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "host"
    path.write_bytes(key.export_private_key("openssh"))
    path.chmod(0o600)
    return " ".join(key.export_public_key("openssh").decode().split()[:2])


@contextmanager
def ssh_server(folder: Path, port: int, agent: Path, operator: str) -> Iterator[str]:
    """A server at which one key leads into the agent, and nowhere else; says which program it is."""
    (folder / "authorized_keys").write_text(f'command="{agent} ssh-entry",restrict {operator}\n', encoding="utf-8")
    (folder / "authorized_keys").chmod(0o600)
    if os.access(SSHD, os.X_OK):
        with _openssh(folder, port):
            yield "OpenSSH"
    else:
        with _asyncssh(folder, port, agent, operator):
            yield "asyncssh, since OpenSSH's server is not installed"


@contextmanager
def _openssh(folder: Path, port: int) -> Iterator[None]:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    lines = [f"Port {port}", f"ListenAddress {HOST}", f"HostKey {folder / 'host'}", f"PidFile {folder / 'sshd.pid'}"]
    lines += [f"AuthorizedKeysFile {folder / 'authorized_keys'}", "StrictModes no", "PasswordAuthentication no"]
    lines += ["KbdInteractiveAuthentication no", "UsePAM no", "PermitRootLogin forced-commands-only", ""]
    (folder / "sshd_config").write_text("\n".join(lines), encoding="utf-8")
    command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    with _running("OpenSSH server", command, folder, port):
        yield


@contextmanager
def _asyncssh(folder: Path, port: int, agent: Path, operator: str) -> Iterator[None]:
    """Whatever is asked for, the agent gets it: asyncssh forgets what that was where the key has a command."""
    (folder / "authorized_keys").write_text(f"restrict {operator}\n", encoding="utf-8")

    async def enter(process: "asyncssh.SSHServerProcess[bytes]") -> None:
        environment = {**os.environ, "SSH_ORIGINAL_COMMAND": process.command or ""}
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            str(agent), "ssh-entry", env=environment, stdin=pipe, stdout=pipe, stderr=pipe
        )
        await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
        code = await child.wait()
        await process.stdout.drain()
        process.exit(code)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = asyncssh.listen(
        HOST, port, server_host_keys=[str(folder / "host")], process_factory=enter, encoding=None,
        authorized_client_keys=str(folder / "authorized_keys"),
    )  # fmt: skip

    async def listen() -> asyncssh.SSHAcceptor:
        return await listening

    acceptor = asyncio.run_coroutine_threadsafe(listen(), loop).result(timeout=START_SECONDS)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(acceptor.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)


@contextmanager
def device_server(folder: Path) -> Iterator[str]:
    """``stillhouse devices serve`` on a free port; its address."""
    port = any_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flows.cli", "devices", "serve", "--port", str(port)]
    with _running("Device server", command, folder, port):
        yield f"http://{HOST}:{port}"


@contextmanager
def _running(name: str, command: list[str], folder: Path, port: int) -> Iterator[None]:
    """A program that listens at a port, while the block runs; it ends with this one however that ends."""
    log = folder / f"{name.lower().replace(' ', '-')}.log"
    child = children.start(name, command, environment=os.environ, folder=SOURCE_ROOT, log=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not children.listens(child.process.pid, port):
            child.require_alive()
            if time.monotonic() > deadline:
                raise StillhouseError(f"{name} did not start in {START_SECONDS:.0f} s: {children.tail(log)}")
            time.sleep(0.1)
        yield
    finally:
        children.end([child])
