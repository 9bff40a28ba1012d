"""What a platform team relies on: passwords, addresses, no pickles, harmless YAML, files that others cannot read."""

import ast
import base64
import json
import os
import sqlite3
import stat
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml

from compression.errors import RecipeError
from flows.ports import any_port
from flows.recipe import load_recipe
from flows.safe_yaml import MAX_BYTES
from tests.flows.running_up import ROOT, RunningUp, wait_for
from tests.flows.test_compress import environment
from tests.flows.tiny_recipe import tiny_recipe

DIGITS = (ROOT / "recipes" / "digits.yaml").read_text()

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "by its aliases"),
        ("a: &a [*a, 1]", "by its aliases"),
        (f"name: {'[' * 20_000}", "nested too deeply|not YAML"),
        ("# " + "x" * MAX_BYTES, "more than 1,048,576 bytes"),
        ("a: !!python/object/apply:os.system ['touch owned']", "not YAML"),
        ("a: !!python/name:os.system", "not YAML"),
    ],
    ids=["billion laughs", "an alias in itself", "deep nesting", "a large file", "a call", "a name"],
)
def test_yaml_that_means_harm_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """Unfolded, the first one has 31 billion values: a loader that follows it never returns."""
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(path)
    assert not (tmp_path / "owned").exists()


def test_an_override_is_no_way_around(tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text(DIGITS)
    flow = "[&a [x,x,x,x,x,x,x,x,x], " + ", ".join(
        f"&{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(11)
    )
    for value, says in (
        (flow + "]", "by its aliases"),
        ("!!python/name:os.system", "not YAML"),
        ("[" * 20_000, "deep|not YAML"),
    ):
        with pytest.raises(RecipeError, match=says):
            load_recipe(path, [f"description={value}"])


def test_honest_anchors_still_work(tmp_path: Path) -> None:
    path = tmp_path / "digits.yaml"
    raw = yaml.safe_load(DIGITS)
    shared = raw["teachers"][0]["source"]
    for teacher in raw["teachers"]:
        teacher["source"] = shared
    path.write_text(yaml.safe_dump(raw))
    assert "*id001" in path.read_text()
    assert len({str(teacher.source) for teacher in load_recipe(path).teachers}) == 1


def code_of(package: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


@pytest.mark.parametrize("package", ["flows", "tasks", "export", "compression"])
def test_no_code_can_unpickle_or_run_yaml(package: str) -> None:
    """Imports of pickling modules, and calls that unpickle unless told not to."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    found = []
    for path, node in code_of(package):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found += [where for name in node.names if name.name.partition(".")[0] in forbidden]
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in forbidden:
            found.append(where)
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            options = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if call == "torch.load" and options.get("weights_only") != "True":
                found.append(where)
            if call == "torch.save" and path.name != "step_checkpoint.py":
                found.append(where)  # that one is read by weights_only, and gone when the stage is done
            if call in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
                found.append(where)
            if options.get("allow_pickle") == "True":
                found.append(where)
    assert found == []


def test_the_home_is_for_its_owner_alone(tmp_path: Path) -> None:
    code = "from tasks.settings import prepare_prefect, settings; prepare_prefect(); print(settings().home_dir)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "STILLHOUSE"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "STILLHOUSE_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    made = Path(done.stdout.strip())
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert (made / "prefect").is_dir()


def looks_pickled(content: bytes) -> bool:
    """A pickle of protocol 2 to 5, alone or in a zip archive as torch writes it, or as text in base64."""
    if content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05" and content.rstrip(b"\n")[-1:] == b".":
        return True
    return (
        base64.b64encode(b"\x80\x04\x95")[:4] in content[:4000]
        or base64.b64encode(b"\x80\x05\x95")[:4] in content[:4000]
    )


def pickles_in(folder: Path) -> list[str]:
    """Files, members of archives, object arrays and database values that hold a pickle."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".joblib") or looks_pickled(content):
            found.append(str(path))
        if content[:6] == b"\x93NUMPY" and b"'|O'" in content[:200]:
            found.append(f"{path}: an array of objects")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found += [f"{path}: {name}" for name in archive.namelist() if name.endswith(".pkl")]
        if content[:16] == b"SQLite format 3\0":
            found += [f"{path}: {place}" for place in _pickled_values(path)]
    return found


def _pickled_values(path: Path) -> Iterator[str]:
    with closing(sqlite3.connect(path)) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in database.execute(f'SELECT * FROM "{table}"'):
                if any(isinstance(value, bytes) and looks_pickled(value) for value in row):
                    yield table


def test_the_search_for_pickles_finds_them(tmp_path: Path) -> None:
    import pickle

    import numpy as np
    import torch

    content = pickle.dumps({"a": [1, 2, 3] * 100})
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "prefect.json").write_text(json.dumps({"result": base64.b64encode(content).decode()}))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    torch.save(torch.zeros(2), tmp_path / "checkpoint.bin")
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("CREATE TABLE t (value BLOB)")
        database.execute("INSERT INTO t VALUES (?)", [content])
        database.commit()
    names = {line.removeprefix(str(tmp_path)).partition(":")[0] for line in pickles_in(tmp_path)}
    assert names == {"/plain", "/prefect.json", "/objects.npy", "/checkpoint.bin", "/a.db"}


@pytest.mark.servers
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_whole_run_leaves_no_pickle_behind(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    clean = {"PREFECT_HOME": str(tmp_path / ".stillhouse" / "prefect")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "compress", "tiny.yaml"],
        env={**environment(tmp_path), **clean},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / ".stillhouse" / "prefect" / "prefect.db").is_file()
    assert list((tmp_path / ".stillhouse" / "store").rglob("*.safetensors"))
    assert not [path for path in (tmp_path / ".stillhouse" / "prefect" / "storage").rglob("*") if path.is_file()]
    assert pickles_in(tmp_path) == []


USER, PASSWORD = "team", "correct-horse-battery"

TICK = """
from pathlib import Path

from prefect import flow, task


@task(persist_result=True)
def half(number: int) -> dict:
    return {"half": number / 2}


@flow
def tick(number: int = 4) -> dict:
    done = half(number)
    Path("ticks.txt").write_text(str(done))
    return done
"""

DEPLOYMENTS = """
name: test
deployments:
  - {name: tick, entrypoint: "tick.py:tick", tags: [stillhouse], work_pool: {name: stillhouse}}
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    folder = tmp_path_factory.mktemp("password")
    (folder / "tick.py").write_text(TICK)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_API_AUTH_STRING", f"{USER}:{PASSWORD}")
        patch.setenv("PREFECT_HOME", str(folder / ".stillhouse" / "prefect"))
        patch.delenv("PREFECT_API_AUTH_STRING", raising=False)
        started = RunningUp(folder, source=folder, deployments=folder / "prefect.yaml")
    yield started
    started.end()


class TestWithPassword:
    """``stillhouse up`` with Prefect's basic authentication: everything of ours goes on, everybody else stays out."""

    pytestmark = [pytest.mark.servers, pytest.mark.e2e, pytest.mark.timeout(900)]

    def ask(self, up: RunningUp, path: str, *, password: str | None, body: object = None) -> tuple[int, str]:
        request = urllib.request.Request(
            up.state["prefect_api"] + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        if password is not None:
            token = base64.b64encode(f"{USER}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def test_without_the_password_nothing_is_answered(self, up: RunningUp) -> None:
        for path, body in (("/deployments/filter", {}), ("/block_documents/filter", {}), ("/admin/settings", None)):
            assert self.ask(up, path, password=None, body=body)[0] == 401, path
            assert self.ask(up, path, password="wrong", body=body)[0] == 401, path
            assert self.ask(up, path, password=PASSWORD, body=body)[0] == 200, path

    def test_whether_it_lives_is_no_secret(self, up: RunningUp) -> None:
        """A service manager asks without the password."""
        assert self.ask(up, "/health", password=None) == (200, "true")

    def test_a_run_goes_from_server_to_worker_to_its_end(self, up: RunningUp) -> None:
        _, found = self.ask(up, "/deployments/name/tick/tick", password=PASSWORD)
        deployment = json.loads(found)["id"]
        path = f"/deployments/{deployment}/create_flow_run"
        assert self.ask(up, path, password=None, body={})[0] == 401
        status, made = self.ask(up, path, password=PASSWORD, body={})
        assert status == 201

        def done() -> bool:
            _, run = self.ask(up, f"/flow_runs/{json.loads(made)['id']}", password=PASSWORD)
            return json.loads(run)["state_type"] == "COMPLETED"

        wait_for(done, 180, "the run")
        assert "2.0" in (up.folder / "ticks.txt").read_text()

    def test_what_prefect_keeps_of_a_result_is_json(self, up: RunningUp) -> None:
        """After the run before: that task asked for a kept result."""
        kept = [path for path in (up.folder / ".stillhouse" / "prefect" / "storage").rglob("*") if path.is_file()]
        assert kept
        for path in kept:
            assert json.loads(path.read_text())["metadata"]["serializer"]["type"] == "json"
        assert pickles_in(up.folder) == []

    def test_our_own_commands_get_in_with_the_password_in_their_environment(self, up: RunningUp) -> None:
        code = "from flows import blocks, notify; print(blocks.channels(notify.server()))"
        for extra, code_wanted in (({}, 1), ({"PREFECT_API_AUTH_STRING": f"{USER}:{PASSWORD}"}, 0)):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**up.environment, **extra},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == code_wanted, done.stderr
            assert ("401" in done.stderr) == (code_wanted == 1)

    def test_every_server_listens_on_this_machine_only(self, up: RunningUp) -> None:
        listening = []
        for child in up.state["children"].values():
            process = psutil.Process(child["pid"])
            for each in [process, *process.children(recursive=True)]:
                listening += [c.laddr.ip for c in each.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert len(listening) >= 2
        assert set(listening) == {"127.0.0.1"}

    def test_the_password_is_in_no_file_and_no_command_line(self, up: RunningUp) -> None:
        files = [path for path in up.folder.rglob("*") if path.is_file()]
        assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
        commands = [psutil.Process(child["pid"]).cmdline() for child in up.state["children"].values()]
        assert PASSWORD not in str(commands)


@pytest.mark.servers
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_mlflow_with_its_basic_auth_lets_only_our_user_in(tmp_path: Path) -> None:
    pytest.importorskip("flask_wtf", reason="pip install 'mlflow[auth]'")
    port = any_port()
    (tmp_path / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{tmp_path / 'users.db'}\nadmin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    server_environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-this-test",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, env=server_environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        wait_for(lambda: _status(f"http://127.0.0.1:{port}/health") == 200, 180, "MLflow")
        assert _status(f"http://127.0.0.1:{port}/") == 401
        assert _status(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1") == 401
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe()))
        url = {"STILLHOUSE_MLFLOW_URI": f"http://127.0.0.1:{port}"}
        login = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        code = "from tasks import tracking; tracking.experiment_id(); print('in')"
        for extra, says in (({}, "Set MLFLOW_TRACKING_USERNAME"), (login, "in")):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**environment(tmp_path), **url, **extra},
                capture_output=True,
                text=True,
                check=False,
            )
            assert says in done.stdout + done.stderr
            assert (done.returncode == 0) == (says == "in")
    finally:
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
