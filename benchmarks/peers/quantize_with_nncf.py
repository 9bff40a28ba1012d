"""INT8 by NNCF's post-training quantization: MODEL.onnx CALIBRATION.npy OUT.onnx; versions and CPU seconds as JSON."""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

import nncf
import numpy as np
import onnx
import onnxruntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help="normalised images [N, C, H, W] float32")
    parser.add_argument("out", type=Path)
    parser.add_argument("--transformer", action="store_true", help="model_type, as NNCF's documentation asks for them")
    parser.add_argument("--control", type=Path, help="npz with images and labels: quantize_with_accuracy_control")
    parser.add_argument("--max-drop", type=float, default=0.01, help="share of correct answers, for --control")
    options = parser.parse_args()
    model = onnx.load(options.model)
    name = model.graph.input[0].name
    images = np.load(options.calibration)
    common = {
        "subset_size": len(images),
        "model_type": nncf.ModelType.TRANSFORMER if options.transformer else None,
    }
    before = cpu_seconds()
    calibration = one_by_one(images, name)
    if options.control is None:
        quantized = nncf.quantize(model, calibration, **common)
    else:
        stored = np.load(options.control)
        labels = stored["labels"]
        quantized = nncf.quantize_with_accuracy_control(
            model,
            calibration,
            nncf.Dataset(list(zip(stored["images"], labels, strict=True)), lambda item: {name: item[0][None]}),
            lambda session, items: accuracy(session, items, name),
            max_drop=options.max_drop,
            **common,
        )
    seconds = cpu_seconds() - before
    onnx.save(quantized, options.out)
    versions = {package: version(package) for package in ("nncf", "onnx", "onnxruntime", "numpy")}
    print(json.dumps({"versions": versions, "cpu_seconds": seconds}))


def one_by_one(images: np.ndarray, name: str) -> nncf.Dataset:
    """As NNCF's examples feed it: batches of one."""
    return nncf.Dataset(images, lambda image: {name: image[None]})


def accuracy(model: object, items: object, name: str) -> tuple[float, list[float]]:
    """Share of correct answers and each image's, of what NNCF hands over: a model, or a session of one."""
    session = model
    if isinstance(model, onnx.ModelProto):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    correct = [float(session.run(None, {name: image[None]})[0].argmax() == label) for image, label in items]
    return float(np.mean(correct)), correct


def cpu_seconds() -> float:
    """Of this process and the ones it waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
