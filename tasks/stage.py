"""A stage: a function from handles to a handle, skipped when the same work was done before.

The stage key is a hash of the stage's name, the source of the code it names, the library versions it depends on
and its inputs (configs as JSON, artifacts as digests). ``<store>/stages/<key>.json`` holds what came out. A kept
result counts only if its artifact still verifies, so a damaged file is recomputed instead of served.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from compression.types import Frozen
from tasks import tracking
from tasks.artifacts import Artifact, Store, write_durably
from tasks.cost import Meter
from tasks.settings import settings

logger = logging.getLogger(__name__)

PENDING = "pending"


class StageResult(Frozen):
    """What a stage returns; only handles and small facts, never tensors."""

    stage: str
    name: str
    """What it was done for: a teacher, a student, a target."""
    key: str
    artifact: Artifact
    metrics: dict[str, float] = {}
    info: dict[str, Any] = {}
    """Small JSON facts that later stages or the report need."""
    inputs: tuple[str, ...] = ()
    """Digests of the artifacts that went in."""
    seconds: float = 0.0
    cpu_seconds: float | None = None
    """Of this process and its children; None: not measured."""
    energy_j: float | None = None
    """Of the machine's processor packages while the stage ran; None: not measured."""
    made_of: dict[str, Any] = {}
    """Why a result may differ from another: ``code`` and ``config`` (all inputs that are no artifacts) as digests,
    ``libraries`` by version."""
    run_id: str = ""
    """MLflow run that did the work."""
    parent_run: str = ""
    """MLflow run of the recipe that did the work."""
    cached: bool = False

    @property
    def cost(self) -> dict[str, float]:
        """What was measured of the work, as MLflow metrics."""
        found = {"stage_seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "energy_j": self.energy_j}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def is_pending(self) -> bool:
        """Whether this stands for work that a plan found still to be done."""
        return self.artifact.sha256 == PENDING


@dataclass(frozen=True)
class Work:
    """What a running stage may use."""

    store: Store
    run: tracking.Run
    scratch: Path
    """Kept until the stage succeeds, the same folder on a second try: step checkpoints go here."""
    report: Callable[[str, int, int], None]
    """``report(text, done, total)`` moves the progress bar."""

    def open(self, result: "StageResult") -> Path:
        """The verified folder of an input."""
        return self.store.open(result.artifact)


class StageOutput(Frozen):
    """What a stage's function returns."""

    artifact: Artifact
    metrics: dict[str, float] = {}
    info: dict[str, Any] = {}


class StageFn(Protocol):
    """``fn(work, *, name, **inputs)``; inputs are Frozen configs, StageResults, tuples or dicts of them, or JSON."""

    __name__: str
    __doc__: str | None

    def __call__(self, work: Work, *, name: str, **inputs: Any) -> StageOutput: ...


@dataclass(frozen=True)
class Stage:
    """A named function with the code and libraries its result depends on."""

    name: str
    fn: Callable[..., StageOutput]
    code: tuple[str, ...]
    libraries: tuple[str, ...]
    tags: tuple[str, ...]

    def __call__(self, *, name: str, **inputs: Any) -> StageResult:
        return current_runner().run(self, name, inputs)

    def key(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Digest of everything the result depends on."""
        payload = {
            "stage": self.name,
            "name": name,
            "code": self.code_digest,
            "libraries": self.library_versions,
            "inputs": _canonical(dict(inputs)),
        }
        return _digest(payload)

    @property
    def code_digest(self) -> str:
        """Of the code that the result depends on."""
        return code_digest((self.fn.__module__, *self.code))

    @property
    def library_versions(self) -> dict[str, str]:
        """Of the libraries that the result depends on."""
        return {library: importlib.metadata.version(library) for library in self.libraries}

    def made_of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the result depends on besides artifacts, part by part."""
        config = {field: value for field, value in inputs.items() if not list(results_in(value))}
        return {
            "code": self.code_digest,
            "libraries": self.library_versions,
            "config": _digest(_canonical(config)),
        }


def stage(
    name: str,
    *,
    code: tuple[str, ...] = (),
    libraries: tuple[str, ...] = ("torch",),
    tags: tuple[str, ...] = (),
) -> Callable[[Callable[..., StageOutput]], Stage]:
    """Make a stage of a function; ``code`` names the modules and packages its result depends on."""
    return lambda fn: Stage(name=name, fn=fn, code=code, libraries=libraries, tags=tags)


@cache
def code_digest(modules: tuple[str, ...]) -> str:
    """SHA-256 over the code of modules and packages (a package counts with all its modules).

    Comments, docstrings and formatting do not count: they cannot change a result.
    """
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"Module '{module}' named as a stage's code does not exist.")
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            digest.update(file.name.encode())
            digest.update(code_of(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def code_of(source: str) -> str:
    """The syntax tree of Python source as text, without docstrings and positions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, StageResult):
        return {"kind": value.artifact.kind, "sha256": value.artifact.sha256}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def results_in(value: Any) -> Iterator[StageResult]:
    """Every StageResult inside nested inputs."""
    if isinstance(value, StageResult):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from results_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from results_in(item)


class StageIndex:
    """``<store>/stages/<key>.json``: what came out of finished work."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.root / "stages"

    def get(self, key: str) -> StageResult | None:
        """The kept result, if its record reads and its artifact verifies; otherwise None (damage is quarantined)."""
        path = self.folder / f"{key}.json"
        try:
            result = StageResult.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError):
            logger.warning("Stage record '%s' is damaged; the stage is recomputed.", path.name)
            path.unlink(missing_ok=True)
            return None
        if self.store.is_intact(result.artifact):
            return result.model_copy(update={"cached": True})
        if self.store.place(result.artifact).exists():
            moved = self.store.quarantine(result.artifact)
            logger.warning(
                "Artifact '%s' of stage '%s' has other bytes than were written; moved to '%s' and recomputed.",
                result.artifact.kind, result.stage, moved,
            )  # fmt: skip
        return None

    def keep(self, result: StageResult) -> None:
        """Record a finished stage."""
        write_durably(self.folder / f"{result.key}.json", result.model_dump_json(indent=1))

    def forget(self, key: str) -> None:
        """Drop a record, so that the stage runs again."""
        (self.folder / f"{key}.json").unlink(missing_ok=True)


class Runner(Protocol):
    """Decides how a stage call is carried out."""

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult: ...


_runner: ContextVar[Runner | None] = ContextVar("stage_runner", default=None)


def current_runner() -> Runner:
    """The runner of the enclosing ``use_runner`` block."""
    runner = _runner.get()
    if runner is None:
        raise RuntimeError("A stage was called outside of a run: wrap the call in `use_runner(...)`.")
    return runner


@contextmanager
def use_runner(runner: Runner) -> Iterator[Runner]:
    """Carry out all stage calls of the block with ``runner``."""
    token = _runner.set(runner)
    try:
        yield runner
    finally:
        _runner.reset(token)


def placeholder(stage: Stage, name: str, key: str = PENDING) -> StageResult:
    """Stands for work that is not done here, now."""
    nothing = Artifact(kind=PENDING, sha256=PENDING, size_bytes=0)
    return StageResult(stage=stage.name, name=name, key=key, artifact=nothing)


class PlanRunner:
    """Looks every stage up and runs nothing; unfinished ones come back as pending placeholders."""

    def __init__(self, index: StageIndex) -> None:
        self.index = index
        self.results: list[StageResult] = []

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        """The kept result, or a pending placeholder."""
        result = None
        key = PENDING
        if not any(item.is_pending for item in results_in(inputs)):
            key = stage.key(name, inputs)
            result = self.index.get(key)
        if result is None:
            result = placeholder(stage, name, key)
        self.results.append(result)
        return result


@dataclass
class DirectRunner:
    """Runs stages in this process, one after the other, with cache, lock, MLflow and resume."""

    index: StageIndex
    parent_run: tracking.Run
    report: Callable[[str, int, int], None] = lambda text, done, total: None
    force_from: str | None = None
    """Stage name from which on kept results are not used, but for those that this parent run made before it was
    interrupted."""

    def __post_init__(self) -> None:
        self.results: list[StageResult] = []
        self._forcing = False

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        """The kept result of the same work, or a fresh one."""
        result = self.execute(stage, name, inputs)
        self.results.append(result)
        return result

    def execute(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        """Like ``run``, without adding to the list of results."""
        key = stage.key(name, inputs)
        self._forcing = self._forcing or stage.name == self.force_from
        with stage_lock(key, f"{stage.name} '{name}'"):
            kept = self.index.get(key)
            if kept is not None and (not self._forcing or kept.parent_run == self.parent_run.id):
                tracking.log_cached_stage(self.parent_run, kept)
                shutil.rmtree(_scratch(key), ignore_errors=True)  # of a process killed when it had just kept it
                return kept
            return self._fresh(stage, name, key, inputs)

    def _fresh(self, stage: Stage, name: str, key: str, inputs: Mapping[str, Any]) -> StageResult:
        scratch = _scratch(key)
        scratch.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        params = {field: value for field, value in inputs.items() if not list(results_in(value))}
        with tracking.stage_run(self.parent_run, stage=stage.name, name=name, key=key, params=params) as run:
            work = Work(store=self.index.store, run=run, scratch=scratch, report=self.report)
            try:
                with Meter() as meter:
                    output = stage.fn(work, name=name, **inputs)
            except Exception as error:
                error.add_note(
                    f"Stage '{stage.name}' of '{name}' failed. Finished stages are kept; run again to resume."
                )
                raise
            result = StageResult(
                stage=stage.name,
                name=name,
                key=key,
                artifact=output.artifact,
                metrics=output.metrics,
                info=output.info,
                inputs=tuple(sorted({item.artifact.sha256 for item in results_in(inputs)})),
                seconds=time.monotonic() - started,
                cpu_seconds=meter.cpu_seconds,
                energy_j=meter.energy_j,
                made_of=stage.made_of(inputs),
                run_id=run.id,
                parent_run=self.parent_run.id,
            )
            self.index.keep(result)
            run.log_metrics({**result.metrics, **result.cost})
        shutil.rmtree(scratch, ignore_errors=True)
        return result


def _scratch(key: str) -> Path:
    return settings().home_dir / "scratch" / key


@contextmanager
def stage_lock(key: str, what: str) -> Iterator[None]:
    """Only one process works on a stage key; another waits and then finds the result."""
    folder = settings().home_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0.05)
    except Timeout:
        logger.info("Waiting: another process (of %d) is working on %s.", os.getpid(), what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
