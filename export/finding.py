"""What a finding is, and what the checks that make findings look at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from compression.types import Frozen
from export.file_facts import FileFacts
from export.operator_profile import NodeTime
from export.runtime import CpuFeatures

Severity = Literal["high", "medium", "low"]
"""high: may well be the reason; medium: costs time or space; low: worth knowing."""


class Finding(Frozen):
    """One reason why a file is slow, large or inexact."""

    code: str
    """Short name, for programs."""
    title: str
    evidence: str
    """What was found, in words with numbers."""
    remedy: str
    layers: tuple[str, ...] = ()
    share_of_time: float | None = None
    """Share of the time of all operators that it concerns, 0..1; None where that cannot be said."""
    severity: Severity = "medium"


class Speed(Frozen):
    """How one file's time compares with another's, measured in the same rounds."""

    ratio: float
    """Median over rounds of the candidate's time over the reference's."""
    low: float
    """Lower 95 % bound of that median."""
    high: float
    noise_floor: float
    """Share below which a difference means nothing."""
    p50_ms: float | None = None
    """Of the candidate, in ms per call."""

    @property
    def faster(self) -> Literal["yes", "no", "cannot tell"]:
        """Whether the whole interval is below 1 by more than the noise floor, or none of it."""
        threshold = max(1 - self.noise_floor, 0.0)
        if self.high < threshold:
            return "yes"
        return "no" if self.low >= threshold else "cannot tell"


@dataclass(frozen=True)
class Case:
    """What the checks look at."""

    candidate: FileFacts
    reference: FileFacts
    cpu: CpuFeatures
    speed: Speed | None = None

    @property
    def is_x86(self) -> bool:
        """Whether the processor is an x86."""
        return self.cpu.machine.lower() in ("x86_64", "amd64", "i686")

    def share(self, chosen: Callable[[NodeTime], bool]) -> float:
        """Share of the candidate's time in the chosen operators, 0..1."""
        return sum(node.share for node in self.candidate.operators.profile.nodes if chosen(node))


Check = Callable[[Case], Iterator[Finding]]


def named(layers: Sequence[str], most: int = 4) -> str:
    """Layer names in words, the first few of them."""
    shown = [f"'{layer}'" for layer in layers[:most]]
    return ", ".join(shown) + (f" and {len(layers) - most} more" if len(layers) > most else "")
