"""The predictor: the terms an operator costs, their coefficients fitted to a table, and how well they predict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compression.search.space import Operator
from export.latency_model.operators import PRODUCTS, InputShape, in_blocks, macs_of, operators_of
from export.latency_model.table import HeldOut, LatencyTable, OperatorRow

_LIKE = {  # kinds that cost what another one costs, which the sample has
    **dict.fromkeys(("MaxPool", "AveragePool"), "ReduceMean"),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization"), "LayerNormalization"),
    **dict.fromkeys(("Concat", "Split", "Pad"), "Transpose"),
    **dict.fromkeys(("Sigmoid", "Tanh", "Silu", "Hardswish", "Elu", "Erf", "Exp", "Mish"), "Gelu"),
}
_OWN_KIND = frozenset({"Add", "Mul", "Gelu", "LayerNormalization", "Softmax", "Transpose", "ReduceMean", "Reorder"})
_OWN_KIND |= {"Relu", "FusedAdd", "Attention"}
_VECTOR = 16  # columns a matrix product takes at once
_TOLERATED = 0.08  # relative errors above this count linearly, not squared
_KERNEL_WEIGHT = 0.25
_KERNEL_FLOOR_MS = 0.003  # kernels below this are mostly overhead of the profiler

Term = tuple[str, str]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def terms_of(operator: Operator, block: int) -> dict[Term, float]:
    """What the cost of an operator is a sum of: (group, term) -> amount for one image; each grows with the channels."""
    positions, kernel, groups = operator.height * operator.width, operator.kernel, operator.groups
    area, inputs, outputs = kernel**2, operator.in_channels, operator.out_channels
    terms: dict[str, float]
    if operator.kind == "Conv":
        depthwise = groups > 1 and groups == inputs == outputs
        if depthwise and in_blocks(operator, block):
            group, filled = "depthwise", _up(outputs, block)
            terms = {
                "mac": area * positions * filled,
                "row": kernel * positions * filled,
                "out": positions * filled,
                "in": positions * filled * operator.stride**2,
            }
        elif depthwise:
            group = "depthwise one by one"
            terms = {"groups": groups, "mac": area * _up(positions, _VECTOR) * groups, "out": positions * groups}
        elif in_blocks(operator, block):
            direct = groups == 1 and inputs < block
            group = "conv of few channels" if direct else "conv 1x1" if kernel == 1 else "conv"
            taken, filled = inputs if direct else _up(inputs, block), _up(outputs, block)
            work = area * positions * taken * filled / groups
            terms = {
                "mac": work,
                "out": positions * filled,
                "in": positions * operator.stride**2 * taken,
                "row": work / operator.width,
                "w": area * taken * filled / groups,
                "pass": area * positions * taken * _up(filled, 4 * block) / groups,
                "strided": work if operator.stride > 1 else 0,
                "sums": positions * filled * taken / block,
            }
        else:
            group = "conv as product"
            work = area * _up(positions, _VECTOR) * inputs * outputs / groups
            terms = {
                "groups": groups,
                "mac": work,
                "out": positions * outputs,
                "in": positions * operator.stride**2 * inputs,
                "columns": area * positions * inputs if kernel > 1 or operator.stride > 1 else 0,
                "gathered": work if kernel > 1 else 0,
            }
    elif operator.kind in PRODUCTS:
        group, filled = operator.kind, groups * _up(outputs // groups, _VECTOR)
        terms = {
            "groups": groups if groups > 1 else 0,
            "mac": positions * inputs * filled / groups,
            "out": positions * filled,
            "in": positions * inputs,
            "w": inputs * filled / groups,
        }
    else:
        group = _LIKE.get(operator.kind, operator.kind)
        group = group if group in _OWN_KIND else "Mul"
        terms = {"elements": positions * inputs * area}
        if group in ("LayerNormalization", "Softmax"):
            terms["rows"] = positions
        if group == "ReduceMean":
            terms["channels"] = inputs
    return {(group, "1"): 1.0} | {(group, name): float(amount) for name, amount in terms.items() if amount}


def _sum_of(bag: Sequence[OperatorRow], block: int, extra: Term) -> dict[Term, float]:
    total: dict[Term, float] = {extra: 1.0}
    for row in bag:
        for term, amount in terms_of(Operator(*row), block).items():
            total[term] = total.get(term, 0.0) + amount
    return total


_CALL: Term = ("call", "1")
_PROFILER: Term = ("profiler", "1")


def _fit(table: LatencyTable) -> dict[Term, float]:
    """Milliseconds for each term: least squares of the relative error, no coefficient below zero."""
    from scipy.optimize import nnls

    amounts = [_sum_of(row.operators, table.block, _CALL if row.source == "net" else _PROFILER) for row in table.rows]
    terms = sorted(set().union(*amounts))
    places = {term: place for place, term in enumerate(terms)}
    design = np.zeros((len(amounts), len(terms)))
    for number, row in enumerate(amounts):
        for term, amount in row.items():
            design[number, places[term]] = amount
    scale = design.max(axis=0)
    design /= scale
    target = np.array([row.ms for row in table.rows])
    is_net = np.array([row.source == "net" for row in table.rows])
    weight = np.where(is_net, 1.0 / target, _KERNEL_WEIGHT / (target + _KERNEL_FLOOR_MS))
    trust = np.ones(len(target))
    solution = np.zeros(len(terms))
    for _ in range(5):
        rows = weight * np.sqrt(trust)
        solution, _ = nnls(design * rows[:, None], target * rows, maxiter=100 * len(terms))
        error = np.abs(design @ solution / target - 1.0)
        trust = 1.0 / np.maximum(1.0, error / _TOLERATED)
    return dict(zip(terms, (solution / scale).tolist(), strict=True))


@dataclass(frozen=True)
class FittedLatency:
    """A ``LatencyModel``: the predictor fitted to a table. Equal tables predict equally."""

    table: LatencyTable
    _coefficients: dict[Term, float] = field(init=False, repr=False, compare=False)
    _usual: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = _fit(self.table)
        named: dict[str, list[float]] = {}
        for (group, term), value in found.items():
            if value > 0 and (group, term) not in (_CALL, _PROFILER):
                named.setdefault(term, []).append(value)
        object.__setattr__(self, "_coefficients", found)
        object.__setattr__(self, "_usual", {term: float(np.median(values)) for term, values in named.items()})

    @property
    def batch(self) -> int:
        """Images per call."""
        return self.table.batch

    @property
    def call_ms(self) -> float:
        """What a call costs besides its operators."""
        return self._coefficients.get(_CALL, 0.0)

    def predict_ms(self, model: nn.Module, input_shape: InputShape) -> float:
        """Milliseconds of one call: ``call_ms`` and the sum of its operators."""
        return self.total_ms(operators_of(model, input_shape, block=self.table.block))

    def total_ms(self, operators: Sequence[Operator]) -> float:
        """Milliseconds of one call of a network of these operators."""
        return self.call_ms + sum(self.operators_ms(operators))

    def operators_ms(self, operators: Sequence[Operator]) -> list[float]:
        """Milliseconds of each operator at ``batch`` images, 0 or more; some 10 us of compute each.

        Grows with both channel counts as long as the same kernel runs (see ``in_blocks``).
        """
        return [
            sum(amount * self._per(term) for term, amount in terms_of(operator, self.table.block).items())
            for operator in operators
        ]

    def _per(self, term: Term) -> float:
        """The coefficient of a term; of one that no network of the sample had, the usual one by that name."""
        found = self._coefficients.get(term)
        return self._usual.get(term[1], 0.0) if found is None else found


def held_out(model: FittedLatency, bags: Sequence[Sequence[Operator]], measured_ms: Sequence[float]) -> HeldOut:
    """How well ``model`` predicts networks, given as their operators, that took ``measured_ms``."""
    from scipy import stats

    measured = np.array(measured_ms)
    predicted = np.array([model.total_ms(bag) for bag in bags])
    error = np.abs(predicted / measured - 1.0)

    def tau(values: Sequence[float] | NDArray[np.float64]) -> float:
        found: Any = stats.kendalltau(values, measured)
        return float(found.statistic) if math.isfinite(found.statistic) else 0.0

    return HeldOut(
        nets=len(bags),
        median_error=float(np.median(error)),
        p90_error=float(np.quantile(error, 0.9)),
        kendall_tau=tau(predicted),
        kendall_tau_macs=tau([float(macs_of(bag)) for bag in bags]),
    )
