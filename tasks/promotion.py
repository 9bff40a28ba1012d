"""What promotion decides on: the evidence of registered versions, read from their tags and the store."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from compression.errors import ArtifactError
from compression.statistics import Interval
from export.promotion import Promotion, PromotionDecision, VersionFacts, decide_promotion
from tasks import registry
from tasks.artifacts import Artifact, Store
from tasks.registry import Version
from tasks.settings import settings

POLICY = "promotion"
"""Tag with the recipe's promotion section, for whoever decides later."""


def decide(version: Version, config: Promotion | None = None) -> PromotionDecision:
    """What becomes of a version by the policy of its recipe, against the champion of now."""
    champion = registry.champion(version.name)
    return decide_promotion(config or policy_of(version), facts_of(version), champion and facts_of(champion))


def policy_of(version: Version) -> Promotion:
    """The promotion section of the recipe that last made this version; the defaults where none is known."""
    return Promotion.model_validate_json(version.tags.get(POLICY) or "{}")


def facts_of(version: Version) -> VersionFacts:
    """The evidence of a version. What an older version did not record is "not measured"."""
    tags = version.tags
    measured = {name: _read(tags.get(name, "")) for name in ("accuracy", "float_accuracy", "ece", "latency_p50_ms")}
    counts = {name: _read(tags.get(name, "")) for name in ("num_samples", "size_bytes")}
    ratio, file = _read(tags.get("latency_ratio", "")), tags.get("file", "")
    folder = _evaluation(tags.get("evaluation", ""))
    return VersionFacts(
        version=version.version,
        file=file,
        sha256=tags.get("sha256", ""),
        verdict=tags.get("verdict", "accept"),  # type: ignore[arg-type]
        verdict_because=tags.get("verdict_because", ""),
        precision=tags.get("precision", ""),
        latency_ratio=Interval(estimate=ratio[0], low=ratio[1], high=ratio[2]) if ratio else None,
        latency_noise_floor=_read(tags.get("latency_noise_floor", "")) or 0.0,
        yardstick=tags.get("yardstick", ""),
        data=tags.get("data", ""),
        correct=_array(folder, f"{file}.correct.npy"),
        answers=_array(folder, f"{file}.answers.npy"),
        refused=_refused(version),
        **measured,
        **counts,
    )


def _refused(version: Version) -> str:
    """A file that was rolled back or declined is so under every number it was registered as."""
    for each in registry.versions(version.name):
        if each.version != version.version and each.tags.get("sha256") != version.tags.get("sha256"):
            continue
        for mark, said in (("rolled_back", "rolled back"), ("declined", "declined")):
            if f"{mark}_because" in each.tags:
                why = f"'{each.tags[f'{mark}_because']}'"
                return f"Version {each.version} was {said} by {each.tags.get(f'{mark}_by', 'someone')}: {why}."
    return ""


def _read(text: str) -> Any:
    return json.loads(text) if text else None


def _evaluation(sha256: str) -> Path | None:
    if not sha256:
        return None
    try:
        return Store(settings().store_dir).open(Artifact(kind="evaluation", sha256=sha256, size_bytes=0))
    except ArtifactError:  # cleared away since; the shares in the tags are left
        return None


def _array(folder: Path | None, name: str) -> Any:
    path = None if folder is None else folder / name
    return np.load(path) if path is not None and path.is_file() else None
