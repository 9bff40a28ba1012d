"""The whole chain on tiny recipes, with a real Prefect server, a real MLflow store and real runtimes."""

import csv
import html
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = (
    "recipe.resolved.yaml env.json lineage.json trials.csv pareto.png comparison.csv parity.csv latency_raw.csv "
    "latency.json verdict.json report.html report.md teachers.csv selection.json histories.json reliability.json "
    "summary.json ladder.json layer_diff.csv diagnosis.json sensitivity.json sensitivity-student-0.csv "
    "sensitivity-student-0.png calibration.json robustness.json attention.json"
).split()
EVIDENCE = "ladder.json layer_diff.csv diagnosis.json sensitivity.json sensitivity-student-0.png report.html".split()
"""What people look for in MLflow: where accuracy was lost, why a file is not faster, which layers are fragile."""


def tiny_recipe() -> dict[str, Any]:
    raw = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    quick = {"epochs": 5, "batch_size": 16, "learning_rate": 0.004}
    raw["data"]["limit"] = 600
    raw["teachers"] = raw["teachers"][:2]
    for teacher in raw["teachers"]:
        teacher["model"] |= {"widths": [16, 16], "depths": [1, 1], "strides": [1, 2], "stem_width": 16}
        teacher["source"]["train"] = quick
    raw["search"] |= {
        "spaces": [
            {"kind": "prune", "parent": "residual", "ratios": [0.5]},
            {
                "kind": "scale",
                "base": {"kind": "plain_cnn", "widths": [8], "depths": [1], "strides": [2], "stem_width": 8},
            },
        ],
        "trials": 2,
        "train": {"epochs": 1, "batch_size": 64},
        "max_macs_share": 1.0,
    }
    raw["distill"] |= {"train": quick, "views": 2}
    raw["quantize"] = {"kind": "qat", "train": {"epochs": 1, "batch_size": 64, "learning_rate": 0.0004}}
    raw["targets"] = [raw["targets"][0], raw["targets"][1] | {"compute_capabilities": ["SM86"]}]
    raw["benchmark_rounds"] = 5
    raw["policy"] = {
        "max_accuracy_drop": 1.0,
        "max_worst_class_drop": None,
        "max_ece_increase": None,
        "max_flips_int8": 0.2,
        "faster_than_parent": False,
        "max_accuracy_gain": None,
    }
    return raw


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chain")
    (place / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    return place


def environment(place: Path) -> dict[str, str]:
    return {
        **os.environ,
        "STILLHOUSE_ROOT": str(place),
        "STILLHOUSE_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }


def stillhouse(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment(place),
        cwd=place,
        check=False,
    )


@pytest.fixture(scope="module")
def first(place: Path) -> subprocess.CompletedProcess[str]:
    done = stillhouse(place, "compress", "tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def newest(place: Path, recipe: str = "digits") -> Path:
    return sorted((place / "runs" / recipe).iterdir())[-1]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_run_ends_with_table_verdict_and_report(first: subprocess.CompletedProcess[str], place: Path) -> None:
    assert "Verdict: accept" in first.stdout
    assert "student-0.int8" in first.stdout
    assert "report.html" in first.stdout


def test_the_run_folder_keeps_its_contract(first: subprocess.CompletedProcess[str], place: Path) -> None:
    folder = newest(place)
    for name in RUN_FILES:
        assert (folder / name).stat().st_size > 0, name
    rows = {row["id"]: row for row in rows_of(folder / "comparison.csv")}
    assert {"student-0.float32", "student-0.int8", "student-0.int8-ptq", "student-0-control.float32"} <= set(rows)
    assert rows["student-0.rtx-int8-sm86"]["status"] == "built, not run"
    assert rows["student-0.rtx-int8-sm86"]["accuracy"] == "not measured"
    assert float(rows["teacher-depthwise.float32"]["accuracy"]) > 0.3
    manifest = json.loads((folder / "export" / "cpu" / "manifest.json").read_text())
    assert manifest["accepted"] is True
    assert (folder / "export" / "cpu" / "model.onnx").is_file()
    assert list((folder / "export" / "rtx-int8").glob("*.engine"))


def test_every_rung_of_the_ladder_is_there_and_close(first: subprocess.CompletedProcess[str], place: Path) -> None:
    rungs = {row["name"]: row for row in rows_of(newest(place) / "parity.csv")}
    assert float(rungs["student-0: ONNX float32"]["flips"]) <= 0.001
    assert float(rungs["student-0: ONNX INT8 symmetric"]["flips"]) <= 0.01
    assert float(rungs["student-0: ONNX INT8 u8"]["flips"]) <= 0.02
    engine = next(row for name, row in rungs.items() if name.startswith("engine"))
    assert engine["status"] == "built, not run here"
    assert engine["flips"] == ""


def test_the_report_shows_the_evidence(first: subprocess.CompletedProcess[str], place: Path) -> None:
    folder = newest(place)
    page = (folder / "report.html").read_text()
    for section in "diagnosis parity sensitivity calibration robustness attention".split():
        assert f'<section id="{section}">' in page
    assert "was not run" not in page
    assert ": not run" not in page
    (ladder,) = json.loads((folder / "ladder.json").read_text())
    assert ladder["sentence"] in html.unescape(page)
    measured = [rung for rung in ladder["rungs"] if rung["against"]]
    assert {rung["outcome"] for rung in measured} <= {"ok", "exceeded"}
    assert all(rung["attribution"]["layers"] for rung in measured)
    table = json.loads((folder / "sensitivity.json").read_text())["student-0"]["table"]
    assert {row["layer"] for row in table["rows"]} >= {"head"}
    diagnosis = json.loads((folder / "diagnosis.json").read_text())["files"]
    assert diagnosis["student-0.int8"]["diagnosis"]["faster"] in ("yes", "no", "cannot tell")
    rows = {row["id"]: row for row in rows_of(folder / "comparison.csv")}
    assert 0 <= float(rows["student-0.int8"]["accuracy_corrupted"]) <= 1
    assert 0 <= float(rows["student-0.int8"]["ece_scaled"]) <= 1


def test_the_shipped_file_runs_on_its_own_and_describes_itself(
    first: subprocess.CompletedProcess[str], place: Path
) -> None:
    import onnxruntime

    path = newest(place) / "export" / "cpu" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == [str(digit) for digit in range(10)]
    assert set(json.loads(facts["preprocessing"])) == {"scale", "mean", "std"}
    assert json.loads(facts["lineage"])["model"]
    assert float(facts["temperature"]) > 0
    assert facts["temperature_applied"] == "false"
    (logits,) = session.run(None, {"images": np.zeros((3, 1, 8, 8), np.float32)})
    assert logits.shape == (3, 10)


def test_mlflow_has_a_parent_a_child_per_stage_and_a_candidate_model(
    first: subprocess.CompletedProcess[str], place: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stillhouse")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], "tags.stage = 'recipe'")
    parent = parents[-1]
    below = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    children = [run for run in below if run.data.tags["stage"] != "file"]
    files = {run.info.run_name for run in below if run.data.tags["stage"] == "file"}
    assert files == {row["id"] for row in rows_of(newest(place) / "comparison.csv")}
    lineage = json.loads((newest(place) / "lineage.json").read_text())
    assert len(children) == len(lineage)
    assert {run.data.tags["stage"] for run in children} == {row["stage"] for row in lineage}
    assert parent.data.tags["verdict"] == "accept"
    assert parent.data.metrics["accepted"] == 1.0
    assert parent.data.tags["prefect.flow_run_id"]
    teacher = next(run for run in children if run.data.tags["stage"] == "teacher")
    assert {"accuracy", "nll", "ece", "params", "macs", "size_bytes"} <= set(teacher.data.metrics)
    trials = client.search_runs([experiment.experiment_id], "tags.stage = 'candidate'")
    assert len(trials) >= 2
    version = client.get_model_version_by_alias("digits", "candidate")
    assert version.tags["file"].startswith("student-0.")
    assert set(EVIDENCE) <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert client.get_run(children[0].info.run_id).info.status == "FINISHED"


def test_a_finished_recipe_is_a_no_op_without_any_server(first: subprocess.CompletedProcess[str], place: Path) -> None:
    before = sorted(path.name for path in (place / "runs" / "digits").iterdir())
    done = stillhouse(place, "compress", "tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing has changed" in done.stdout
    assert sorted(path.name for path in (place / "runs" / "digits").iterdir()) == before


def test_a_changed_quantizer_keeps_everything_before_it(first: subprocess.CompletedProcess[str], place: Path) -> None:
    done = stillhouse(place, "plan", "tiny.yaml", "--set", "quantize.train.learning_rate=0.0002")
    assert done.returncode == 0, done.stderr
    todo = [line for line in done.stdout.splitlines() if "to do" in line and "│" in line]
    assert any("quantize" in line for line in todo)
    assert not any("teacher" in line or "distill" in line or "search" in line for line in todo)


@pytest.mark.slow
def test_from_a_stage_on_it_is_done_again(first: subprocess.CompletedProcess[str], place: Path) -> None:
    done = stillhouse(place, "compress", "tiny.yaml", "--from", "gate")
    assert done.returncode == 0, done.stdout + done.stderr
    lineage = json.loads((newest(place) / "lineage.json").read_text())
    assert {row["stage"] for row in lineage if not row["cached"]} == {"gate", "register"}


def test_compare_shows_any_runs(first: subprocess.CompletedProcess[str], place: Path) -> None:
    done = stillhouse(place, "compare", str(newest(place)), "--csv", "all.csv")
    assert done.returncode == 0
    assert "student-0.int8" in done.stdout
    assert rows_of(place / "all.csv")


@pytest.mark.slow
def test_a_rejected_run_exits_with_1_and_says_why(first: subprocess.CompletedProcess[str], place: Path) -> None:
    done = stillhouse(place, "compress", "tiny.yaml", "--set", "policy.max_size_kib=0.5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "infeasible" in done.stdout
    assert "KiB" in done.stdout


def make_image_folder(root: Path) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for number, name in enumerate(("bars", "checks", "dots")):
        (root / name).mkdir(parents=True)
        for index in range(60):
            picture = generator.integers(0, 90, (40, 44, 3), dtype=np.uint8)
            if number == 0:
                picture[:, index % 4 :: 8] = 220
            elif number == 1:
                picture[(index % 4) :: 8, :] = 220
            else:
                picture[10:30, 12:32] = 220
            Image.fromarray(picture).save(root / name / f"{index:03d}.png")


@pytest.mark.slow
def test_the_image_folder_template_runs_with_a_timm_teacher(tmp_path: Path) -> None:
    """A user's own pictures and a timm checkpoint, through the shipped template.

    The teacher is untrained, so the chain must run to its end and the gate must not believe it.
    """
    import timm
    from safetensors.torch import save_file

    make_image_folder(tmp_path / "images")
    teacher = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    settings = {
        "data.root": tmp_path / "images",
        "data.image_size": 32,
        "teachers.0.model.name": "test_resnet",
        "teachers.0.source.path": tmp_path / "teacher.safetensors",
        "search.spaces.0.ratios": "[0.5]",
        "search.trials": 1,
        "distill.train.epochs": 2,
        "distill.views": 2,
        "quantize.train.epochs": 1,
        "benchmark_rounds": 5,
        "policy.max_accuracy_drop": 1.0,
        "policy.max_worst_class_drop": "null",
        "policy.max_ece_increase": "null",
        "policy.max_accuracy_gain": "null",
        "policy.max_flips_int8": 0.5,
        "policy.faster_than_parent": "false",
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    recipe = ROOT / "recipes" / "image-folder-template.yaml"
    done = stillhouse(tmp_path, "compress", str(recipe), *overrides)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no better than guessing" in done.stdout
    rows = {row["id"]: row for row in rows_of(newest(tmp_path, "image-folder-template") / "comparison.csv")}
    assert float(rows["student-0.float32"]["macs"]) < float(rows["teacher-teacher.float32"]["macs"])
