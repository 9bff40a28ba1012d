"""Ends an agent at a chosen system call, as a kill or as a power cut, and looks at what is left.

The calls are found by tracing one whole installation with strace; then the same installation is made anew for each of
them, and the kernel kills it when it comes to that call. A power cut is a kill on a file system of its own, of whose
image only what had reached the device is kept.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from export.devices.agent import package
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused

ROOT = Path(__file__).resolve().parents[3]
MUTATING = ("write", "fsync", "rename", "unlink", "unlinkat", "rmdir", "mkdir", "symlink", "ftruncate")
OTHERS = ("openat", "close", "read", "readlink", "flock", "newfstatat", "lseek", "getdents64", "statfs", "fadvise64")
RESTARTS = 3


def can_trace() -> bool:
    """Whether strace is here and may look into a process."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Point:
    """The n-th call of that name in the whole process."""

    call: str
    number: int
    line: str

    def __str__(self) -> str:
        return f"{self.call} {self.number}: {self.line[:120]}"


def agent(root: Path, *arguments: str, code: str = "") -> list[str]:
    """The agent's command; ``code`` runs before, in the same process, to break it on purpose."""
    start = (
        f"import sys; {code or 'pass'}; from export.devices.agent.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, "--root", str(root), *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}


def points(root: Path, bundle: Path, calls: tuple[str, ...], log: Path, code: str = "") -> list[Point]:
    """Every call below ``root`` that installing a bundle makes, from one installation that is not disturbed."""
    command = [
        "strace",
        "-y",
        "-o",
        str(log),
        "-e",
        f"trace={','.join(calls)}",
        *agent(root, "install", str(bundle), code=code),
    ]
    subprocess.run(command, env=environment(), capture_output=True, check=False)
    found, counts = [], Counter[str]()
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(r"(\w+)\(", line)
        if call:
            counts[call[1]] += 1
            if str(root) in line:
                found.append(Point(call[1], counts[call[1]], line.replace(str(root), "")))
    return found


def killed_at(point: Point, root: Path, bundle: Path, code: str = "") -> bool:
    """Install a bundle, killed at a call; whether it came to that."""
    inject = ["-e", f"trace={point.call}", "-e", f"inject={point.call}:signal=KILL:when={point.number}"]
    command = ["strace", "-o", "/dev/null", *inject, *agent(root, "install", str(bundle), code=code)]
    done = subprocess.run(command, env=environment(), capture_output=True, check=False)
    return done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)


def faults(root: Path, before: int, after: int) -> str:
    """What is wrong with a device right now: ``current`` must be a verified slot with one of two numbers."""
    device = Device(root)
    try:
        active = device.active
        statement = device.statement(active)
        if active is None or statement is None:
            return "no model is active"
        package.verify(device.slot(active), statement)
        device.trust  # noqa: B018
    except (OSError, ValueError, KeyError, Refused) as error:
        return f"{type(error).__name__}: {error}"
    if statement["seq"] not in (before, after):
        return f"number {statement['seq']} is active"
    return ""


def settle(root: Path, bundle: Path, wanted: int) -> str:
    """Start again until it is settled; what is wrong then."""
    for _ in range(RESTARTS):
        device = Device(root)
        try:
            device.install(bundle)
        except (Failed, Refused) as error:
            if error.code in ("disk", "no file", "trust"):
                return f"{error.code}: {error}"
        except (OSError, ValueError, KeyError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        statement = device.statement(device.active)
        if statement is not None and statement["seq"] == wanted and device.journal["state"] == "idle":
            stray = [path.name for path in root.iterdir() if path.name.startswith(".current")]
            return f"left behind: {stray}" if stray else faults(root, wanted, wanted)
    return f"not settled after {RESTARTS} starts: {Device(root).journal}"


@contextmanager
def copy_of(base: Path, place: Path) -> Iterator[Path]:
    shutil.copytree(base, place, symlinks=True)
    try:
        yield place
    finally:
        shutil.rmtree(place)


class Disk:
    """A small file system of its own in a file."""

    def __init__(self, image: Path, options: str) -> None:
        self.image, self.options = image, options

    def make(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(24 << 20)
        command = ["mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", "-E", "lazy_itable_init=0", str(self.image)]
        subprocess.run(command, check=True, capture_output=True)

    @contextmanager
    def mounted(self, place: Path) -> Iterator[Path]:
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", f"loop,{self.options}", str(self.image), str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def as_cut(self, image: Path) -> "Disk":
        """What a power cut would leave now: the image as far as the file system has written it."""
        shutil.copyfile(self.image, image)
        return Disk(image, self.options)


def can_mount(folder: Path) -> str:
    """Why no file system can be mounted here; empty when it can."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return "needs root and mkfs.ext4 for file systems in files"
    disk = Disk(folder / "probe.img", "defaults")
    disk.make()
    try:
        with disk.mounted(folder / "probe"):
            return ""
    except subprocess.CalledProcessError:
        return "needs loop devices"
