"""Registered versions without the days of training behind them: real rows of a real MLflow store."""

import json
from typing import Any

EVIDENCE: dict[str, Any] = {
    "file": "student-0.int8",
    "verdict": "accept",
    "precision": "int8",
    "accuracy": 0.95,
    "float_accuracy": 0.951,
    "ece": 0.02,
    "num_samples": 100_000,
    "size_bytes": 100_000,
    "latency_p50_ms": 1.0,
    "latency_ratio": [0.5, 0.49, 0.51],
    "latency_noise_floor": 0.0,
    "yardstick": "teacher-a.float32 of 900 KiB, batch 32, 1 threads",
}


def add_version(name: str, **evidence: Any) -> int:
    """A new version of the model with these tags, alias ``candidate``; returns its number."""
    from tasks import tracking

    client = tracking.client()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    number = len(client.search_model_versions(f"name = '{name}'")) + 1
    tags = {**EVIDENCE, "sha256": f"{name}-{number}", "lineage": f"lineage-{number}", **evidence}
    run = client.create_run(tracking.experiment_id(), run_name=f"register/{name}")
    client.create_model_version(
        name,
        f"runs:/{run.info.run_id}/model",
        run.info.run_id,
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()},
    )
    client.set_registered_model_alias(name, "candidate", str(number))
    return number
