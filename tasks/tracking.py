"""The only import of MLflow: a parent run per recipe, a child per stage and candidate, metrics in batches.

Everything goes through ``MlflowClient`` with explicit run ids, because the fluent API starts stray runs in threads.
"""

import json
import logging
import math
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from compression.errors import ArtifactError
from tasks.settings import settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.stage import StageResult

logger = logging.getLogger(__name__)

METRICS_PER_BATCH = 900  # MLflow takes at most 1,000 per call
PARAMETER_LENGTH = 6000  # longer values are cut by MLflow with a warning


@dataclass(frozen=True)
class Run:
    """An MLflow run by its id; every call is explicit about the run it writes to."""

    id: str

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
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            client().log_batch(self.id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested values as dotted names, once."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:PARAMETER_LENGTH]) for key, value in flatten(params)]
        for start in range(0, len(flat), 100):
            client().log_batch(self.id, params=flat[start : start + 100])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        client().log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_file(self, path: Path, folder: str = "") -> None:
        """Copy a file to the run's artifacts."""
        client().log_artifact(self.id, str(path), folder or None)

    def log_folder(self, path: Path, folder: str = "") -> None:
        """Copy a folder to the run's artifacts."""
        client().log_artifacts(self.id, str(path), folder or None)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """Show a dataset in the run's Dataset column."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:8],
            source_type="local",
            source=json.dumps({"uri": source}),
            schema=None,
            profile=json.dumps(dict(profile)),
        )
        tags = [InputTag("mlflow.data.context", context)]
        client().log_inputs(self.id, [DatasetInput(dataset=dataset, tags=tags)])

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


@cache
def client() -> "MlflowClient":
    """The client of this process.

    Raises:
        ArtifactError: the store cannot be opened or written.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = settings().tracking_uri
    if uri.startswith("sqlite:///"):
        _check_database(Path(uri.removeprefix("sqlite:///")))
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        found = MlflowClient(tracking_uri=uri)
        found.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise ArtifactError(
            f"MLflow store '{uri}' does not answer ({error}). Start the server, or set STILLHOUSE_MLFLOW_URI."
        ) from error
    return found


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
    owner = {"stillhouse.pid": str(os.getpid()), "stillhouse.host": socket.gethostname()}
    run = client().create_run(experiment_id(), run_name=name, tags={**owner, **tags})
    return Run(run.info.run_id)


@contextmanager
def recipe_run(name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[Run]:
    """The parent run of a recipe; FAILED if the block raises.

    A run of the same Prefect flow run (tag ``prefect.flow_run_id``) is continued instead of doubled.
    """
    run = _existing(tags.get("prefect.flow_run_id"))
    if run is None:
        run = _create(name, {"stage": "recipe", **tags})
        run.log_params(params)
    with _closing(run):
        yield run


def _existing(flow_run_id: str | None) -> Run | None:
    if not flow_run_id:
        return None
    query = f"tags.`prefect.flow_run_id` = '{flow_run_id}' and tags.stage = 'recipe'"
    found = client().search_runs([experiment_id()], query, max_results=1)
    if not found:
        return None
    client().update_run(found[0].info.run_id, status="RUNNING")
    return Run(found[0].info.run_id)


@contextmanager
def stage_run(parent: Run, *, stage: str, name: str, key: str, params: Mapping[str, Any]) -> Iterator[Run]:
    """A child run for one stage of one candidate; FAILED if the block raises."""
    run = _create(f"{stage}/{name}", {"mlflow.parentRunId": parent.id, "stage": stage, "stage_key": key})
    run.log_params(params)
    with _closing(run):
        yield run


def log_cached_stage(parent: Run, result: "StageResult") -> None:
    """Show a stage that was not run again, with its metrics and where they come from."""
    tags = {
        "mlflow.parentRunId": parent.id,
        "stage": result.stage,
        "stage_key": result.key,
        "cached": "true",
        "source_run": result.run_id,
    }
    run = _create(f"{result.stage}/{result.name}", tags)
    run.log_metrics(result.metrics)
    run.finish()


def log_candidate(parent: Run, name: str, *, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """A finished child run for one candidate of a stage."""
    run = _create(name, {"mlflow.parentRunId": parent.id, "stage": "candidate"})
    run.log_params(params)
    run.log_metrics(metrics)
    run.finish()


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        run.tag({"error": str(error)[:4000]})
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.finish()


def children(parent_id: str) -> list[Any]:
    """The child runs of a recipe's run."""
    return list(client().search_runs([experiment_id()], f"tags.`mlflow.parentRunId` = '{parent_id}'"))


def register_model(
    *, name: str, onnx_path: Path, run: Run, alias: str, tags: Mapping[str, str], requirements: Sequence[str]
) -> int:
    """Log an ONNX file as a model of ``run`` and register it as a new version with ``alias``; returns the version."""
    import mlflow
    import numpy as np
    import onnx
    from mlflow import onnx as onnx_flavour
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = onnx.load(str(onnx_path))
    schemas = []
    for values in (model.graph.input, model.graph.output):
        tensors = []
        for value in values:
            shape = tuple(size.dim_value or -1 for size in value.type.tensor_type.shape.dim)
            tensors.append(TensorSpec(np.dtype("float32"), shape, value.name))
        schemas.append(Schema(tensors))
    mlflow.set_tracking_uri(settings().tracking_uri)
    with mlflow.start_run(run_id=run.id):
        info = onnx_flavour.log_model(
            model,
            name="model",
            registered_model_name=name,
            signature=ModelSignature(*schemas),
            pip_requirements=list(requirements),
            save_as_external_data=False,
        )
    version = int(info.registered_model_version or 0)
    client().set_registered_model_alias(name, alias, str(version))
    for key, value in tags.items():
        client().set_model_version_tag(name, str(version), key, value)
    return version
