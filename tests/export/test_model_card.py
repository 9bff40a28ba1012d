import json
import re
import subprocess
import sys

import pytest

from compression.errors import InputError
from compression.types import Preprocessing, TensorSpec
from export.model_card.card import write_card
from export.model_card.running import how_to_run
from export.profiles import Manifest, ManifestFile, build_manifest
from export.targets import OnnxRuntimeTarget
from tests.export.made_up_run import make_run

PARTS = (
    "What it is|Intended and unsuited use|Teachers|Data|Training and compression|Results on this hardware|Reliability"
    "|Parity ladder|Limits|How to run it|Cost|Lineage|Verdict of the gate|Change since the last champion"
).split("|")
RECIPE = """
name: edge-classifier
description: Tells <ten> kinds of clothing apart, for a kiosk.
seed: 3
data: {kind: fashion_mnist}
teachers:
- {name: teacher-resnet, model: {kind: residual_cnn}, source: {kind: train}}
- {name: teacher-convnext, source: {kind: outputs, path: /data/answers.npz}}
distill: {losses: [{kind: cross_entropy, weight: 0.5}, {kind: kd, weight: 0.5, temperature: 2.0}], train: {epochs: 7}}
card:
  unsuited: [Sorting what people wear on the street.]
  data_licence: MIT
  teacher_licences: [{teacher: teacher-convnext, licence: CC-BY-4.0}]
"""


@pytest.fixture
def folder(tmp_path, exported):
    run = make_run(tmp_path)
    (run / "recipe.resolved.yaml").write_text(RECIPE)
    target = OnnxRuntimeTarget(name="cpu", precision="float32")
    place = run / "export" / "cpu"
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(exported.float32.path.read_bytes())
    facts = {"recipe": "edge-classifier", "accepted": True}
    manifest = build_manifest(target, {"model.onnx": place / "model.onnx"}, facts)
    (place / "manifest.json").write_text(manifest.model_dump_json())
    return run


def parts_of(text):
    found = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def test_the_card_has_every_part_and_says_where_nothing_is_known(folder):
    parts = parts_of(write_card(folder).read_text())
    assert list(parts) == PARTS
    assert all(text.strip() for text in parts.values())
    assert "Tells <ten> kinds of clothing apart" in parts["What it is"]
    assert "residual_cnn | train | *not stated" in parts["Teachers"].replace("| not", "| *not")
    assert "CC-BY-4.0" in parts["Teachers"]
    assert "black box" in parts["Teachers"]
    assert "Intended: Tells <ten> kinds" in parts["Intended and unsuited use"]
    assert "- Sorting what people wear on the street." in parts["Intended and unsuited use"]
    assert "Licence: MIT" in parts["Data"]
    assert "test-0a1b2c" in parts["Data"]
    assert "cross_entropy (weight 0.5), kd (weight 0.5, temperature 2.0)" in parts["Training and compression"]
    assert "student-float32" in parts["Results on this hardware"]
    assert "Energy of one inference: not measured" in parts["Cost"]
    assert "The net is tiny" in parts["Verdict of the gate"]


def test_the_change_is_that_of_the_regression_report_else_of_the_champion_else_none(folder):
    text = parts_of(write_card(folder).read_text())[PARTS[-1]]
    assert "version 4" in text
    assert "89.51 %" in text
    row = {"target": "cpu", "what": "accuracy", "kind": "share", "before": 0.8951, "now": 0.8973, "word": "same"}
    regression = {"sentence": "Nothing got worse.", "comparisons": [{"against": "champion", "rows": [row]}]}
    (folder / "regression.json").write_text(json.dumps(regression))
    text = parts_of(write_card(folder).read_text())[PARTS[-1]]
    assert "Nothing got worse." in text
    assert "| accuracy (cpu) | 89.51 % | 89.73 % | same |" in text
    (folder / "regression.json").unlink()
    (folder / "champion.json").unlink()
    assert "This is the first" in parts_of(write_card(folder).read_text())[PARTS[-1]]


def test_the_page_is_one_file_and_escapes_what_people_wrote(folder):
    write_card(folder)
    page = (folder / "model_card.html").read_text()
    assert "Tells &lt;ten&gt; kinds" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert all(f"<h2>{part}</h2>" in page for part in PARTS)
    before = page
    write_card(folder)
    assert (folder / "model_card.html").read_text() == before


def test_its_lines_run_the_file_as_they_stand(folder):
    (lines,) = re.findall(r"```python\n(.*?)```", write_card(folder).read_text(), flags=re.DOTALL)
    code = lines + "\nprint(logits.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 4)", done.stderr


def test_a_run_that_was_not_accepted_has_no_card(folder):
    verdict = json.loads((folder / "verdict.json").read_text()) | {"outcome": "regression"}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    with pytest.raises(InputError, match="expected 'accept'"):
        write_card(folder)


def manifest(kind, file, **changes):
    described = {
        "target": "a-target",
        "kind": kind,
        "runtime": "Runtime",
        "runtime_versions": ">=1",
        "built_with": "1",
        "precision": "int8",
        "opset": 20,
        "input": TensorSpec(name="images", shape=(-1, 3, 4, 4), dtype="float32"),
        "output": TensorSpec(name="logits", shape=(-1, 2), dtype="float32"),
        "files": (ManifestFile(file=file, sha256="0" * 64, size_bytes=1, status="built, not run"),),
    }
    return Manifest.model_validate({**described, **changes})


def test_the_lines_prepare_images_of_several_channels():
    preparation = Preprocessing(scale=255.0, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    found = how_to_run(manifest("onnxruntime", "m.onnx", preprocessing=preparation), "export/cpu")
    scope = {}
    exec("\n".join(line for line in found["lines"].splitlines() if "session" not in line), scope)
    assert scope["images"].shape == (1, 3, 4, 4)
    assert scope["images"].dtype == "float32"
    assert scope["images"][0, :, 0, 0].tolist() == pytest.approx([-0.1, -0.1, -0.075])


@pytest.mark.parametrize(
    ("kind", "file", "wanted"),
    [
        ("onnxruntime", "m.onnx", "export/t/m.onnx"),
        ("openvino", "m.xml", "openvino.Core().compile_model"),
        ("tensorrt_rtx", "m.engine", "import tensorrt_rtx as trt"),
        ("tensorrt", "m.engine", "import tensorrt as trt"),
    ],
)
def test_every_runtime_has_lines_that_parse_and_say_whether_they_were_run(kind, file, wanted):
    found = how_to_run(manifest(kind, file), "export/t")
    compile(found["lines"], "card", "exec")
    assert wanted in found["lines"]
    assert "built, not run" in found["note"]
    assert how_to_run(manifest(kind, "notes.txt"), "export/t") is None


def test_int8_for_arm_is_opened_as_it_is_meant():
    found = how_to_run(manifest("onnxruntime", "m.onnx", precision="int8-arm"), "export/t")
    assert "session.qdqisint8allowed" in found["lines"]
    compile(found["lines"], "card", "exec")
