"""Trials of earlier studies, as the predictor and the priors read them."""

from typing import Any

from compression.types import Frozen


class PastTrial(Frozen):
    """One trained candidate of an earlier study."""

    task: str
    space: str
    choices: dict[str, Any]
    accuracy: float
