"""Files that appear whole or not at all, and are on the disk when the call returns."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from export.bundle import BundleError


@contextmanager
def durable_file(path: Path, *, mode: int = 0o644, replace: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write; when the block ends well it is at ``path``, else nothing is.

    Args:
        path: Where it goes.
        mode: Its permissions; nobody but the owner can read it before they are set.
        replace: Whether it may take the place of another file.

    Raises:
        BundleError: there is a file already, and it may not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 0600
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        _put(draft, path, replace=replace)
    finally:
        draft.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, mode: int = 0o644, replace: bool = False) -> None:
    """Write a small file; see ``durable_file``."""
    with durable_file(path, mode=mode, replace=replace) as file:
        file.write(data)


def _put(draft: Path, path: Path, *, replace: bool) -> None:
    if not replace:
        try:
            path.hardlink_to(draft)  # unlike a rename, never over another file
        except FileExistsError as error:
            raise BundleError(
                f"File '{path}' has been there before, expected a new name. It is never overwritten: choose another"
                " name, or move it away."
            ) from error
        except OSError:
            if path.exists():
                raise
        else:
            return
    draft.replace(path)  # also on file systems without hard links, e.g. on a stick
