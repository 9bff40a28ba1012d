"""The temporary Prefect server of a run from the command line: one for all, for as long as somebody uses it."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.flows.running_up import ROOT, wait_for
from tests.flows.sleepy import left_of

pytestmark = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.timeout(400)]

USE = """
import sys
from pathlib import Path
from flows.temporary_server import temporary_server
with temporary_server() as api:
    from prefect import flow, get_client

    @flow
    def short():
        return 1

    assert short() == 1
    with get_client(sync_client=True) as client:
        assert str(client.api_url).startswith(api)
        print(api, len(client.read_flow_runs()), flush=True)
    sys.stdin.readline()
"""


def environment(folder: Path) -> dict[str, str]:
    home = str(folder / ".stillhouse" / "prefect")
    mine = {"STILLHOUSE_ROOT": str(folder), "PREFECT_HOME": home, "PREFECT_LOGGING_LEVEL": "ERROR"}
    given = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return {**given, **mine, "PYTHONPATH": str(ROOT)}


def use(folder: Path, code: str = USE) -> subprocess.Popen[str]:
    """A process that uses the temporary server until it reads a line; it writes address and number of runs."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(folder),
    )


def said(user: subprocess.Popen[str]) -> list[str]:
    assert user.stdout is not None
    return user.stdout.readline().split()


RUN = """
import time
from flows.temporary_server import temporary_server
with temporary_server():
    from prefect import flow
    from prefect.runtime import flow_run
    from tasks.running import running

    @flow
    def short():
        with running("short", flow_run_id=str(flow_run.id)):
            print(flow_run.id, flush=True)
            time.sleep(600)

    short()
"""


def test_runs_share_a_server_that_lives_until_the_last_is_gone_however_it_goes(tmp_path: Path) -> None:
    users = [use(tmp_path), use(tmp_path)]
    (first, one), (second, other) = (said(user) for user in users)
    assert first == second
    assert {one, other} in ({"1", "2"}, {"2"})
    servers = [each for each in left_of(tmp_path) if "server start" in each["command"]]
    assert len(servers) == 1
    refused = subprocess.run(
        [sys.executable, "-m", "flows.cli", "up"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "two servers on one SQLite database" in refused.stderr
    users[0].communicate("\n", timeout=60)
    assert users[0].returncode == 0
    third = use(tmp_path)
    assert said(third) == [first, "3"]
    killed = use(tmp_path, RUN)
    (run,) = said(killed)
    for user in (users[1], third, killed):
        user.kill()
        user.wait()
    wait_for(lambda: not left_of(tmp_path), 30, "the end of the server")
    again = use(tmp_path)
    api, count = said(again)
    assert count == "5"  # the records have stayed
    with urllib.request.urlopen(f"{api}/flow_runs/{run}", timeout=30) as response:
        assert json.loads(response.read())["state_type"] == "CRASHED"
    again.communicate("\n", timeout=60)
    wait_for(lambda: not left_of(tmp_path), 30, "the end of the server")
