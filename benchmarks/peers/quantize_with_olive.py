"""INT8 by Olive's static quantization pass: MODEL.onnx CALIBRATION.npy OUT.onnx; versions and CPU seconds as JSON."""

import argparse
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from olive.data.registry import Registry
from olive.workflows import run


class Calibration:
    """Images for Olive's loader, with a label that it drops."""

    def __init__(self, images: np.ndarray, name: str) -> None:
        self.images = images
        self.name = name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        return {self.name: self.images[index]}, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="normalised images [N, C, H, W] float32")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    name = onnx.load(options.model).graph.input[0].name
    images = np.load(options.calibration)

    @Registry.register_dataset("calibration_images")
    def calibration_images(**_: object) -> Calibration:
        return Calibration(images, name)

    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        run(
            {
                "input_model": {"type": "OnnxModel", "model_path": str(options.model)},
                "data_configs": [
                    {
                        "name": "calibration",
                        "type": "DataContainer",
                        "load_dataset_config": {"type": "calibration_images"},
                        "pre_process_data_config": {"type": "skip_pre_process"},
                        "post_process_data_config": {"type": "skip_post_process"},
                        "dataloader_config": {"batch_size": 1},
                    }
                ],
                "passes": {"quantize": {"type": "OnnxStaticQuantization", "data_config": "calibration"}},
                "output_dir": str(Path(folder) / "out"),
                "cache_dir": str(Path(folder) / "cache"),
                "log_severity_level": 3,
            }
        )
        (made,) = (Path(folder) / "out").rglob("*.onnx")
        shutil.copyfile(made, options.out)
    seconds = cpu_seconds() - before
    versions = {package: version(package) for package in ("olive-ai", "onnx", "onnxruntime", "torch", "numpy")}
    print(json.dumps({"versions": versions, "cpu_seconds": seconds}))


def cpu_seconds() -> float:
    """Of this process and the ones it waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
