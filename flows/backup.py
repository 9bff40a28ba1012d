"""``stillhouse backup`` and ``stillhouse restore``: everything of a project that cannot be made again, in one tar file.

The copy is consistent while recipes run: databases are copied by SQLite's online backup; artifacts never change once
they are there, and the records that name them are copied first. Locks, leases, logs and half-done work stay behind.
"""

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from rich.console import Console

from compression.errors import ArtifactError, InputError
from tasks.progress import Report
from tasks.settings import prepare_prefect, settings

FORMAT = 1
MANIFEST = "manifest.json"
TRANSIENT = {"locks", "scratch", "logs", "running", "fan_out", "prefect", "up.json", "demo-deploy"}
"""What of the home belongs to processes that run now; Prefect's home is reduced to its database."""
ARTIFACTS = ("store", "objects")
"""Copied byte for byte, whatever they hold: they are named by their digest."""
TRANSIENT_IN_STORE = {"partial", "quarantine"}
SQLITE = b"SQLite format 3\0"
KEEP = {".gitkeep"}


@dataclass
class Done:
    """What was copied."""

    files: int = 0
    size_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    """What was left out, and where it has to be looked after."""


@dataclass(frozen=True)
class Places:
    """Where a project keeps its things."""

    home: Path
    runs: Path
    mlruns: Path
    prefect_db: Path
    mlflow_db: Path

    @classmethod
    def here(cls) -> "Places":
        """Those of the settings."""
        prepare_prefect()
        prefect = Path(os.environ["PREFECT_HOME"]) / "prefect.db"
        uri = settings().tracking_uri
        mlflow = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else settings().mlruns_dir
        return cls(settings().home_dir, settings().runs_dir, settings().mlruns_dir, prefect, mlflow)

    @classmethod
    def below(cls, root: Path) -> "Places":
        """The usual ones below a root."""
        root = root.absolute()
        home, mlruns = root / ".stillhouse", root / "mlruns"
        return cls(home, root / "runs", mlruns, home / "prefect" / "prefect.db", mlruns / "mlflow.db")

    def of(self, name: str) -> Path:
        """Where a member of the tar file belongs."""
        single = {"prefect.db": self.prefect_db, "mlflow.db": self.mlflow_db}
        top, _, rest = name.partition("/")
        return (
            single[name]
            if name in single
            else {"home": self.home, "runs": self.runs, "mlruns": self.mlruns}[top] / rest
        )


def back_up(target: Path, *, report: Report = lambda text, done, total: None) -> Done:
    """Write everything into one tar file, readable only for its owner, with a digest of every file.

    Raises:
        InputError: the file exists, or there is nothing to back up.
        ArtifactError: it cannot be written.
    """
    if target.exists():
        raise InputError(f"Backup '{target}' exists, expected a new name. Choose another, or remove it.")
    places, done = Places.here(), Done()
    databases = {name: path for name, path in _databases(done).items() if path.is_file()}
    if not databases and not list(_files(places, target)):
        raise InputError(
            f"Project '{settings().root}' holds nothing yet, expected runs or a store. Set STILLHOUSE_ROOT."
        )
    digests: dict[str, str] = {}
    part = target.with_name(f".{target.name}.part")
    try:
        with (
            os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out,
            tarfile.open(fileobj=out, mode="w") as tar,
            tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".stillhouse-") as scratch,
        ):
            for name, path in databases.items():  # before the files that they name are listed
                digests[name] = _add(tar, name, _copy_of_database(path, Path(scratch)), done)
            files = list(_files(places, target))
            for number, (name, path) in enumerate(files, start=1):
                with suppress(FileNotFoundError):  # a temporary file that is gone by now
                    alive = _is_database(path) and not name.startswith("home/store/objects/")
                    source = _copy_of_database(path, Path(scratch)) if alive else path
                    digests[name] = _add(tar, name, source, done)
                report("Backing up", number, len(files))
            done.files = len(digests)
            manifest = {
                "format": FORMAT,
                "created": datetime.now(UTC).isoformat(),
                "places": {key: str(getattr(places, key)) for key in ("home", "runs", "mlruns")},
                "sha256": digests,
            }
            content = json.dumps(manifest, indent=1).encode()
            _add_stream(tar, MANIFEST, io.BytesIO(content), len(content))
            tar.close()
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except (OSError, sqlite3.Error) as error:
        raise ArtifactError(
            f"Backup '{target}' cannot be written ({error}). Free some space or choose another place."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return done


def _databases(done: Done) -> dict[str, Path]:
    """The SQLite files of the two servers; another kind of database is noted."""
    places, found = Places.here(), {}
    urls = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
    url = next((os.environ[name] for name in urls if os.environ.get(name)), "")
    if url and not url.startswith("sqlite"):
        done.notes.append(f"Prefect's database {_without_password(url)} is not in it: use pg_dump.")
    else:
        found["prefect.db"] = places.prefect_db
    uri = settings().tracking_uri
    if uri.startswith("sqlite:///"):
        found["mlflow.db"] = places.mlflow_db
    elif uri.startswith("http"):
        done.notes.append(f"MLflow at {_without_password(uri)} is not in it: back it up where it runs.")
    else:
        done.notes.append(f"MLflow's database {_without_password(uri)} is not in it: use pg_dump.")
    if settings().study_storage:
        done.notes.append(f"Studies in {_without_password(str(settings().study_storage))} are not in it: use pg_dump.")
    if settings().device_registry:
        registry = _without_password(settings().device_registry_url)
        done.notes.append(f"Devices in {registry} are not in it: use pg_dump.")
    if settings().keys_dir.is_dir():
        done.notes.append(f"Keys in {settings().keys_dir} are not in it: keep a copy of them elsewhere.")
    return found


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _files(places: Places, target: Path) -> Iterator[tuple[str, Path]]:
    """(name in the tar file, path); records are listed before the artifacts that they name."""
    apart = {places.prefect_db, places.mlflow_db, target.absolute()}
    records = places.home / "store" / "stages"
    seen: set[Path] = set()
    tops = (("home", places.home, records), ("runs", places.runs, places.runs))
    for top, root, folder in (*tops, ("home", places.home, places.home), ("mlruns", places.mlruns, places.mlruns)):
        for base, folders, names in os.walk(folder):
            inside = Path(base).relative_to(root)
            folders[:] = sorted(each for each in folders if not _is_transient(top, inside / each))
            for name in sorted(names):
                path = Path(base) / name
                if path in seen or path in apart or _is_transient(top, inside / name) or path.is_symlink():
                    continue
                seen.add(path)
                yield f"{top}/{(inside / name).as_posix()}", path


def _is_transient(top: str, inside: Path) -> bool:
    if top == "home" and inside.parts[:2] == ARTIFACTS:
        return False
    if inside.name.startswith(".") or inside.name.endswith(("-wal", "-shm", "-journal")):
        return True
    if top != "home":
        return False
    parts = inside.parts
    return (
        parts[0] in TRANSIENT
        or parts[0].startswith("temporary-server")
        or (parts[0] == "store" and len(parts) > 1 and parts[1] in TRANSIENT_IN_STORE)
    )


def _is_database(path: Path) -> bool:
    if path.suffix != ".db":
        return False
    with path.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def _copy_of_database(path: Path, scratch: Path) -> Path:
    copy = scratch / "copy.db"
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, timeout=60)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")
    return copy


def _add(tar: tarfile.TarFile, name: str, path: Path, done: Done) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        done.size_bytes += size
        return _add_stream(tar, name, file, size)


def _add_stream(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> str:
    """Copy exactly ``size`` bytes; returns their digest."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(datetime.now(UTC).timestamp())
    reader = _Hashing(file)
    tar.addfile(member, reader)  # type: ignore[arg-type]
    return reader.digest.hexdigest()


class _Hashing:
    """A file that hashes what is read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(size)
        self.digest.update(chunk)
        return chunk


def restore(
    source: Path, *, into: Path | None = None, force: bool = False, report: Report = lambda text, done, total: None
) -> Done:
    """Put everything of a backup back; every file is verified before anything is put into place.

    Args:
        source: The tar file.
        into: Another root; default: the places of the settings.
        force: What is there is moved aside (``<name>.before-<time>``) instead of refused.
        report: Told the progress.

    Raises:
        InputError: no backup of ours, or something is there already.
        ArtifactError: a file is damaged or missing; nothing was put into place.
    """
    places = Places.here() if into is None else Places.below(into)
    folders = (places.home, places.runs, places.mlruns)
    single = [path for path in (places.prefect_db, places.mlflow_db) if not any(map(path.is_relative_to, folders))]
    taken = [path for path in (*folders, *single) if _holds_something(path)]
    if taken and not force:
        raise InputError(
            f"'{taken[0]}' is there already, expected a fresh place. "
            "Choose another with --into, or move what is there aside with --force."
        )
    _refuse_running(places)
    places.home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=places.home.parent, prefix=".restoring-") as name:
        draft = Places.below(Path(name))
        manifest = _unpack(source, draft, report)
        moves = {manifest["places"][key]: str(getattr(places, key)) for key in ("home", "runs", "mlruns")}
        _relocate(draft, moves)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        for path in taken:
            path.rename(path.with_name(f"{path.name}.before-{stamp}"))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # nothing is in it
        _put(draft, places)
    return Done(files=len(manifest["sha256"]))


def _holds_something(folder: Path) -> bool:
    return folder.is_file() or any(path.is_file() and path.name not in KEEP for path in folder.rglob("*"))


def _refuse_running(places: Places) -> None:
    from flows.server import running_server

    if places.home == settings().home_dir and running_server() is not None:
        raise InputError(
            "`stillhouse up` runs on what would be replaced, expected it to be ended. End it with Ctrl-C first."
        )


def _unpack(source: Path, draft: Places, report: Report) -> dict[str, Any]:
    """Extract and verify; returns the manifest."""
    digests: dict[str, str] = {}
    manifest: dict[str, Any] | None = None
    try:
        with tarfile.open(source, mode="r:") as tar:
            members = tar.getmembers()
            for number, member in enumerate(members, start=1):
                content = tar.extractfile(member)
                if content is None or not _is_plain(member.name):
                    raise InputError(
                        f"Backup '{source}' holds '{member.name}', which no backup of ours has. Use another file."
                    )
                if member.name == MANIFEST:
                    manifest = json.load(content)
                    continue
                path = draft.of(member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                reader = _Hashing(content)
                with path.open("wb") as file:
                    shutil.copyfileobj(reader, file, 1 << 20)  # type: ignore[arg-type]
                digests[member.name] = reader.digest.hexdigest()
                report("Restoring", number, len(members))
    except FileNotFoundError as error:
        raise InputError(f"Backup '{source}' does not exist. Name the file that `stillhouse backup` wrote.") from error
    except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"Backup '{source}' cannot be read ({error}), expected a whole tar file of ours. Use another one."
        ) from error
    if manifest is None or manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"Backup '{source}' has no manifest of format {FORMAT}: it is cut off, or not ours. Use another one."
        )
    wrong = sorted(
        name for name in {*digests, *manifest["sha256"]} if digests.get(name) != manifest["sha256"].get(name)
    )
    if wrong:
        raise ArtifactError(
            f"Backup '{source}' has {len(wrong)} damaged or missing files, the first is '{wrong[0]}'. "
            "Nothing was restored; use another one."
        )
    return manifest


def _is_plain(name: str) -> bool:
    """Whether a member's name stays inside of its folder."""
    return ".." not in PurePosixPath(name).parts and "//" not in name and not name.startswith("/")


def _relocate(draft: Places, moves: dict[str, str]) -> None:
    """Make absolute paths point to the new places: MLflow's artifact locations, and the summaries of runs."""
    moved = {old: new for old, new in moves.items() if old != new}
    moved |= {Path(old).as_uri(): Path(new).as_uri() for old, new in moved.items()}
    pairs = sorted(moved.items(), key=lambda pair: -len(pair[0]))
    if not pairs:
        return
    for path in draft.runs.glob("*/*/summary.json"):
        text = path.read_text(encoding="utf-8")
        for old, new in pairs:
            text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
        path.write_text(text, encoding="utf-8")
    if not draft.mlflow_db.is_file():
        return
    with closing(sqlite3.connect(draft.mlflow_db)) as database:
        for table, column in _text_columns(database):
            for old, new in pairs:
                database.execute(
                    f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)',
                    (old, new, old),
                )
        database.commit()


def _text_columns(database: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        for row in database.execute(f'PRAGMA table_info("{table}")').fetchall():
            if row[2].upper().startswith(("VARCHAR", "TEXT")):
                yield table, row[1]


def _put(draft: Places, places: Places) -> None:
    for key in ("home", "runs", "mlruns"):
        here, there = getattr(draft, key), getattr(places, key)
        here.mkdir(exist_ok=True)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(here, there)
    usual = (places.home / "prefect" / "prefect.db", places.mlruns / "mlflow.db")
    for here, there in zip(usual, (places.prefect_db, places.mlflow_db), strict=True):
        if here != there and here.is_file():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(here, there)
    places.home.chmod(0o700)


def backup_command(console: Console, target: Path) -> None:
    """``stillhouse backup``."""
    from flows.progress import show, terminal_progress

    with terminal_progress(console):
        done = back_up(target, report=show)
    console.print(f"Wrote {target}: {done.files:,} files, {done.size_bytes / 2**20:,.1f} MiB.", markup=False)
    console.print(
        "It holds the addresses and passwords of your notifications: keep it where only you read.", markup=False
    )
    for note in done.notes:
        console.print(note, markup=False, soft_wrap=True)


def restore_command(console: Console, source: Path, into: Path | None, *, force: bool) -> None:
    """``stillhouse restore``."""
    from flows.progress import show, terminal_progress

    with terminal_progress(console):
        done = restore(source, into=into, force=force, report=show)
    root = into.absolute() if into is not None else settings().root
    console.print(f"Restored {done.files:,} files to {root}; all digests are right.", markup=False)
    console.print(
        "Deployments name the folder that flows are loaded from: `stillhouse up` registers them anew.", markup=False
    )
