"""``stillhouse parity``: whether two ONNX files, of this program or any other, answer alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from compression.errors import InputError
from export.attribution import Attribution
from export.file_parity import FileParity, compare_files

LAYERS_SHOWN = 12


def show_parity(
    console: Console,
    a: Path,
    b: Path,
    *,
    inputs: Path | None = None,
    labels: Path | None = None,
    samples: int = 64,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Print how file ``b`` differs from file ``a``, output by output and layer by layer.

    Args:
        console: Where to.
        a: The file that is right.
        b: The file in question.
        inputs: ``.npz`` with an array per input, or ``.npy`` for files with one; samples first. None: random ones.
        labels: ``.npy`` with the right class of every sample.
        samples: How many random inputs.
        seed: Of the random inputs.
        as_json: Print JSON, for programs.

    Returns:
        0 when every limit holds, 1 when one is broken.

    Raises:
        InputError: see :func:`export.file_parity.compare_files`, and files that are no arrays.
    """
    found = compare_files(
        a,
        b,
        inputs=None if inputs is None else read_arrays(inputs),
        labels=None if labels is None else next(iter(read_arrays(labels).values())),
        samples=samples,
        seed=seed,
    )
    if as_json:
        content = {**found.model_dump(mode="json"), "exceeded": found.exceeded, "within": not found.exceeded}
        console.out(json.dumps(content, indent=1), highlight=False)
    else:
        _print(console, found)
    return 1 if found.exceeded else 0


def read_arrays(path: Path) -> dict[str, NDArray]:
    """The arrays of a ``.npz`` or ``.npy`` file; pickled objects are refused.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else {path.stem: loaded}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"File '{path}' has no readable arrays ({error}), expected .npz or .npy. Write it with numpy.savez."
        ) from error
    if not arrays:
        raise InputError(f"File '{path}' has no arrays, expected one for each input. Write it with numpy.savez.")
    return arrays


def _print(console: Console, found: FileParity) -> None:
    console.print(_outputs(found))
    if found.attribution is not None:
        _print_layers(console, found.attribution)
    for note in found.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)
    if found.exceeded:
        console.print("[bold red]Over a limit[/]")
        for reason in found.exceeded:
            console.print(f"  - {reason}", markup=False, highlight=False)
    else:
        console.print(f"[bold green]Within the limits[/] of a hop of kind {found.hop}.")


def _outputs(found: FileParity) -> Table:
    columns = ["output", "shape", "relative", "max diff", "mean diff", "flips", "KL"]
    judged = any(row.accuracy is not None for row in found.outputs)
    table = Table(
        *(columns + (["accuracy", "of the other"] if judged else [])),
        title=f"{found.b} against {found.a}, {found.num_samples} samples",
    )
    for row in found.outputs:
        name = row.output if row.output == row.other else f"{row.output} / {row.other}"
        cells = [name, "x".join(map(str, row.shape)), _short(row.relative_error), _short(row.max_abs)]
        cells += [_short(row.mean_abs), _share(row.flips), _short(row.kl)]
        table.add_row(*cells, *([_share(row.accuracy), _share(row.other_accuracy)] if judged else []))
    return table


def _print_layers(console: Console, attribution: Attribution) -> None:
    layers = f"{attribution.matched} of {attribution.reference_layers} and {attribution.candidate_layers} layers"
    console.print(f"Layers: {layers} matched by {attribution.matched_by}.", highlight=False)
    first, worst = attribution.layer(attribution.first), attribution.layer(attribution.worst)
    if first is not None:
        console.print(
            f"First to diverge: '{first.layer}', relative error {first.relative_error:.2g},"
            f" {first.input_error:.2g} before it.",
            markup=False,
            highlight=False,
        )
    if worst is None:
        console.print("No layer differs.")
        return
    console.print(f"Largest jump: '{worst.layer}', {worst.added:.2g} of its own.", markup=False, highlight=False)
    if attribution.runtime_flips or (attribution.runtime_max_abs or 0.0) > 0:
        change = f"changes {_share(attribution.runtime_flips)} of the answers"
        largest = _short(attribution.runtime_max_abs)
        console.print(f"ONNX Runtime's optimisation of {attribution.candidate} {change}, an output by {largest}.")
    rows = sorted(attribution.layers, key=lambda row: row.added, reverse=True)[:LAYERS_SHOWN]
    columns = ("layer", "relative", "before", "own share", "SQNR dB", "max diff", "clipped")
    table = Table(*columns, title="Layers that add most error, in execution order")
    for row in sorted(rows, key=lambda row: row.order):
        name = row.layer if row.candidate_layer is None else f"{row.layer} / {row.candidate_layer}"
        sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        cells = [_short(row.relative_error), _short(row.input_error), f"{row.own_share:.0%}", sqnr]
        table.add_row(name, *cells, _short(row.max_abs), _share(row.clipped))
    console.print(table)


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
