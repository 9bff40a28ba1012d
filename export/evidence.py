"""What is known about one exported file when the gate decides; ``None`` always means "not measured"."""

from torch import Tensor

from compression.statistics import Interval, accuracy_drop
from compression.types import Frozen
from export.latency import BenchmarkResult
from export.profiles import Form


class Evidence(Frozen):
    """Everything measured on one file of one target, beside the teacher and parent it is compared with."""

    target: str
    """The target this file was built for."""
    candidate: str
    """Name of the file in the tables, e.g. ``student-int8``."""
    precision: Form
    ran: bool = True
    """False for an engine that was built but could not be run on this machine."""

    num_samples: int | None = None
    """Test samples behind accuracy and parity."""
    num_classes: int | None = None
    accuracy: float | None = None
    """Share of correct answers of this file, 0..1."""
    teacher_accuracy: float | None = None
    """The best teacher's, on the same samples."""
    accuracy_drop: Interval | None = None
    """Teacher's accuracy minus this file's, paired; negative when the student is better."""
    mcnemar_p: float | None = None
    """Chance of a difference this large if both were equally good; for the reader, not for the decision."""
    worst_class_drop: Interval | None = None
    """The largest drop any one class suffers."""
    robust_gap_increase: Interval | None = None
    """How much wider the gap between clean and corrupted accuracy is than the teacher's, paired."""
    ece: float | None = None
    teacher_ece: float | None = None

    flips: float | None = None
    """Share of test samples whose answer differs from the torch model this file was exported from."""
    latency_ratio: Interval | None = None
    """Median latency over the parent's in the same rounds."""
    latency_noise_floor: float | None = None
    """How far the parent strays from itself, as a share of its latency."""
    parent: str = "the teacher"
    """What ``latency_ratio`` is a ratio to."""
    latency_p50_ms: float | None = None
    latency_p95_ms: Interval | None = None
    size_bytes: int | None = None
    peak_rss_bytes: int | None = None

    integer_share: float | None = None
    """Share of the weight layers that run as integer kernels, 0..1; for integer files."""
    vnni: bool | None = None
    """Whether the processor multiplies bytes natively (VNNI, AMX or ARM dot product)."""
    num_nodes: int | None = None
    """Operators in the graph the runtime executes; a tiny net spends its time between them."""


def worst_class_drop(
    reference_correct: Tensor, candidate_correct: Tensor, labels: Tensor, *, seed: int, level: float = 0.95
) -> Interval:
    """The paired accuracy drop of the class that loses most.

    Args:
        reference_correct: [N] bool, the teacher's answers.
        candidate_correct: [N] bool, the candidate's answers on the same samples.
        labels: [N] int64.
        seed: Of the bootstrap.
        level: Confidence for all classes together; each class gets its Bonferroni share, because the worst
            of many classes looks bad by chance alone.
    """
    classes = labels.unique().tolist()
    each = 1 - (1 - level) / len(classes)
    drops = [
        accuracy_drop(reference_correct[labels == label], candidate_correct[labels == label], level=each, seed=seed)
        for label in classes
    ]
    return max(drops, key=lambda drop: drop.estimate)


def latency_facts(result: BenchmarkResult, model: str, *, batch: int) -> dict[str, Interval | float | int | None]:
    """The fields of ``Evidence`` that a benchmark fills in; unpack it with ``**``.

    Raises:
        ExportError: the benchmark has no row for this model and batch.
    """
    row = result.row(model, batch)
    return {
        "latency_ratio": Interval(estimate=row.ratio_to_reference, low=row.ratio_low, high=row.ratio_high, level=0.95),
        "latency_noise_floor": result.noise_floor(batch),
        "latency_p50_ms": row.latency_p50_ms,
        "latency_p95_ms": Interval(
            estimate=row.latency_p95_ms, low=row.latency_p95_low_ms, high=row.latency_p95_high_ms, level=0.95
        ),
        "size_bytes": row.size_bytes,
        "peak_rss_bytes": row.peak_rss_bytes,
    }
