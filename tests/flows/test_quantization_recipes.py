"""Recipes that quantize and export: every number format and profile from a recipe to a verdict, and refusals."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml

from compression.errors import RecipeError
from flows.recipe import parse_recipe
from tests.flows.test_compress import newest, rows_of, stillhouse, tiny_recipe

VIT = {"kind": "vision_transformer", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "stem_width": 8}


def every_format() -> dict[str, Any]:
    raw = tiny_recipe()
    raw["augment"] = {"kind": "robust", "base": raw["augment"], "share": 0.5}
    quick = {"epochs": 3, "batch_size": 16, "learning_rate": 0.004}
    raw["teachers"].append({"name": "vit", "model": VIT, "source": {"kind": "train", "train": quick}})
    space = {"kind": "prune", "parent": "vit", "ratios": [0.0]}
    raw["search"] |= {"spaces": [space], "trials": 1, "max_macs_share": None}
    raw["sensitivity"] = {"kind": "layerwise", "images": 64}
    raw["quantize"] = {"kind": "ptq", "calibration": "mse", "control": {"max_drop": 0.0, "max_layers": 1}}
    raw["calibrate"] = {"kind": "temperature", "apply": True}
    raw["robustness"] = {"kind": "corruptions", "images": 64, "severities": [1, 5]}
    raw["targets"] = [
        {"kind": "onnxruntime", "name": "cpu", "precision": "int8", "batch_sizes": [8]},
        {"kind": "onnxruntime", "name": "narrow", "precision": "int4", "batch_sizes": [8]},
        {"kind": "onnxruntime", "name": "phone", "precision": "int8", "isa": "arm"},
        {"kind": "tensorrt_rtx", "name": "brain", "precision": "bfloat16", "compute_capabilities": ["SM86"]},
        {"kind": "tensorrt_rtx", "name": "ada", "precision": "fp8", "compute_capabilities": ["SM89"]},
        {"kind": "tensorrt_rtx", "name": "wonly", "precision": "int4", "compute_capabilities": ["SM86"]},
    ]
    raw["policy"] |= {"max_flips_float32": 0.2, "max_flips_float16": 0.2, "max_robust_gap_increase": 1.0}
    return raw


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_number_format_goes_from_recipe_to_verdict(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(every_format()))
    ended = stillhouse(tmp_path, "compress", "recipe.yaml")
    assert ended.returncode in (0, 1), ended.stderr
    folder = newest(tmp_path)
    rows = {row["id"]: row for row in rows_of(folder / "comparison.csv")}
    for form in ("float32", "int8", "int8-ptq", "int8-symmetric", "int8-arm", "int4", "fp8"):
        assert float(rows[f"student-0.{form}"]["accuracy"]) > 0.1, form
    for built in ("student-0.bfloat16", "student-0.brain-sm86", "student-0.ada-sm89", "student-0.wonly-sm86"):
        assert rows[built]["status"] == "built, not run"
        assert rows[built]["accuracy"] == "not measured"
    assert rows["student-0.int8-arm"]["latency_p50_ms"] == "not measured"
    assert float(rows["student-0.int4"]["size_bytes"]) < float(rows["student-0.float32"]["size_bytes"])

    checks = {check["name"] for check in json.loads((folder / "verdict.json").read_text())["targets"]["cpu"]["checks"]}
    assert "robustness" in checks
    manifests = {
        name: json.loads((folder / "export" / name / "manifest.json").read_text()) for name in ("cpu", "phone")
    }
    assert (manifests["cpu"]["isa"] or "x86", manifests["phone"]["isa"]) == ("x86", "arm")
    assert {file["status"] for file in manifests["phone"]["files"]} == {"built, not run"}
    session = onnxruntime.InferenceSession(
        str(folder / "export" / "cpu" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert session.get_modelmeta().custom_metadata_map["temperature_applied"] == "true"
    (ladder,) = json.loads((folder / "ladder.json").read_text())
    assert {rung["name"] for rung in ladder["rungs"] if rung["outcome"] == "not run"} >= {"student-0: ONNX bfloat16"}
    rungs = {rung["name"]: rung for rung in ladder["rungs"]}
    assert rungs["student-0: torch bfloat16"]["parity"]["flips"] < 0.2
    layers = json.loads((folder / "sensitivity.json").read_text())["student-0"]
    assert len(layers["keep_float"]) <= 1
    assert layers["control"] is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"augment": {"kind": "robust"}, "distill": {"losses": [{"kind": "kd"}, {"kind": "trg"}]}},
            "runs teachers live",
        ),
        ({"targets": [{"kind": "tensorrt_rtx", "name": "x", "precision": "fp8"}]}, "8-bit floats need SM89"),
        ({"quantize": {"weight_bits": 9}}, "less than or equal to 8"),
        ({"quantize": {"kind": "ptq", "calibration": "best"}}, "'min_max', 'percentile', 'entropy' or 'mse'"),
        ({"quantize": {"control": {}}, "sensitivity": {"formats": ["int8 weights"]}}, "no column 'int8'"),
        ({"robustness": {"severities": [6]}}, "less than or equal to 5"),
    ],
    ids=["robust_and_live_teachers", "fp8_on_ampere", "nine_bits", "unknown_calibration", "no_order", "severity"],
)
def test_what_does_not_fit_is_refused_before_any_compute(change: dict[str, Any], told: str) -> None:
    raw = tiny_recipe()
    del raw["augment"]
    for section, values in change.items():
        raw[section] = values if isinstance(values, list) else {**(raw.get(section) or {}), **values}
    with pytest.raises(RecipeError, match="nothing was run") as refused:
        parse_recipe(raw)
    assert told in str(refused.value)


def test_pruning_by_sensitivity_needs_its_column() -> None:
    raw = tiny_recipe()
    raw["search"]["spaces"][0] |= {"stage_ratios": [0.0, 0.5], "use_sensitivity": True}
    raw["sensitivity"] = {"kind": "layerwise", "formats": ["int8"]}
    with pytest.raises(RecipeError, match="no column 'half the channels'"):
        parse_recipe(raw)
