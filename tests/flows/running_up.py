"""A real ``stillhouse up`` for tests: server, worker, MLflow UI and deployments on free ports."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

START = """
import sys
from pathlib import Path
from flows.ports import any_port
from flows.server import up
sys.exit(up(any_port(), any_port(), folder=Path(sys.argv[1]), deployments_file=Path(sys.argv[2])))
"""

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


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
            "PREFECT_HOME": str(folder / ".stillhouse" / "prefect"),  # a test that imports flows has set the project's
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
        """The Prefect server's answer to one request; asked again while its database is busy, as Prefect does."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.state["prefect_api"] + path, data=data, method=method, headers={"content-type": "application/json"}
        )
        for wait in (0.5, 1.0, 2.0, 4.0, None):
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    content = response.read()
                return json.loads(content) if content else None
            except urllib.error.HTTPError as error:
                if error.code != 503 or wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("not reached")

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

    def start(self, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment; its id."""
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return self.api(f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", body)["id"]

    def run(self, run_id: str) -> dict[str, Any]:
        return self.api(f"/flow_runs/{run_id}", method="GET")

    def states(self, run_id: str) -> list[str]:
        """Names of the states a run went through."""
        history = self.api(f"/flow_run_states/?flow_run_id={run_id}", method="GET")
        return [each["name"] for each in sorted(history, key=lambda each: each["timestamp"])]

    def cancel(self, run_id: str) -> None:
        """What the button of the UI does."""
        body = {"state": {"type": "CANCELLING", "message": "Cancelled in a test."}}
        self.api(f"/flow_runs/{run_id}/set_state", body)

    def reaches(self, run_id: str, *states: str, seconds: float) -> dict[str, Any]:
        """The run as soon as its state has one of these types."""

        def found() -> dict[str, Any] | None:
            run = self.run(run_id)
            return run if run["state_type"] in states else None

        return wait_for(found, seconds, f"{' or '.join(states)} of run {run_id}, {self.states(run_id)}")

    def children(self) -> dict[str, int]:
        """Process ids of servers and worker, as the state file has them now."""
        state = json.loads((self.folder / ".stillhouse" / "up.json").read_text())
        return {name: each["pid"] for name, each in state["children"].items()}

    def artifact(self, key: str) -> dict[str, Any]:
        """The newest artifact of that key."""
        body = {"artifacts": {"key": {"any_": [key]}}}
        (latest,) = self.api("/artifacts/latest/filter", body)
        return latest

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=90)
