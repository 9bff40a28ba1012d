"""How to run what a target ships: a few lines of Python for its runtime, from its manifest."""

from typing import Any

from export.profiles import Manifest, session_options


def how_to_run(manifest: Manifest, folder: str) -> dict[str, Any] | None:
    """``{title, lines, note}`` for the first file of a target; None for a runtime that has no Python interface here.

    Args:
        manifest: The target's.
        folder: Where its files lie, as the lines name it.
    """
    names = [each.file for each in manifest.files]
    wanted = {"onnxruntime": ".onnx", "openvino": ".xml", "tensorrt_rtx": ".engine", "tensorrt": ".engine"}
    file = next((name for name in names if name.endswith(wanted[manifest.kind])), None)
    if file is None:
        return None
    lines, note = {
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "tensorrt_rtx": _tensorrt,
        "tensorrt": _tensorrt,
    }[manifest.kind](manifest, f"{folder}/{file}")
    status = next(each.status for each in manifest.files if each.file == file)
    return {
        "title": f"{manifest.target}: {manifest.runtime}",
        "lines": "\n".join(lines),
        "note": f"{file}: {status}. {note}".strip(),
    }


def _onnxruntime(manifest: Manifest, path: str) -> tuple[list[str], str]:
    config = session_options(manifest.precision).get("config", {})
    options = [f"options.add_session_config_entry({key!r}, {value!r})" for key, value in config.items()]
    named = ", options" if options else ""
    return [
        "import numpy as np, onnxruntime as ort",
        *_images(manifest),
        *(["options = ort.SessionOptions()", *options] if options else []),
        f'session = ort.InferenceSession("{path}"{named}, providers=["CPUExecutionProvider"])',
        f'logits = session.run(None, {{"{manifest.input.name}": images}})[0]',
    ], ""


def _openvino(manifest: Manifest, path: str) -> tuple[list[str], str]:
    return [
        "import numpy as np, openvino",
        *_images(manifest),
        f'model = openvino.Core().compile_model("{path}", "CPU")',
        "logits = model(images)[model.output(0)]",
    ], ""


def _tensorrt(manifest: Manifest, path: str) -> tuple[list[str], str]:
    return [
        f"import {manifest.kind} as trt",
        f'engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(open("{path}", "rb").read())',
        "context = engine.create_execution_context()",
    ], (
        f"Then bind GPU memory to '{manifest.input.name}' and '{manifest.output.name}' "
        "(context.set_tensor_address) and start context.execute_async_v3."
    )


def _images(manifest: Manifest) -> list[str]:
    shape = tuple(1 if size < 1 else size for size in manifest.input.shape)
    raw = f"raw = np.zeros({shape}, np.float32)  # your images: batch, channels, height, width"
    preparation = manifest.preprocessing
    if preparation is None:
        return [raw, "images = raw"]
    mean, std = (_channels(values) for values in (preparation.mean, preparation.std))
    return [
        f"{raw}; values 0 to {preparation.scale:g}",
        f"images = ((raw / {preparation.scale:g} - {mean}) / {std}).astype(np.float32)",
    ]


def _channels(values: tuple[float, ...]) -> str:
    """One number for each channel, in the shape that meets [batch, channels, height, width]."""
    if len(values) == 1:
        return f"{values[0]!r}"
    return f"np.array({list(values)}).reshape(-1, 1, 1)"
