"""Stage 1: a validated, split, hashed dataset in the store."""

import hashlib
from pathlib import Path

from compression.data import AnyData, load_dataset, save_dataset
from tasks.artifacts import file_digest
from tasks.stage import StageOutput, Work, stage

HASHED_UP_TO = 256 * 2**20


def source_digest(config: AnyData) -> str:
    """Changes when the files behind a dataset change: contents of files, names, sizes and times of folders."""
    place: Path | None = getattr(config, "root", None) or getattr(config, "path", None)
    if place is None or not place.exists():
        return ""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    by_content = sum(path.stat().st_size for path in files) <= HASHED_UP_TO
    digest = hashlib.sha256()
    for path in files:
        facts = path.stat()
        mark = file_digest(path) if by_content else f"{facts.st_size}:{facts.st_mtime_ns}"
        digest.update(f"{path.relative_to(place)}:{mark};".encode())
    return digest.hexdigest()


@stage("data", code=("compression.data",), libraries=("torch", "scikit-learn"))
def prepare_data(
    work: Work,
    *,
    name: str,
    config: AnyData,
    source: str,
    seed: int,
    unlabelled: AnyData | None = None,
    unlabelled_source: str = "",
) -> StageOutput:
    """Read, validate, split and hash the dataset; ``unlabelled`` is a second source, of images without labels."""
    dataset = load_dataset(config, seed=seed, unlabelled=unlabelled)
    with work.store.put("dataset") as draft:
        save_dataset(dataset, draft.folder)
    splits = ("train", "validation", "calibration", "test")
    sizes = {f"num_{split}": float(len(getattr(dataset, split).labels)) for split in splits}
    for split in splits:
        work.run.log_dataset(
            dataset.name, dataset.hashes[split], name, {"num_rows": int(sizes[f"num_{split}"])}, context=split
        )
    if dataset.pool is not None:
        sizes["num_pool"] = float(len(dataset.pool.labels))
    return StageOutput(
        artifact=draft.done(),
        metrics={**sizes, "num_classes": float(dataset.num_classes)},
        info={
            "class_names": list(dataset.class_names),
            "input_shape": list(dataset.input_shape),
            "hashes": dataset.hashes,
            "warnings": list(dataset.warnings),
        },
    )
