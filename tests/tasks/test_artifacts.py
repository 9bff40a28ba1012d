import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from compression.errors import ArtifactError
from tasks.artifacts import Artifact, Store, write_durably


def put(store: Store, files: dict[str, bytes], kind: str = "thing") -> Artifact:
    with store.put(kind) as draft:
        for name, content in files.items():
            path = draft.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return draft.done()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def test_equal_bytes_give_an_equal_handle_and_other_bytes_another(store: Store) -> None:
    first = put(store, {"a": b"1", "sub/b": b"2"})
    again = put(store, {"sub/b": b"2", "a": b"1"})
    assert first == again
    assert put(store, {"a": b"1", "sub/c": b"2"}).sha256 != first.sha256
    assert put(store, {"a": b"2", "sub/b": b"2"}).sha256 != first.sha256


def test_an_artifact_reads_back_and_survives_its_json_form(store: Store) -> None:
    artifact = put(store, {"weights.bin": b"\x00\x01"})
    handle = Artifact.model_validate_json(artifact.model_dump_json())
    assert (store.open(handle) / "weights.bin").read_bytes() == b"\x00\x01"


@pytest.mark.parametrize("damage", ["flip", "truncate", "extra", "delete"])
def test_a_changed_artifact_is_refused_and_quarantined(store: Store, damage: str) -> None:
    artifact = put(store, {"weights.bin": b"0123456789"})
    path = store.place(artifact) / "weights.bin"
    if damage == "flip":
        path.write_bytes(b"0123456780")
    elif damage == "truncate":
        path.write_bytes(b"01234")
    elif damage == "extra":
        (path.parent / "more.bin").write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match="other bytes than were written"):
        store.open(artifact)
    assert not store.place(artifact).exists()
    assert list(store.quarantined.iterdir())
    assert put(store, {"weights.bin": b"0123456789"}) == artifact
    assert store.is_intact(artifact)


def test_a_block_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="boom"), store.put("thing") as draft:
        (draft.folder / "half").write_bytes(b"1")
        raise RuntimeError("boom")
    assert not list(store.partial.iterdir())
    assert not list(store.objects.iterdir())


def test_an_unwritable_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="STILLHOUSE_HOME"):
        Store(tmp_path / "file" / "store").prepare()


def test_a_full_disk_is_refused_before_work_starts(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"MiB of free disk, expected at least"):
        store.prepare(min_free_bytes=1 << 60)


def test_a_full_disk_while_writing_is_named_and_leaves_nothing(store: Store) -> None:
    """/dev/full gives the kernel's own ENOSPC."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(ArtifactError, match="No space left"), store.put("thing") as draft:
        (draft.folder / "small").write_bytes(b"1")
        with full.open("wb") as file:
            file.write(b"x" * 8192)
            file.flush()
    assert not list(store.partial.iterdir())


def write_forever(root: str) -> None:
    store = Store(Path(root))
    number = 0
    while True:
        put(store, {"blob": number.to_bytes(4, "big") * 50_000})
        number += 1


def test_killed_while_writing_every_artifact_there_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    for _ in range(3):
        process = multiprocessing.get_context("spawn").Process(target=write_forever, args=(str(store.root),))
        process.start()
        deadline = time.monotonic() + 60
        while not any(store.objects.rglob("blob")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.15)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with store.put("mine") as mine:
        (mine.folder / "blob").write_bytes(b"1")
        os.utime(mine.folder, (0, 0))
        foreign, old = store.partial / "thing.00000000.1.1.0-x", store.partial / "thing.00000000.1.1.0-y"
        foreign.mkdir()
        old.mkdir()
        os.utime(old, (0, 0))
        store.prepare()
        assert set(store.partial.iterdir()) == {mine.folder, foreign}, "what the killed left is gone"
    folders = [path.parent for path in store.objects.rglob("blob")]
    assert folders
    for folder in folders:
        assert store.is_intact(Artifact(kind="thing", sha256=folder.name, size_bytes=0))


def test_write_durably_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "note.json"
    write_durably(path, "one, and quite long")
    write_durably(path, "two")
    assert path.read_text() == "two"
    assert [item.name for item in path.parent.iterdir()] == ["note.json"]
