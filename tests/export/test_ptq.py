"""Static quantization, the control arm: both presets give what their runtime wants."""

from pathlib import Path

import numpy as np
import pytest

from compression.errors import ExportError
from export.onnx_graph import metadata_of
from export.ptq import quantize_static
from export.qdq import check_symmetric
from export.runtime import OnnxSession, integer_share


@pytest.fixture(scope="module")
def calibration(exported) -> np.ndarray:
    return exported.images(64, 1).numpy()


@pytest.mark.parametrize("weights", ["int8", "uint8"])
def test_cpu_preset_runs_every_layer_as_integers(exported, calibration, tmp_path: Path, weights):
    info = quantize_static(
        exported.float32.path, tmp_path / "p.onnx", calibration, preset="onnxruntime_x86", weights=weights
    )
    assert integer_share(info.path).share == 1.0
    assert info.size_bytes < exported.float32.size_bytes


def test_cpu_preset_predicts_as_the_float_model(exported, calibration, tmp_path: Path):
    info = quantize_static(
        exported.float32.path, tmp_path / "p.onnx", calibration, preset="onnxruntime_x86", metadata={"k": "v"}
    )
    images = exported.images(256, 2)
    expected = exported.model(images).detach().numpy()
    found = OnnxSession(info.path).run(images.numpy())
    assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()
    assert metadata_of(info.path) == {"k": "v"}


def test_tensorrt_preset_is_symmetric_and_keeps_the_metadata(exported, calibration, tmp_path: Path):
    info = quantize_static(exported.float32.path, tmp_path / "t.onnx", calibration, preset="tensorrt")
    assert check_symmetric(info.path).weights == 7
    assert metadata_of(info.path) == metadata_of(exported.float32.path)


@pytest.mark.parametrize(
    ("preset", "method"), [("onnxruntime_x86", "percentile"), ("tensorrt", "percentile"), ("tensorrt", "entropy")]
)
def test_one_odd_pixel_does_not_set_the_range(exported, calibration, tmp_path: Path, capsys, preset, method):
    odd = calibration.copy()
    odd[0, 0, 0, 0] = 60
    errors = {}
    images = exported.images(256, 2)
    expected = exported.model(images).detach().numpy()
    for calibrated in ("min_max", method):
        info = quantize_static(
            exported.float32.path, tmp_path / "p.onnx", odd, preset=preset, calibration=calibrated, percentile=99.9
        )
        errors[calibrated] = np.abs(OnnxSession(info.path).run(images.numpy()) - expected).mean()
    assert errors[method] < 0.8 * errors["min_max"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("percentile", [50, 0, 100.1])
def test_a_percentile_out_of_bounds_is_refused(exported, calibration, tmp_path: Path, percentile):
    with pytest.raises(ExportError, match="percentile"):
        quantize_static(
            exported.float32.path,
            tmp_path / "p.onnx",
            calibration,
            preset="tensorrt",
            calibration="percentile",
            percentile=percentile,
        )


def test_no_calibration_images_is_refused(exported, tmp_path: Path):
    with pytest.raises(ExportError, match="0 images"):
        quantize_static(
            exported.float32.path,
            tmp_path / "p.onnx",
            np.zeros((0, 1, 12, 12), np.float32),
            preset="onnxruntime_x86",
        )
