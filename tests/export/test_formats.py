"""Number formats as graph edits: what is stored, what the runtimes here make of it, and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import nn

from compression.errors import ExportError, ShapeError
from export.engine_trt import build_engine
from export.formats import NOT_RUN_HERE, activation_ranges, bfloat16_predict, to_bfloat16, to_fp8, to_int4
from export.formats.int4 import quantize_blocks
from export.onnx_graph import load_graph, metadata_of, to_onnx
from export.profiles import session_options
from export.runtime import OnnxSession, integer_share
from export.targets import TensorRtRtxTarget

SHAPE = (1, 8, 8)


class Mlp(nn.Module):
    """Linear layers of 64 inputs, one of them without bias and on three dimensions, and a head of 24 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = nn.GELU()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 24, bias=False), nn.Linear(24, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.gelu(self.first(images.flatten(1))).unsqueeze(1)
        return self.head(self.gelu(self.second(hidden)).squeeze(1))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    return to_onnx(Mlp().eval(), path, input_shape=SHAPE, metadata={"k": "v"}, fast=True).path


@pytest.fixture(scope="module")
def fp8(exported, tmp_path_factory) -> Path:
    images = exported.images(128, 1).numpy()
    ranges = activation_ranges(exported.float32.path, images)
    return to_fp8(exported.float32.path, tmp_path_factory.mktemp("fp8") / "fp8.onnx", ranges).path


def stored(path: Path, kind: int) -> dict[str, np.ndarray]:
    """The stored tensors of a type, by name."""
    tensors = load_graph(path).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors if tensor.data_type == kind}


def images_of(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


# --- INT4 ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([32, 64]),
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_a_block_rounds_to_within_half_a_step(blocks, outputs, size, seed, spread):
    weight = np.random.default_rng(seed).normal(0, spread, (blocks * size, outputs)).astype(np.float32)
    weight[:size, 0] = 0  # a block of zeros
    counts, scales = quantize_blocks(weight, size)
    assert counts.shape == weight.shape
    assert scales.shape == (blocks, outputs)
    assert counts.min() >= -7
    assert counts.max() <= 7
    back = counts * np.repeat(scales, size, axis=0)
    assert (np.abs(back - weight) <= np.repeat(scales, size, axis=0) / 2 * (1 + 1e-5)).all()
    largest = np.abs(weight.reshape(blocks, size, outputs)).max(axis=1)
    reached = np.abs(counts.reshape(blocks, size, outputs)).max(axis=1)
    assert (reached[largest > 0] == 7).all()


def test_blocks_are_whole():
    with pytest.raises(ShapeError, match="multiple of 32"):
        quantize_blocks(np.ones((40, 2), np.float32), 32)


@pytest.mark.parametrize("block_size", [32, 64])
def test_int4_file_means_the_rounded_weights(mlp, tmp_path: Path, block_size):
    info = to_int4(mlp, tmp_path / "int4.onnx", block_size=block_size)
    assert len(info.layers) == 2
    assert len(info.kept) == 1  # 24 inputs fill no block
    assert info.opset >= 21
    assert metadata_of(info.path) == {"k": "v"}
    torch.manual_seed(0)
    model = Mlp().eval()
    with torch.no_grad():
        for layer in (model.first, model.second):
            counts, scales = quantize_blocks(layer.weight.T.numpy(), block_size)
            layer.weight.copy_(torch.from_numpy(counts * np.repeat(scales, block_size, axis=0)).T)
        images = images_of(32)
        expected = model(torch.from_numpy(images)).numpy()
    assert np.abs(OnnxSession(info.path, optimise=False).run(images) - expected).max() < 1e-5


def test_onnx_runtime_fuses_int4_and_stays_near(mlp, tmp_path: Path):
    info = to_int4(mlp, tmp_path / "int4.onnx")
    assert integer_share(info.path).operators["MatMulNBits"] == 2
    images = images_of(64)
    fused, plain = OnnxSession(info.path).run(images), OnnxSession(info.path, optimise=False).run(images)
    assert np.abs(fused - plain).max() < 0.05 * np.abs(plain).max()


def test_int4_stores_half_a_byte_per_weight(mlp, tmp_path: Path):
    info = to_int4(mlp, tmp_path / "int4.onnx")
    packed = [tensor for tensor in load_graph(info.path).graph.initializer if tensor.data_type == TensorProto.INT4]
    assert sorted(len(tensor.raw_data) for tensor in packed) == [64 * 24 // 2, 64 * 64 // 2]
    assert info.size_bytes < mlp.stat().st_size / 3


def test_int4_of_a_net_with_small_heads_is_refused(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="gains nothing"):
        to_int4(exported.float32.path, tmp_path / "int4.onnx")
    assert not list(tmp_path.iterdir())


# --- bfloat16 -----------------------------------------------------------------------------------------


def test_bfloat16_rounds_the_weights_and_keeps_float32_ends(exported, tmp_path: Path):
    info = to_bfloat16(exported.float32.path, tmp_path / "b.onnx")
    before, after = stored(exported.float32.path, TensorProto.FLOAT), stored(info.path, TensorProto.BFLOAT16)
    assert set(before) == set(after)
    assert not stored(info.path, TensorProto.FLOAT)
    for name, values in before.items():
        expected = torch.from_numpy(np.array(values)).bfloat16().float().numpy()
        assert np.array_equal(after[name].astype(np.float32), expected)
    graph = load_graph(info.path).graph
    ends = (graph.input[0], graph.output[0])
    assert [entry.type.tensor_type.elem_type for entry in ends] == [TensorProto.FLOAT] * 2
    assert [entry.name for entry in ends] == ["images", "logits"]
    assert info.size_bytes < 0.65 * exported.float32.size_bytes
    assert metadata_of(info.path) == metadata_of(exported.float32.path)


def test_bfloat16_is_listed_as_not_run_because_the_runtime_refuses_it(exported, tmp_path: Path):
    assert "bfloat16" in NOT_RUN_HERE
    info = to_bfloat16(exported.float32.path, tmp_path / "b.onnx")
    with pytest.raises(ExportError, match="refuses"):
        OnnxSession(info.path)


def test_torch_in_bfloat16_is_near_and_leaves_the_model_alone(exported):
    images = exported.images(128, 3)
    expected = exported.model(images).detach()
    found = bfloat16_predict(exported.model)(images)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert {parameter.dtype for parameter in exported.model.parameters()} == {torch.float32}
    assert torch.equal(exported.model(images), expected)


def test_bfloat16_of_a_quantized_graph_is_refused(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="expected a float32 graph"):
        to_bfloat16(exported.symmetric.path, tmp_path / "b.onnx")
    assert not list(tmp_path.iterdir())


# --- FP8 ----------------------------------------------------------------------------------------------


def test_ranges_are_the_extremes_of_what_layers_read(exported):
    images = exported.images(96, 1)
    ranges = activation_ranges(exported.float32.path, images.numpy())
    assert len(ranges) == 6  # seven layers; two read the same tensor
    assert ranges["images"] == images.abs().max().item()
    seen: list[float] = []
    layer = next(module for module in exported.model.modules() if isinstance(module, nn.Linear))
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max().item()))
    with torch.no_grad():
        exported.model(images)
    hook.remove()
    assert min(abs(value - seen[0]) for value in ranges.values()) < 1e-4 * seen[0]


def test_fp8_weights_are_scaled_to_the_largest_value(fp8):
    weights = {name: values for name, values in stored(fp8, TensorProto.FLOAT8E4M3FN).items() if values.ndim > 1}
    assert len(weights) == 7
    assert all(np.abs(values.astype(np.float32)).max() == 448 for values in weights.values())


def test_fp8_means_what_the_standard_says(exported, fp8):
    """The runtime here against onnx's own evaluator: an optimised session would be wrong or refused."""
    from onnx.reference import ReferenceEvaluator

    images = exported.images(2, 5).numpy()
    expected = ReferenceEvaluator(onnx.load(fp8)).run(None, {"images": images})[0]
    found = OnnxSession(fp8, **session_options("fp8")).run(images)
    assert np.abs(found - expected).max() < 1e-5
    with pytest.raises(ExportError):
        OnnxSession(fp8)


def test_calibrated_ranges_are_better_than_others(exported, fp8, tmp_path: Path):
    images = exported.images(256, 6)
    expected = exported.model(images).detach().numpy()

    def error(path: Path) -> float:
        return float(np.abs(OnnxSession(path, **session_options("fp8")).run(images.numpy()) - expected).mean())

    ranges = activation_ranges(exported.float32.path, exported.images(128, 1).numpy())
    narrow = {name: value / 4 for name, value in ranges.items()}
    clipped = to_fp8(exported.float32.path, tmp_path / "narrow.onnx", narrow).path
    assert 0 < error(fp8) < 0.4 * np.abs(expected).mean()
    assert error(fp8) < 0.5 * error(clipped)


def test_fp8_without_images_or_ranges_is_refused(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="0 images"):
        activation_ranges(exported.float32.path, np.zeros((0, *exported.shape), np.float32))
    with pytest.raises(ExportError, match="no range of"):
        to_fp8(exported.float32.path, tmp_path / "f.onnx", {"images": 1.0})
    assert not list(tmp_path.iterdir())


# --- engines ------------------------------------------------------------------------------------------


def engine(path: Path, folder: Path, precision: str, capability: str, shape) -> int:
    target = TensorRtRtxTarget(precision=precision, compute_capabilities=("SM89",), max_batch=8)
    info = build_engine(path, folder / "e.engine", target, compute_capability=capability, input_shape=shape)
    return info.size_bytes


def test_engines_build_from_every_format(exported, mlp, fp8, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed", exc_type=ImportError)
    half = to_bfloat16(exported.float32.path, tmp_path / "b.onnx").path
    four = to_int4(mlp, tmp_path / "i.onnx").path
    assert engine(half, tmp_path, "bfloat16", "SM86", exported.shape) > 0
    assert engine(fp8, tmp_path, "fp8", "SM89", exported.shape) > 0
    assert engine(four, tmp_path, "int4", "SM86", SHAPE) > 0


def test_fp8_needs_its_gpu_and_every_precision_its_graph(exported, fp8, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed", exc_type=ImportError)
    with pytest.raises(ExportError, match="fp8"):
        engine(fp8, tmp_path, "fp8", "SM86", exported.shape)
    for precision in ("bfloat16", "fp8", "int4"):
        with pytest.raises(ExportError, match=f"no {precision} weights"):
            engine(exported.float32.path, tmp_path, precision, "SM89", exported.shape)
    assert not list(tmp_path.iterdir())
