"""Sessions run where they say they do, and the machine's abilities are read from it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compression.errors import ExportError
from export.runtime import CpuFeatures, OnnxSession, cpu_features, integer_share, predict_fn


def test_predict_fn_gives_what_the_session_gives(exported):
    session = OnnxSession(exported.float32.path)
    images = exported.images(3)
    logits = predict_fn(session)(images)
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 4)
    assert np.array_equal(logits.numpy(), session.run(images.numpy()))


def test_images_may_lie_in_memory_in_any_order(exported):
    session = OnnxSession(exported.float32.path)
    images = exported.images(3)
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(predict_fn(session)(strided), predict_fn(session)(images))


def test_session_is_on_the_asked_provider(exported):
    assert OnnxSession(exported.float32.path).provider == "CPUExecutionProvider"


def test_a_silent_fallback_to_another_provider_is_an_error(exported):
    import onnxruntime

    if any(device.device.type.name == "GPU" for device in onnxruntime.get_ep_devices()):
        pytest.skip("a GPU is here, so nothing falls back")
    with pytest.raises(ExportError, match="CUDAExecutionProvider"):
        OnnxSession(exported.float32.path, provider="CUDAExecutionProvider")


def test_missing_and_broken_files_are_named(exported, tmp_path: Path):
    with pytest.raises(ExportError, match=r"absent\.onnx"):
        OnnxSession(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(exported.float32.path.read_bytes()[:300])
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        OnnxSession(tmp_path / "broken.onnx")


def test_a_float_graph_has_no_integer_layers(exported):
    share = integer_share(exported.float32.path)
    assert (share.integer, share.total, share.share) == (0, 7, 0.0)
    assert len(share.float_layers) == 7


def test_cpu_features_are_plausible():
    features = cpu_features()
    assert features.machine
    assert features.avx2 or not features.avx512
    assert cpu_features() is features


def test_only_x86_without_vnni_saturates():
    assert CpuFeatures(model="x", machine="x86_64").saturates
    assert not CpuFeatures(model="x", machine="x86_64", vnni=True).saturates
    assert not CpuFeatures(model="x", machine="aarch64").saturates
