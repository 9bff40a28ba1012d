"""Quantization-aware training: what the fake-quantized model promises, and what conversion keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver

from compression.augment import NoAugment
from compression.checkpoint import save_checkpoint
from compression.data import Dataset
from compression.data.dataset import Split
from compression.distill import DistillConfig
from compression.errors import CheckpointError, CompressionError
from compression.models import ModelSpec
from compression.quantize import (
    FakeQuantized,
    NumberFormat,
    Qat,
    convert,
    load_quantized,
    prepare_qat,
    qat,
    quantize,
    save_quantized,
)
from compression.quantize.annotator import SymmetricInt8
from compression.quantize.folding import batch_norm
from compression.quantize.prepared import load_prepared, save_prepared
from compression.quantize.rounding import SymmetricFakeQuantize
from compression.train import TrainConfig
from compression.types import Batch, Preprocessing
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, VisionTransformer
from export.onnx_graph import load_graph, to_onnx
from export.qdq import check_symmetric

SHAPE = (1, 12, 12)
FAMILIES = {
    "residual": ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8),
    "plain": PlainCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8),
    "depthwise": DepthwiseCnn(widths=(8,), depths=(2,), strides=(1,), stem_width=8),
    "transformer": VisionTransformer(width=16, depth=1, num_heads=2, patch_size=4, stem_width=8),
    "mixer": Mixer(width=16, depth=1, token_hidden=8, patch_size=4, stem_width=8),
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def lively(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and factors (negative ones too) that a folding error would show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            module.running_mean = torch.randn(size, generator=generator) * 0.3
            module.running_var = torch.rand(size, generator=generator) + 0.5
            module.weight.data = torch.randn(size, generator=generator) + 0.5
            module.bias.data = torch.randn(size, generator=generator) * 0.3
    return model.eval()


def images(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def prepared_for(family: str, **options) -> FakeQuantized:
    return prepare_qat(lively(FAMILIES[family].build(4, SHAPE)), SHAPE, images(32), NumberFormat(**options))


def train_steps(model: FakeQuantized, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    for step in range(steps):
        labels = torch.arange(8) % 4
        loss = F.cross_entropy(model(images(8, seed=step)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request) -> FakeQuantized:
    torch.manual_seed(0)
    model = prepared_for(request.param)
    train_steps(model, 2)
    return model.eval()


# --- rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["signed", "non-negative", "negative"])
def test_rounding_equals_torchaos_bit_for_bit(kind):
    options = {
        "observer": MovingAverageMinMaxObserver,
        "quant_min": -128,
        "quant_max": 127,
        "dtype": torch.int8,
        "qscheme": torch.per_tensor_symmetric,
        "eps": 2**-20,
    }
    ours, theirs = SymmetricFakeQuantize(**options), FakeQuantize(**options)
    for seed in range(3):
        x = torch.randn(64, 33, generator=torch.Generator().manual_seed(seed)) * 3
        x = {"signed": x, "non-negative": x.relu(), "negative": -x.abs()}[kind]
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        left, right = ours(mine), theirs(other)
        left.sum().backward()
        right.sum().backward()
        assert torch.equal(left, right)
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(mine.grad, other.grad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), spread=st.floats(1e-3, 1e3))
def test_rounding_is_idempotent_on_a_grid_of_at_most_256_levels(seed, spread):
    quantizer = SymmetricFakeQuantize(
        observer=MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.int8,
        qscheme=torch.per_tensor_symmetric,
        eps=2**-20,
    )
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * spread
    once = quantizer(x)
    quantizer.disable_observer()
    assert torch.equal(quantizer(once), once)
    assert len(once.unique()) <= 256
    assert (once - x).abs().max() <= quantizer.scale.item() * 1.001


# --- the prepared model -------------------------------------------------------------------------------


def test_preparing_leaves_the_student_as_it_was():
    model = lively(FAMILIES["residual"].build(4, SHAPE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_qat(model, SHAPE, images(8))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rounding_it_is_the_float_model(family):
    model = lively(FAMILIES[family].build(4, SHAPE))
    prepared = prepare_qat(model, SHAPE, images(16))
    for quantizer in prepared.quantizers():
        quantizer.disable_fake_quant()
    torch.testing.assert_close(prepared(images(5)), model(images(5)), rtol=1e-5, atol=1e-5)


def test_calibrated_ranges_are_close_enough_to_predict_as_the_float_model():
    model = lively(FAMILIES["residual"].build(4, SHAPE))
    prepared = prepare_qat(model, SHAPE, images(128))
    expected = model(images(64, seed=9))
    error = (prepared(images(64, seed=9)) - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.1


def test_evaluation_moves_nothing_and_takes_any_batch():
    prepared = prepared_for("residual")
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    for count in (1, 2, 70):
        assert prepared(images(count) * 50).shape == (count, 4)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())


def test_training_moves_ranges_and_statistics_until_frozen():
    prepared = prepared_for("residual")

    def moving() -> dict[str, Tensor]:
        names = ("running_mean", "running_var", "min_val", "max_val", "scale")
        return {n: v.clone() for n, v in prepared.state_dict().items() if n.endswith(names)}

    def weights() -> list[Tensor]:
        return [each.detach().clone() for each in prepared.parameters()]

    start = moving()
    train_steps(prepared, 1)
    assert any(not torch.equal(value, start[name]) for name, value in moving().items())
    prepared.freeze()
    frozen, before = moving(), weights()
    train_steps(prepared, 2)
    assert all(torch.equal(value, frozen[name]) for name, value in moving().items())
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(), strict=True))


def test_every_weight_gets_a_gradient():
    prepared = prepared_for("depthwise").train()
    F.cross_entropy(prepared(images(8)), torch.arange(8) % 4).backward()
    assert all(
        each.grad is not None and torch.isfinite(each.grad).all() and each.grad.abs().sum() > 0
        for name, each in prepared.named_parameters()
        if "weight" in name
    )


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-2, momentum=0.37)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def test_dropout_epsilon_and_momentum_survive():
    model = WithDropout().eval()
    prepared = prepare_qat(model, SHAPE, images(16))
    for quantizer in prepared.quantizers():
        quantizer.disable_fake_quant()
    torch.testing.assert_close(prepared(images(4)), model(images(4)))
    assert torch.equal(prepared(images(4)), prepared(images(4)))
    prepared.train()
    model.train()
    assert not torch.equal(prepared(images(4)), prepared(images(4)))
    mean = model.norm.running_mean.clone()
    expected = mean + 0.37 * (model.conv(images(4)).mean((0, 2, 3)) - mean)
    fresh = prepare_qat(model, SHAPE, images(16)).train()
    for quantizer in fresh.quantizers():
        quantizer.disable_fake_quant()
    fresh(images(4))
    name = next(name for name in fresh.state_dict() if name.endswith("running_mean"))
    torch.testing.assert_close(fresh.state_dict()[name], expected)


def test_a_model_without_layers_to_quantize_is_refused():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x.flatten(1)[:, :4] + self.shift

    with pytest.raises(CompressionError, match="no convolution or linear layer"):
        prepare_qat(Mean(), SHAPE, images(4))


def test_a_model_that_is_no_static_graph_is_refused_by_name():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(144, 4)

        def forward(self, x):
            return self.head(x.flatten(1)) if x.sum() > 0 else x.flatten(1)[:, :4]

    with pytest.raises(CompressionError, match="Branch"):
        prepare_qat(Branch(), SHAPE, images(4))


# --- conversion ---------------------------------------------------------------------------------------


def test_converted_predicts_what_training_simulated(trained):
    with torch.no_grad():
        simulated, converted = trained(images(64, seed=5)), convert(trained)(images(64, seed=5))
    step = max(quantizer.scale.max().item() for quantizer in trained.quantizers())
    assert (simulated - converted).abs().max() <= 2 * step
    assert (simulated - converted).abs().mean() <= 0.02 * step  # equal but for values on a rounding boundary


def test_converting_leaves_the_prepared_model_trainable(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    convert(trained)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_converted_has_integer_weights_and_no_batch_norm(trained):
    graph = convert(trained).body
    targets = {node.target for node in graph.graph.nodes}
    assert batch_norm not in targets
    assert torch.ops.aten.batch_norm.default not in targets
    layers = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
    weights = [node.args[1] for node in graph.graph.nodes if node.target in layers]
    assert weights
    for dequantize in weights:
        stored = getattr(graph, dequantize.args[0].target)
        assert stored.dtype == torch.int8
        assert stored.min() >= -127
        zero_points = getattr(graph, dequantize.args[2].target)
        assert not zero_points.any()
        assert len(zero_points) == len(stored)


def test_folding_changes_no_integer_weight():
    prepared = prepared_for("plain")
    layer = next(node for node in prepared.body.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    quantizer = prepared.body.get_submodule(layer.args[1].target)
    weight = prepared.body.get_parameter(layer.args[1].args[0].target)
    scale = quantizer.scale.reshape(-1, 1, 1, 1)
    expected = (weight / scale).round().clamp(-127, 127)
    norm = next(iter(layer.users))
    gamma = prepared.body.get_parameter(norm.args[1].target)
    converted = convert(prepared).body
    folded = next(node for node in converted.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    stored = getattr(converted, folded.args[1].args[0].target)
    assert (gamma < 0).any()
    assert torch.equal(stored.float(), expected * gamma.sign().reshape(-1, 1, 1, 1))


def test_seven_bit_weights_stay_in_range():
    graph = convert(prepared_for("plain", weight_bits=7)).body
    stored = [value for value in graph.buffers() if value.dtype == torch.int8 and value.dim() > 1]
    stored += [value for value in graph.parameters() if value.dtype == torch.int8 and value.dim() > 1]
    assert stored
    assert max(value.abs().max().item() for value in stored) == 63


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_few_bits_are_stored_as_int8_on_their_own_levels(bits):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))
    prepared = prepare_qat(model, SHAPE, images(8), NumberFormat(weight_bits=bits))
    graph = convert(prepared).body
    layers = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
    stored = [getattr(graph, node.args[1].args[0].target) for node in graph.graph.nodes if node.target in layers]
    limit = 2 ** (bits - 1) - 1
    assert [value.dtype for value in stored] == [torch.int8] * 2
    assert [value.abs().max().item() for value in stored] == [limit] * 2
    assert torch.equal(prepared(images(16)), convert(prepared)(images(16)))


FORMATS = {
    "percentile": NumberFormat(calibration="percentile"),
    "learned": NumberFormat(learned_steps=True),
    "learned-4-bit": NumberFormat(learned_steps=True, calibration="mse", weight_bits=4),
}


@pytest.mark.parametrize("family", ["residual", "depthwise", "transformer"])
@pytest.mark.parametrize("name", ["percentile", "learned"])
def test_every_format_converts_to_what_training_simulated(family, name):
    model = lively(FAMILIES[family].build(4, SHAPE))
    prepared = prepare_qat(model, SHAPE, images(32), FORMATS[name])
    train_steps(prepared, 2)
    prepared.eval()
    with torch.no_grad():
        simulated, converted = prepared(images(64, seed=5)), convert(prepared)(images(64, seed=5))
    step = max(quantizer.scale.max().item() for quantizer in prepared.quantizers())
    assert (simulated - converted).abs().max() <= 2 * step
    assert (simulated - converted).abs().mean() <= 0.02 * step


@pytest.mark.parametrize(
    ("family", "name"), [("residual", "percentile"), ("depthwise", "learned-4-bit"), ("transformer", "learned")]
)
def test_every_format_exports_to_what_training_simulated(family, name, tmp_path: Path):
    import onnxruntime

    prepared = prepare_qat(lively(FAMILIES[family].build(4, SHAPE)), SHAPE, images(32), FORMATS[name])
    train_steps(prepared, 2)
    info = to_onnx(convert(prepared.eval()), tmp_path / "model.onnx", input_shape=SHAPE, metadata={})
    assert not check_symmetric(info.path).violations
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(info.path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images(64, seed=5).numpy()})
    with torch.no_grad():
        simulated = prepared(images(64, seed=5))
    step = max(quantizer.scale.max().item() for quantizer in prepared.quantizers())
    assert (simulated - torch.from_numpy(found)).abs().mean() <= 0.02 * step
    integers = [numpy_helper.to_array(each) for each in load_graph(info.path).graph.initializer]
    integers = [each for each in integers if each.dtype == np.int8 and each.ndim > 1]
    assert integers
    assert all(len(np.unique(each)) <= 2 ** FORMATS[name].weight_bits - 1 for each in integers)


def test_a_maximum_shares_the_scale_of_its_input():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 6), nn.Flatten())
    prepared = prepare_qat(model, SHAPE, images(16))
    pool = next(n for n in prepared.body.graph.nodes if n.target is torch.ops.aten.max_pool2d.default)
    before, after = pool.args[0], next(iter(pool.users))
    modules = dict(prepared.body.named_modules(remove_duplicate=False))
    assert modules[before.target] is modules[after.target]


def test_tokens_keep_a_float_residual_stream():
    model = FAMILIES["transformer"].build(4, SHAPE)
    program = torch.export.export(model.eval(), (images(2),), strict=False).module()
    annotated = SymmetricInt8().annotate(program)
    additions = [node for node in annotated.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert additions
    assert all("quantization_annotation" not in node.meta for node in additions)


# --- state and training -------------------------------------------------------------------------------


def test_state_round_trip_is_bit_equal(trained, tmp_path: Path, request):
    family = request.node.callspec.params["trained"]
    save_prepared(trained, tmp_path / "q.safetensors")
    again = load_prepared(tmp_path / "q.safetensors", FAMILIES[family].build(4, SHAPE), SHAPE)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(images(16)), trained(images(16)))
    assert torch.equal(convert(again)(images(16)), convert(trained)(images(16)))


def test_a_state_of_another_model_is_refused(tmp_path: Path):
    save_prepared(prepared_for("plain"), tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match=r"q\.safetensors"):
        load_prepared(tmp_path / "q.safetensors", FAMILIES["residual"].build(4, SHAPE), SHAPE)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        load_prepared(tmp_path / "broken.safetensors", FAMILIES["plain"].build(4, SHAPE), SHAPE)


def toy_dataset() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(4, *SHAPE, generator=generator)

    def split(count: int, first: int) -> Split:
        labels = torch.arange(count) % 4
        noise = torch.randn(count, *SHAPE, generator=generator) * 0.5
        return Split(images=patterns[labels] + noise, labels=labels, ids=torch.arange(first, first + count))

    preprocessing = Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,))
    return Dataset(
        name="toy",
        class_names=("a", "b", "c", "d"),
        preprocessing=preprocessing,
        train=split(64, 0),
        validation=split(32, 100),
        calibration=split(32, 200),
        test=split(32, 300),
        hashes={},
    )


def label_step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"cross_entropy": F.cross_entropy(model(batch.images), batch.labels)}


CONFIG = Qat(train=TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=1))


def run_qat(folder: Path | None = None, on_step=None) -> tuple[FakeQuantized, list]:
    torch.manual_seed(0)
    model = lively(FAMILIES["plain"].build(4, SHAPE))
    prepared, history = qat(
        model,
        toy_dataset(),
        CONFIG,
        step=label_step,
        seed=4,
        augment=NoAugment(),
        checkpoint_dir=folder,
        on_step=on_step,
    )
    return prepared, history.rows


@pytest.fixture(scope="module")
def whole_run() -> tuple[FakeQuantized, list]:
    torch.set_num_threads(1)
    return run_qat()


@pytest.mark.parametrize("stop_at", [5, 10])
def test_a_stopped_training_goes_on_bit_for_bit(whole_run, tmp_path: Path, stop_at: int):
    """Step 10 of 12 lies after the freeze: the mode is part of the state."""

    def stop(done: int, total: int) -> None:
        assert total == 12
        if done == stop_at:
            raise KeyboardInterrupt

    whole, rows = whole_run
    with pytest.raises(KeyboardInterrupt):
        run_qat(tmp_path, stop)
    resumed, resumed_rows = run_qat(tmp_path)
    assert bool(whole.frozen)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert resumed_rows[-1]["loss"] == rows[-1]["loss"]


def test_training_learns_and_ends_in_eval_mode(whole_run):
    prepared, rows = whole_run
    assert len(rows) == 3
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation_nll"] < rows[0]["validation_nll"]
    assert not prepared.training


def test_a_stored_student_is_the_one_that_was_quantized(tmp_path: Path):
    dataset = toy_dataset()
    config = CONFIG.model_copy(update={"weight_bits": 7, "train": TrainConfig(epochs=1, batch_size=32)})
    spec = ModelSpec(
        model=FAMILIES["plain"],
        num_classes=4,
        input_shape=SHAPE,
        class_names=dataset.class_names,
        preprocessing=dataset.preprocessing,
    )
    student = lively(FAMILIES["plain"].build(4, SHAPE))
    distillation = DistillConfig(train=config.train)
    result = quantize(student, dataset, config, distillation=distillation, panel=(), seed=0, augment=NoAugment())
    save_checkpoint(student, spec, tmp_path)
    with pytest.raises(CheckpointError, match=r"quantizer\.json"):
        load_quantized(tmp_path)
    save_quantized(result.prepared, tmp_path, config)
    stored = load_quantized(tmp_path)
    assert result.metrics.num_samples == len(dataset.validation.labels)
    assert torch.equal(stored.converted(images(32)), convert(result.prepared)(images(32)))
