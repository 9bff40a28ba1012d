"""INT8 by modelopt's ONNX quantization: MODEL.onnx CALIBRATION.npy OUT.onnx; versions and CPU seconds as JSON."""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from modelopt.onnx.quantization import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="normalised images [N, C, H, W] float32")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    name = onnx.load(options.model).graph.input[0].name
    images = np.load(options.calibration)
    before = cpu_seconds()
    quantize(
        str(options.model),
        quantize_mode="int8",
        calibration_data={name: images},
        calibration_eps=["cpu"],
        # Its default stores what stays float as float16, which this file is not about.
        high_precision_dtype="fp32",
        output_path=str(options.out),
        log_level="ERROR",
    )
    seconds = cpu_seconds() - before
    packages = ("nvidia-modelopt", "onnx", "onnxruntime-gpu", "torch", "numpy")
    print(json.dumps({"versions": {package: version(package) for package in packages}, "cpu_seconds": seconds}))


def cpu_seconds() -> float:
    """Of this process and the ones it waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
