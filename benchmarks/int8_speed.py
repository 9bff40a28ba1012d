"""How much faster an INT8 file is than its float32 file in ONNX Runtime, on a net where the arithmetic dominates.

    .venv/bin/python benchmarks/int8_speed.py [--rounds 30]

The 16 M-MAC residual net of the Fashion-MNIST recipe, random weights (speed does not depend on them): float32,
INT8 with u8 activations from the symmetric graph, and ONNX Runtime's own static quantization. Interleaved, one thread.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from compression.profile import macs
from compression.quantize import convert, prepare_qat
from compression.zoo.residual_cnn import ResidualCnn
from export.benchmark import BenchmarkJob, run_benchmark
from export.onnx_graph import to_onnx
from export.ptq import quantize_static
from export.qdq import to_u8_activations
from export.runtime import cpu_features, integer_share

SHAPE = (1, 28, 28)
NETS = {
    "16 M-MAC residual": ResidualCnn(widths=(32, 48, 96), depths=(1, 1, 1), strides=(2, 1, 2), stem_width=16),
    "2.5 M-MAC residual": ResidualCnn(widths=(16, 32, 64), strides=(1, 2, 2), stem_width=16, stem_stride=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    features = cpu_features()
    print(f"CPU: {features.model}, AVX2 {features.avx2}, AVX-512 {features.avx512}, VNNI {features.vnni}\n")
    print(
        "| net | file | batch | p50 ms | ratio to float32 | 95 % interval | integer layers |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, config in NETS.items():
        with tempfile.TemporaryDirectory() as folder:
            measure(name, config, Path(folder), arguments.rounds)


def measure(name: str, config: ResidualCnn, folder: Path, rounds: int) -> None:
    model = config.build(10, SHAPE).eval()
    images = torch.randn(64, *SHAPE)
    files = {name: folder / f"{name}.onnx" for name in ("float32", "int8", "int8-static")}
    to_onnx(model, files["float32"], input_shape=SHAPE, metadata={})
    converted = convert(prepare_qat(model, SHAPE, images))
    to_onnx(converted, folder / "symmetric.onnx", input_shape=SHAPE, metadata={})
    to_u8_activations(folder / "symmetric.onnx", files["int8"])
    quantize_static(files["float32"], files["int8-static"], images.numpy(), preset="onnxruntime_x86")
    result = run_benchmark(BenchmarkJob(models=files, reference="float32", rounds=rounds, memory=False), folder)
    title = f"{name} ({macs(model, SHAPE) / 1e6:.1f} M)"
    for row in result.rows:
        share = integer_share(files[row.model])
        layers = "-" if row.model == "float32" else f"{share.integer} of {share.total}"
        bounds = f"{row.ratio_low:.3f} to {row.ratio_high:.3f}"
        cells = (
            title,
            row.model,
            row.batch,
            f"{row.latency_p50_ms:.3f}",
            f"{row.ratio_to_reference:.3f}",
            bounds,
            layers,
        )
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    floors = ", ".join(f"batch {floor.batch}: {floor.spread:.1%}" for floor in result.noise_floors)
    print(f"| {title} | noise floor | {floors} | | | | |")


if __name__ == "__main__":
    main()
