"""The writer's reading and the agent's were written apart: they must agree on every file, right or wrong."""

from pathlib import Path

import pytest

from export.bundle import BundleError
from export.bundle.package import open_package
from export.bundle.trust import Trust as WritersTrust
from export.devices.agent import package
from export.devices.agent.envelope import Trust
from export.devices.agent.errors import Refused
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_package import WRONG_STATEMENTS, mutants


def opinions(path: Path) -> tuple[bool, bool]:
    """(the writer takes it, the agent takes it)."""
    try:
        open_package(path, WritersTrust.model_validate(made_up.trust()))
        writer = True
    except BundleError:
        writer = False
    try:
        package.read(path, Trust(made_up.trust()))
        agent = True
    except Refused:
        agent = False
    return writer, agent


def complete(said: dict) -> None:
    """What the writer asks for besides: where a model comes from."""
    digest = "0" * 64
    said["lineage"] = {
        **{"run": "r", "mlflow_run": None, "recipe_sha256": digest, "data_sha256": digest, "teachers": {}},
        **{"commit": None, "flow_run": None},
    }


def archive_as_written(files: dict[str, bytes]) -> bytes:
    import io
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o100644 << 16
            archive.writestr(info, files[name])
    return content.getvalue()


def write(path: Path, change=lambda said: None) -> Path:
    files = made_up.members()
    return made_up.write(
        path, files, content=archive_as_written(files), change=lambda said: (complete(said), change(said))
    )


def test_both_take_a_right_bundle(tmp_path: Path) -> None:
    assert opinions(write(tmp_path / "x.edgepkg")) == (True, True)


@pytest.mark.parametrize("kind", sorted(WRONG_STATEMENTS))
def test_both_refuse_a_signed_statement_that_says_nonsense(tmp_path: Path, kind: str) -> None:
    assert opinions(write(tmp_path / "x.edgepkg", WRONG_STATEMENTS[kind])) == (False, False)


def test_both_refuse_changed_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.edgepkg").read_bytes()
    broken = tmp_path / "broken.edgepkg"
    found = set()
    for mutant in mutants(whole, 300, 5):
        broken.write_bytes(mutant)
        found.add(opinions(broken))
    assert found == {(False, False)}
