"""``stillhouse doctor``: what works on this machine, what does not and why, and what to do about it."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compression.errors import ArtifactError, DataError
from tasks.settings import settings

Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    way_out: str = ""
    """What to do about it; empty when nothing has to be done."""
    required: bool = False
    """Without it no run works."""


def checks() -> list[Check]:
    """Everything, in the order of a run; a look that fails is a row, never an error."""
    return [check for look in LOOKS for check in _safely(look)]


def report(console: Console) -> int:
    """Print the table; the exit code is 0 unless something that every run needs is missing."""
    table = Table("what", "", "found", "what to do", title="stillhouse doctor", title_justify="left")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]note[/]", "missing": "[red]no[/]"}
    found = checks()
    for check in found:
        table.add_row(check.name, marks[check.status], escape(check.found), escape(check.way_out))
    console.print(table)
    broken = [check.name for check in found if check.required and check.status == "missing"]
    if broken:
        console.print(f"Runs do not work before this is mended: {', '.join(broken)}.")
        return 3
    console.print("Runs work here. Try: stillhouse compress recipes/digits.yaml")
    return 0


def _safely(look: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(look())
    except Exception as error:  # a doctor reports, whatever it finds
        name = look.__name__.strip("_").replace("_", " ")
        return [Check(name, "warn", f"could not be looked at: {type(error).__name__}: {str(error)[:200]}")]


def _machine() -> Iterator[Check]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    way_out = "" if fits else "Use Python 3.11, 3.12 or 3.13: make setup PYTHON=python3.11"
    yield Check("python", "ok" if fits else "missing", version, way_out, required=True)
    cores = os.cpu_count() or 1
    threads = settings().threads or cores
    yield Check("cores", "ok", f"{cores}, training takes {threads} (STILLHOUSE_THREADS)")
    place = settings().home_dir
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    enough = free * 1024 >= settings().min_free_mib
    way_out = "" if enough else "Free some disk, or set STILLHOUSE_HOME to another one"
    yield Check("disk", "ok" if enough else "missing", f"{free:.1f} GiB free for {place}", way_out, required=True)


def _store() -> Iterator[Check]:
    from tasks.artifacts import Store

    try:
        Store(settings().store_dir).prepare()
        yield Check("store", "ok", f"{settings().store_dir} is writable", required=True)
    except ArtifactError as error:
        yield Check("store", "missing", str(error), "Set STILLHOUSE_HOME to a writable folder", required=True)


def _processor() -> Iterator[Check]:
    from export.runtime import cpu_features

    cpu = cpu_features()
    flags = [name for name in ("avx2", "avx512", "vnni", "amx_int8", "dot_product") if getattr(cpu, name)]
    fast = cpu.vnni or cpu.amx_int8 or cpu.dot_product
    note = "" if fast else "No 8-bit dot products: INT8 files may be slower than float here; the gate then ships float"
    yield Check("processor", "ok" if fast else "warn", f"{cpu.model}: {', '.join(flags) or cpu.machine}", note)


def _torch() -> Iterator[Check]:
    import torch

    cuda = f"CUDA with {torch.cuda.device_count()} GPU" if torch.cuda.is_available() else "CPU only"
    yield Check("torch", "ok", f"{torch.__version__}, {cuda}", required=True)


def _onnxruntime() -> Iterator[Check]:
    import onnxruntime

    # get_available_providers lists what was compiled in; devices are what is really there.
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        devices = sorted({str(each.device.type).rpartition(".")[2] for each in onnxruntime.get_ep_devices()})
    yield Check("onnxruntime", "ok", f"{onnxruntime.__version__}, devices: {', '.join(devices)}", required=True)
    both = all(_version(name) for name in ("onnxruntime", "onnxruntime-gpu"))
    if both:
        yield Check(
            "onnxruntime twice",
            "warn",
            "onnxruntime and onnxruntime-gpu overwrite each other",
            "pip uninstall onnxruntime",
        )


def _tensorrt() -> Iterator[Check]:
    try:
        rtx = importlib.import_module("tensorrt_rtx")
        names = [name for name in dir(rtx.ComputeCapability) if name.startswith("SM")]
        yield Check("TensorRT-RTX", "ok", f"{rtx.__version__}, builds for {', '.join(names)}; engines are not run here")
    except ImportError:
        yield Check(
            "TensorRT-RTX", "warn", "not installed", "pip install tensorrt-rtx (Linux x86-64); only its targets need it"
        )
    version = _version("tensorrt")
    if version:
        yield Check("TensorRT", "ok", version)
    else:
        way_out = "pip install '.[tensorrt]' on the host with the GPU; only targets of kind tensorrt need it"
        yield Check("TensorRT", "warn", "not installed", way_out)


def _orchestration() -> Iterator[Check]:
    for package, below, trouble in (
        ("fastapi", (0, 151), "the Prefect server does not start with newer ones"),
        ("sqlalchemy", (2, 1), "schedules never start a run with newer ones"),
    ):
        version = _version(package) or "0"
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        fits = numbers < below
        way_out = "" if fits else f"{trouble}; run make setup again"
        yield Check(package, "ok" if fits else "missing", version, way_out, required=True)
    yield Check("prefect", "ok", _version("prefect") or "?", required=True)
    from flows.server import running_server

    found = running_server()
    if found is None:
        yield Check("servers", "warn", "stillhouse up is not running", "stillhouse up, for the UI and the schedule")
    else:
        yield Check("servers", "ok", f"Prefect {found.prefect_url}, MLflow {found.mlflow_url}")
    yield Check("mlflow", "ok", f"{_version('mlflow')}, {settings().tracking_uri}", required=True)


def _devices() -> Iterator[Check]:
    from flows import fleet

    if not fleet.is_set_up():
        yield Check("devices", "ok", "not set up: stillhouse devices setup, when there are some")
        return
    registry = fleet.open_registry()
    try:
        count = len(registry.devices())
    finally:
        registry.close()
    role, until = min(fleet.open_repository(()).expiries.items(), key=lambda pair: pair[1])
    found = f"{count} in the registry; they take what is signed until {until:%Y-%m-%d %H:%M} UTC ({role})"
    late = until < datetime.now(UTC)
    way_out = "stillhouse devices serve, with STILLHOUSE_KEY_PASSPHRASE, signs it anew" if late else ""
    yield Check("devices", "warn" if late else "ok", found, way_out)


def _datasets() -> Iterator[Check]:
    from compression.data import FashionMnist

    yield Check("digits", "ok", "comes with scikit-learn")
    try:
        FashionMnist().check()
        yield Check("Fashion-MNIST", "ok", str(FashionMnist().root))
    except DataError:
        way_out = "apt-get install dataset-fashion-mnist, or set data.root"
        yield Check("Fashion-MNIST", "warn", f"not in {FashionMnist().root}", way_out)


def _browser() -> Iterator[Check]:
    found = [str(path) for path in (Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")) if path.exists()]
    way_out = "" if len(found) == 2 else "apt-get install chromium chromium-driver; only the browser tests need them"
    yield Check("browser", "warn" if way_out else "ok", ", ".join(found) or "none", way_out)


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


LOOKS = (_machine, _store, _processor, _torch, _onnxruntime, _tensorrt, _orchestration, _devices, _datasets, _browser)
