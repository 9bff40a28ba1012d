"""Which recipes run here, who runs them, and one run of a recipe at a time.

A recipe that runs holds two things: a file lock, which the kernel releases when the process dies however it dies,
and a lease, ``<home>/running/<id>.json``, which says who holds the lock and is touched every few seconds. A lease whose
owner is dead tells the reconciler which flow run and which MLflow run nobody will ever end.
"""

import logging
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from compression.errors import StillhouseError
from compression.types import Frozen
from tasks.artifacts import write_durably
from tasks.owner import Owner
from tasks.progress import Report
from tasks.settings import settings

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""An owner on another machine whose lease was not touched for so long counts as dead."""
POLL_SECONDS = 0.5

IfRunning = Literal["wait", "leave"]


class AlreadyRunning(StillhouseError):  # noqa: N818  (reads as what it says)
    """Another process runs the recipe, and this one was told to leave then."""


class Lease(Frozen):
    """Who runs a recipe."""

    id: str
    recipe: str
    owner: Owner
    flow_run_id: str | None = None
    mlflow_run: str | None = None
    started: datetime
    heartbeat: datetime
    """When the owner last touched the file."""
    waiting: bool = False
    """It waits for another run of the recipe to end."""

    def is_alive(self) -> bool:
        """Whether its owner still runs; judged by the heartbeat on another machine."""
        alive = self.owner.is_alive()
        if alive is None:
            return (datetime.now(UTC) - self.heartbeat).total_seconds() < SILENT_SECONDS
        return alive

    def __str__(self) -> str:
        flow = f", flow run {self.flow_run_id}" if self.flow_run_id else ""
        return f"{self.owner} since {self.started:%Y-%m-%d %H:%M:%S} UTC{flow}"


class Running:
    """A lease while it is held: its file is touched by a thread and rewritten when a fact is added."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._stop = threading.Event()
        self._write = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name=f"lease {lease.recipe}", daemon=True)

    def note(self, *, mlflow_run: str | None = None, waiting: bool | None = None) -> None:
        """Add what is known by now."""
        facts = {"mlflow_run": mlflow_run, "waiting": waiting}
        with self._write:
            self.lease = self.lease.model_copy(update={key: value for key, value in facts.items() if value is not None})
            _keep(self.lease)

    def start(self) -> None:
        """Write the file and keep touching it."""
        _keep(self.lease)
        self._thread.start()

    def end(self) -> None:
        """Take the lease back."""
        self._stop.set()
        self._thread.join()
        release(self.lease)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                with self._write:
                    self._touch()
            except OSError as error:
                logger.warning("The lease of recipe '%s' could not be touched: %s", self.lease.recipe, error)

    def _touch(self) -> None:
        try:
            os.utime(_file(self.lease.id))
        except FileNotFoundError:  # somebody took it away, though its owner lives
            _keep(self.lease)


@contextmanager
def running(
    recipe: str,
    *,
    flow_run_id: str | None = None,
    if_running: IfRunning = "wait",
    report: Report = lambda text, done, total: None,
) -> Iterator[Running]:
    """Hold lease and lock of a recipe while the block runs.

    Raises:
        AlreadyRunning: another process runs it, and ``if_running`` is "leave".
    """
    now = datetime.now(UTC)
    lease = Lease(
        id=uuid.uuid4().hex[:16],
        recipe=recipe,
        owner=Owner.me(),
        flow_run_id=flow_run_id,
        started=now,
        heartbeat=now,
        waiting=True,
    )
    held = Running(lease)
    held.start()
    try:
        with recipe_lock(recipe, if_running, report):
            held.note(waiting=False)
            yield held
    finally:
        held.end()


@contextmanager
def recipe_lock(
    name: str, if_running: IfRunning = "wait", report: Report = lambda text, done, total: None
) -> Iterator[None]:
    """Let one process of this home run the recipe at a time.

    Raises:
        AlreadyRunning: another one does, and ``if_running`` is "leave".
    """
    folder = settings().home_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"recipe-{name}.lock")
    try:
        lock.acquire(timeout=0.05)
    except Timeout:
        who = holder(name)
        shown = str(who) if who else "another process"
        if if_running == "leave":
            raise AlreadyRunning(
                f"Recipe '{name}' is being run by {shown}, expected no other run of it. "
                "Wait for that run or cancel it; with if_running 'wait' this one would wait and then go on."
            ) from None
        logger.info("Waiting: recipe '%s' is being run by %s.", name, shown)
        text = f"waiting for {shown}"
        report(text, 0, 1)
        lock.acquire(poll_interval=POLL_SECONDS)
        report(text, 1, 1)
    try:
        yield
    finally:
        lock.release()


def holder(recipe: str) -> Lease | None:
    """The lease of the process that runs a recipe now, or None."""
    return next((each for each in leases() if each.recipe == recipe and not each.waiting and each.is_alive()), None)


def leases() -> list[Lease]:
    """Every lease of this home, oldest first; those of the dead too."""
    found = []
    for path in _folder().glob("[!.]*.json"):
        try:
            lease = Lease.model_validate_json(path.read_text(encoding="utf-8"))
            touched = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except FileNotFoundError:  # released in between
            continue
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            logger.warning("Lease '%s' cannot be read and is passed over: %s", path, error)
            continue
        found.append(lease.model_copy(update={"heartbeat": touched}))
    return sorted(found, key=lambda lease: (lease.started, lease.id))


def release(lease: Lease) -> None:
    """Remove a lease, with what a killed write of it left behind."""
    for leftover in _folder().glob(f".{lease.id}.json.*"):
        with suppress(OSError):
            leftover.unlink()
    _file(lease.id).unlink(missing_ok=True)


def _keep(lease: Lease) -> None:
    write_durably(_file(lease.id), lease.model_dump_json(indent=1))


def _folder() -> Path:
    return settings().home_dir / "running"


def _file(identity: str) -> Path:
    return _folder() / f"{identity}.json"
