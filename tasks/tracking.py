"""The only import of MLflow: a parent run per recipe, a child per stage and candidate, metrics in batches.

Everything goes through ``MlflowClient`` with explicit run ids, because the fluent API starts stray runs in threads.

A killed recipe that is started again goes on writing where it stopped: its parent run is found by the recipe's
content, a stage's child by the stage key, a candidate by its name, a metric by name and step. Nothing is there twice,
whenever the kill came and whatever a server did before its answer was lost.
"""

import hashlib
import json
import logging
import math
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock
from pydantic import BaseModel

from compression.errors import ArtifactError
from tasks.owner import Owner
from tasks.running import leases
from tasks.settings import settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.stage import StageResult

logger = logging.getLogger(__name__)

METRICS_PER_BATCH = 900  # MLflow takes at most 1,000 per call
PARAMETER_LENGTH = 6000  # longer values are cut by MLflow with a warning
PATIENCE_SECONDS = 300.0
"""How long a locked database or a server that does not answer is waited for, in the middle of a run."""
FLOW_RUNS_KEPT = 100

RECIPE_SHA256 = "stillhouse.recipe_sha256"
RESTART_FROM = "stillhouse.restart_from"
FLOW_RUNS = "stillhouse.flow_runs"
"""Every flow run that worked on a run, oldest first, with commas between."""
TOKEN = "stillhouse.token"
"""Of one creation, so that a run is found whose creation was not answered."""


@dataclass(frozen=True)
class Run:
    """An MLflow run by its id; every call is explicit about the run it writes to."""

    id: str
    continued: bool = False
    """Something may be there already, and is left as it is."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log one value per name; non-finite values are left out."""
        self.log_series([{**metrics, "step": step}])

    def log_series(self, rows: Sequence[Mapping[str, Any]], *, prefix: str = "") -> None:
        """Log rows of {name: number, step or epoch: int} in as few calls as possible."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(prefix + key, float(value), now, int(row.get("step", row.get("epoch", 0))))
            for row in rows
            for key, value in row.items()
            if key not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value)
        ]
        if self.continued:
            names = {metric.key for metric in metrics}
            there = {(name, old.step) for name in names for old in client().get_metric_history(self.id, name)}
            metrics = [metric for metric in metrics if (metric.key, metric.step) not in there]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            client().log_batch(self.id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested values as dotted names, once."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:PARAMETER_LENGTH]) for key, value in flatten(params)]
        if self.continued:
            there = client().get_run(self.id).data.params
            flat = [param for param in flat if param.key not in there]
        for start in range(0, len(flat), 100):
            client().log_batch(self.id, params=flat[start : start + 100])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        client().log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_file(self, path: Path, folder: str = "") -> None:
        """Copy a file to the run's artifacts."""
        client().log_artifact(self.id, str(path), folder or None)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """Show a dataset in the run's Dataset column."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        dataset = Dataset(
            name=name,
            digest=digest[:8],
            source_type="local",
            source=json.dumps({"uri": source}),
            schema=None,
            profile=json.dumps(dict(profile)),
        )
        tags = [InputTag("mlflow.data.context", context)]
        inputs = [DatasetInput(dataset=dataset, tags=tags)]
        try:
            client().log_inputs(self.id, inputs)
        except MlflowException:  # another run was just writing the same data set, which is there now
            client().log_inputs(self.id, inputs)

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run."""
        client().set_terminated(self.id, status)

    @property
    def url(self) -> str:
        """Address of the run in the MLflow UI, or the path of the database when no server is set."""
        experiment = client().get_run(self.id).info.experiment_id
        base = os.environ.get("STILLHOUSE_MLFLOW_UI") or settings().tracking_uri
        return f"{base}/#/experiments/{experiment}/runs/{self.id}" if base.startswith("http") else base


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) pairs of nested models, mappings and lists."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | BaseModel) for item in value):
        for number, item in enumerate(value):
            yield from flatten(item, f"{prefix}.{number}")
    else:
        yield prefix, value


_hurried: ContextVar[bool] = ContextVar("hurried", default=False)
"""Somebody wants this process to end: nothing is waited for."""


class _Patient:
    """A client whose calls wait while the database is locked or the server does not answer.

    A call that may have been carried out is made again only if that changes nothing: creating is not.
    """

    def __init__(self, wrapped: "MlflowClient") -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: _patiently(lambda: found(*args, **kwargs), repeat=not name.startswith("create"))


def _patiently(call: Callable[[], Any], *, repeat: bool) -> Any:
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except MlflowException as error:
            passes = error.error_code == "TEMPORARILY_UNAVAILABLE" or (repeat and _is_silence(error))
            if not passes or _hurried.get() or time.monotonic() > deadline:
                raise
            logger.warning("MLflow store '%s' cannot be used now; trying again.", settings().tracking_uri)
            time.sleep(0.5)


def _is_silence(error: Exception) -> bool:
    """Whether the server gave no answer, so that nobody knows what it did."""
    from requests import RequestException

    return isinstance(error.__cause__ or error.__context__, RequestException)


@cache
def client() -> "MlflowClient":
    """The client of this process; patient in the middle of a run, not at its start.

    Raises:
        ArtifactError: the store cannot be opened or written.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = settings().tracking_uri
    database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if database is not None:
        _check_database(database)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback at each wait for a lock
    try:
        found = MlflowClient(tracking_uri=uri)
        with FileLock(f"{database}.lock") if database is not None else nullcontext():  # one process makes the tables
            found.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        if "401" in str(error):
            raise ArtifactError(
                f"MLflow server '{uri}' asks who is there and does not know the answer. Set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD."
            ) from error
        raise ArtifactError(
            f"MLflow store '{uri}' does not answer ({error}). Start the server, or set STILLHOUSE_MLFLOW_URI."
        ) from error
    return cast("MlflowClient", _Patient(found))


def _check_database(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except (OSError, sqlite3.Error) as error:
        raise ArtifactError(
            f"MLflow database '{path}' cannot be written ({error}). Fix its permissions, or set STILLHOUSE_MLFLOW_URI."
        ) from error


@cache
def experiment_id() -> str:
    """The experiment's id, created at first use with its artifacts under ``mlruns/artifacts``."""
    from mlflow.exceptions import MlflowException

    name = settings().experiment
    found = client().get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    local = settings().tracking_uri.startswith("sqlite:")
    place = (settings().mlruns_dir / "artifacts").as_uri() if local else None
    try:
        return client().create_experiment(name, artifact_location=place)
    except MlflowException:  # another process created it in between
        existing = client().get_experiment_by_name(name)
        if existing is None:
            raise
        return existing.experiment_id


def _create(name: str, tags: Mapping[str, str]) -> Run:
    """A new run of this process; one, even when a server makes it and its answer is lost."""
    token = uuid.uuid4().hex
    asked = False

    def make() -> str:
        nonlocal asked
        there = _search({TOKEN: token}) if asked else []
        asked = True
        every = {**_owner_tags(), TOKEN: token, **tags}
        return (there[0] if there else client().create_run(experiment_id(), run_name=name, tags=every)).info.run_id

    made = _patiently(make, repeat=True)
    if settings().tracking_uri.startswith("http"):  # whose client asks again by itself when no answer comes
        for twin in _search({TOKEN: token}):
            if twin.info.run_id != made:
                client().delete_run(twin.info.run_id)
    return Run(made)


def _owner_tags() -> dict[str, str]:
    me = Owner.me()
    return {
        "stillhouse.pid": str(me.pid),
        "stillhouse.host": me.host,
        "stillhouse.boot": me.boot_id,
        "stillhouse.created": repr(me.created),
    }


def _owner_of(run: Any) -> Owner | None:
    """Whose run it is; None when it does not say."""
    tags = run.data.tags
    try:
        return Owner(
            host=tags["stillhouse.host"],
            boot_id=tags["stillhouse.boot"],
            pid=int(tags["stillhouse.pid"]),
            created=float(tags["stillhouse.created"]),
        )
    except (KeyError, ValueError):
        return None


def _search(tags: Mapping[str, str], *, more: str = "") -> list[Any]:
    """The runs with all these tags, newest first."""
    query = " and ".join([*(f"tags.`{key}` = '{value}'" for key, value in tags.items()), *filter(None, [more])])
    found: list[Any] = []
    token = None
    while True:
        page = client().search_runs([experiment_id()], query, order_by=["attributes.start_time DESC"], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


@contextmanager
def recipe_run(name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[Run]:
    """The parent run of a recipe; FAILED if the block raises, KILLED if it is interrupted.

    A run of the same Prefect flow run is continued, and so is an interrupted one of the same recipe content and the
    same ``stillhouse.restart_from``.
    """
    content = json.dumps([name, dict(flatten(params))], sort_keys=True, default=str)
    tags = {"stage": "recipe", RECIPE_SHA256: hashlib.sha256(content.encode()).hexdigest(), **tags}
    before = _interrupted(tags)
    flow_runs = [tags["prefect.flow_run_id"]] if "prefect.flow_run_id" in tags else []
    if before is None:
        run = _create(name, {**tags, **({FLOW_RUNS: flow_runs[0]} if flow_runs else {})})
    else:
        earlier = [each for each in before.data.tags.get(FLOW_RUNS, "").split(",") if each]
        flow_runs = [*(each for each in earlier if each not in flow_runs), *flow_runs][-FLOW_RUNS_KEPT:]
        run = _take_over(before, {**tags, **({FLOW_RUNS: ",".join(flow_runs)} if flow_runs else {})})
    run.log_params(params)
    with _closing(run):
        yield run


def _interrupted(tags: Mapping[str, str]) -> Any | None:
    """The run to go on with, or None."""
    flow_run_id = tags.get("prefect.flow_run_id")
    if flow_run_id:
        same = _search({"prefect.flow_run_id": flow_run_id, "stage": "recipe"})
        if same:
            return same[0]
    for run in _search({"stage": "recipe", RECIPE_SHA256: tags[RECIPE_SHA256]}):
        if run.info.status == "RUNNING" and not _is_abandoned(run):
            continue
        interrupted = run.info.status in ("RUNNING", "KILLED")
        return run if interrupted and run.data.tags.get(RESTART_FROM) == tags.get(RESTART_FROM) else None
    return None


def _is_abandoned(run: Any) -> bool:
    """Whether nobody will ever end a run that is under way."""
    owner = _owner_of(run)
    alive = None if owner is None else owner.is_alive()
    if alive is None:  # another machine's; its lease may lie here
        return any(lease.mlflow_run == run.info.run_id and not lease.is_alive() for lease in leases())
    return not alive


def _take_over(before: Any, tags: Mapping[str, str]) -> Run:
    """Make an earlier run this process's own, and go on with it."""
    run = Run(before.info.run_id, continued=True)
    run.tag({**_owner_tags(), **tags})
    if "error" in before.data.tags:
        client().delete_tag(run.id, "error")
    client().update_run(run.id, status="RUNNING")
    return run


@contextmanager
def stage_run(parent: Run, *, stage: str, name: str, key: str, params: Mapping[str, Any]) -> Iterator[Run]:
    """A child run for one stage of one candidate; FAILED if the block raises, KILLED if it is interrupted.

    There is one for each parent and stage key: an interrupted one is continued.
    """
    there = _child(parent, key)
    if there is None:
        run = _create(f"{stage}/{name}", {"mlflow.parentRunId": parent.id, "stage": stage, "stage_key": key})
    else:
        run = _take_over(there, {"cached": "false"} if "cached" in there.data.tags else {})
    run.log_params(params)
    with _closing(run):
        yield run


def log_cached_stage(parent: Run, result: "StageResult") -> None:
    """Show a stage that was not run again, with its metrics and where they come from; once for each parent."""
    there = _child(parent, result.key)
    if there is None:
        tags = {
            "mlflow.parentRunId": parent.id,
            "stage": result.stage,
            "stage_key": result.key,
            "cached": "true",
            "source_run": result.run_id,
        }
        run = _create(f"{result.stage}/{result.name}", tags)
    elif there.info.status == "FINISHED":
        return
    else:  # killed when its result was kept and its run not yet closed
        run = _take_over(there, {})
    run.log_metrics(result.metrics)
    run.finish()


def _child(parent: Run, key: str) -> Any | None:
    found = _search({"mlflow.parentRunId": parent.id, "stage_key": key})
    return found[0] if found else None


def log_candidate(
    parent: Run,
    name: str,
    *,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    series: Sequence[Mapping[str, Any]] = (),
    stage: str = "candidate",
) -> None:
    """A finished child run for one candidate of a stage; once for each parent and name.

    ``series`` are rows per epoch, shown as curves.
    """
    named = f"attributes.run_name = '{name}'"
    there = _search({"mlflow.parentRunId": parent.id, "stage": stage}, more=named)
    if there and there[0].info.status == "FINISHED":
        return
    tags = {"mlflow.parentRunId": parent.id, "stage": stage}
    run = _take_over(there[0], {}) if there else _create(name, tags)
    run.log_params(params)
    run.log_metrics(metrics)
    run.log_series(series, prefix="train/")
    run.finish()


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        failed = isinstance(error, Exception)
        hurried = _hurried.set(not failed)
        try:
            run.tag({"error": (str(error) or type(error).__name__)[:4000]})
            run.finish("FAILED" if failed else "KILLED")
        except Exception as problem:
            logger.warning("MLflow run '%s' could not be closed: %s", run.id, problem)
        finally:
            _hurried.reset(hurried)
        raise
    run.finish()


def kill_runs(owner_is_dead: Callable[[Owner], bool]) -> list[Run]:
    """Mark every run that is under way, but whose process is dead, as KILLED, and return them.

    Runs that do not say whose they are stay as they are; one whose work is complete is closed.
    """
    killed = []
    for found in _search({}, more="attributes.status = 'RUNNING'"):
        owner = _owner_of(found)
        if owner is None or not owner_is_dead(owner):
            continue
        run = Run(found.info.run_id, continued=True)
        if _had_come_to_its_end(found):
            run.finish()
            continue
        run.tag({"error": f"Its process is gone ({owner})."})
        run.finish("KILLED")
        killed.append(run)
    return killed


def _had_come_to_its_end(run: Any) -> bool:
    """Whether a recipe's run was killed when all that was left was to close it."""
    folder = run.data.tags.get("run_folder")
    return folder is not None and (Path(folder) / "summary.json").is_file()


def children(parent_id: str) -> list[Any]:
    """The child runs of a recipe's run, newest first."""
    return _search({"mlflow.parentRunId": parent_id})


def parent_of(run_id: str) -> str | None:
    """The recipe's run that a stage's run belongs to."""
    return client().get_run(run_id).data.tags.get("mlflow.parentRunId")


def register_model(
    *, name: str, onnx_path: Path, run: Run, alias: str | None, tags: Mapping[str, str], requirements: Sequence[str]
) -> int:
    """Register an ONNX file, logged as a model of ``run``, as a version with ``alias``; returns the version.

    A version with the same tags ``sha256`` and ``lineage`` is taken instead of a second one, and so is a model that
    was logged before an interruption. The version appears together with its tags, the alias comes last.
    """
    import mlflow

    mlflow.set_tracking_uri(settings().tracking_uri)  # the registry looks the logged model up by the global address
    same = {key: tags[key] for key in ("sha256", "lineage")}

    def made() -> int:
        there = _registered(name, same)
        if there is not None:
            return there
        model = _logged_model(run, same) or _log_onnx(onnx_path, run, same, requirements)
        if not client().search_registered_models(f"name = '{name}'"):
            client().create_registered_model(name)
        return int(client().create_model_version(name, f"models:/{model}", run.id, dict(tags), model_id=model).version)

    version = _patiently(made, repeat=True)
    if alias is not None:
        client().set_registered_model_alias(name, alias, str(version))
    return version


def _registered(name: str, tags: Mapping[str, str]) -> int | None:
    """The newest version that has these tags."""
    versions = client().search_model_versions(f"name = '{name}'")
    return max((int(each.version) for each in versions if tags.items() <= each.tags.items()), default=None)


def _logged_model(run: Run, tags: Mapping[str, str]) -> str | None:
    """The id of a whole model with these tags that ``run`` logged before it was interrupted."""
    outputs = client().get_run(run.id).outputs
    for output in outputs.model_outputs if outputs else ():
        model = client().get_logged_model(output.model_id)
        if model.status.name == "READY" and tags.items() <= model.tags.items():
            return model.model_id
    return None


def _log_onnx(path: Path, run: Run, tags: Mapping[str, str], requirements: Sequence[str]) -> str:
    import mlflow
    import numpy as np
    import onnx
    from mlflow import onnx as onnx_flavour
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = onnx.load(str(path))
    schemas = []
    for values in (model.graph.input, model.graph.output):
        tensors = []
        for value in values:
            shape = tuple(size.dim_value or -1 for size in value.type.tensor_type.shape.dim)
            tensors.append(TensorSpec(np.dtype("float32"), shape, value.name))
        schemas.append(Schema(tensors))
    with mlflow.start_run(run_id=run.id):
        info = onnx_flavour.log_model(
            model,
            name="model",
            signature=ModelSignature(*schemas),
            pip_requirements=list(requirements),
            save_as_external_data=False,
            tags=dict(tags),
        )
    return str(info.model_id)
