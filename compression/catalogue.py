"""Every method a recipe can name, by kind."""

from typing import Any, get_args

from compression.types import Frozen


def catalogue() -> dict[str, list[type[Frozen]]]:
    """Return kind of method -> its config classes, in the order of the unions; each carries a ``card``."""
    from compression.attention import AttentionConfig
    from compression.augment import AnyAugment
    from compression.calibration import Calibrate
    from compression.distill.losses import AnyLoss
    from compression.distill.merging import AnyMerge
    from compression.distill.online import AnyOnline
    from compression.distill.procedures import AnyProcedure
    from compression.distill.samplers import AnySampler
    from compression.distill.teachers import AnyCombination
    from compression.quantize import AnyQuantizer
    from compression.quantize.sensitivity import SensitivityConfig
    from compression.robustness.accuracy import RobustnessConfig
    from compression.search import AnyFilter, AnyPriors, AnySearch, AnySpace
    from compression.search import AnySampler as AnyProposer
    from compression.search.criteria import AnyCriterion
    from compression.select import AnySelector
    from compression.sparsify import AnySparsifier
    from compression.teachers import AnySource

    return {
        "sources": members(AnySource),
        "selectors": members(AnySelector),
        "searchers": members(AnySearch),
        "spaces": members(AnySpace),
        "proposers": members(AnyProposer),
        "filters": members(AnyFilter),
        "priors": members(AnyPriors),
        "criteria": members(AnyCriterion),
        "combinations": members(AnyCombination),
        "losses": members(AnyLoss),
        "samplers": members(AnySampler),
        "procedures": members(AnyProcedure),
        "mergers": members(AnyMerge),
        "augmenters": [*members(AnyAugment), *members(AnyOnline)],
        "sparsifiers": members(AnySparsifier),
        "quantizers": members(AnyQuantizer),
        "sensitivity": [SensitivityConfig],
        "evidence": [Calibrate, RobustnessConfig, AttentionConfig],
    }


def members(union: Any) -> list[type[Frozen]]:
    """Return the classes of a union; a union of one is the class itself."""
    return list(get_args(union)) or [union]
