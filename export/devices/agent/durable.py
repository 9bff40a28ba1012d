"""Files that survive a power cut: written aside, flushed, renamed, and the folder flushed too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole. One writer at a time, so that one name for what is not ready yet is enough."""
    aside = path.with_name(f".{path.name}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write(path, json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(path: Path, default: Any) -> Any:
    """The content of a JSON file; ``default`` when there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, target: str) -> None:
    """Let a symbolic link point elsewhere; at every moment it points to the old or to the new place."""
    aside = link.with_name(f".{link.name}.new")
    if os.path.lexists(aside):
        os.unlink(aside)
    os.symlink(target, aside)
    os.replace(aside, link)
    flush_folder(link.parent)


def erase(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if os.path.lexists(folder):
        shutil.rmtree(folder)
        flush_folder(folder.parent)
