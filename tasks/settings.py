"""Facts of this machine: where things are kept, which servers to talk to. Never part of a recipe."""

import contextlib
import os
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.parsing import serialize_parsing

SOURCE_ROOT = Path(__file__).resolve().parent.parent


def _project_root() -> Path:
    """The repository when installed from one, else the working folder."""
    return SOURCE_ROOT if (SOURCE_ROOT / "pyproject.toml").is_file() else Path.cwd()


class Settings(BaseSettings):
    """Read from the environment: every field is ``STILLHOUSE_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="STILLHOUSE_", frozen=True, extra="ignore")

    root: Path = Field(default_factory=_project_root)
    """Folder that holds recipes, runs and mlruns."""
    home: Path | None = None
    """Store, stage index, locks and server state; default ``<root>/.stillhouse``."""
    runs: Path | None = None
    """Run folders; default ``<root>/runs``."""
    mlflow_uri: str | None = None
    """MLflow tracking server or database; default SQLite at ``<root>/mlruns/mlflow.db``."""
    experiment: str = "stillhouse"
    """MLflow experiment that holds all runs."""
    threads: int = Field(default=0, ge=0)
    """Threads for training; 0 takes every core."""
    study_storage: str | None = None
    """URL of a database whose search studies several workers share, say ``postgresql+psycopg://user@host/name``; a
    password belongs into its password file. Default: an SQLite file for each search."""
    latency_networks: int = Field(default=0, ge=0)
    """Networks that the latency model of this machine is fitted to, 0 for the usual 96; fewer are sooner measured and
    predict worse."""
    fan_out: Literal["none", "processes", "dask", "ray"] = "none"
    """Who does independent teachers and finalists ahead of the story: nobody, local processes, or a cluster."""
    workers: int = Field(default=2, gt=0)
    """Workers of a fan-out on this machine; each takes its share of the cores."""
    dask_scheduler: str = ""
    """Address of a Dask scheduler, say ``tcp://host:8786``; empty starts a cluster of processes here."""
    ray_address: str = ""
    """Address of a Ray cluster; empty starts one here."""
    devices: int = Field(default=1, gt=0)
    """Processes, one for each device, that train one teacher or student together."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """What teachers and students are trained on; ``auto`` takes a GPU when there is one."""
    restarts: int = Field(default=2, ge=0)
    """How often the reconciler starts a crashed flow run of compress or nightly again."""
    keys: Path | None = None
    """Folder of the keys that sign for devices, outside of the project; default ``~/.config/stillhouse/keys``."""
    fleet: Path | None = None
    """Folder of devices: registry, repository, bundles that were rolled out; default ``<home>/devices``."""
    device_registry: str | None = None
    """Database of devices and rollouts, say ``postgresql+psycopg://user@host/name``; default SQLite in ``fleet``."""
    device_address: str = "127.0.0.1:8420"
    """Where the device server listens, ``host:port``; devices in the field reach it through a proxy with TLS."""
    min_free_mib: int = Field(default=512, ge=0)
    """Refuse to start with less free disk than this under ``home``."""

    @property
    def home_dir(self) -> Path:
        return (self.home or self.root / ".stillhouse").absolute()

    @property
    def runs_dir(self) -> Path:
        return (self.runs or self.root / "runs").absolute()

    @property
    def store_dir(self) -> Path:
        return self.home_dir / "store"

    @property
    def keys_dir(self) -> Path:
        return (self.keys or Path.home() / ".config" / "stillhouse" / "keys").expanduser().absolute()

    @property
    def devices_dir(self) -> Path:
        return (self.fleet or self.home_dir / "devices").absolute()

    @property
    def device_registry_url(self) -> str:
        return self.device_registry or f"sqlite:///{self.devices_dir / 'registry.db'}"

    @property
    def mlruns_dir(self) -> Path:
        return (self.root / "mlruns").absolute()

    @property
    def tracking_uri(self) -> str:
        return self.mlflow_uri or f"sqlite:///{self.mlruns_dir / 'mlflow.db'}"


@cache
def settings() -> Settings:
    """The settings of this process; tests call ``settings.cache_clear()`` after changing the environment."""
    return Settings()


def prepare_prefect() -> None:
    """Set Prefect's environment before it is imported: own home, patient clients, no pickles, no telemetry.

    Every flow and command begins here, so threads also take turns at parsing from here on.
    """
    serialize_parsing()
    defaults = {
        "PREFECT_HOME": str(settings().home_dir / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # 2 + 4 + ... + 256 s: a server may be away for minutes
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "compression,export,tasks",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(OSError):  # an unwritable home gets its own error from the store
        if not settings().home_dir.exists():  # databases and logs are only for who runs it
            settings().home_dir.mkdir(parents=True, mode=0o700)
        Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
