"""The arms of ``search.py``: search sections of a recipe, by name."""

from collections.abc import Sequence
from typing import Any

RESIDUAL_3 = {
    "kind": "design",
    "base": {
        "kind": "residual_cnn",
        "widths": [8, 16, 32],
        "depths": [1, 1, 1],
        "strides": [1, 2, 2],
        "stem_stride": 2,
    },
    "widths": [[8, 16], [16, 24, 32, 48], [48, 64, 96, 128]],
    "depths": [[1], [1, 2], [1, 2]],
    "stem_widths": [8, 16],
}
RESIDUAL_2 = {
    "kind": "design",
    "base": {"kind": "residual_cnn", "widths": [24, 64], "depths": [1, 1], "strides": [2, 2], "stem_stride": 2},
    "widths": [[24, 32, 48], [64, 96, 128]],
    "depths": [[1, 2], [1, 2]],
    "stem_widths": [8, 16],
}
PLAIN = {
    "kind": "design",
    "base": {"kind": "plain_cnn", "widths": [24, 64], "depths": [1, 1], "strides": [2, 2], "stem_stride": 2},
    "widths": [[24, 32, 48], [64, 96, 128]],
    "depths": [[1, 2, 3], [1, 2, 3]],
    "stem_widths": [8, 16],
}
DESIGN = [RESIDUAL_3, RESIDUAL_2, PLAIN]
"""Networks for images of 28 pixels; what is expensive there is width where images are large."""

RATIOS = [0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
TEACHER = "residual"


def hand_made(widths: Sequence[int]) -> dict[str, Any]:
    """A network of a few stages as one would write it down, alone in its space."""
    base = RESIDUAL_3["base"] | {"widths": list(widths), "stem_width": 16}
    return {"spaces": [{"kind": "scale", "base": base, "widths": [1.0]}]}


STAGES = {"kind": "prune", "parent": TEACHER, "stage_ratios": [0.0, 0.25, 0.5, 0.6, 0.7, 0.8]}
NSGA2 = {"kind": "nsga2", "population": 6}
SUPERNET = {"epochs": 3, "batch_size": 256, "learning_rate": 0.004, "max_steps_per_epoch": 110}
"""About what four trials cost, since each step trains four networks."""

ARMS: dict[str, dict[str, Any]] = {
    "hand-made, fast": hand_made([16, 16, 32]),
    "hand-made, wide": hand_made([16, 32, 64]),
    "uniform width": {
        "spaces": [
            {
                "kind": "scale",
                "base": {"kind": "residual_cnn", "widths": [32, 48, 96], "strides": [2, 1, 2], "stem_width": 16},
                "widths": [0.1 + 0.05 * step for step in range(15)],
            }
        ]
    },
    "prune, magnitude": {"spaces": [{"kind": "prune", "parent": TEACHER, "ratios": RATIOS}]},
    "prune, taylor": {"spaces": [{"kind": "prune", "parent": TEACHER, "criterion": "taylor", "ratios": RATIOS}]},
    "random search": {"spaces": DESIGN, "sampler": {"kind": "random"}},
    "nsga2": {"spaces": DESIGN, "sampler": NSGA2},
    "tpe": {"spaces": DESIGN, "sampler": {"kind": "tpe", "warm_up_trials": 6}},
    "diswot filter": {"spaces": DESIGN, "sampler": NSGA2, "filter": {"kind": "diswot"}},
    "predictor filter": {"spaces": DESIGN, "sampler": NSGA2, "filter": {"kind": "predictor"}},
    "priors of past runs": {"spaces": DESIGN, "sampler": NSGA2, "priors": {"kind": "past_runs"}},
    "diswot evolution": {"spaces": DESIGN, "sampler": {"kind": "diswot_evolution"}, "max_macs": 4_000_000},
    "prune, stages": {"spaces": [STAGES], "sampler": NSGA2},
    "prune to latency and designs": {
        "spaces": [
            {"kind": "prune", "parent": TEACHER, "target": "latency", "ratios": [0.785, 0.845]},
            {"kind": "prune", "parent": TEACHER, "target": "latency", "ranking": "global", "ratios": [0.785, 0.845]},
            *DESIGN,
        ],
        "sampler": NSGA2,
    },
    "prune, iterative": {
        "spaces": [
            {
                "kind": "prune",
                "parent": TEACHER,
                "target": "latency",
                "ratios": [0.78, 0.84],
                "steps": 2,
                "between": {"epochs": 1, "batch_size": 256, "learning_rate": 0.004},
            }
        ],
        "trials": 2,
    },
    "prune, stages and designs": {"spaces": [STAGES, *DESIGN], "sampler": NSGA2},
    "tas": {
        "spaces": [
            {
                "kind": "tas",
                "base": {"kind": "residual_cnn", "widths": [16, 48, 128], "strides": [1, 2, 2], "stem_stride": 2},
                "targets": [0.4, 0.6],
                "train": {"epochs": 2, "batch_size": 256, "learning_rate": 0.004, "max_steps_per_epoch": 110},
            }
        ],
        "trials": 2,
    },
    "supernet": {
        "spaces": [
            {
                "kind": "subnets",
                "base": {"kind": "residual_cnn", "widths": [16, 48, 128], "strides": [1, 2, 2], "stem_stride": 2},
                "widths": [0.25, 0.5, 0.75],
                "train": SUPERNET,
            }
        ],
        "filter": {"kind": "inherited", "keep": 0.3, "first": 1},
        "sampler": {"kind": "random"},
        "trials": 4,
    },
    "layers, depthwise teacher": {
        "spaces": [{"kind": "layers", "parent": "depthwise", "shares": [0.25, 0.5, 0.75]}],
        "trials": 3,
        "max_latency_share": 1.0,
    },
    "prune, depthwise teacher": {
        "spaces": [{"kind": "prune", "parent": "depthwise", "target": "latency", "ratios": [0.5, 0.65, 0.8]}],
        "trials": 3,
        "max_latency_share": 1.0,
    },
    "n2n, depthwise teacher": {
        "spaces": [{"kind": "shrink", "parent": "depthwise"}],
        "sampler": {"kind": "n2n", "removal_trials": 3},
    },
    "prune, transformer teacher": {
        "spaces": [
            {
                "kind": "prune",
                "parent": "transformer",
                "criterion": "taylor",
                "ratios": [0.25, 0.5, 0.75],
                "round_to": 4,
            }
        ],
        "trials": 3,
        "max_latency_share": 1.0,
    },
    "tokens, transformer teacher": {
        "spaces": [{"kind": "tokens", "parent": "transformer", "keeps": [0.25, 0.5, 0.75]}],
        "trials": 3,
        "max_latency_share": 1.0,
    },
    "fastnas": {
        "spaces": [{"kind": "fastnas", "parent": TEACHER, "shares": [0.1, 0.15, 0.2, 0.3]}],
        "trials": 4,
    },
}
"""Search sections; what all have in common is added. Arms of networks that one would take by size alone need no
trials."""

NO_TRIALS = ("hand-made, fast", "hand-made, wide", "uniform width", "prune, magnitude", "prune, taylor")
"""Arms that take the largest network within the budget, as one would without a search."""

MEASURES = {
    "uniform width": "spaces.scale",
    "prune, magnitude": "criteria.magnitude",
    "prune, taylor": "criteria.taylor",
    "nsga2": "proposers.nsga2",
    "tpe": "proposers.tpe",
    "random search": "spaces.design",
    "diswot filter": "filters.diswot",
    "predictor filter": "filters.predictor",
    "priors of past runs": "priors.past_runs",
    "diswot evolution": "proposers.diswot_evolution",
    "prune, stages": "spaces.prune",
    "tas": "spaces.tas",
    "supernet": "spaces.subnets",
    "layers, depthwise teacher": "spaces.layers",
    "n2n, depthwise teacher": "proposers.n2n",
    "tokens, transformer teacher": "spaces.tokens",
    "fastnas": "spaces.fastnas",
}
"""Arm -> the method of the catalogue whose worth it shows."""
