"""Recipes that use the catalogue: black boxes, unlabelled images, specialists, live teachers, merging; end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compression.errors import RecipeError
from flows.recipe import load_recipe, parse_recipe
from flows.samples import write_samples
from tests.flows.test_compress import newest, rows_of, stillhouse, tiny_recipe


def with_changes(**sections: Any) -> dict[str, Any]:
    raw = tiny_recipe()
    for name, value in sections.items():
        raw[name] = raw[name] | value if isinstance(value, dict) and isinstance(raw.get(name), dict) else value
    return raw


def answer(samples: Path, answers: Path, *, classes: int = 10) -> None:
    """A black box that looks at nearest class means of what it is shown: real answers, none of our code."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    box = LogisticRegression(max_iter=200).fit(images[::3], labels[::3])
    with np.load(samples) as file:
        probabilities = box.predict_proba(file["images"].reshape(len(file["ids"]), -1))
        np.savez(answers, ids=file["ids"], probabilities=probabilities)
    assert probabilities.shape[1] == classes


def test_samples_are_the_images_of_all_splits_without_labels(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(with_changes(unlabelled={"kind": "digits", "limit": 100})))
    counts = write_samples(load_recipe(path), tmp_path / "samples.npz")
    assert counts["pool"] == 100
    with np.load(tmp_path / "samples.npz") as file:
        assert set(file.files) == {"ids", "images", "split"}
        assert len(set(file["ids"].tolist())) == sum(counts.values())
        assert file["images"].shape == (sum(counts.values()), 1, 8, 8)
        assert (file["split"] == "pool").sum() == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [{"name": "box", "source": {"kind": "outputs", "path": "x.npz"}}]}, "black boxes alone"),
        ({"distill": {"procedure": {"kind": "progressive"}}}, "progressive trains groups"),
        ({"distill": {"sampler": {"kind": "dp4tl"}}}, "has no target"),
        ({"distill": {"losses": [{"kind": "kd"}, {"kind": "multi_aspect"}]}}, "without answers"),
        ({"distill": {"labels": "none"}}, "learns from labels, but labels is none"),
        (
            {"distill": {"labels": "none", "losses": [{"kind": "kd"}], "procedure": {"kind": "active"}}},
            "spends a budget of labels",
        ),
        (
            {"distill": {"teachers": {"kind": "partition"}, "online": {"kind": "mixup"}}},
            "adds the student's own start as a teacher, beside online augmentation 'mixup'",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(changes, message):
    raw = with_changes(**changes)
    if "teachers" in changes:
        raw["search"]["spaces"] = raw["search"]["spaces"][1:]
        raw["select"]["panel_size"] = 1
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


def test_a_black_box_cannot_be_looked_into(tmp_path):
    raw = tiny_recipe()
    raw["teachers"].append({"name": "box", "source": {"kind": "outputs", "path": "box.npz"}})
    raw["distill"]["losses"] = [{"kind": "cross_entropy"}, {"kind": "nd"}]
    with pytest.raises(RecipeError, match="has a black box, but a loss of distill needs more than its outputs"):
        parse_recipe(raw)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_black_box_and_unlabelled_images_from_samples_to_verdict(tmp_path):
    raw = with_changes(unlabelled={"kind": "digits", "limit": 200}, select={"panel_size": 3, "rank_by": "nll"})
    raw["teachers"].append({"name": "box", "source": {"kind": "outputs", "path": str(tmp_path / "box.npz")}})
    raw["select"]["selectors"] = [{"kind": kind} for kind in ("nll", "tmi", "ped", "osborn", "black_box")]
    (tmp_path / "box.yaml").write_text(yaml.safe_dump(raw))
    done = stillhouse(tmp_path, "samples", "box.yaml", "samples.npz")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 pool" in done.stdout
    answer(tmp_path / "samples.npz", tmp_path / "box.npz")
    done = stillhouse(tmp_path, "compress", "box.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    teachers = {row["name"]: row for row in rows_of(newest(tmp_path) / "teachers.csv")}
    assert teachers["box"]["kind"] == "black box"
    assert float(teachers["box"]["validation_accuracy"]) > 0.8
    assert teachers["box"]["macs"] == ""
    assert all(row["in_panel"] == "True" for row in teachers.values())
    assert "box" in (newest(tmp_path) / "report.html").read_text()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_live_teachers_a_specialist_helpers_and_merging_from_recipe_to_verdict(tmp_path):
    raw = with_changes(
        distill={
            "teachers": {"kind": "router"},
            "losses": [
                {"kind": "cross_entropy", "weight": 0.5},
                {"kind": "kd", "weight": 0.5},
                {"kind": "normalised_features", "weight": 0.1},
                {"kind": "dhkd", "weight": 0.1, "align_gradients": True},
            ],
            "online": {"kind": "mixup", "fraction": 0.25},
            "merge": {"members": 2, "train": {"epochs": 1, "batch_size": 64, "learning_rate": 0.0004}},
        }
    )
    raw["teachers"][1]["classes"] = ["0", "1", "2", "3", "4"]
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(raw))
    done = stillhouse(tmp_path, "compress", "live.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    teachers = {row["name"]: row for row in rows_of(newest(tmp_path) / "teachers.csv")}
    assert float(teachers["depthwise"]["accuracy"]) < 0.6
    histories = (newest(tmp_path) / "histories.json").read_text()
    assert "merge_nll_after" in histories
    assert "gate_balance" in histories
