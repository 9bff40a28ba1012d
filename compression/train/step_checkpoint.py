"""Training states on disk: the newest two, each with its hash, so that a killed training goes on."""

import hashlib
import io
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from compression.errors import ArtifactError

logger = logging.getLogger(__name__)

KEPT = 2
_NAME = re.compile(r"step-(\d{10})-([0-9a-f]{16})\.pt")


def save_state(state: dict[str, Any], folder: Path, *, step: int) -> Path:
    """Write a state of tensors and plain values for good, drop all but the newest two, and return its path.

    Temp file, fsync, rename, fsync of the folder: a crash or power cut at any point leaves the older states
    whole. The name carries the step and the first half of the content's SHA-256.

    Raises:
        ArtifactError: the folder cannot be written or is full; older states are intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{step:010d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"Checkpoint folder '{folder}' has not taken {len(content)} bytes ({error.strerror}), expected a "
            "writable folder with free space. Free some and start again: it goes on at the last checkpoint."
        ) from error
    for old in _newest_first(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the newest state that is whole, on the CPU, or None; damaged ones are logged and passed over.

    Only tensors and plain values are read (``weights_only``): a file cannot run code.
    """
    if not folder.is_dir():
        return None
    for leftover in folder.glob("step-*.tmp"):
        leftover.unlink(missing_ok=True)
    for path in _newest_first(folder):
        content = path.read_bytes()
        match = _NAME.fullmatch(path.name)
        if match is None or hashlib.sha256(content).hexdigest()[:16] != match[2]:
            logger.warning(
                "Step checkpoint '%s' has %d bytes that do not match its hash; using the one before it.",
                path,
                len(content),
            )
            continue
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return None


def _newest_first(folder: Path) -> list[Path]:
    """By step, then by time: before and after an epoch is closed, the same number of steps is done."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name.split("-")[1], path.stat().st_mtime_ns), reverse=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
