"""Bad input gets one clear message (what, where, found, expected, way out), exit code 2, and loses nothing."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def tiny(place: Path, **changes: object) -> Path:
    """A recipe small enough to run in seconds, if it ran."""
    raw = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    raw["teachers"] = raw["teachers"][:1]
    raw["select"] = {"panel_size": 1}
    raw |= changes
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def stillhouse(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "STILLHOUSE_ROOT": str(home),
        "COLUMNS": "200",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=home,
        check=False,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    for text in says:
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def checkpoint_recipe(place: Path, weights: Path) -> Path:
    teacher = {
        "name": "residual",
        "model": {"kind": "residual_cnn", "widths": [8], "depths": [1], "strides": [1], "stem_width": 8},
        "source": {"kind": "checkpoint", "path": str(weights)},
    }
    return tiny(place, teachers=[teacher])


def test_a_missing_teacher(tmp_path: Path) -> None:
    done = stillhouse(tmp_path, "compress", str(checkpoint_recipe(tmp_path, tmp_path / "none.safetensors")))
    assert_refused(done, "none.safetensors")


def test_a_corrupt_teacher(tmp_path: Path) -> None:
    weights = tmp_path / "broken.safetensors"
    weights.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not json at all")
    assert_refused(stillhouse(tmp_path, "compress", str(checkpoint_recipe(tmp_path, weights))), "broken.safetensors")


def test_a_pickle_payload_is_refused_and_does_not_run(tmp_path: Path) -> None:
    import pickle

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    weights = tmp_path / "evil.pt"
    weights.write_bytes(pickle.dumps(Payload()))
    done = stillhouse(tmp_path, "compress", str(checkpoint_recipe(tmp_path, weights)))
    assert_refused(done, "evil.pt", "safetensors")
    assert not marker.exists()


@pytest.mark.slow
def test_a_wrong_class_count(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from compression.zoo.residual_cnn import ResidualCnn

    model = ResidualCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8).build(7, (1, 8, 8))
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    done = stillhouse(tmp_path, "compress", str(checkpoint_recipe(tmp_path, tmp_path / "seven.safetensors")))
    assert_refused(done, "7", "10", "class")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.array([0, 1, 2, 99] * 20), "99"),
        (np.array([0, 1, 2, -1] * 20), "-1"),
        (np.array([0, 1, 1, 0] * 20), "0 samples"),
    ],
    ids=["out of range", "negative", "empty class"],
)
def test_wrong_labels(tmp_path: Path, labels: np.ndarray, says: str) -> None:
    np.savez(
        tmp_path / "data.npz",
        images=np.zeros((80, 8, 8), np.uint8),
        labels=labels,
        class_names=["a", "b", "c"],
    )
    recipe = tiny(tmp_path, data={"kind": "arrays", "path": str(tmp_path / "data.npz")})
    assert_refused(stillhouse(tmp_path, "compress", str(recipe)), says, "data.npz")


def test_an_unknown_recipe_key(tmp_path: Path) -> None:
    assert_refused(
        stillhouse(tmp_path, "compress", str(tiny(tmp_path, teecher=1))),
        "teecher",
        "unknown key",
        "nothing was run",
    )


def test_an_unwritable_store(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file in the way")
    done = stillhouse(tmp_path, "compress", str(tiny(tmp_path)), STILLHOUSE_HOME=str(tmp_path / "home"))
    assert_refused(done, "cannot be written", "STILLHOUSE_HOME")


def test_no_free_disk(tmp_path: Path) -> None:
    done = stillhouse(tmp_path, "compress", str(tiny(tmp_path)), STILLHOUSE_MIN_FREE_MIB=str(1 << 40))
    assert_refused(done, "free disk", "STILLHOUSE_MIN_FREE_MIB")


def test_an_absent_dataset_says_how_to_get_it(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, data={"kind": "fashion_mnist", "root": str(tmp_path / "nowhere")})
    assert_refused(stillhouse(tmp_path, "compress", str(recipe)), "dataset-fashion-mnist", "data.root")


@pytest.mark.slow
def test_a_truncated_dataset_file(tmp_path: Path) -> None:
    for stem, count in (("train", 50), ("t10k", 20)):
        images = struct.pack(">IIII", 2051, count, 28, 28) + bytes(count * 784 - (100 if stem == "train" else 0))
        labels = struct.pack(">II", 2049, count) + bytes(index % 10 for index in range(count))
        with gzip.open(tmp_path / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(images)
        with gzip.open(tmp_path / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(labels)
    recipe = tiny(tmp_path, data={"kind": "fashion_mnist", "root": str(tmp_path)})
    assert_refused(stillhouse(tmp_path, "compress", str(recipe)), "train-images")


def test_a_stage_that_does_not_exist(tmp_path: Path) -> None:
    assert_refused(
        stillhouse(tmp_path, "compress", str(tiny(tmp_path)), "--from", "distil"), "distil", "expected one of"
    )


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    assert_refused(stillhouse(tmp_path, "plan", str(tmp_path / "nothing.yaml")), "nothing.yaml", "does not exist")
