"""``stillhouse delta``: the sparse difference of two checkpoints as a file, and checkpoints with some added up."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from compression.models import ModelSpec

app = typer.Typer(
    name="delta",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Ship what a fine-tuning changed as a small file, and add up several such files on one network.",
)

BaseArgument = Annotated[
    Path, typer.Argument(help="Checkpoint folder (spec.json, weights.safetensors) of the start.", show_default=False)
]


@app.command(epilog="Example: stillhouse delta make checkpoints/base checkpoints/site-a site-a.safetensors")
def make(
    base: BaseArgument,
    tuned: Annotated[
        Path, typer.Argument(help="Checkpoint folder of the same network, fine-tuned.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    keep: Annotated[
        int | None,
        typer.Option(
            min=0, help="At most this many entries, those that changed most; classifier, norms and buffers are kept."
        ),
    ] = None,
) -> None:
    """Write what leads from BASE to TUNED; with procedure sparse_finetuning that is a small share of the weights."""
    typer.echo(make_delta(base, tuned, out, keep=keep))


@app.command(epilog="Example: stillhouse delta apply checkpoints/base site-a.safetensors patch.safetensors out")
def apply(
    base: BaseArgument,
    deltas: Annotated[list[Path], typer.Argument(help="Files that delta make wrote for BASE.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.", show_default=False)],
) -> None:
    """Write a checkpoint of BASE plus the sum of all DELTAS; BASE stays as it is, which is the way back."""
    typer.echo(apply_deltas(base, deltas, out))


def make_delta(base: Path, tuned: Path, out: Path, *, keep: int | None = None) -> str:
    """Write the delta between two checkpoint folders, and return one line about it.

    Raises:
        InputError: a checkpoint does not load, the two differ in more than weights, or ``out`` exists already.
        ArtifactError: ``out`` cannot be written.
    """
    from compression.deltas import SUFFIX, delta_of, save_delta
    from compression.errors import CheckpointError, InputError

    _refuse_existing(out)
    if out.suffix != SUFFIX:
        raise InputError(f"Delta file '{out}' has suffix '{out.suffix}', expected {SUFFIX}. Rename it.")
    start, spec = _checkpoint(base)
    end, tuned_spec = _checkpoint(tuned)
    differing = [name for name in type(spec).model_fields if getattr(spec, name) != getattr(tuned_spec, name)]
    if differing:
        raise CheckpointError(
            f"Checkpoint '{tuned}' has another {', '.join(differing)} than '{base}', expected equal specs. "
            "Give the checkpoint that the tuned one started from."
        )
    delta = delta_of(start, end, keep=keep)
    size = save_delta(delta, out)
    return f"Wrote {out}: {_entries(delta.count, start)}, {len(delta.whole)} whole tensors, {size:,} bytes."


def apply_deltas(base: Path, deltas: list[Path], out: Path) -> str:
    """Write the checkpoint of a base plus deltas, and return one line about it.

    Raises:
        InputError: a file does not load, a delta belongs to another network, one is given twice, or ``out`` exists
            already.
        ArtifactError: ``out`` cannot be written.
    """
    from compression.checkpoint import save_checkpoint
    from compression.deltas import apply_delta, compose, load_delta, weights_sha256
    from compression.errors import CheckpointError, InputError

    _refuse_existing(out)
    model, spec = _checkpoint(base)
    found = weights_sha256(model)
    loaded = []
    for path in deltas:
        delta = load_delta(path)
        if any(delta.sha256 == each.sha256 for each in loaded):
            raise InputError(f"Delta '{path}' has been given before, expected each once. Remove it from the list.")
        if delta.base_sha256 != found:
            raise CheckpointError(
                f"Delta '{path}' has a base with SHA-256 {delta.base_sha256[:12]}..., expected {found[:12]}..., the "
                f"weights of '{base}'. Give the checkpoint it was made from; deltas of one base are applied together, "
                "not one after another."
            )
        loaded.append(delta)
    merged = compose(model, loaded)
    shared = sum(delta.count for delta in loaded) - merged.count
    apply_delta(model, merged)
    save_checkpoint(model, spec, out)
    size = sum(path.stat().st_size for path in deltas)
    overlap = f", {shared:,} changes on top of others" if len(loaded) > 1 else ""
    title = f"{len(loaded)} delta{'s' if len(loaded) > 1 else ''}"
    return f"Wrote {out}: {title} of {size:,} bytes, {_entries(merged.count, model)}{overlap}."


def _checkpoint(folder: Path) -> "tuple[nn.Module, ModelSpec]":
    from compression.checkpoint import load_checkpoint

    return load_checkpoint(folder)


def _entries(count: int, model: "nn.Module") -> str:
    from compression.deltas import maskable

    total = sum(parameter.numel() for parameter in maskable(model).values())
    return f"{count:,} of {total:,} entries ({count / max(1, total):.2%})"


def _refuse_existing(out: Path) -> None:
    from compression.errors import InputError

    if out.exists():
        raise InputError(f"Output '{out}' exists already. Choose another name, or delete it.")
