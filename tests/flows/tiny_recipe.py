"""The digits recipe made small: one teacher, one pruned student, one target, and a policy without limits."""

from typing import Any

import yaml

from tests.flows.running_up import ROOT

LIMITS = ("max_accuracy_drop", "max_flips_int8", "max_worst_class_drop", "max_ece_increase", "max_accuracy_gain")


def tiny_recipe(name: str = "tiny", *, images: int = 600, epochs: int = 8, batch_size: int = 16) -> dict[str, Any]:
    """As written in a file; teacher and student are trained alike, the search for one epoch; one float32 file."""
    raw = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    raw |= {"name": name, "description": "One small teacher, one student, minutes.", "benchmark_rounds": 3}
    raw["data"]["limit"] = images
    raw["teachers"] = raw["teachers"][:1]
    teacher = raw["teachers"][0]
    teacher["model"] |= {"widths": [16], "depths": [1], "strides": [2], "stem_width": 16}
    teacher["source"]["train"] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": 0.004}
    raw["select"]["panel_size"] = 1
    raw["search"] |= {"spaces": [{"kind": "prune", "parent": "residual", "ratios": [0.5]}], "trials": 1}
    raw["search"] |= {"train": {"epochs": 1, "batch_size": 64}, "max_macs_share": 1.0}
    raw["distill"] |= {"train": dict(teacher["source"]["train"]), "views": 2, "control": False}
    raw |= {"quantize": None, "targets": [{"kind": "onnxruntime", "name": "cpu", "precision": "float32"}]}
    raw["policy"] = {**dict.fromkeys(LIMITS), "faster_than_parent": False}
    return raw
