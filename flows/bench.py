"""Time the files of a finished run again, on the machine of today."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tasks.settings import prepare_prefect

prepare_prefect()

from prefect import flow  # noqa: E402
from prefect.artifacts import create_table_artifact  # noqa: E402

from compression.errors import InputError  # noqa: E402
from export.benchmark import BenchmarkJob, run_benchmark  # noqa: E402
from flows.form import RecipeName  # noqa: E402
from tasks.artifacts import Artifact, Store  # noqa: E402
from tasks.run_folder import run_folders  # noqa: E402
from tasks.settings import settings  # noqa: E402


@flow(name="bench")
def bench(
    recipe: RecipeName = "digits",
    batches: list[Annotated[int, Field(ge=1)]] = [1, 32],  # noqa: B006  (Prefect's form shows it)
    rounds: Annotated[int, Field(ge=3, le=1000)] = 30,
    threads: Annotated[int, Field(ge=1, le=256)] = 1,
) -> list[dict[str, Any]]:
    """Interleaved latency of every file of a recipe's newest run.

    Args:
        recipe: Name of the recipe; its newest run is timed.
        batches: Images per call.
        rounds: Interleaved rounds; more rounds, narrower noise floor.
        threads: Threads of each session.
    """
    folders = run_folders(recipe)
    if not folders:
        raise InputError(
            f"Recipe '{recipe}' has no finished run in '{settings().runs_dir}', expected one. Run it first."
        )
    newest = folders[-1]
    store = Store(settings().store_dir)
    lineage = json.loads((newest / "lineage.json").read_text(encoding="utf-8"))
    models: dict[str, Path] = {}
    for row in lineage:
        if row["stage"] == "export" and not row["name"].endswith("int8-symmetric"):
            artifact = Artifact(kind="graph", sha256=row["output"], size_bytes=row["size_bytes"])
            models[row["name"]] = store.open(artifact) / "model.onnx"
    reference = json.loads((newest / "latency.json").read_text(encoding="utf-8"))["reference"]
    job = BenchmarkJob(models=models, reference=reference, batches=tuple(batches), rounds=rounds, threads=threads)
    result = run_benchmark(job, newest / "bench")
    rows = [
        {
            "file": row.model,
            "batch": row.batch,
            "p50 ms": round(row.latency_p50_ms, 4),
            "p95 ms": round(row.latency_p95_ms, 4),
            "time ratio": round(row.ratio_to_reference, 4),
        }
        for row in result.rows
    ]
    create_table_artifact(key=f"bench-{recipe}", table=rows, description=f"Latency of {newest.name}, measured again")
    return rows
