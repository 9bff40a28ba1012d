"""FastNAS through the optional library: budgets, rebuilding without it, and the refusal where it is missing."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.models import ModelSpec, build_model
from compression.search.fastnas import NORM_BATCHES, FastNas, check_installed, fastnas, norm_batches
from compression.search.space import Workshop
from compression.search.study import Study, run_study
from compression.search.trials import Latency, Score
from compression.train import TrainConfig
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn, VisionTransformer
from export.onnx_graph import to_onnx
from tests.compression.tiny_data import tiny_dataset

ZOO = {
    "plain": PlainCnn(widths=(16, 32), depths=(1, 1), strides=(2, 2), stem_width=16),
    "residual": ResidualCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16),
    "depthwise": DepthwiseCnn(widths=(16, 32), depths=(1, 1), strides=(1, 2), stem_width=16),
    "transformer": VisionTransformer(width=32, depth=1, num_heads=4, patch_size=4, stem_width=16),
}


def parent_of(model, data: Dataset) -> tuple[nn.Module, ModelSpec]:
    spec = Workshop({}, data, 0, Path("nowhere")).template().model_copy(update={"model": model})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model(spec)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 1.8)
    return net.eval(), spec


def calibration(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    return Workshop({}, data, 0, Path("nowhere")).calibration()


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny_dataset()


@pytest.fixture
def library():
    pytest.importorskip("torchprofile")
    pytest.importorskip("modelopt")


# --- without the library


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, r"'nvidia-modelopt' has no installation, expected one .* pip install 'stillhouse\[modelopt\]'"),
        ({"nvidia-modelopt": "0.47.0"}, "'torchprofile' has no installation, expected 0.0.4"),
        ({"nvidia-modelopt": "0.47.0", "torchprofile": "0.1.0"}, "'torchprofile' has version 0.1.0, expected 0.0.4"),
    ],
    ids=["nothing", "no-torchprofile", "other-torchprofile"],
)
def test_missing_packages_are_named_before_any_compute(versions, message, data, tmp_path, monkeypatch):
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)
    shop = Workshop({"teacher": parent_of(ZOO["plain"], data)}, data, 0, tmp_path)
    with pytest.raises(CompressionError, match=message):
        FastNas(parent="teacher").genes(shop)
    with pytest.raises(CompressionError, match=message):
        FastNas(parent="teacher").build({"flops": 0.6}, shop)
    monkeypatch.setattr(metadata, "version", {"nvidia-modelopt": "0.47.0", "torchprofile": "0.0.4"}.__getitem__)
    check_installed()
    assert FastNas(parent="teacher", shares=(0.6, 0.3, 0.6)).genes(shop) == {"flops": (0.3, 0.6)}
    with pytest.raises(CompressionError, match="parent 'missing'"):
        FastNas(parent="missing").genes(shop)


def test_the_module_loads_without_the_library():
    code = "import sys, compression.search.fastnas; print('modelopt' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("count", [3, 64, 130])
def test_batches_for_batch_norm_show_every_image(count):
    batches = norm_batches(torch.arange(count))
    assert len(batches) == NORM_BATCHES
    assert {int(value) for batch in batches for value in batch} == set(range(count))
    assert len({len(batch) for batch in batches}) == 1


# --- with it


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ZOO)
def test_keeps_the_budget_and_rebuilds_without_the_library(name, data, tmp_path):
    model, spec = parent_of(ZOO[name], data)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    settings = {"share": 0.6, "channel_divisor": 8, "calibration": calibration(data)}
    pruned, new_spec = fastnas(model, spec, **settings)
    assert torch.equal(torch.get_rng_state(), random_state)
    macs = [profile.macs(net, spec.input_shape) for net in (model, pruned)]
    assert macs[1] <= 0.62 * macs[0]
    assert new_spec.edits
    assert type(pruned) is type(model)
    assert not pruned.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pruned.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    widths = [module.out_channels for module in pruned.modules() if isinstance(module, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)

    again, spec_again = fastnas(model, spec, **settings)
    assert spec_again == new_spec
    assert same_weights(again, pruned)
    save_checkpoint(pruned, new_spec, tmp_path / "kept")
    loaded, _ = load_checkpoint(tmp_path / "kept")
    images = calibration(data)[0]
    with torch.no_grad():
        assert torch.equal(loaded(images), pruned(images))


@pytest.mark.usefixtures("library")
def test_every_look_follows_fresh_statistics(data):
    model, spec = parent_of(ZOO["plain"], data)
    images, labels = calibration(data)
    calls: list[str] = []

    def noted(norm: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        del output
        if len(inputs[0]) == len(images):
            calls.append("statistics" if norm.training else "look")

    model.stem[1].register_forward_hook(noted)
    fastnas(model, spec, share=0.6, channel_divisor=8, calibration=(images, labels))
    looks = [place for place, call in enumerate(calls) if call == "look"]
    assert len(looks) >= 3
    assert all(calls[place - 1] == "statistics" for place in looks)


@pytest.mark.usefixtures("library")
def test_a_whole_search_keeps_what_it_found(data, tmp_path):
    seen: list[int] = []

    def train_trial(model: nn.Module, number: int, folder: Path, on_epoch: object) -> Score:
        del number, folder, on_epoch
        seen.append(profile.params(model))
        return Score(evaluate(model, data.validation, data.preprocessing).accuracy)

    result = run_study(
        Study(spaces=(FastNas(parent="teacher", shares=(0.6,)),), trials=1, train=TrainConfig(epochs=1)),
        parents={"teacher": parent_of(ZOO["residual"], data)},
        dataset=data,
        seed=0,
        latency=lambda model: Latency(profile.params(model) / 1e4),
        train_trial=train_trial,
        storage=tmp_path / "study.db",
        folder=tmp_path / "trials",
    )
    assert [trial.state for trial in result.trials] == ["complete"]
    model, _ = load_checkpoint(result.finalists[0])
    assert [profile.params(model)] == seen == [result.chosen[0].params]


@pytest.mark.usefixtures("library")
def test_a_candidate_is_searched_once_and_exported(data, tmp_path, monkeypatch, capsys):
    space = FastNas(parent="teacher", shares=(0.5,))
    shop = Workshop({"teacher": parent_of(ZOO["plain"], data)}, data, 0, tmp_path / "shop")
    assert space.genes(shop) == {"flops": (0.5,)}
    first, spec = space.build({"flops": 0.5}, shop)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    monkeypatch.setattr("compression.search.fastnas.fastnas", None)
    second, _ = space.build({"flops": 0.5}, shop)
    assert same_weights(first, second)
    images = calibration(data)[0]
    import onnxruntime

    to_onnx(first, tmp_path / "graph.onnx", input_shape=spec.input_shape, metadata={}, fast=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), first(images), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("change", [{"share": 0.01}, {"channel_divisor": 64}], ids=["share", "divisor"])
def test_what_cannot_be_reached_says_so(change, data):
    settings = {"share": 0.6, "channel_divisor": 8, "calibration": calibration(data)} | change
    with pytest.raises(CompressionError, match=r"no pruned form with .* Raise the share, lower channel_divisor"):
        fastnas(*parent_of(ZOO["plain"], data), **settings)
