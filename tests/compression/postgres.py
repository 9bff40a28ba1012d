"""A real PostgreSQL server on a free port of this machine, for tests."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCOUNTS = ("postgres", "nobody")
"""Who runs the server when the tests are run by root, which it refuses."""


def programs() -> Path | None:
    """The folder of ``initdb`` and ``postgres``; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return folders[-1] if folders else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server() -> Iterator[str]:
    """The SQLAlchemy URL of an empty database; the server ends with the block."""
    binaries = programs()
    assert binaries is not None
    user: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.geteuid() == 0:
        import pwd

        name = next(name for name in ACCOUNTS if any(entry.pw_name == name for entry in pwd.getpwall()))
        user = {"user": name}
        shutil.chown(folder, name)
    place, port, log = folder / "data", free_port(), (folder / "log").open("wb")
    try:
        subprocess.run(
            [binaries / "initdb", "-D", place, "-U", "stillhouse", "-A", "trust", "--no-sync"],
            check=True,
            stdout=log,
            stderr=log,
            cwd=folder,
            **user,
        )
        command = [binaries / "postgres", "-D", place, "-p", str(port), "-c", "unix_socket_directories="]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **user) as process:
            try:
                deadline = time.monotonic() + 60
                while True:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline
                    if "ready to accept connections" in (folder / "log").read_text():
                        break
                    time.sleep(0.1)
                yield f"postgresql+psycopg://stillhouse@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # at once; SIGTERM would wait until every client has left
    finally:
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
