"""A backup of a project in use, put back elsewhere: nothing is done again, and nothing damaged is put back."""

import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from compression.errors import ArtifactError, InputError
from flows.backup import back_up, restore
from tasks.artifacts import Artifact, Store
from tasks.settings import settings
from tests.flows.test_compress import environment, newest, stillhouse
from tests.flows.tiny_recipe import tiny_recipe

RUN = """
import sys
from pathlib import Path
from rich.console import Console
from flows import backup
if sys.argv[1] == "backup":
    backup.backup_command(Console(), Path(sys.argv[2]))
else:
    backup.restore_command(Console(), Path(sys.argv[2]), Path(sys.argv[3]), force=False)
"""


def fill(root: Path) -> Path:
    """What a project holds, without a run: an artifact, a record, a run folder, two databases, things in passing."""
    home = settings().home_dir
    store = Store(settings().store_dir)
    store.prepare()
    with store.put("graph") as draft:
        (draft.folder / "model.onnx").write_bytes(os.urandom(3000))
        (draft.folder / ".hidden").write_text("part of it")
        with closing(sqlite3.connect(draft.folder / "study.db")) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE trials (number INTEGER)")
    (home / "store" / "stages").mkdir(exist_ok=True)
    (home / "store" / "stages" / "key.json").write_text(draft.done().model_dump_json())
    for name in ("locks/a.lock", "scratch/key/step-1.safetensors", "running/id.json", "logs/x.log", "up.json"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    run = root / "runs" / "digits" / "20260101"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"folder": str(run), "outcome": "accept"}))
    (root / "mlruns" / "artifacts").mkdir(parents=True)
    (root / "mlruns" / "artifacts" / "report.html").write_text("a report")
    (home / "prefect").mkdir(exist_ok=True)
    for path in (home / "prefect" / "prefect.db", root / "mlruns" / "mlflow.db"):
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE runs (number INTEGER, artifact_uri VARCHAR(200))")
            database.execute("INSERT INTO runs VALUES (0, ?)", [(root / "mlruns" / "artifacts").as_uri()])
            database.commit()
    return run


@pytest.fixture
def project(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PREFECT_HOME", str(home / ".stillhouse" / "prefect"))
    fill(home)
    return home


def rows_of(path: Path) -> list[tuple[int, str]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT number, artifact_uri FROM runs ORDER BY number").fetchall()


def test_everything_comes_back_elsewhere_and_what_was_in_passing_does_not(project: Path, tmp_path: Path) -> None:
    file, there = tmp_path / "night.tar", tmp_path / "my backup" / "there"
    assert back_up(file).notes == []
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    restore(file, into=there)
    names = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    record = (there / ".stillhouse" / "store" / "stages" / "key.json").read_text()
    assert Store(there / ".stillhouse" / "store").is_intact(Artifact.model_validate_json(record))
    artifact = {name for name in names if name.startswith(".stillhouse/store/objects/")}
    assert len(artifact) == 3
    assert names == {
        *artifact,
        ".stillhouse/store/stages/key.json",
        ".stillhouse/prefect/prefect.db",
        "runs/digits/20260101/summary.json",
        "mlruns/mlflow.db",
        "mlruns/artifacts/report.html",
    }
    assert json.loads((there / "runs/digits/20260101/summary.json").read_text())["folder"].startswith(str(there))
    assert rows_of(there / "mlruns/mlflow.db") == [(0, (there / "mlruns" / "artifacts").as_uri())]
    assert stat.S_IMODE((there / ".stillhouse").stat().st_mode) == 0o700
    assert not [path for path in (there.parent).iterdir() if path != there]


def test_a_database_that_is_written_meanwhile_is_copied_whole(project: Path, tmp_path: Path) -> None:
    """Two rows belong together; a copy of the file could hold one of them."""
    stop = threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(project / "mlruns" / "mlflow.db", timeout=30)) as database:
            number = 0
            while not stop.is_set():
                number += 2
                with database:
                    database.execute("INSERT INTO runs VALUES (?, 'x')", [number])
                    database.execute("INSERT INTO runs VALUES (?, 'x')", [number + 1])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for round_ in range(3):
            back_up(tmp_path / f"{round_}.tar")
    finally:
        stop.set()
        writer.join()
    for round_ in range(3):
        restore(tmp_path / f"{round_}.tar", into=tmp_path / str(round_))
        rows = rows_of(tmp_path / str(round_) / "mlruns" / "mlflow.db")
        assert len(rows) % 2 == 1
        assert [number for number, _ in rows[1:]] == list(range(2, len(rows) + 1))


@pytest.mark.parametrize("where", ["an artifact", "the end", "a wrong digest", "no manifest"])
def test_a_damaged_backup_is_refused_and_nothing_is_put_back(project: Path, tmp_path: Path, where: str) -> None:
    file, there = tmp_path / "night.tar", tmp_path / "there"
    back_up(file)
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        members = {member.name: member for member in tar.getmembers()}
    model = next(member for name, member in members.items() if name.endswith("model.onnx"))
    if where == "an artifact":
        content[model.offset_data + 7] ^= 1
    elif where == "the end":
        del content[model.offset_data + 100 :]
    elif where == "a wrong digest":
        place = content.index(b'"prefect.db": "') + len(b'"prefect.db": "')
        content[place] = ord("0") if content[place] != ord("0") else ord("1")
    else:
        del content[members["manifest.json"].offset :]
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="Use another one|use another one"):
        restore(file, into=there)
    assert not there.exists() or not list(there.iterdir())


@pytest.mark.parametrize("name", ["../outside", "/outside", "home//outside", "home/../../outside", "elsewhere/x"])
def test_a_file_that_would_leave_the_root_is_refused(home: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "bad.tar"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises((InputError, ArtifactError), match=r"no backup of ours|cannot be read"):
        restore(file, into=tmp_path / "there")
    assert not list(tmp_path.rglob("outside*"))


def test_what_is_there_is_kept_unless_forced_and_then_moved_aside(project: Path, tmp_path: Path) -> None:
    file, there = tmp_path / "night.tar", tmp_path / "there"
    back_up(file)
    (there / "runs").mkdir(parents=True)
    (there / "runs" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        restore(file, into=there)
    assert [path.name for path in there.rglob("*")] == ["runs", "mine.txt"]
    restore(file, into=there, force=True)
    (aside,) = there.glob("runs.before-*")
    assert (aside / "mine.txt").read_text() == "mine"
    assert (there / "runs" / "digits").is_dir()


def test_refusals_name_the_way_out(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "night.tar"
    file.write_text("no tar")
    with pytest.raises(InputError, match="expected a new name"):
        back_up(file)
    with pytest.raises(ArtifactError, match="Use another one"):
        restore(file, into=tmp_path / "there")
    with pytest.raises(InputError, match="does not exist"):
        restore(tmp_path / "none.tar", into=tmp_path / "there")
    with pytest.raises(ArtifactError, match="choose another place"):
        back_up(tmp_path / "absent" / "night.tar")
    monkeypatch.setenv("STILLHOUSE_MLFLOW_URI", "postgresql://me:secret@db.example.com/mlflow")
    settings.cache_clear()
    (note,) = back_up(tmp_path / "second.tar").notes
    assert "pg_dump" in note
    assert "db.example.com/mlflow" in note
    assert "secret" not in note


@pytest.mark.servers
@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_a_run_that_is_put_back_elsewhere_is_a_no_op_there_and_mlflow_shows_it(tmp_path: Path) -> None:
    """The backup is taken while another recipe runs; the old place is gone when the new one is looked at."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    first = stillhouse(old, "compress", "tiny.yaml")
    assert first.returncode == 0, first.stdout + first.stderr
    other = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "compress", "tiny.yaml", "--set", "seed=1", "--set", "name=other"],
        env=environment(old),
        cwd=old,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (old / ".stillhouse" / "scratch").is_dir() or not list((old / ".stillhouse" / "scratch").iterdir()):
        assert other.poll() is None
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(
        [*command, "backup", "a.tar"], env=environment(old), cwd=old, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert other.poll() is None
    other.kill()
    other.wait()
    done = subprocess.run(
        [*command, "restore", "a.tar", str(new)],
        env=environment(old),
        cwd=old,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    old.rename(tmp_path / "gone")
    (new / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    plan = stillhouse(new, "plan", "tiny.yaml")
    assert " 0 to do" in plan.stdout, plan.stdout + plan.stderr
    again = stillhouse(new, "compress", "tiny.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing has changed" in again.stdout

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{new / 'mlruns' / 'mlflow.db'}")
    folder = newest(new, tiny_recipe()["name"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["folder"].startswith(str(new))
    assert client.get_run(summary["mlflow_run"]).data.tags["verdict"] == "accept"
    report = client.download_artifacts(summary["mlflow_run"], "report.html", str(tmp_path))
    assert Path(report).read_text() == (folder / "report.html").read_text()
    version = client.get_model_version_by_alias(summary["registered"]["model"], summary["registered"]["alias"])
    uri = client.get_model_version_download_uri(version.name, version.version)
    assert str(tmp_path / "old") not in uri
