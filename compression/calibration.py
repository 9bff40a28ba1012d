"""Temperature scaling: one number that makes confidence believable and changes no answer.

Legend: N samples, C classes, T temperature.
"""

import logging
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.errors import CompressionError
from compression.metrics import Metrics, checked, metrics_of, per_class_accuracy
from compression.types import Frozen

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of a fitted temperature: beyond them the split says that no finite temperature is best."""
FIRST = 1.5
STEPS = 50


class Calibrate(Frozen):
    """Fit one temperature for each form of a model, on the calibration split."""

    kind: Literal["temperature"] = "temperature"
    apply: bool = False
    """Divide the logits by it inside the exported graph, unless it is at a bound; otherwise it is stored in the file
    for the application."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Temperature scaling",
        paper="Guo et al. 2017, arXiv:1706.04599",
        summary="Divides the logits by one number that makes the likelihood of held-out labels largest. The order of "
        "the classes stays, so every answer stays; only the confidence moves.",
        needs="Labels of the calibration split, which nothing was trained on.",
        cost="One forward pass over the calibration split; nothing at inference, the last layer takes it in.",
        evidence="Digits, one run: the ECE of a transformer teacher fell from 0.044 to 0.028; that of students, below "
        "0.01 already, did not change.",
    )


class Temperature(Frozen):
    """A fitted temperature, and what it did on the samples it was fitted on."""

    value: float
    """Divide logits by it; above 1 the model was too sure."""
    nll_before: float
    """Negative log-likelihood of the labels, nats."""
    nll_after: float
    """The same after division; never more than before."""
    ece_before: float
    """Expected calibration error over 15 bins, 0..1."""
    ece_after: float
    """The same after division; it may rise, since the likelihood is what is fitted."""
    num_samples: int
    """How many samples it was fitted on."""
    note: str = ""
    """Why not to trust the value; empty when there is nothing to say."""


def fit_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """The T within 0.05..20 that makes the likelihood of labels int64 [N] under logits [N,C] / T largest.

    Guo et al. 2017 (arXiv:1706.04599). L-BFGS in float64 from T = 1.5, at most 50 iterations, on log T squeezed into
    its bounds. The likelihood has one optimum in T, so the better of what was found, 1 and the two bounds is taken:
    the split it was fitted on never gets worse. Where no temperature is better than another (constant logits), T is 1.

    Raises:
        ShapeError: shapes do not fit, or there are no samples.
        CompressionError: some logits are not finite, or some labels are no class.
    """
    logits, labels = checked(logits, labels)

    candidates = (1.0, _searched(logits, labels), LOWEST, HIGHEST)
    value = min(candidates, key=lambda each: float(F.cross_entropy(logits / each, labels)))
    note = ""
    if value in (LOWEST, HIGHEST):
        wanted = "sharper" if value == LOWEST else "flatter"
        note = f"At its bound {value:g}: on these {len(labels)} samples {wanted} logits would be likelier still."
        logger.warning("Temperature is not to be trusted. %s Fit it on more samples.", note)
    before, after = metrics_of(logits, labels), metrics_of(logits / value, labels)
    return Temperature(
        value=value,
        nll_before=before.nll,
        nll_after=after.nll,
        ece_before=before.ece,
        ece_after=after.ece,
        num_samples=len(labels),
        note=note,
    )


@torch.inference_mode(False)
@torch.enable_grad()
def _searched(logits: Tensor, labels: Tensor) -> float:
    logits, labels = logits.clone(), labels.clone()  # tensors of inference mode are no use for a gradient
    low, width = math.log(LOWEST), math.log(HIGHEST / LOWEST)
    share = (math.log(FIRST) - low) / width
    place = torch.tensor(math.log(share / (1 - share)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [place], max_iter=STEPS, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def temperature() -> Tensor:
        return torch.exp(low + width * torch.sigmoid(place))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / temperature(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # wants a float, takes a tensor
    return float(temperature().detach().clamp(LOWEST, HIGHEST))


class CalibratedRow(Frozen):
    """One file on one split, as it answers and with its temperature."""

    temperature: float | None
    """What the file says about itself; none when it was not fitted."""
    applied: bool = False
    """Whether the graph itself divides: then it answers as in ``after``."""
    before: Metrics
    """Of the logits that were not divided."""
    after: Metrics | None
    """Of the divided logits; none without a temperature."""
    per_class: tuple[float | None, ...]
    """Accuracy on each class, in the order of the logits; the temperature does not change it."""


def calibrated_row(
    logits: Tensor, labels: Tensor, temperature: float | None, *, applied: bool = False
) -> CalibratedRow:
    """What logits [N,C] are worth against labels [N] before and after the temperature.

    Args:
        logits: As the file gives them, so already divided where ``applied``.
        labels: int64 [N].
        temperature: Fitted on other samples than these.
        applied: Whether the logits were divided by it already.

    Raises:
        ShapeError: shapes do not fit, or there are no samples.
        CompressionError: logits, labels or the temperature are not usable.
    """
    if temperature is not None:
        check_temperature(temperature)
    before = logits.double() * temperature if applied and temperature is not None else logits.double()
    after = None if temperature is None else metrics_of(before / temperature, labels)
    return CalibratedRow(
        temperature=temperature,
        applied=applied,
        before=metrics_of(before, labels),
        after=after,
        per_class=tuple(per_class_accuracy(logits, labels)),
    )


def calibrated_rows(
    logits: Mapping[str, Tensor], labels: Tensor, temperatures: Mapping[str, tuple[float, bool]]
) -> dict[str, CalibratedRow]:
    """One row per file, by name; ``temperatures`` holds (T, whether the graph divides) of the files that have one."""
    rows = {}
    for name, values in logits.items():
        temperature, applied = temperatures.get(name, (None, False))
        rows[name] = calibrated_row(values, labels, temperature, applied=applied)
    return rows


def check_temperature(value: float) -> None:
    """Whether logits can be divided by it.

    Raises:
        CompressionError: it is not finite, or not above 0.
    """
    if not (math.isfinite(value) and value > 0):
        raise CompressionError(f"Temperature has {value}, expected a finite number above 0. Fit it again.")
