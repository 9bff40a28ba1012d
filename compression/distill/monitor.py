"""Teacher hacking: a student that comes ever closer to its teachers while it gets worse at the task.

Two curves are watched, one value per epoch. The proxy is the divergence from the teachers; the golden curve is the
negative log-likelihood of human labels; both on validation images that no one is trained on.
"""

import logging
import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compression.data.dataset import Dataset
from compression.distill.types import TeacherLogits
from compression.errors import ShapeError
from compression.train import Row
from compression.types import Frozen

logger = logging.getLogger(__name__)

ALARMS = ("hacking_u_shape", "hacking_power_law")
"""Entries of a row, 1.0 where the alarm holds."""

EARLY_SHARE = 0.3
"""Part of a curve, from its start, to which the power law is fitted."""
MIN_EARLY = 5
"""Fewest values for that fit."""
SIGMAS = 3.0
"""How far above the law a value must be."""
RECENT = 3
"""Newest values that must all be there."""
MIN_SCATTER = 0.01
"""Scatter about the law below which no fit is believed, in logarithms: one percent."""


def u_shape_alarm(golden: Sequence[float], proxy: Sequence[float], window: int = 6, level: float = 0.9) -> bool:
    """Whether the proxy surely falls while the golden curve surely rises, over the last ``window`` values.

    Sure is what the Theil-Sen confidence interval of the slope says at ``level``. On two flat curves of pure noise
    about 5 % of trainings of 40 epochs raise it; the longer a flat golden curve meets a falling proxy, the more.
    """
    if min(len(golden), len(proxy)) < window:
        return False
    return _slopes(golden[-window:], level)[0] > 0 and _slopes(proxy[-window:], level)[1] < 0


def _slopes(curve: Sequence[float], level: float) -> tuple[float, float]:
    """Lowest and highest slope in the Theil-Sen confidence interval."""
    from scipy.stats import theilslopes

    found: Any = theilslopes(np.asarray(curve), alpha=level)
    return float(found.low_slope), float(found.high_slope)


def power_law_alarm(golden: Sequence[float], proxy: Sequence[float]) -> bool:
    """Whether the golden curve has left its early power law upward while the proxy keeps to its own.

    A straight line in log-log axes is fitted to the first 30 % of each curve. The last three golden values must all
    lie beyond three standard errors of prediction above theirs (the matching quantile of Student's t, as the fit is
    short), and the last three proxy values must not. A curve that merely levels off leaves its law too, so the golden
    values must also lie three times the scatter above the lowest running median of three: it must have turned.
    Needs 8 values.
    """
    found, taught = _excess(golden), _excess(proxy)
    if found is None or taught is None:
        return False
    (above, scatter), (taught_above, _) = found, taught
    if not (above[-RECENT:] > 1).all() or (taught_above[-RECENT:] > 1).all():
        return False
    logs = _log(golden)
    lowest = np.median(np.lib.stride_tricks.sliding_window_view(logs, RECENT), axis=1).min()
    return bool((logs[-RECENT:] > lowest + SIGMAS * scatter).all())


def _excess(curve: Sequence[float]) -> tuple[NDArray[np.float64], float] | None:
    """Height over the early power law in units of its limit, and the scatter about it; None for short curves."""
    from scipy.stats import norm, t

    count = len(curve)
    early = max(MIN_EARLY, math.ceil(EARLY_SHARE * count))
    if count < early + RECENT:
        return None
    x, y = np.log(np.arange(1, count + 1, dtype=np.float64)), _log(curve)
    centred = x - x[:early].mean()
    spread = float((centred[:early] ** 2).sum())
    height = y - y[:early].mean() - centred * float(centred[:early] @ y[:early]) / spread
    scatter = max(MIN_SCATTER, math.sqrt(float((height[:early] ** 2).sum()) / (early - 2)))
    quantile = float(t.ppf(norm.cdf(SIGMAS), early - 2))
    return height / (quantile * scatter * np.sqrt(1 + 1 / early + centred**2 / spread)), scatter


def _log(curve: Sequence[float]) -> NDArray[np.float64]:
    return np.log(np.maximum(np.asarray(curve, dtype=np.float64), 1e-12))


class Monitor(Frozen):
    """Watches for students that learn their teachers' faults."""

    window: Annotated[int, Field(ge=4, le=200)] = 6
    """Epochs over which the two curves must part."""
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    """Confidence that each of them has the slope it seems to have."""
    stop: bool = False
    """End the training after the epoch of the first alarm; off, alarms are only recorded. They can be false."""

    def watch(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> "Watch | None":
        """The watch over a training with this panel; None if there is none, or a teacher has no validation logits.

        Raises:
            ShapeError: validation logits were stored for another split.
        """
        stored: list[Tensor] = []
        for number, teacher in enumerate(panel):
            logits: Tensor | None = getattr(teacher, "validation_logits", None)
            if logits is None:
                logger.debug("Teacher %d has no validation logits; no watch is kept.", number)
                return None
            expected = [len(dataset.validation.labels), dataset.num_classes]
            if list(logits.shape) != expected:
                raise ShapeError(
                    f"Validation logits of teacher {number} of the panel have shape {list(logits.shape)}, expected "
                    f"{expected} as data set '{dataset.name}'. Store its outputs again."
                )
            stored.append(logits)
        return Watch(self, torch.stack(stored)) if stored else None


class Watch:
    """A monitor at work; what it says depends on the rows alone, so a resumed training needs no state of it."""

    def __init__(self, config: Monitor, teacher_logits: Tensor) -> None:
        """Keep the equal mixture of the teachers' distributions, from logits [K,N,C]."""
        self.config = config
        self.mixture = teacher_logits.double().softmax(dim=-1).mean(dim=0)

    def __call__(self, logits: Tensor, rows: Sequence[Row]) -> dict[str, float]:
        """Entries for the last row: ``teacher_kl`` in nats, and both alarms as 0.0 or 1.0.

        ``teacher_kl`` is KL(mixture || student) at temperature 1. The teachers count equally, whatever weights they
        have in training: those may depend on labels, which the proxy must not see.

        Args:
            logits: the student's, [N,C], on the validation split.
            rows: with ``validation_nll``, and all but the last with ``teacher_kl``.
        """
        divergence = float(F.kl_div(logits.double().log_softmax(dim=-1), self.mixture, reduction="batchmean"))
        golden = [float(row["validation_nll"]) for row in rows]
        proxy = [*(float(row["teacher_kl"]) for row in rows[:-1]), divergence]
        alarms = (u_shape_alarm(golden, proxy, self.config.window, self.config.level), power_law_alarm(golden, proxy))
        if any(alarms) and not any(_alarmed(row) for row in rows[:-1]):
            logger.warning(
                "From epoch %d on the student may be hacking its teachers: it comes closer to them (%.3g nats) while "
                "its validation nll grows (%.3g). Raise the weight of cross_entropy, add views, or train for less.",
                rows[-1]["epoch"],
                divergence,
                golden[-1],
            )
        return {"teacher_kl": divergence} | dict(zip(ALARMS, map(float, alarms), strict=True))

    def should_stop(self, rows: Sequence[Row]) -> bool:
        """Whether an alarm has been raised and ends the training."""
        return self.config.stop and any(_alarmed(row) for row in rows)


def _alarmed(row: Row) -> bool:
    return any(row.get(name) for name in ALARMS)
