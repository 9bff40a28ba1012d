"""Disk is given back without taking anything that the newest runs were made of."""

import json
import os
import time
from pathlib import Path

import pytest

from compression.errors import InputError
from flows.prune import prune
from tasks.artifacts import Store
from tasks.running import running
from tasks.settings import settings
from tasks.stage import StageIndex, StageResult

LATER = time.time() + 48 * 3600


def a_run(root: Path, number: int, *artifacts: str, recipe: str = "digits") -> list[StageResult]:
    """A finished run whose stages made these artifacts."""
    store = Store(settings().store_dir)
    store.prepare()
    results = []
    for name in artifacts:
        with store.put("checkpoint") as draft:
            (draft.folder / "weights.bin").write_text(name * 1000)
        result = StageResult(stage="distill", name=name, key=f"key-of-{name}", artifact=draft.done())
        StageIndex(store).keep(result)
        results.append(result)
    folder = root / "runs" / recipe / f"2026010{number}-000000-aaaaaaaa"
    folder.mkdir(parents=True)
    rows = [{"key": each.key, "output": each.artifact.sha256, "inputs": []} for each in results]
    (folder / "lineage.json").write_text(json.dumps(rows))
    (folder / "summary.json").write_text(json.dumps({"folder": str(folder)}))
    return results


def there(results: list[StageResult]) -> list[bool]:
    index = StageIndex(Store(settings().store_dir))
    return [index.get(each.key) is not None for each in results]


def test_only_what_the_newest_runs_were_not_made_of_goes(home: Path) -> None:
    first = a_run(home, 1, "old", "shared")
    second = a_run(home, 2, "shared", "new")
    other = a_run(home, 1, "another recipe", recipe="fashion")
    freed = prune(1, dry_run=True, now=LATER)
    assert freed.size_bytes == 3000
    assert there([*first, *second, *other]) == [True] * 5
    assert prune(1, dry_run=False, now=LATER) == freed
    assert there(first) == [False, True]
    assert there([*second, *other]) == [True] * 3
    assert prune(1, dry_run=False, now=LATER).size_bytes == 0
    assert prune(9, dry_run=False, now=LATER).size_bytes == 0


def test_young_things_stay_and_old_leftovers_go(home: Path) -> None:
    kept = a_run(home, 1, "one", "two")
    store = Store(settings().store_dir)
    with store.put("checkpoint") as draft:
        (draft.folder / "weights.bin").write_text("of a run that is not finished yet")
    scratch = settings().home_dir / "scratch" / "key"
    scratch.mkdir(parents=True)
    assert prune(1, dry_run=False).folders == []
    os.utime(scratch, (0, 0))
    assert prune(1, dry_run=False).folders == [scratch]
    assert store.is_intact(draft.done())
    assert there(kept) == [True, True]


def test_while_a_recipe_runs_nothing_goes(home: Path) -> None:
    with running("digits"), pytest.raises(InputError, match="'digits' runs"):
        prune(1, dry_run=False)


def test_keeping_nothing_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match="--keep 1"):
        prune(0, dry_run=True)
