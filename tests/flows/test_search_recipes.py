"""Recipes that search: every space, sampler and filter from a recipe file to a verdict, and what is refused before."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compression.errors import RecipeError
from flows.recipe import Recipe, parse_recipe
from tests.flows.test_compress import newest, rows_of, stillhouse, tiny_recipe

SHORT = {"epochs": 1, "batch_size": 64}
SMALL = {"kind": "plain_cnn", "widths": [16, 16], "depths": [1, 1], "strides": [2, 1], "stem_width": 8}
EVERY_SPACE = [
    {"kind": "prune", "parent": "residual", "ratios": [0.5]},
    {"kind": "prune", "parent": "transformer", "ratios": [0.5], "criterion": "hessian", "round_to": 2},
    {"kind": "prune", "parent": "residual", "ranking": "global", "target": "macs", "ratios": [0.4]},
    {"kind": "prune", "parent": "residual", "ratios": [0.5], "steps": 2, "between": SHORT, "criterion": "taylor"},
    {"kind": "scale", "base": SMALL, "widths": [1.0]},
    {"kind": "design", "base": SMALL, "widths": [[16], [24]], "stem_widths": [16]},
    {"kind": "layers", "parent": "transformer", "shares": [0.4]},
    {"kind": "tokens", "parent": "transformer", "keeps": [0.5]},
    {"kind": "tas", "parent": "residual", "targets": [0.6], "cost": "macs", "round_to": 4, "train": SHORT},
    {"kind": "subnets", "base": SMALL, "widths": [0.5], "depths": [[1], [1]], "train": SHORT},
    {"kind": "shrink", "parent": "residual", "widths": [0.5, 1.0]},
]
"""One choice each, or few, so that a short study sees them all."""


def searching(**search: Any) -> dict[str, Any]:
    raw = tiny_recipe()
    raw["teachers"].append(
        {
            "name": "transformer",
            "model": {
                "kind": "vision_transformer",
                "width": 16,
                "depth": 3,
                "num_heads": 2,
                "patch_size": 2,
                "stem_width": 8,
            },
            "source": {"kind": "train", "train": {"epochs": 3, "batch_size": 16, "learning_rate": 0.004}},
        }
    )
    raw["search"] = {"kind": "study", "train": SHORT, "batch": 8} | search
    raw["targets"] = raw["targets"][:1]
    return raw


@pytest.fixture(autouse=True)
def rough_latency_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_LATENCY_NETWORKS", "8")


def run(place: Path, raw: dict[str, Any]) -> list[dict[str, str]]:
    """The trials of a whole run of the recipe."""
    (place / "recipe.yaml").write_text(yaml.safe_dump(raw))
    done = stillhouse(place, "compress", "recipe.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return rows_of(newest(place) / "trials.csv")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_space_competes_by_predicted_latency_and_the_winner_is_made_sparse(tmp_path):
    raw = searching(
        spaces=EVERY_SPACE,
        trials=len(EVERY_SPACE),
        sampler={"kind": "random"},
        latency="predicted",
        objectives=["accuracy", "latency_p50_ms", "size_bytes", "ece"],
    )
    raw["sparsify"] = {"kind": "magnitude_nm", "train": SHORT}
    rows = run(tmp_path, raw)
    trained = [row for row in rows if row["state"] == "complete"]
    assert {row["state"] for row in rows} <= {"complete", "infeasible", "duplicate"}, [row["reason"] for row in rows]
    assert len({row["space"] for row in trained}) == len(EVERY_SPACE)
    assert all(float(row["latency_predicted_ms"]) > 0 and row["ece"] for row in trained)

    folder = newest(tmp_path)
    stages = [entry["stage"] for entry in json.loads((folder / "lineage.json").read_text())]
    assert stages.index("distill") < stages.index("sparsify") < stages.index("quantize")
    files = {row["id"]: row for row in rows_of(folder / "comparison.csv")}
    assert float(files["student-0.float32"]["nonzero_share"]) < 0.9
    assert float(files["student-0.int8"]["nonzero_share"]) < 0.9, "zeros survive quantization"
    assert "sparsify" in files["student-0.int8"]["stages"]
    assert files["student-0-dense.float32"]["nonzero_share"] == "not measured"
    assert "11 trained" in (folder / "report.html").read_text()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_night_starts_where_the_first_one_ended(tmp_path):
    design = {"kind": "design", "base": SMALL, "widths": [[8, 16, 24], [8, 16, 24]], "depths": [[1, 2], [1, 2]]}
    first = run(tmp_path, searching(spaces=[design], trials=4, filter={"kind": "diswot", "seeds": 1}))
    assert all(row["score"] for row in first if row["state"] in ("complete", "filtered"))
    trained = [row for row in first if row["state"] == "complete"]
    most = max(float(row["accuracy"]) for row in trained)
    assert len(list((tmp_path / ".stillhouse" / "trials").glob("*.jsonl"))) == 1

    second = searching(spaces=[design], trials=3, priors={"kind": "past_runs"}, filter={"kind": "predictor"})
    rows = run(tmp_path, second | {"seed": 1})
    assert rows[0]["choices"] in [row["choices"] for row in trained if float(row["accuracy"]) == most]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_n2n_shrinks_a_teacher_and_leaves_its_policy(tmp_path):
    raw = searching(
        spaces=[{"kind": "shrink", "parent": "residual"}],
        sampler={"kind": "n2n", "removal_trials": 2},
        trials=4,
        stop_behind=0.5,
        max_latency_share=1.0,
    )
    raw["teachers"][0]["model"]["depths"] = [2, 2]
    raw["distill"]["losses"] = [{"kind": "cross_entropy"}, {"kind": "kd"}, {"kind": "auxiliary"}]
    rows = run(tmp_path, raw)
    assert sum(row["state"] in ("complete", "stopped") for row in rows) == 4
    assert list((tmp_path / ".stillhouse" / "store").rglob("policy.safetensors"))
    histories = (newest(tmp_path) / "histories.json").read_text()
    assert "auxiliary" in histories


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gated_networks_evolve_without_training_and_become_a_sparse_change_of_themselves(tmp_path):
    gated = SMALL | {"kind": "gated_cnn"}
    raw = searching(
        spaces=[{"kind": "design", "base": gated, "widths": [[8, 16], [16, 24]]}],
        sampler={"kind": "diswot_evolution", "population": 4, "cycles": 4, "tournament": 2},
        filter={"kind": "inherited"},
        trials=2,
    )
    raw["distill"]["procedure"] = {"kind": "sparse_finetuning"}
    raw["sparsify"] = {"kind": "learned_nm", "train": {"epochs": 2, "batch_size": 64}}
    rows = run(tmp_path, raw)
    assert sum(row["state"] == "complete" for row in rows) == 2
    assert "delta_share" in (newest(tmp_path) / "histories.json").read_text()
    files = {row["id"]: row for row in rows_of(newest(tmp_path) / "comparison.csv")}
    assert 0.4 < float(files["student-0.int8"]["nonzero_share"]) < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spaces": []}, "at least 1 item"),
        ({"spaces": [{"kind": "prune", "parent": "nobody"}]}, "parent is 'nobody', expected one of residual"),
        ({"spaces": [EVERY_SPACE[0]], "objectives": ["size_bytes", "macs"]}, "expected each once, with accuracy"),
        (
            {
                "spaces": [EVERY_SPACE[0]],
                "objectives": ["accuracy", "latency_p95_ms"],
                "latency": "predicted",
            },
            "which is only measured",
        ),
        ({"spaces": [{"kind": "prun", "parent": "residual"}]}, "Did you mean 'prune'"),
        ({"spaces": [EVERY_SPACE[0]], "sampler": {"kind": "nsga"}}, "Did you mean 'nsga2'"),
        (
            {"spaces": [{"kind": "prune", "parent": "residual", "steps": 3}]},
            "between",
        ),
        (
            {"spaces": [{"kind": "design", "base": SMALL, "widths": [[8]]}]},
            "widths has 1 entries, expected 2",
        ),
    ],
    ids=["no-space", "parent", "no-accuracy", "predicted-p95", "kind", "sampler", "no-schedule", "stages"],
)
def test_what_cannot_work_is_refused_when_the_recipe_is_read(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(searching(**changes))


def test_the_form_of_the_ui_shows_every_space_sampler_and_filter_as_alternatives():
    """``anyOf`` becomes tabs in the Prefect form, each with the fields of one method."""
    schema = json.dumps(Recipe.model_json_schema())
    for kind in ("prune", "design", "layers", "tokens", "tas", "subnets", "shrink", "fastnas", "nsga2", "n2n"):
        assert f'"const": "{kind}"' in schema, kind
    for kind in ("diswot", "inherited", "predictor", "past_runs", "magnitude_nm", "learned_nm"):
        assert f'"const": "{kind}"' in schema, kind
    study = Recipe.model_json_schema()["$defs"]["Study"]["properties"]
    assert len(study["spaces"]["items"]["anyOf"]) == 9
    assert len(study["sampler"]["anyOf"]) == 5
