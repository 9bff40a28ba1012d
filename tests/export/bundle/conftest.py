"""One bundle that most tests look at, and what it was made of."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from export.bundle.build import accepted_run, build_bundle
from export.bundle.package import Package, open_package
from flows.bundling import app
from tasks.settings import settings
from tests.export.bundle.accepted import ORDER, TRUST, make_accepted


@pytest.fixture(scope="session")
def run(tmp_path_factory, exported) -> Path:
    return make_accepted(tmp_path_factory.mktemp("run"), exported)


@pytest.fixture(scope="session")
def images(exported) -> np.ndarray:
    return exported.images(8).numpy()


@pytest.fixture(scope="session")
def sources(exported) -> dict[str, Path]:
    return {exported.symmetric.sha256: exported.symmetric.path}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, run, images, sources) -> Package:
    path, notes = build_bundle(accepted_run(run), tmp_path_factory.mktemp("out"), ORDER, images, sources)
    assert notes == ()
    return open_package(path, TRUST)


@pytest.fixture
def stillhouse(tmp_path, monkeypatch):
    """The commands, with everything they keep below ``tmp_path``."""
    for name, value in {
        "STILLHOUSE_ROOT": str(tmp_path),
        "STILLHOUSE_HOME": str(tmp_path / "home"),
        "STILLHOUSE_KEYS": str(tmp_path / "keys"),
        "STILLHOUSE_KEY_PASSPHRASE": "correct horse battery",
        "COLUMNS": "200",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("STILLHOUSE_MLFLOW_URI", raising=False)
    settings.cache_clear()
    yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    settings.cache_clear()
