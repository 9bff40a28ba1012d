"""``stillhouse prune``: give disk back. What a later run needs again is then simply done again.

Kept is what the newest runs of every recipe were made of. Run folders, MLflow and registered models are not touched.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from compression.errors import InputError
from tasks.artifacts import Store
from tasks.run_folder import run_folders
from tasks.running import leases
from tasks.settings import settings
from tasks.stage import StageResult

YOUNG_SECONDS = 24 * 3600.0
"""Younger things may belong to a run that is not finished yet."""


@dataclass
class Freed:
    """What goes, or would go."""

    records: list[Path]
    folders: list[Path]
    size_bytes: int


def prune(keep: int, *, dry_run: bool, now: float | None = None) -> Freed:
    """Remove stage records and artifacts that none of the newest ``keep`` runs of any recipe was made of.

    Args:
        keep: Runs of each recipe whose artifacts stay.
        dry_run: Only say what would go.
        now: Seconds since the epoch; default: the clock.

    Raises:
        InputError: a recipe runs, or nothing would be kept.
    """
    if keep < 1:
        raise InputError(f"The number of runs to keep has {keep}, expected 1 or more. Give --keep 1.")
    running = [lease for lease in leases() if lease.is_alive()]
    if running:
        raise InputError(f"Recipe '{running[0].recipe}' runs ({running[0]}), expected none. Wait for its end.")
    old = (now or time.time()) - YOUNG_SECONDS
    home, store = settings().home_dir, Store(settings().store_dir)
    keys, digests = _needed(keep)
    records = []
    for path in sorted((store.root / "stages").glob("*.json")):
        if path.stem in keys or path.stat().st_mtime > old:
            digests |= _digests_of(path)
        else:
            records.append(path)
    objects = [path for path in sorted(store.objects.glob("*/*")) if path.name not in digests]
    leftovers = [*(home / "scratch").glob("*"), *store.quarantined.glob("*")]
    folders = [path for path in [*objects, *leftovers] if path.stat().st_mtime < old]
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    if not dry_run:
        for path in records:  # first, so that no record names an artifact that is gone
            path.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return Freed(records, folders, size)


def _needed(keep: int) -> tuple[set[str], set[str]]:
    """Stage keys and artifact digests of the newest runs of every recipe."""
    keys: set[str] = set()
    digests: set[str] = set()
    by_recipe: dict[Path, list[Path]] = {}
    for folder in run_folders():
        by_recipe.setdefault(folder.parent, []).append(folder)
    for folders in by_recipe.values():
        for folder in folders[-keep:]:
            for row in json.loads((folder / "lineage.json").read_text(encoding="utf-8")):
                keys.add(row["key"])
                digests |= {row["output"], *row["inputs"]}
    return keys, digests


def _digests_of(record: Path) -> set[str]:
    try:
        result = StageResult.model_validate_json(record.read_text(encoding="utf-8"))
    except (ValidationError, OSError):
        return set()
    return {result.artifact.sha256, *result.inputs}


def prune_command(console: Console, keep: int, *, dry_run: bool) -> None:
    """``stillhouse prune``."""
    freed = prune(keep, dry_run=dry_run)
    verb = "Would free" if dry_run else "Freed"
    counted = f"{len(freed.folders):,} folders and {len(freed.records):,} stage records"
    console.print(f"{verb} {freed.size_bytes / 2**20:,.1f} MiB: {counted}.", markup=False)
    console.print(f"Kept: everything the newest {keep} runs of each recipe were made of.", markup=False)
