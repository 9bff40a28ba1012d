"""The table of a latency model: what was measured, how well networks not seen were predicted, and the file of both."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import Field, PositiveFloat, ValidationError

from compression.search.space import Operator
from compression.types import Frozen
from export.latency_model.operators import InputShape

LOGGER = logging.getLogger(__name__)

FORMAT = 1
"""Version of the table and of what its operators mean; another one is measured anew."""

OperatorRow = tuple[str, int, int, int, int, int, int, int]
"""The fields of an ``Operator``, in order."""


class Row(Frozen):
    """What was measured once: some operators and the time they took together."""

    source: Literal["net", "kernel"]
    """A whole call, or what the profiler says of one kernel."""
    operators: Annotated[tuple[OperatorRow, ...], Field(min_length=1)]
    ms: PositiveFloat


class HeldOut(Frozen):
    """How well networks were predicted that the fit has not seen."""

    nets: int
    median_error: float
    """Median of |predicted / measured - 1|."""
    p90_error: float
    """90th percentile of the same."""
    kendall_tau: float
    """Rank correlation of predicted and measured, -1..1."""
    kendall_tau_macs: float
    """The same of multiply-accumulates and measured, for comparison."""


class LatencyTable(Frozen):
    """All that was measured on one machine for one image size and batch; what the predictor is fitted to."""

    format: int = FORMAT
    facts: dict[str, str]
    """Machine, versions, threads."""
    input_shape: InputShape
    batch: int
    block: int
    """Channels that are computed at once."""
    nets: int
    seed: int
    reference_ms: float
    """p50 of the reference net over the whole session; network rows are shares of it."""
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    held_out: HeldOut | None = None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for machine, versions and threads."""
        return fingerprint(self.facts)


def row_of(operator: Operator) -> OperatorRow:
    """The fields of an operator, in order."""
    return cast("OperatorRow", astuple(operator))


def fingerprint(facts: Mapping[str, str]) -> str:
    """16 hexadecimal digits that stand for these facts."""
    return hashlib.sha256(json.dumps([FORMAT, sorted(facts.items())]).encode()).hexdigest()[:16]


def kept(path: Path, wanted: Mapping[str, object], nets: int) -> LatencyTable | None:
    """The table in a file, if it is whole and what is wanted."""
    if not path.exists():
        return None
    try:
        table = LatencyTable.model_validate_json(path.read_bytes())
    except (ValidationError, ValueError, OSError) as error:
        LOGGER.warning("latency table '%s' is damaged (%s), measuring again", path.name, str(error).splitlines()[0])
        return None
    for name, value in wanted.items():
        if (found := getattr(table, name)) != value:
            LOGGER.info("latency table '%s' has %s %s, expected %s, measuring again", path.name, name, found, value)
            return None
    if table.nets < nets:
        LOGGER.info("latency table '%s' has %d nets, expected %d, measuring again", path.name, table.nets, nets)
        return None
    return table


def keep(table: LatencyTable, path: Path) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(table.model_dump_json(), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
