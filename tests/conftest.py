"""Every test gets its own home: nothing is written to the project's store, runs or mlruns."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("no deadlines", deadline=None)  # how long an example takes is no behaviour
hypothesis.settings.load_profile("no deadlines")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh root for store, runs and MLflow, as settings see it."""
    from tasks import tracking
    from tasks.settings import settings

    monkeypatch.setenv("STILLHOUSE_ROOT", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_THREADS", "1")
    caches = (settings, tracking.client, tracking.experiment_id)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Equal bits are promised for one thread of training."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
