"""Says where numbers stopped being finite: step, loss term, layer and samples."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from compression.errors import CompressionError
from compression.types import Batch

_SHOWN_IDS = 16


def divergence(
    model: nn.Module,
    batch: Batch,
    terms: Mapping[str, float],
    *,
    set_training: Callable[[nn.Module, bool], object],
) -> CompressionError:
    """Return the error to raise for a batch whose loss terms are not all finite.

    The batch goes through the model once more, in inference mode, to find the first layer and the samples
    with non-finite numbers; ``terms`` maps names to weighted values in nats.
    """
    bad = ", ".join(f"'{name}' has value {value}" for name, value in terms.items() if not _finite(value))
    first_layer, rows = _trace(model, batch.images, set_training)
    ids = batch.ids.tolist()
    if first_layer is None:
        place = "The model's own outputs are finite: look at the targets (stored teacher outputs, labels)."
    else:
        place = f"The first layer with non-finite output is '{first_layer}'."
        if 0 < len(rows) < len(ids):
            ids = [ids[row] for row in rows]
            place += " Only these samples are affected: look at their pixels."
    shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (f", ... ({len(ids)} in all)" if len(ids) > _SHOWN_IDS else "")
    return CompressionError(
        f"Loss term {bad} at epoch {batch.epoch}, step {batch.step}, sample ids {shown}, expected a finite "
        f"number. {place} Otherwise lower train.learning_rate, or use precision 32-true. The last checkpoint "
        "is kept."
    )


def _trace(
    model: nn.Module, images: Tensor, set_training: Callable[[nn.Module, bool], object]
) -> tuple[str | None, list[int]]:
    """Return the first module that gives a non-finite output, and the rows of the batch in which it does.

    Its rows tell more than those of the logits: batch norm has met the bad sample before and spreads it.
    """
    found: list[tuple[str, list[int]]] = []

    def note(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
            return
        rows = (~torch.isfinite(output.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
        found.append((name, rows if len(output) == len(images) else []))

    set_training(model, False)
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            handle = module.register_forward_hook(partial(note, name or type(model).__name__))
            hooks.callback(handle.remove)
        model(images)
    return found[0] if found else (None, [])


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
