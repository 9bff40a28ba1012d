import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compression.augment import ShiftFlip, augment, normalise
from compression.data import Dataset, Digits, load_dataset
from compression.errors import CompressionError
from compression.features import penultimate
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.zoo.plain_cnn import PlainCnn

ROOT = Path(__file__).resolve().parents[2]
SPEC = OutputsSpec(views=3, seed=7, augment=ShiftFlip(pad=1, flip=False))


def make_teacher() -> nn.Module:
    torch.manual_seed(0)
    return PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8).build(10, (1, 8, 8)).eval()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset(Digits(limit=400), seed=0)


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    write_teacher_outputs(make_teacher(), dataset, SPEC, folder)
    return folder


@pytest.mark.parametrize("view", [0, 1, 2])
def test_stored_logits_equal_a_fresh_forward(dataset: Dataset, folder: Path, view: int) -> None:
    stored = StoredOutputs.open(folder)
    order = torch.randperm(len(dataset.train.labels))[:50]
    ids = dataset.train.ids[order]
    raw = augment(dataset.train.images[order], ids, view=view, seed=7, config=SPEC.augment)
    with torch.no_grad():
        fresh = make_teacher()(normalise(raw, dataset.preprocessing))
    found = stored.logits(ids, view)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, fresh, atol=2e-3, rtol=2e-3)  # float16


def test_validation_logits_and_features_are_plain_forwards(dataset: Dataset, folder: Path) -> None:
    stored = StoredOutputs.open(folder)
    with torch.no_grad():
        logits, features = penultimate(make_teacher(), normalise(dataset.validation.images, dataset.preprocessing))
    torch.testing.assert_close(stored.validation_logits, logits, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(stored.validation_features, features, atol=2e-3, rtol=2e-3)


def test_features_of_every_view_are_stored_when_asked_for(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"features": True})
    write_teacher_outputs(make_teacher(), dataset, spec, tmp_path)
    stored, without = StoredOutputs.open(tmp_path), StoredOutputs.open(folder)
    ids = dataset.train.ids[torch.tensor([3, 90, 7])]
    raw = augment(dataset.train.images[torch.tensor([3, 90, 7])], ids, view=2, seed=7, config=SPEC.augment)
    with torch.no_grad():
        _, fresh = penultimate(make_teacher(), normalise(raw, dataset.preprocessing))
    torch.testing.assert_close(stored.features(ids, 2), fresh, atol=2e-3, rtol=2e-3)
    assert torch.equal(stored.logits(ids, 2), without.logits(ids, 2))
    with pytest.raises(CompressionError, match="features: true"):
        without.features(ids, 2)


WRITE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_teacher_outputs import SPEC, make_teacher
from compression.data import Digits, load_dataset
from compression.teacher_outputs import write_teacher_outputs
write_teacher_outputs(make_teacher(), load_dataset(Digits(limit=400), seed=0), SPEC, Path(sys.argv[1]))
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    def digests(name: str) -> dict[str, str]:
        command = [sys.executable, "-c", WRITE, str(tmp_path / name), str(Path(__file__).parent)]
        subprocess.run(command, check=True, cwd=ROOT)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}

    assert digests("one") == digests("two")


def test_the_teacher_comes_back_as_it_was(dataset: Dataset, tmp_path: Path) -> None:
    teacher = make_teacher().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    write_teacher_outputs(teacher, dataset, SPEC.model_copy(update={"views": 1}), tmp_path)
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_unknown_samples_and_views_are_refused(dataset: Dataset, folder: Path) -> None:
    stored = StoredOutputs.open(folder)
    with pytest.raises(CompressionError, match="3 views"):
        stored.logits(dataset.train.ids[:2], 3)
    for sample in (dataset.validation.ids[:1], torch.tensor([10**6]), torch.tensor([-1])):
        with pytest.raises(CompressionError, match="no sample"):
            stored.logits(sample, 0)


def test_no_views_store_the_validation_split_alone(dataset: Dataset, tmp_path: Path) -> None:
    write_teacher_outputs(make_teacher(), dataset, SPEC.model_copy(update={"views": 0}), tmp_path)
    stored = StoredOutputs.open(tmp_path)
    assert len(stored.validation_logits) == len(dataset.validation.labels)
    with pytest.raises(CompressionError, match="0 views"):
        stored.logits(dataset.train.ids[:1], 0)


def test_a_broken_teacher_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    teacher = make_teacher()
    with torch.no_grad():
        next(teacher.parameters()).fill_(float("nan"))
    with pytest.raises(CompressionError, match="finite"):
        write_teacher_outputs(teacher, dataset, SPEC, tmp_path)


def test_a_folder_without_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="no readable teacher outputs"):
        StoredOutputs.open(tmp_path)
