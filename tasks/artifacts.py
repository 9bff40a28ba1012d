"""The store: content-addressed folders, written whole or not at all, verified on every read."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compression.errors import ArtifactError
from compression.types import Frozen
from tasks.owner import Owner, boot_id

CHUNK = 1 << 20
OLD_SECONDS = 7 * 24 * 3600.0
_DRAFT = re.compile(r"\.(?P<boot>[0-9a-f-]{8})\.(?P<pid>\d+)\.(?P<created>\d+\.\d+)-")


class Artifact(Frozen):
    """Handle to a folder in the store: equal bytes, equal handle. Small enough to travel as JSON."""

    kind: str
    """What it is: dataset, checkpoint, teacher_outputs, graph, engine, ..."""
    sha256: str
    """Digest over the relative names and contents of all files."""
    size_bytes: int


def file_digest(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(folder: Path) -> tuple[str, int]:
    """SHA-256 over sorted (name, content digest) pairs of all files below ``folder``, and their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [(path.relative_to(folder).as_posix(), file_digest(path)) for path in files]
    size = sum(path.stat().st_size for path in files)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest(), size


def write_durably(path: Path, text: str) -> None:
    """Write a small text file through a temporary one, flushed to disk, then renamed over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store:
    """Artifacts under ``root/objects``; anything that fails verification moves to ``root/quarantine``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.quarantined = root / "quarantine"
        self.partial = root / "partial"

    def prepare(self, *, min_free_bytes: int = 0) -> None:
        """Create the folders and prove that the store can be written.

        Raises:
            ArtifactError: not a folder, no permission, or less than ``min_free_bytes`` free.
        """
        try:
            for folder in (self.objects, self.quarantined, self.partial):
                folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with tempfile.TemporaryFile(dir=self.partial) as probe:
                probe.write(b"stillhouse")
        except OSError as error:
            raise ArtifactError(
                f"Store '{self.root}' cannot be written ({error.strerror}), expected a writable folder. "
                "Fix its permissions, or set STILLHOUSE_HOME to another folder."
            ) from error
        free = shutil.disk_usage(self.root).free
        if free < min_free_bytes:
            raise ArtifactError(
                f"Store '{self.root}' has {free / 2**20:.0f} MiB of free disk, expected at least "
                f"{min_free_bytes / 2**20:.0f} MiB. Free some space, set STILLHOUSE_HOME to another disk, "
                "or lower STILLHOUSE_MIN_FREE_MIB."
            )

    def _sweep(self) -> None:
        """Remove drafts of processes that were killed; those of other machines when they are old."""
        for folder in self.partial.iterdir():
            name = _DRAFT.search(folder.name)
            owner = None if name is None else Owner.of(int(name["pid"]))
            if name is not None and name["boot"] == boot_id()[:8]:
                abandoned = owner is None or owner.created != float(name["created"])
            else:
                abandoned = False
                with suppress(FileNotFoundError):  # it became an artifact in between
                    abandoned = time.time() - folder.stat().st_mtime > OLD_SECONDS
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)

    def place(self, artifact: Artifact) -> Path:
        """Where the artifact lies, without looking at it."""
        return self.objects / artifact.sha256[:2] / artifact.sha256

    @contextmanager
    def put(self, kind: str) -> Iterator["Draft"]:
        """Give a scratch folder; when the block ends well its content becomes ``draft.artifact``."""
        self.partial.mkdir(parents=True, exist_ok=True)
        me = Owner.me()
        mark = f"{kind}.{me.boot_id[:8]}.{me.pid}.{me.created}-"
        folder = Path(tempfile.mkdtemp(dir=self.partial, prefix=mark))
        draft = Draft(folder)
        try:
            yield draft
            draft.artifact = self._adopt(kind, folder)
        except OSError as error:
            raise ArtifactError(
                f"Artifact '{kind}' could not be written to '{self.root}' ({error.strerror or error}). "
                "Free some disk or set STILLHOUSE_HOME to another one; finished stages are kept."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _adopt(self, kind: str, folder: Path) -> Artifact:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sha256, size = tree_digest(folder)
        artifact = Artifact(kind=kind, sha256=sha256, size_bytes=size)
        place = self.place(artifact)
        if place.exists() and self.is_intact(artifact):
            return artifact
        if place.exists():
            self.quarantine(artifact)
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        _sync_folder(place.parent)
        return artifact

    def is_intact(self, artifact: Artifact) -> bool:
        """Whether the artifact is there and every byte is as it was written."""
        place = self.place(artifact)
        return place.is_dir() and tree_digest(place)[0] == artifact.sha256

    def open(self, artifact: Artifact) -> Path:
        """The artifact's folder, verified.

        Raises:
            ArtifactError: it is missing, or a byte changed; a changed one is quarantined first.
        """
        place = self.place(artifact)
        if not place.is_dir():
            raise ArtifactError(
                f"Artifact '{artifact.kind}' {artifact.sha256[:12]} is missing from '{self.objects}'. "
                "Run the recipe again: the stage that makes it will be recomputed."
            )
        if not self.is_intact(artifact):
            moved = self.quarantine(artifact)
            raise ArtifactError(
                f"Artifact '{artifact.kind}' {artifact.sha256[:12]} has other bytes than were written; moved to "
                f"'{moved}'. Run the recipe again: the stage that makes it will be recomputed."
            )
        return place

    def quarantine(self, artifact: Artifact) -> Path:
        """Move a damaged artifact out of the way and return where it went."""
        self.quarantined.mkdir(parents=True, exist_ok=True)
        target = Path(tempfile.mkdtemp(dir=self.quarantined, prefix=f"{artifact.sha256[:12]}-"))
        moved = target / "content"
        self.place(artifact).rename(moved)
        return moved


class Draft:
    """A folder being filled; ``artifact`` is set once it has been adopted by the store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifact: Artifact | None = None

    def done(self) -> Artifact:
        """The adopted artifact."""
        if self.artifact is None:
            raise ArtifactError(f"Draft '{self.folder.name}' was not adopted by the store yet.")
        return self.artifact
