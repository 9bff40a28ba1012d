"""OpenVINO: the same answers as ONNX Runtime, and integers where the file has integers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from compression.errors import ExportError
from export.openvino import OpenVinoSession, to_openvino
from export.runtime import OnnxSession

INSTALLED = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="the extra 'openvino' is not installed")


@pytest.mark.skipif(INSTALLED, reason="openvino is installed here")
def test_without_the_extra_it_says_how_to_get_it(exported, tmp_path: Path):
    with pytest.raises(ExportError, match=r"pip install 'stillhouse\[openvino\]'"):
        to_openvino(exported.float32.path, tmp_path)
    with pytest.raises(ExportError, match="openvino"):
        OpenVinoSession(tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_float32_answers_as_onnx_runtime(exported, tmp_path: Path):
    info = to_openvino(exported.float32.path, tmp_path)
    images = exported.images(64, 3).numpy()
    found, wanted = OpenVinoSession(info.graph).run(images), OnnxSession(exported.float32.path).run(images)
    assert np.abs(found - wanted).max() < 1e-5
    assert sorted(place.name for place in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert info.size_bytes == sum(place.stat().st_size for place in tmp_path.iterdir())


@needs_openvino
def test_int8_runs_in_integers_and_answers_within_steps(exported, tmp_path: Path):
    info = to_openvino(exported.symmetric.path, tmp_path)
    session = OpenVinoSession(info.graph)
    assert set(session.layer_types()) <= {"u8", "i8"}
    assert sum(session.layer_types().values()) == 7
    images = exported.images(256, 4)
    expected = exported.quantized(images).detach().numpy()
    found = session.run(images.numpy())
    step = np.abs(expected).max() / 127
    assert np.abs(found - expected).mean() < 2 * step
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95


@needs_openvino
def test_a_broken_graph_is_refused(tmp_path: Path):
    broken = tmp_path / "model.xml"
    broken.write_text("<net")
    with pytest.raises(ExportError, match="refuses"):
        OpenVinoSession(broken)
