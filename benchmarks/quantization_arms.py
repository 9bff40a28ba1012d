"""The students and the quantizers of ``quantization.py``: each turns a float32 student into an INT8 file."""

import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from compression.augment import AnyAugment
from compression.checkpoint import load_checkpoint
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, DistillationStep, DistillConfig, Kd
from compression.models import AnyModel
from compression.quantize import AnyQuantizer, Ptq, Qat, convert, quantize
from compression.quantize.control import AccuracyControl
from compression.train import TrainConfig, fit
from compression.zoo import DepthwiseCnn, ResidualCnn, TimmModel, VisionTransformer
from export.onnx_graph import to_onnx
from export.qdq import to_u8_activations

STUDENTS: dict[str, AnyModel] = {
    "residual": ResidualCnn(widths=(16, 32, 64), strides=(1, 2, 2), stem_width=16, stem_stride=2),
    "depthwise": DepthwiseCnn(
        widths=(16, 32, 64), depths=(1, 2, 2), strides=(1, 2, 2), stem_width=16, stem_stride=2, kernel=5
    ),
    "mobilenet": TimmModel(name="mobilenetv2_050"),
    "transformer": VisionTransformer(width=48, depth=2, num_heads=4, stem_width=24),
}
"""About 2.5 million multiply-accumulates each; the MobileNetV2 of half width has 1.7 million."""
SCHEDULES: dict[str, dict[str, float]] = {
    "depthwise": {"learning_rate": 0.02, "weight_decay": 0.1},
    "mobilenet": {"learning_rate": 0.01},
}
"""What differs from the common schedule: better on the validation split after two epochs."""

CALIBRATION_IMAGES = 512
"""What every quantizer calibrates with, of the calibration split."""
MAX_DROP = 0.001
"""Share of validation answers that accuracy control may lose, NNCF's and ours: the bar of the benchmark's cases."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One student, and what quantizers may look at; the test split is not among it."""

    name: str
    folder: Path
    """Its checkpoint and ``float32.onnx``."""
    seed: int
    dataset: Dataset
    calibration: Path
    """Normalised images, npy."""
    control: Path
    """Normalised validation images and labels, npz."""
    peers: Path
    """Virtual environments, see ``peers/setup.sh``."""
    augment: AnyAugment

    @property
    def float32(self) -> Path:
        return self.folder / "float32.onnx"


@dataclass(frozen=True)
class Made:
    """How an INT8 file came about."""

    cpu_seconds: float
    """Of the quantization with its export, without imports."""
    versions: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)


MakeFn = Callable[[Case, Path], Made]
"""Writes the INT8 file of a case."""


def onnxruntime_defaults(case: Case, target: Path) -> Made:
    """``quantize_static`` with nothing but a model, a file and images."""
    from onnxruntime.quantization import quantize_static

    before = cpu_seconds()
    quantize_static(str(case.float32), str(target), _reader(case))
    return Made(cpu_seconds() - before, _versions("onnxruntime", "onnx"))


def onnxruntime_u8(case: Case, target: Path) -> Made:
    """As its documentation advises for x86: graph cleaned first, uint8 activations, a scale per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        clean = str(Path(folder) / "clean.onnx")
        quant_pre_process(str(case.float32), clean, skip_symbolic_shape=True)
        quantize_static(
            clean,
            str(target),
            _reader(case),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return Made(cpu_seconds() - before, _versions("onnxruntime", "onnx"))


def peer(tool: str, *, control: bool = False) -> MakeFn:
    """A tool in its own environment, by its script in ``peers/``."""
    return partial(_peer, tool, control)


def _peer(tool: str, control: bool, case: Case, target: Path) -> Made:
    command: list[str] = [
        str(case.peers / tool / "bin" / "python"),
        str(HERE / "peers" / f"quantize_with_{tool}.py"),
        *map(str, (case.float32, case.calibration, target)),
    ]
    if tool == "nncf" and case.name == "transformer":
        command.append("--transformer")
    if control:
        command += ["--control", str(case.control), "--max-drop", str(MAX_DROP)]
    env = os.environ | {"OLIVE_DISABLE_TELEMETRY": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise RuntimeError(f"{tool} ended with {done.returncode}: {words[-1] if words else 'no word'}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    return Made(facts["cpu_seconds"], facts["versions"], facts.get("info", {}))


def trained_longer(case: Case, target: Path) -> Made:
    """The float student after the epochs that quantization-aware training adds, in float: what they alone are worth."""
    model, spec = load_checkpoint(case.folder)
    before = time.process_time()
    live = [copy.deepcopy(model).eval()]
    step = DistillationStep(LEARNT.losses, LEARNT.teachers, [], live, epochs=QAT.train.epochs)
    step.prepare(model, case.dataset)
    fit(model, step, case.dataset, QAT.train, seed=case.seed, augment=case.augment)
    to_onnx(model.eval(), target, input_shape=spec.input_shape, metadata={})
    return Made(time.process_time() - before, _versions("torch", "onnx"))


def ours(config: AnyQuantizer) -> MakeFn:
    """Our quantizer, shipped in the uint8 form for x86 CPUs."""
    return partial(_ours, config)


def _ours(config: AnyQuantizer, case: Case, target: Path) -> Made:
    model, spec = load_checkpoint(case.folder)
    # Arms that differ in accuracy control alone share their training; each is charged for it.
    training = target.parent / "training" / ("learned-steps" if config.learned_steps else "plain")
    ends: list[float] = []
    before = time.process_time()
    made = quantize(
        model,
        case.dataset,
        config,
        distillation=LEARNT,
        panel=(),
        seed=case.seed,
        augment=case.augment,
        checkpoint_dir=training,
        on_epoch=lambda _: ends.append(time.process_time()),
    )
    with tempfile.TemporaryDirectory() as folder:
        symmetric = Path(folder) / "symmetric.onnx"
        to_onnx(convert(made.prepared), symmetric, input_shape=spec.input_shape, metadata={})
        to_u8_activations(symmetric, target)
    seconds = time.process_time() - before
    if isinstance(config, Qat):
        noted = training / "cpu_seconds.txt"
        if noted.exists():
            seconds += float(noted.read_text())
        else:
            noted.write_text(str(ends[-1] - before))
    info: dict[str, Any] = {"keep_float": made.config.keep_float, "validation_in_torch": made.metrics.accuracy}
    if made.control is not None:
        info |= {"met": made.control.met, "attempts": [row.model_dump() for row in made.control.rows]}
    return Made(seconds, _versions("torch", "torchao", "onnx"), info)


LEARNT = DistillConfig(
    train=TrainConfig(epochs=2), losses=(CrossEntropy(weight=0.5), Kd(weight=0.5, temperature=2.0)), control=False
)
"""What quantization-aware training learns from: labels and, there being no panel, the student's own float form."""
QAT = Qat(
    train=TrainConfig(epochs=2, batch_size=256, learning_rate=2e-4, checkpoint_every_steps=10**6),
    calibration_images=CALIBRATION_IMAGES,
)
PTQ = Ptq(calibration_images=CALIBRATION_IMAGES)
CONTROL = AccuracyControl(max_drop=MAX_DROP)

PEERS: dict[str, MakeFn] = {
    "ONNX Runtime, defaults": onnxruntime_defaults,
    "ONNX Runtime, u8, per channel": onnxruntime_u8,
    "Olive": peer("olive"),
    "NNCF": peer("nncf"),
    "NNCF, accuracy control": peer("nncf", control=True),
    "modelopt": peer("modelopt"),
}
OURS: dict[str, MakeFn] = {
    "PTQ, min_max": ours(PTQ),
    "PTQ, percentile": ours(PTQ.model_copy(update={"calibration": "percentile"})),
    "PTQ, entropy": ours(PTQ.model_copy(update={"calibration": "entropy"})),
    "PTQ, mse": ours(PTQ.model_copy(update={"calibration": "mse"})),
    "PTQ, min_max, accuracy control": ours(PTQ.model_copy(update={"control": CONTROL})),
    "QAT": ours(QAT),
    "QAT, learned steps": ours(QAT.model_copy(update={"learned_steps": True})),
    "QAT, accuracy control": ours(QAT.model_copy(update={"control": CONTROL})),
}
"""Cheapest first: where two are as good on the validation split, the first is chosen."""
CONTROLS: dict[str, MakeFn] = {"float32, trained as long as QAT": trained_longer}
"""Not quantized, and never chosen."""
ARMS = PEERS | OURS | CONTROLS


def cpu_seconds() -> float:
    """Of this process and the children it waited for."""
    return sum(os.times()[:4])


def _versions(*modules: str) -> dict[str, str]:
    return {name: import_module(name).__version__ for name in modules}


def _reader(case: Case) -> Any:
    """Calibration images in batches of 32, as ONNX Runtime asks for them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    images = np.load(case.calibration)
    name = onnx.load(case.float32).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = (
                {name: images[start : start + 32]} for start in range(0, len(images), 32)
            )

        def get_next(self) -> Any:
            return next(self.batches, None)

    return Reader()
