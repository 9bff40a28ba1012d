"""Stages that train on several devices: the stage's own function, once in a process for each device.

``STILLHOUSE_DEVICES=2`` starts two processes of :mod:`tasks.devices` for a stage decorated with ``on_devices``. Each
is sent the stage's inputs as JSON and runs the same function; training exchanges gradients between them. The first
rank writes checkpoints, artifact and MLflow run; what the others write goes to a folder that is thrown away.
"""

import functools
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from compression.train import Hardware, launcher, ranks
from tasks import tracking
from tasks.artifacts import Store
from tasks.machine import set_threads
from tasks.settings import settings
from tasks.stage import StageOutput, Work

StageFn = Callable[..., StageOutput]


def hardware() -> Hardware:
    """What this process trains on: its share of the devices when it is one of several ranks, else one device."""
    return Hardware(accelerator=settings().accelerator, devices=_world_size())


def on_devices(fn: StageFn) -> StageFn:
    """Let a stage's function run in a process for each device, where the settings name more than one."""

    @functools.wraps(fn)
    def wrapped(work: Work, *, name: str, **inputs: Any) -> StageOutput:
        if settings().devices == 1 or _world_size() > 1:
            return fn(work, name=name, **inputs)
        return _launched(fn, work, name, inputs)

    return wrapped


class SilentRun:
    """Stands for the MLflow run in all ranks but the first: every call is let go."""

    id = ""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _launched(fn: StageFn, work: Work, name: str, inputs: Mapping[str, Any]) -> StageOutput:
    hints = get_type_hints(fn)
    content = {field: TypeAdapter(hints[field]).dump_python(value, mode="json") for field, value in inputs.items()}
    devices = settings().devices
    with tempfile.TemporaryDirectory(prefix="stillhouse-ranks-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(
            json.dumps(
                {
                    "module": fn.__module__,
                    "function": fn.__name__,
                    "name": name,
                    "inputs": content,
                    "run": work.run.id,
                    "scratch": str(work.scratch),
                    "answer": str(answer),
                }
            ),
            encoding="utf-8",
        )
        launcher.launch(
            [sys.executable, "-m", "tasks.devices", str(request)],
            devices,
            what=f"'{name}' on {devices} devices",
            logs=settings().home_dir / "logs" / "ranks",
            on_message=lambda message: work.report(message["text"], message["done"], message["total"]),
            environment=_environment(devices),
        )
        return StageOutput.model_validate_json(answer.read_text(encoding="utf-8"))


def _environment(devices: int) -> dict[str, str]:
    """Of a rank: its share of the cores, and no name of a flow run that is not its own."""
    root = str(Path(__file__).resolve().parents[1])
    threads = settings().threads or max(1, (os.cpu_count() or 1) // devices)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("PREFECT__")},
        "STILLHOUSE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def carry_out(request: Mapping[str, Any]) -> None:
    """A rank's part of a stage."""
    fn: StageFn = getattr(importlib.import_module(request["module"]), request["function"]).fn
    hints = get_type_hints(fn)
    inputs = {field: TypeAdapter(hints[field]).validate_python(value) for field, value in request["inputs"].items()}
    first = os.environ["RANK"] == "0"
    set_threads(settings().threads)
    store = Store(settings().store_dir)
    with tempfile.TemporaryDirectory(prefix="stillhouse-rank-") as thrown_away:
        work = Work(
            store=store if first else _Reading(store, Path(thrown_away)),
            run=tracking.Run(request["run"]) if first else SilentRun(),  # type: ignore[arg-type]
            scratch=Path(request["scratch"]),
            report=lambda text, done, total: launcher.tell(text=text, done=done, total=total) if first else None,
        )
        output = fn(work, name=request["name"], **inputs)
    ranks.part()
    if first:
        Path(request["answer"]).write_text(output.model_dump_json(), encoding="utf-8")


class _Reading(Store):
    """The store as all ranks but the first see it: what they put is kept apart."""

    def __init__(self, store: Store, apart: Path) -> None:
        super().__init__(store.root)
        self._apart = Store(apart)

    def put(self, kind: str) -> Any:
        return self._apart.put(kind)


def _leave(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, _leave)
    launcher.serve(lambda: carry_out(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
