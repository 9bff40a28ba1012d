"""Did it get faster? And if not, why not, in words that name layers and a way out.

Speed comes from an interleaved benchmark (``export.benchmark``), reasons from the two files and this processor
(``export.findings``): what ONNX Runtime makes of them is read from the graph it executes and from its own profiler.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from compression.errors import ExportError
from compression.types import Frozen
from export.feed import Shapes
from export.file_facts import FileFacts, examine
from export.finding import Case, Finding, Speed
from export.findings import find
from export.latency import BenchmarkResult, Samples, median_interval, round_ratios
from export.runtime import CpuFeatures, cpu_features

Faster = Literal["yes", "no", "cannot tell", "not measured"]


class LayerTime(Frozen):
    """One layer with weights: its part of the multiplications and of the time."""

    layer: str
    macs: int
    macs_share: float
    """Of the multiplications of all layers, 0..1."""
    time_share: float
    """Of the time of all operators, 0..1, with the operators the runtime kept under the layer's name."""


class Diagnosis(Frozen):
    """What one file gained over another, and what stands in its way."""

    candidate: str
    reference: str
    faster: Faster
    speed: Speed | None = None
    size_ratio: float
    """Bytes of the candidate over those of the reference."""
    findings: tuple[Finding, ...] = ()
    """Those that concern most of the time first."""
    threads: int = 1
    batch: int = 1
    layers: tuple[LayerTime, ...] = ()
    """Of the candidate, in order of execution."""

    @property
    def headline(self) -> str:
        """The answer in a sentence."""
        if self.candidate == self.reference:
            return f"'{self.candidate}' is what files are compared with."
        if self.speed is None:
            return f"Not measured: '{self.candidate}' and '{self.reference}' were not timed side by side."
        speed = self.speed
        times = f"{speed.ratio:.2f} of the time of '{self.reference}' ({speed.low:.2f} to {speed.high:.2f})"
        noise = f"the noise floor of {speed.noise_floor:.1%}"
        if self.faster == "yes":
            return f"'{self.candidate}' is faster: {times}, beyond {noise}."
        if self.faster == "cannot tell":
            return f"Cannot tell whether '{self.candidate}' is faster: {times}, too close to {noise}."
        if speed.low > 1 + speed.noise_floor:
            return f"'{self.candidate}' is slower: {times}, beyond {noise}."
        return f"'{self.candidate}' is not faster: {times}; {noise} would have to be passed."

    @property
    def conclusion(self) -> str:
        """What the findings come to, in a sentence."""
        if not self.findings:
            return (
                "Nothing was found that makes this file slow or large: no check of files, processor or profile struck."
            )
        high = sum(finding.severity == "high" for finding in self.findings)
        things = f"{len(self.findings)} thing{'s' if len(self.findings) > 1 else ''}"
        grave = f", {high} of them grave" if high else ""
        return f"{things} found{grave}, the one that concerns most of the time first."


def diagnose(
    candidate: Path,
    reference: Path,
    *,
    speed: Speed | None = None,
    threads: int = 1,
    batch: int = 1,
    shapes: Shapes | None = None,
    names: tuple[str, str] | None = None,
) -> Diagnosis:
    """Compare two files: whether one is faster, and what the files, this processor and a profile say about why.

    Args:
        candidate: The file to judge.
        reference: What it is compared with, e.g. the float32 file it was quantized from.
        speed: Both timed in the same rounds, see ``speed_of``; None: not measured.
        threads: Of the sessions.
        batch: Images per call.
        shapes: Sizes of inputs that are open beyond the batch.
        names: Of candidate and reference; default: their file names.

    Raises:
        ExportError: a file is missing, cannot be loaded, or does not run at this batch size.
    """
    called = names or (candidate.name, reference.name)
    facts = [
        examine(path, name=name, threads=threads, batch=batch, shapes=shapes)
        for path, name in zip((candidate, reference), called, strict=True)
    ]
    return compare_files(facts[0], facts[1], speed=speed)


def compare_files(
    candidate: FileFacts, reference: FileFacts, *, speed: Speed | None = None, cpu: CpuFeatures | None = None
) -> Diagnosis:
    """The diagnosis from facts already there; a pure function but for asking about this processor (``cpu``)."""
    case = Case(candidate, reference, cpu or cpu_features(), speed)
    profile = candidate.operators.profile
    return Diagnosis(
        candidate=candidate.name,
        reference=reference.name,
        faster=speed.faster if speed is not None else "not measured",
        speed=speed,
        size_ratio=candidate.size_bytes / max(reference.size_bytes, 1),
        findings=find(case),
        threads=profile.threads,
        batch=profile.batch,
        layers=layer_times(candidate),
    )


def layer_times(facts: FileFacts) -> tuple[LayerTime, ...]:
    """Multiplications and time of every layer with weights."""
    profile = facts.operators.profile
    macs: dict[str, int] = {}
    for node in profile.nodes:
        if node.macs is not None:
            macs[node.layer] = macs.get(node.layer, 0) + node.macs
    total = sum(macs.values()) or 1
    return tuple(
        LayerTime(layer=layer, macs=number, macs_share=number / total, time_share=profile.share_of_layers([layer]))
        for layer, number in macs.items()
    )


def speed_of(samples: Samples, result: BenchmarkResult, candidate: str, reference: str, *, batch: int) -> Speed | None:
    """How two files of one benchmark compare at one batch size; None when either was not timed at it.

    The ratio is taken round by round, so the reference need not be the benchmark's own; the noise floor is the
    benchmark's.
    """
    own, base = samples.get((candidate, batch)), samples.get((reference, batch))
    floors = {floor.batch: floor.spread for floor in result.noise_floors}
    if own is None or base is None or batch not in floors:
        return None
    ratios = round_ratios(own, base)
    low, high = median_interval(ratios)
    return Speed(
        ratio=float(np.median(ratios)),
        low=low,
        high=high,
        noise_floor=floors[batch],
        p50_ms=float(np.median(np.concatenate(own))),
    )


class FileDiagnosis(Frozen):
    """One file of a report."""

    parent: str | None = None
    """What it is compared with."""
    failure: str | None = None
    """Why nothing is known about it."""
    facts: FileFacts | None = None
    diagnosis: Diagnosis | None = None
    """None for a file without a parent."""


class DiagnosisReport(Frozen):
    """Every file of a run or of a benchmark; ``diagnosis.json``."""

    reference: str
    cpu: CpuFeatures
    files: dict[str, FileDiagnosis]


def diagnose_all(
    files: Mapping[str, Path],
    parents: Mapping[str, str],
    speeds: Mapping[str, Speed | None],
    *,
    reference: str,
    batches: Mapping[str, int],
    threads: int = 1,
    shapes: Shapes | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> DiagnosisReport:
    """Examine every file once and compare each with its parent; a file that fails is a row with the reason.

    Args:
        files: Name -> ONNX file.
        parents: Name -> name of the file it is compared with.
        speeds: Name -> how its time compares with that of its parent.
        reference: Name of the file that the others descend from, or are measured against.
        batches: Name -> images per call in the profile; default 1.
        threads: Of the sessions.
        shapes: Sizes of inputs that are open beyond the batch.
        on_progress: Called with (files done, files in all).
    """
    facts: dict[str, FileFacts] = {}
    failures: dict[str, str] = {}
    for done, (name, path) in enumerate(files.items(), start=1):
        try:
            facts[name] = examine(path, name=name, threads=threads, batch=batches.get(name, 1), shapes=shapes)
        except ExportError as error:
            failures[name] = str(error)
        on_progress(done, len(files))
    cpu = cpu_features()
    rows = {}
    for name in files:
        parent = parents.get(name)
        found, base = facts.get(name), facts.get(parent or "")
        diagnosis = compare_files(found, base, speed=speeds.get(name), cpu=cpu) if found and base else None
        rows[name] = FileDiagnosis(parent=parent, failure=failures.get(name), facts=found, diagnosis=diagnosis)
    return DiagnosisReport(reference=reference, cpu=cpu, files=rows)
