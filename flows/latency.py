"""``stillhouse latency``: the latency model of this machine, built or shown, with its error; and seen from a device."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compression.checkpoint import load_checkpoint
from compression.errors import InputError, RecipeError
from export.latency_model import DeviceLatency
from flows.progress import show, terminal_progress
from tasks.search import device_factor, latency_model_for, require_points


def show_latency(
    console: Console,
    input_shape: tuple[int, int, int],
    batches: tuple[int, ...],
    checkpoints: tuple[Path, ...],
    *,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Print for each batch size how well unseen networks are predicted, and the prediction for each checkpoint.

    Measured on first use, which takes minutes, and then read from ``<home>/latency``. With ``device`` also what it
    takes there.

    Raises:
        InputError: the device has no measured model, or the batches are others than it measures.
    """
    if device is not None and batches != (1,):
        raise InputError(
            f"Device '{device}' has models measured at batch 1, expected no other batch. Leave --batch out."
        )
    if device is not None:
        require_points(device)
    problems = Console(stderr=True)
    models = {str(path): load_checkpoint(path) for path in checkpoints}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        with terminal_progress(problems if as_json else console):
            fitted = latency_model_for(input_shape, batch=batch, report=show)
        table = fitted.table
        rows.append(
            {
                "batch": batch,
                "networks": table.nets,
                "reference_ms": table.reference_ms,
                "held_out": None if table.held_out is None else table.held_out.model_dump(),
                "predicted_ms": {name: fitted.predict_ms(model, input_shape) for name, (model, _) in models.items()},
                "machine": table.facts,
            }
        )
        if device is not None:
            found = device_factor(device)
            there = DeviceLatency(fitted, found.factor)
            rows[-1]["device"] = found.model_dump(mode="json") | {
                "predicted_ms": {name: there.predict_ms(model, input_shape) for name, (model, _) in models.items()}
            }
    if as_json:
        console.out(json.dumps(rows, indent=1), highlight=False)
        return
    size = "x".join(map(str, input_shape))
    shown = Table(
        *("batch", "fitted to", "unseen", "median error", "90 % below", "Kendall tau", "tau of MACs"),
        title=f"Latency model of this machine for images {size}",
    )
    for row in rows:
        held = row["held_out"] or {}
        cells = [str(row["batch"]), f"{row['networks']} networks", str(held.get("nets", "-"))]
        cells += [f"{held[key]:.1%}" if key in held else "-" for key in ("median_error", "p90_error")]
        cells += [f"{held[key]:.2f}" if key in held else "-" for key in ("kendall_tau", "kendall_tau_macs")]
        shown.add_row(*cells)
    console.print(shown)
    for row in rows:
        if "device" in row:
            console.print(_said_of(row["device"]), highlight=False, soft_wrap=True)
        for name, milliseconds in row["predicted_ms"].items():
            there = f", {row['device']['predicted_ms'][name]:.3f} ms on {device}" if device is not None else ""
            text = f"{name}: {milliseconds:.3f} ms predicted for one call of {row['batch']}{there}"
            console.print(text, highlight=False, soft_wrap=True)


def _said_of(found: Mapping[str, Any]) -> str:
    """The factor of a device, and what it rests on."""
    count = f"{found['models']} model" + ("" if found["models"] == 1 else "s")
    spread = f", between {found['low']:.3g} and {found['high']:.3g}" if found["models"] > 1 else ""
    text = f"Device {found['device']} takes {found['factor']:.3g} times as long as predicted here"
    text += f" ({found['runtime']}, {found['precision']}): {count}{spread}."
    for shape in found["unpredicted"]:
        size = "x".join(map(str, shape))
        text += f" Its models for images {size} do not count before: stillhouse latency {size} --batch 1."
    return text


def shape_of(text: str) -> tuple[int, int, int]:
    """Channels, height and width from ``1x28x28``.

    Raises:
        RecipeError: it is not written so.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"Image size '{text}' has another form, expected CHANNELSxHEIGHTxWIDTH. Write, say, 3x32x32.")
    channels, height, width = map(int, parts)
    return channels, height, width
