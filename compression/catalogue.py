"""Every method a recipe can name, by kind; read from the unions, so that nothing is listed twice."""

from typing import Any, get_args

from compression.augment import AnyAugment
from compression.data import AnyData
from compression.distill import AnyCombination, AnyLoss
from compression.models import AnyModel
from compression.quantize import AnyQuantizer
from compression.search import AnySearch, AnySpace
from compression.search.criteria import AnyCriterion
from compression.select import AnySelector


def catalogue() -> dict[str, list[Any]]:
    """Kind of method -> its config classes, in the order of their union."""
    unions: dict[str, Any] = {
        "data": AnyData,
        "augmentations": AnyAugment,
        "models": AnyModel,
        "selectors": AnySelector,
        "searches": AnySearch,
        "spaces": AnySpace,
        "criteria": AnyCriterion,
        "combinations": AnyCombination,
        "losses": AnyLoss,
        "quantizers": AnyQuantizer,
    }
    return {kind: list(get_args(union)) or [union] for kind, union in unions.items()}
