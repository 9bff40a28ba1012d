"""``stillhouse bench``: did it get faster? For ONNX files of any tool, with the reasons when it did not."""

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from compression.errors import InputError
from export.benchmark import BenchmarkJob, run_benchmark
from export.diagnosis import DiagnosisReport, FileDiagnosis, diagnose_all, speed_of
from export.feed import fixed_batch, input_shapes
from export.finding import Finding, Speed
from export.latency import BenchmarkResult, read_raw
from flows.progress import show, terminal_progress

NOT_MEASURED = "not measured"
COLOURS = {"yes": "green", "no": "red", "cannot tell": "yellow", NOT_MEASURED: "dim"}
SHOWN_OPERATORS = 12

Inputs = list[tuple[str, list[Any]]]


@dataclass(frozen=True)
class Bench:
    """What was measured and found."""

    timing: BenchmarkResult
    report: DiagnosisReport
    rows: list[dict[str, Any]]
    """One per file and batch size, and one per file that failed."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know: batch sizes that files are fixed to."""


def bench_files(
    console: Console,
    files: Sequence[Path],
    *,
    reference: Path | None = None,
    batches: Sequence[int] = (1, 32),
    rounds: int = 30,
    threads: int = 1,
    shapes: Sequence[str] = (),
    operators: bool = False,
    as_json: bool = False,
    csv_path: Path | None = None,
) -> None:
    """Time ONNX files side by side, say which got faster, and what keeps the others back.

    Args:
        console: Where results go; progress goes to the standard error output.
        files: ONNX files of any tool.
        reference: One of them; default: the first.
        batches: Images per call; a file with a fixed batch size is measured at that size.
        rounds: Interleaved rounds.
        threads: Threads of each session.
        shapes: ``name=1x3x224x224`` for inputs with open sizes beyond the batch.
        operators: Also print time per operator and the operators before and after the runtime's optimisation.
        as_json: Print everything as JSON instead.
        csv_path: Also write the table to this file.

    Raises:
        InputError: options or the reference are not usable.
        ExportError: the reference cannot be timed.
    """
    with terminal_progress(Console(stderr=True)):
        found = measure(
            files, reference=reference, batches=batches, rounds=rounds, threads=threads, shapes=shapes_of(shapes)
        )
    if csv_path is not None:
        write_csv(found.rows, csv_path)
    if as_json:
        console.out(json.dumps(as_dict(found), indent=1), highlight=False)
        return
    _print(console, found, operators=operators)
    if csv_path is not None:
        console.print(f"Wrote {csv_path}.", soft_wrap=True)


def measure(
    files: Sequence[Path],
    *,
    reference: Path | None = None,
    batches: Sequence[int] = (1, 32),
    rounds: int = 30,
    threads: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Bench:
    """Times and diagnoses; see ``bench_files``. A file that cannot be read or run is a row with the reason."""
    given = _named(files, reference)
    base = next(iter(given))
    inputs, failures = _inputs(given)
    sizes = dict(shapes or {})
    unknown = [name for name in sizes if not any(name == each for found in inputs.values() for each, _ in found)]
    if unknown:
        known = sorted({name for found in inputs.values() for name, _ in found})
        raise InputError(f"Shape of input '{unknown[0]}' has no such input, expected one of {known}.")
    fixed = {name: size for name, found in inputs.items() if (size := fixed_batch(found)) is not None}
    wanted = _batches(batches, fixed, base)
    for name, found in inputs.items():
        try:
            input_shapes(found, fixed.get(name, wanted[0]), sizes)
        except ValueError as error:
            failures[name] = str(error)
    if base in failures:
        raise InputError(f"Reference '{base}' cannot be timed: {failures[base]}")
    usable = {name: path for name, path in given.items() if name not in failures}
    job = BenchmarkJob(models=usable, reference=base, batches=wanted, rounds=rounds, threads=threads, shapes=sizes)
    with tempfile.TemporaryDirectory() as scratch:
        timing = run_benchmark(job, Path(scratch), on_progress=lambda done, total: show("timing files", done, total))
        samples = read_raw(Path(scratch, "latency_raw.csv"))
    measured = {name: [row.batch for row in timing.rows if row.model == name] for name in usable}
    failures |= {name: timing.failures.get(name, "it was not timed") for name in usable if not measured[name]}
    timed = {name: path for name, path in usable.items() if measured[name]}
    report = diagnose_all(
        timed,
        dict.fromkeys(timed, base) if len(timed) == 1 else {name: base for name in timed if name != base},
        {name: speed_of(samples, timing, name, base, batch=measured[name][0]) for name in timed if name != base},
        reference=base,
        batches={name: measured[name][0] for name in timed},
        threads=threads,
        shapes=sizes,
        on_progress=lambda done, total: show("profiling files", done, total),
    )
    rows = [_row(timing, report, name, batch) for name in timed for batch in measured[name]]
    rows += [{"file": name, "failure": why} for name, why in failures.items()]
    notes = [f"'{name}' is fixed to batch {size}; it is measured at that size only." for name, size in fixed.items()]
    return Bench(timing=timing, report=report, rows=rows, notes=notes)


def shapes_of(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Input -> sizes from texts like ``images=1x3x224x224``.

    Raises:
        InputError: one is not written so.
    """
    found = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.lower().split("x")
        if not name or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(
                f"Shape '{text}' has another form, expected NAME=SIZExSIZE. Write, say, images=1x3x224x224."
            )
        found[name] = tuple(map(int, parts))
    return found


def as_dict(found: Bench) -> dict[str, Any]:
    """Everything, for programs."""
    files = {}
    for name, row in found.report.files.items():
        files[name] = row.model_dump(mode="json")
        if row.diagnosis is not None:
            files[name] |= {"headline": row.diagnosis.headline, "conclusion": row.diagnosis.conclusion}
    return {
        "reference": found.report.reference,
        "rows": found.rows,
        "noise_floors": {str(floor.batch): floor.spread for floor in found.timing.noise_floors},
        "notes": found.notes,
        "energy": NOT_MEASURED,
        "environment": found.timing.environment,
        "files": files,
    }


COLUMNS = (
    *("file", "batch", "latency_p50_ms", "latency_p95_ms", "ratio", "ratio_low", "ratio_high", "noise_floor", "faster"),
    *("size_bytes", "peak_rss_bytes", "integer_layers", "layers", "failure"),
)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The table as CSV, one line per file and batch size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _named(files: Sequence[Path], reference: Path | None) -> dict[str, Path]:
    """Name -> file, the reference first; a name is the shortest end of the path that tells files apart."""
    if not files:
        raise InputError("Bench has no files, expected at least one. Name an ONNX file.")
    if reference is not None and reference not in files:
        raise InputError(f"Reference '{reference}' is not among the files, expected one of them. Name it there too.")
    first = files[0] if reference is None else reference
    ordered: list[Path] = [first, *dict.fromkeys(path for path in files if path != first)]
    for parts in (1, 2, 3):
        names = ["/".join(path.parts[-parts:]) for path in ordered]
        if len(set(names)) == len(names):
            return dict(zip(names, ordered, strict=True))
    return {str(path): path for path in ordered}


def _inputs(files: Mapping[str, Path]) -> tuple[dict[str, Inputs], dict[str, str]]:
    """The inputs of each file as it declares them, and why there are none."""
    import onnx

    found, failures = {}, {}
    for name, path in files.items():
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except FileNotFoundError:
            failures[name] = f"File '{path}' does not exist."
            continue
        except Exception as error:  # whatever the parser says, the file is a row
            failures[name] = f"It is no ONNX file ({type(error).__name__})."
            continue
        stored = {tensor.name for tensor in graph.initializer}
        found[name] = [
            (
                spec.name,
                [
                    size.dim_value if size.HasField("dim_value") else size.dim_param or None
                    for size in spec.type.tensor_type.shape.dim
                ],
            )
            for spec in graph.input
            if spec.name not in stored
        ]
        if not graph.node:
            failures[name] = "It is no ONNX graph: it has no nodes."
            del found[name]
    return found, failures


def _batches(wanted: Sequence[int], fixed: Mapping[str, int], reference: str) -> tuple[int, ...]:
    """Batch sizes to measure: what the reference is fixed to, or what is asked for and what others are fixed to."""
    if reference in fixed:
        return (fixed[reference],)
    return tuple(dict.fromkeys([*wanted, *fixed.values()]))


def _row(timing: BenchmarkResult, report: DiagnosisReport, name: str, batch: int) -> dict[str, Any]:
    """One line of the table."""
    row, found = timing.row(name, batch), report.files[name]
    facts = found.facts
    weighted = facts.operators if facts is not None else None
    return {
        "file": name,
        "batch": batch,
        "latency_p50_ms": row.latency_p50_ms,
        "latency_p95_ms": row.latency_p95_ms,
        "ratio": row.ratio_to_reference,
        "ratio_low": row.ratio_low,
        "ratio_high": row.ratio_high,
        "noise_floor": timing.noise_floor(batch),
        "faster": _faster(timing, name, batch),
        "size_bytes": facts.size_bytes if facts is not None else row.size_bytes,
        "peak_rss_bytes": row.peak_rss_bytes,
        "integer_layers": len(weighted.integer_layers) if weighted else None,
        "layers": len(weighted.integer_layers) + len(weighted.float_layers) if weighted else None,
        "failure": found.failure,
    }


def _faster(timing: BenchmarkResult, name: str, batch: int) -> str:
    row = timing.row(name, batch)
    if name == timing.reference:
        return "reference"
    noise = timing.noise_floor(batch)
    return Speed(ratio=row.ratio_to_reference, low=row.ratio_low, high=row.ratio_high, noise_floor=noise).faster


def _print(console: Console, found: Bench, *, operators: bool) -> None:
    environment = found.timing.environment
    table = Table(
        title=f"{environment['cpu']}, {environment['threads']} thread(s), ONNX Runtime {environment['onnxruntime']}",
        caption="Time: median over interleaved rounds of the ratio to the reference, with its 95 % interval. "
        f"Energy: {NOT_MEASURED}.",
    )
    for title in ("file", "batch", "p50 ms", "p95 ms", "time", "faster?", "KiB", "peak MiB", "integer layers"):
        table.add_column(title, justify="left" if title in ("file", "faster?") else "right", overflow="fold")
    for row in found.rows:
        if "batch" not in row:
            table.add_row(row["file"], *["-"] * 4, "[red]failed[/]", *["-"] * 3)
            continue
        answer = row["faster"]
        is_reference = answer == "reference"
        table.add_row(
            row["file"],
            str(row["batch"]),
            f"{row['latency_p50_ms']:.3f}",
            f"{row['latency_p95_ms']:.3f}",
            "1" if is_reference else f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
            f"[{COLOURS.get(answer, 'dim')}]{answer}[/]",
            f"{row['size_bytes'] / 1024:,.1f}",
            "-" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 2**20:.0f}",
            "-" if row["layers"] is None else f"{row['integer_layers']} of {row['layers']}",
        )
    console.print(table)
    for floor in found.timing.noise_floors:
        console.print(f"Noise floor at batch {floor.batch}: {floor.spread:.1%}.", highlight=False)
    for note in found.notes:
        console.print(note, markup=False, highlight=False)
    for row in found.rows:
        if row.get("failure"):
            console.print(f"'{row['file']}' failed: {row['failure']}", markup=False, highlight=False, soft_wrap=True)
    for name, row in found.report.files.items():
        _print_file(console, name, row, operators=operators)


def _print_file(console: Console, name: str, row: FileDiagnosis, *, operators: bool) -> None:
    if row.diagnosis is not None:
        console.print()
        console.rule(
            f"[bold]{name}[/]: faster? [{COLOURS[row.diagnosis.faster]}]{row.diagnosis.faster}[/]", align="left"
        )
        console.print(row.diagnosis.headline, markup=False, highlight=False)
        console.print(row.diagnosis.conclusion, markup=False, highlight=False)
        for number, finding in enumerate(row.diagnosis.findings, start=1):
            _print_finding(console, number, finding)
    if operators and row.facts is not None:
        console.print(_profile_table(name, row))
        console.print(_histogram_table(name, row))


def _print_finding(console: Console, number: int, finding: Finding) -> None:
    share = "" if finding.share_of_time is None else f", {finding.share_of_time:.0%} of the time"
    console.print(f"{number}. [bold]{finding.title}[/] ({finding.severity}{share})", highlight=False)
    for text in (finding.evidence, f"Way out: {finding.remedy}"):
        console.print(Padding(Text(text), (0, 0, 0, 3)))


def _profile_table(name: str, row: FileDiagnosis) -> Table:
    assert row.facts is not None
    profile = row.facts.operators.profile
    table = Table("operator", "works with", "count", "µs", "share", title=f"Time per operator of {name}")
    listed = profile.by_operator()
    for each in listed[:SHOWN_OPERATORS]:
        table.add_row(each.operator, each.kind, str(each.count), f"{each.microseconds:.1f}", f"{each.share:.1%}")
    if len(listed) > SHOWN_OPERATORS:
        table.caption = f"and {len(listed) - SHOWN_OPERATORS} more"
    return table


def _histogram_table(name: str, row: FileDiagnosis) -> Table:
    assert row.facts is not None
    table = Table("operator", "in the file", "as it runs", title=f"Operators of {name}")
    for operator, stored, optimised in row.facts.operators.histogram.rows():
        table.add_row(operator, str(stored), str(optimised))
    return table
