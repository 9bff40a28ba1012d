"""How well the latency model predicts networks it has not seen, and whether multiply-accumulates would do as well.

Examples:
    .venv/bin/python benchmarks/latency_model.py
    .venv/bin/python benchmarks/latency_model.py --batches 32 --nets 48 --json latency_model.json
    .venv/bin/python benchmarks/latency_model.py --folder ~/latency    (kept tables are not measured again)

Fashion-MNIST shapes, 1x28x28. The unseen networks are drawn with another seed than those of the fit (residual, plain,
depthwise, transformer, mixer), and about a quarter are pruned ones with odd channel counts. Measured and predicted are
p50 milliseconds of one call in ONNX Runtime, float32, one thread: CPU time of that thread, beside the same reference.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compression.models import ModelSpec
from compression.search.prune import prune_model
from compression.types import Preprocessing
from compression.zoo import DepthwiseCnn, PlainCnn, ResidualCnn, VisionTransformer
from export.latency_model import (
    NETS,
    HeldOut,
    OnnxRuntimeClock,
    build_latency_model,
    held_out,
    max_macs_of,
    operators_of,
    sample_nets,
)

SHAPE = (1, 28, 28)
PARENTS = (
    ResidualCnn(widths=(32, 48, 96), depths=(1, 1, 1), strides=(2, 1, 2), stem_width=16),
    PlainCnn(),
    DepthwiseCnn(widths=(32, 64), depths=(1, 2)),
    VisionTransformer(depth=2),
)
CUTS = ((0.3, 1), (0.55, 4))
"""Share of channels removed, and the multiple they are rounded to."""


def unseen(count: int, seed: int, batch: int) -> Iterator[tuple[str, nn.Module]]:
    """(family, model) of ``count`` networks, about a quarter of them pruned."""
    pruned = [(parent, *cut) for cut in CUTS for parent in PARENTS][: max(1, count // 4)]
    yield from sample_nets(count - len(pruned), SHAPE, seed=f"benchmark-{seed}", max_macs=max_macs_of(batch))
    for parent, ratio, multiple in pruned:
        spec = ModelSpec(
            model=parent,
            num_classes=10,
            input_shape=SHAPE,
            class_names=tuple("0123456789"),
            preprocessing=Preprocessing(scale=255.0, mean=(0.5,), std=(0.5,)),
        )
        torch.manual_seed(seed)
        model, _ = prune_model(parent.build(10, SHAPE).eval(), spec, ratio=ratio, round_to=multiple)
        yield f"pruned {parent.kind}", model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="images per call")
    parser.add_argument("--nets", type=int, default=NETS, help="networks the model is fitted to")
    parser.add_argument("--unseen", type=int, default=30, help="networks it is tried on")
    parser.add_argument("--seed", type=int, default=1, help="of the unseen networks")
    parser.add_argument("--folder", type=Path, help="where tables are kept; none: a temporary one")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| batch | networks | median error | p90 error | Kendall tau | tau of MACs | build s (CPU s) | predict ms |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        results = [measure(batch, arguments, Path(temporary)) for batch in arguments.batches]
    for result in results:
        print(f"\nBatch {result['batch']}, error by family:\n")
        print("| family | networks | median error | bias |\n|---|---|---|---|")
        rows = result["networks"]
        for family in sorted({row["family"] for row in rows}):
            errors = np.array([row["predicted_ms"] / row["measured_ms"] - 1 for row in rows if row["family"] == family])
            print(f"| {family} | {len(errors)} | {np.median(np.abs(errors)):.1%} | {np.median(errors):+.1%} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(batch: int, arguments: argparse.Namespace, temporary: Path) -> dict:
    started, cpu = time.perf_counter(), time.process_time()

    def on_progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rbatch {batch}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    folder = temporary if arguments.folder is None else arguments.folder
    model = build_latency_model(SHAPE, batch=batch, folder=folder, nets=arguments.nets, on_progress=on_progress)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu

    clock = OnnxRuntimeClock(SHAPE, batch=batch)
    rows, bags = [], []
    predicting = 0.0
    for family, net in unseen(arguments.unseen, arguments.seed, batch):
        measured = clock.measure(net).ratio * model.table.reference_ms
        begun = time.thread_time()
        predicted = model.predict_ms(net, SHAPE)
        predicting += time.thread_time() - begun
        bags.append(operators_of(net, SHAPE, block=model.table.block))
        rows.append({"family": family, "measured_ms": measured, "predicted_ms": predicted})
    found = held_out(model, bags, [row["measured_ms"] for row in rows])
    cost = f"{seconds:.0f} ({cpu_seconds:.0f})"
    own = model.table.held_out
    if own is not None:
        print(line(f"{batch}, own report", own, cost, "-"))
    print(line(f"{batch}, unseen here", found, "-", f"{predicting / len(rows) * 1e3:.1f}"), flush=True)
    return {
        "batch": batch,
        "facts": model.table.facts,
        "nets": model.table.nets,
        "reference_ms": model.table.reference_ms,
        "build_seconds": seconds,
        "build_cpu_seconds": cpu_seconds,
        "own_report": None if own is None else own.model_dump(),
        "unseen": found.model_dump(),
        "networks": rows,
    }


def line(title: str, found: HeldOut, cost: str, predicting: str) -> str:
    errors = f"{found.median_error:.1%} | {found.p90_error:.1%}"
    taus = f"{found.kendall_tau:.3f} | {found.kendall_tau_macs:.3f}"
    return f"| {title} | {found.nets} | {errors} | {taus} | {cost} | {predicting} |"


if __name__ == "__main__":
    main()
