"""What an SSH key of a forced command may do, and nothing else: hand in a bundle, have it installed, read, go back.

    command="agent --root /var/lib/stillhouse-agent ssh-entry",restrict ssh-ed25519 AAAA...

There is no shell: words are compared, never run.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from . import durable
from .device import SPARE_BYTES, Device
from .errors import Refused
from .package import MAX_BYTES

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
CHUNK = 1 << 20
COMMANDS = "status, size NAME, put NAME OFFSET, install NAME, rollback, reports, forget NAME"


def enter(device: Device, command: str, stream: BinaryIO) -> Any:
    """Carry out one command of an SSH session; ``stream`` is what the other side sends.

    Raises:
        Refused: it is none of those allowed.
        Failed: a bundle was tried and rolled back.
    """
    word, *rest = command.split() or [""]
    folder = device.root / "inbox"
    folder.mkdir(exist_ok=True)
    if any(not (NAME.fullmatch(each) or each.isdigit()) for each in rest):
        raise Refused("command", f"A name has characters that are not allowed, expected {NAME.pattern}.")
    if word == "status" and not rest:
        return device.status()
    if word == "reports" and not rest:
        return [{"file": path.name, **durable.read_json(path, {})} for path in device.reports()]
    if word == "rollback" and not rest:
        return device.roll_back("asked for over SSH")
    if word == "forget" and len(rest) == 1:
        (device.root / "reports" / rest[0]).unlink(missing_ok=True)
        return {}
    if word == "size" and len(rest) == 1:
        part = folder / f"{rest[0]}.part"
        return {"size": part.stat().st_size if part.exists() else 0}
    if word == "put" and len(rest) == 2 and rest[1].isdigit():
        return {"size": _put(folder / f"{rest[0]}.part", int(rest[1]), stream)}
    if word == "install" and len(rest) == 1:
        part = folder / f"{rest[0]}.part"
        try:
            return device.install(part)
        finally:
            part.unlink(missing_ok=True)
    raise Refused("command", f"'{word[:20]}' is no command of this key, expected one of: {COMMANDS}.")


def _put(part: Path, offset: int, stream: BinaryIO) -> int:
    """Add to what came before; its size then."""
    have = part.stat().st_size if part.exists() else 0
    if offset != have:
        raise Refused("offset", f"The part has {have} bytes, expected {offset}. Go on from there.")
    room = min(shutil.disk_usage(part.parent).free - SPARE_BYTES, MAX_BYTES - have)
    with open(part, "ab") as file:
        for chunk in iter(lambda: stream.read(CHUNK), b""):
            room -= len(chunk)
            if room < 0:
                raise Refused("disk", "There is no room for more. Free some space.")
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return part.stat().st_size
