"""A real ``stillhouse up`` for tests: server, worker, MLflow UI and deployments on free ports."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

START = """
import sys
from pathlib import Path
from flows.server import up
sys.exit(up(folder=Path(sys.argv[1]), deployments_file=Path(sys.argv[2])))
"""


def wait_for(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first truthy answer of ``ready``, asked twice a second."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = ready()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


class RunningUp:
    """``stillhouse up`` whose store, runs and database lie in ``folder``.

    ``source`` is where the deployments' entry points are found; ``deployments`` is the file that lists them.
    """

    def __init__(self, folder: Path, *, source: Path, deployments: Path) -> None:
        self.folder = folder
        self.log = folder / "up.log"
        self.environment = {
            **os.environ,
            "STILLHOUSE_ROOT": str(folder),
            "STILLHOUSE_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(source), str(deployments)],
            cwd=folder,
            env=self.environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        self.state: dict[str, Any] = wait_for(self._ready, 300, "stillhouse up")

    def _ready(self) -> dict[str, Any] | None:
        assert self.process.poll() is None, self.log.read_text()
        path = self.folder / ".stillhouse" / "up.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def api(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """The Prefect server's answer to one request."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.state["prefect_api"] + path, data=data, method=method, headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            content = response.read()
        return json.loads(content) if content else None

    def deployment(self, name: str) -> dict[str, Any]:
        return next(each for each in self.api("/deployments/filter", {}) if each["name"] == name)

    def runs(self, *states: str, deployment: str | None = None) -> list[dict[str, Any]]:
        """Flow runs in one of the ``states``, of all deployments or of one."""
        wanted: dict[str, Any] = {"state": {"type": {"any_": list(states)}}}
        if deployment:
            wanted["deployment_id"] = {"any_": [self.deployment(deployment)["id"]]}
        return self.api("/flow_runs/filter", {"flow_runs": wanted})

    def finished(self, deployment: str) -> list[dict[str, Any]]:
        return self.runs("COMPLETED", "FAILED", "CRASHED", deployment=deployment)

    def artifact(self, key: str) -> dict[str, Any]:
        """The newest artifact of that key."""
        body = {"artifacts": {"key": {"any_": [key]}}}
        (latest,) = self.api("/artifacts/latest/filter", body)
        return latest

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=90)
