"""Weights files: tensors come out, or one clear error; nothing in a file ever runs."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.checkpoint import load_into, load_weights
from compression.errors import CheckpointError
from compression.zoo import ResidualCnn, TimmModel

SHAPE = (1, 8, 8)
SMALL = ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(2, 1), stem_width=8)


class Payload:
    """Unpickled without care, it runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return SMALL.build(5, SHAPE).state_dict()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_pickle_payload_is_refused_and_does_not_run(tmp_path, weights, zipped, suffix):
    path, marker = tmp_path / f"teacher{suffix}", tmp_path / "ran"
    content = weights | {"extra": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"system, expected tensors only.*Re-save .* \.safetensors"):
        load_weights(path, sha256=None)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload is live: a careless reader does run it
    assert marker.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(SMALL.build(5, SHAPE), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="ResidualNet, expected tensors only"):
        load_weights(tmp_path / "model.pt")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors' has no file"):
        load_weights(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 0.5, 0.99])
def test_a_file_cut_off_is_refused(tmp_path, weights, suffix, kept):
    path = tmp_path / f"teacher{suffix}"
    (torch.save if suffix == ".pt" else save_file)(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load_weights(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_noise_is_refused(tmp_path, suffix):
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(CheckpointError, match=f"teacher{suffix}"):
        load_weights(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_hash_is_checked_before_the_file_is_read(tmp_path, weights, suffix):
    path = tmp_path / f"teacher{suffix}"
    (torch.save if suffix == ".pt" else save_file)(weights, path)
    found, wanted = hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 64
    assert load_weights(path, sha256=found.upper()).keys() == weights.keys()
    with pytest.raises(CheckpointError, match=rf"{found}, expected {wanted}"):
        load_weights(path, sha256=wanted)


def test_an_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "teacher.onnx").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"suffix '\.onnx'"):
        load_weights(tmp_path / "teacher.onnx")


@pytest.mark.parametrize(
    ("content", "said"),
    [([1, 2], "a list"), ({}, "a dict"), ({"epoch": 3, "note": "x"}, r"'epoch' \(int\)"), ({1: 2}, "1")],
)
def test_something_else_than_a_state_dict_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "teacher.pt")
    with pytest.raises(CheckpointError, match=said):
        load_weights(tmp_path / "teacher.pt")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_common_wrappers_are_removed(tmp_path, weights, wrap, prefix):
    torch.save(wrap({prefix + key: value for key, value in weights.items()}), tmp_path / "teacher.pth")
    found = load_weights(tmp_path / "teacher.pth")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


# ---------------------------------------------------------------- into a network


def test_weights_of_other_names_and_shapes_are_listed(weights):
    model = SMALL.build(5, SHAPE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights["stem.0.kernel"] = weights.pop("stem.0.weight")
    weights["stem.1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as refused:
        load_into(model, weights, name="big")
    for said in ("'big'", "no stem.0.weight", "unexpected stem.0.kernel", "stem.1.bias (3,) instead of (8,)"):
        assert said in str(refused.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config", [SMALL, TimmModel(name="test_vit")], ids=lambda config: getattr(config, "name", config.kind)
)
def test_weights_for_other_classes_name_both_counts(config):
    shape = (1, 32, 32)
    trained = config.build(9, shape).state_dict()
    with pytest.raises(CheckpointError, match="9 classes .* expected 5"):
        load_into(config.build(5, shape), trained, name="big")


def test_weights_of_a_diverged_run_are_refused(weights):
    weights["head.bias"][2] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite in head\.bias"):
        load_into(SMALL.build(5, SHAPE), weights, name="big")


def test_safetensors_written_elsewhere_load(tmp_path, weights):
    save_file(weights, tmp_path / "teacher.safetensors", metadata={"format": "pt"})
    model = SMALL.build(5, SHAPE)
    load_into(model, load_weights(tmp_path / "teacher.safetensors"), name="teacher")
    stored = load_file(tmp_path / "teacher.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in stored.items())
