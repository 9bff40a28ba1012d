"""The parity ladder of one student: reference inputs, torch, fake-quant, every file; each hop with its limits.

For every hop the ladder says how many answers changed, whether that is within what such a hop may cost, and at which
layer the difference begins.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.augment import normalise
from compression.data import Split
from compression.errors import ExportError, ShapeError
from compression.metrics import predict
from compression.types import Frozen, Preprocessing
from export.attribution import Attribution, attribute, attribute_hops
from export.intermediates import Form, TorchForm
from export.onnx_form import OnnxForm
from export.onnx_graph import INPUT_NAME, load_graph, metadata_of
from export.parity import (
    LIMITS,
    Hop,
    Parity,
    Rung,
    RungLimits,
    broken_limits,
    compare,
    self_perturbation_floor,
)
from export.profiles import open_as_meant
from export.runtime import predict_fn
from export.temperature import divides_by

SAMPLES = 64
"""Images of which intermediate values are compared."""

LABELS = {
    "float32": "ONNX float32",
    "float16": "ONNX float16",
    "int8-symmetric": "ONNX INT8 symmetric",
    "int8": "ONNX INT8 u8",
    "int8-arm": "ONNX INT8 ARM",
    "int8-ptq": "ONNX INT8 after training",
    "int4": "ONNX INT4",
}
TORCH, FAKE_QUANT, INPUTS = "torch float32", "torch fake-quant", "reference inputs"
_IDENTITY = Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,))


class Ladder(Frozen):
    """The rungs of one student, and in one sentence where most is lost."""

    student: str
    sentence: str
    rungs: tuple[Rung, ...]

    def rung(self, label: str) -> Rung:
        """The rung of a form, by its name without the student's.

        Raises:
            KeyError: there is none.
        """
        for rung in self.rungs:
            if rung.name == f"{self.student}: {label}":
                return rung
        raise KeyError(label)


@dataclass(frozen=True)
class Forms:
    """What a ladder compares: the forms of one student, and the images it is asked about."""

    model: nn.Module
    """The float model, in eval mode."""
    files: Mapping[str, Path]
    """Form (``float32``, ``float16``, ``int8-symmetric``, ``int8``, ``int8-ptq``, ...) -> ONNX file."""
    split: Split
    """Raw images and labels."""
    preprocessing: Preprocessing
    """As the model was trained with."""
    converted: nn.Module | None = None
    """The integer form in torch, where the student was quantized in torch."""
    logits: Mapping[str, Tensor] = field(default_factory=dict)
    """Form -> logits [N, classes] of its file on the whole split, where they are known already."""


@dataclass(frozen=True)
class _Step:
    """One hop before it is measured."""

    label: str
    against: str
    hop: Hop
    file: str | None = None


def climb(
    student: str,
    forms: Forms,
    *,
    limits: Mapping[Hop, RungLimits] = LIMITS,
    samples: int = SAMPLES,
    not_run: Iterable[Rung] = (),
) -> Ladder:
    """Measure the ladder of one student.

    Accuracy, flips and divergence are of the whole split; layers and floors of its first ``samples`` images.
    Logits of a file that divides them by a temperature are multiplied by it first.

    Args:
        student: Its name in the tables; rungs are called ``<student>: <form>``.
        forms: What to compare.
        limits: What each hop may cost.
        samples: Images whose intermediate values are compared.
        not_run: Rungs of what can't be run here, put at the end.

    Raises:
        ExportError: a file can't be run.
        ShapeError: forms have different outputs.
    """
    model, labels = forms.model, forms.split.labels
    images = normalise(torch.as_tensor(forms.split.images[:samples]), forms.preprocessing)
    logits = {TORCH: predict(model, forms.split, forms.preprocessing)}
    runs: dict[str, Callable[[Tensor], Tensor]] = {TORCH: model}
    if forms.converted is not None:
        logits[FAKE_QUANT] = predict(forms.converted, forms.split, forms.preprocessing)
        runs[FAKE_QUANT] = forms.converted
    for form, path in forms.files.items():
        run = predict_fn(open_as_meant(path))
        found = forms.logits[form] if form in forms.logits else predict(run, forms.split, forms.preprocessing)
        logits[label_of(form)], runs[label_of(form)] = found * divides_by(path), run
    steps = _steps(forms)
    attributions, problem = _attributions(steps, forms, images, limits)
    rungs = [_inputs_rung(student, forms, limits["inputs"], samples)]
    same = compare(logits[TORCH], logits[TORCH], labels)
    rungs.append(Rung(name=f"{student}: {TORCH}", against=None, parity=same, note=problem))
    floors: dict[str, float] = {}
    for step in steps:
        reference, candidate, allowed = logits[step.against], logits[step.label], limits[step.hop]
        rounding = step.label if step.against == TORCH else step.against
        if rounding not in floors:
            floors[rounding] = self_perturbation_floor(runs[rounding], images)
        attribution = attributions.get(step.label)
        parity = compare(reference, candidate, labels)
        largest = reference.abs().max().item()
        broken = broken_limits(parity, allowed, largest_logit=largest, floor=floors[rounding], attribution=attribution)
        notes = [_by_runtime(attribution, allowed, largest)]
        if broken and step.hop == "float32":
            notes.append(_swapped_channels(runs[step.label], images, logits[TORCH][:samples], parity))
        rungs.append(
            Rung(
                name=f"{student}: {step.label}",
                against=f"{student}: {step.against}",
                parity=parity,
                floor=floors[rounding],
                file=f"{student}.{step.file}" if step.file else None,
                note=" ".join(note for note in notes if note),
                limits=allowed,
                exceeded=broken,
                attribution=attribution,
            )
        )
    rungs += not_run
    return Ladder(student=student, sentence=sentence(rungs), rungs=tuple(rungs))


def label_of(form: str) -> str:
    """A form of a file in words."""
    return LABELS.get(form, f"ONNX {form}")


def sentence(rungs: Sequence[Rung]) -> str:
    """Which hop of a ladder loses most, and at which layer, in one sentence."""
    inputs = next((rung for rung in rungs if rung.name.endswith(INPUTS)), None)
    if inputs is not None and inputs.exceeded:
        return f"The files don't get the inputs the model was trained with: {inputs.exceeded[0]}."
    hops = [rung for rung in rungs if rung.parity is not None and rung.against is not None]
    if not hops:
        return "Nothing was compared."
    broken = [rung for rung in hops if rung.exceeded]
    most = max(broken or hops, key=_loss)
    name, against = (text.rpartition(": ")[2] for text in (most.name, most.against or ""))
    where = most.attribution.words() if most.attribution else ""
    where = f"; {where}" if where else ""
    if broken:
        more = f" {len(broken) - 1} more {'is' if len(broken) == 2 else 'are'} over a limit." if len(broken) > 1 else ""
        return f"{name} {_change(most.parity, against)}{where}.{more}"
    within = f"All {len(hops)} hops are within their limits" if len(hops) > 1 else "The one hop is within its limits"
    return f"{within}; {name} {_change(most.parity, against)}{where}."


def _loss(rung: Rung) -> tuple[float, float, float]:
    parity = rung.parity
    return (parity.reference_top1 - parity.top1, parity.flips, parity.kl) if parity else (-math.inf, 0.0, 0.0)


def _change(parity: Parity | None, against: str) -> str:
    if parity is None:
        return "was not run"
    lost = (parity.reference_top1 - parity.top1) * 100
    if lost > 0:
        return f"loses {lost:.1f} points to {against}"
    return f"changes {parity.flips:.1%} of the answers of {against}"


def _steps(forms: Forms) -> list[_Step]:
    floats = [form for form in forms.files if form == "float32" or form.endswith("float16")]
    steps = [_Step(label_of(form), TORCH, "float32" if form == "float32" else "float16", form) for form in floats]
    if forms.converted is not None:
        steps.append(_Step(FAKE_QUANT, TORCH, "fake-quant"))
    for form in forms.files:
        if form in floats:
            continue
        if forms.converted is not None and form.startswith("int8") and not form.endswith("ptq"):
            hop: Hop = "int8-symmetric" if "symmetric" in form else "int8-u8"
            steps.append(_Step(label_of(form), FAKE_QUANT, hop, form))
        else:
            steps.append(_Step(label_of(form), TORCH, "after-training", form))
    return steps


def _attributions(
    steps: Sequence[_Step], forms: Forms, images: Tensor, limits: Mapping[Hop, RungLimits]
) -> tuple[dict[str, Attribution], str]:
    """Attribution by label, and why there is none where layers can't be compared."""
    shape = tuple(images.shape[1:])
    found: dict[str, Attribution] = {}
    try:
        looks: dict[str, Form] = {TORCH: TorchForm(forms.model, shape, TORCH)}
        if forms.converted is not None:
            looks[FAKE_QUANT] = TorchForm(forms.converted, shape, FAKE_QUANT)
        for form, path in forms.files.items():
            looks[label_of(form)] = OnnxForm(path, label_of(form))
    except ExportError as error:
        return {}, f"Layers were not compared. {error}"
    hops = [(looks[step.against], looks[step.label], limits[step.hop].layer) for step in steps]
    inputs = [np.ascontiguousarray(images.numpy())]
    try:
        rows = attribute_hops(hops, inputs) if hops else []
        return {step.label: row for step, row in zip(steps, rows, strict=True)}, ""
    except ShapeError as error:
        problem = f"Some layers were not compared. {error}"
    for step, (reference, candidate, limit) in zip(steps, hops, strict=True):
        try:
            found[step.label] = attribute(reference, candidate, inputs, limit=limit)
        except ShapeError:
            continue
    return found, problem


def _inputs_rung(student: str, forms: Forms, limits: RungLimits, samples: int) -> Rung:
    """Whether images as they are stored, prepared as each file itself says, give the answers of the model's inputs."""
    raw = torch.as_tensor(forms.split.images[:samples])
    labels = forms.split.labels[:samples]
    expected = normalise(raw, forms.preprocessing)
    problems: list[str] = []
    worst: Parity | None = None
    for form, path in forms.files.items():
        file = f"{student}.{form}"
        problems += [f"file '{file}' has {problem}" for problem in check_inputs(path, raw, forms.preprocessing)]
        own = stored_preprocessing(path) or _IDENTITY
        if len(own.mean) not in (1, raw.shape[1]):
            continue  # said above
        session = predict_fn(open_as_meant(path))
        reference = session(expected)
        parity = compare(reference, session(normalise(raw, own)), labels)
        largest = reference.abs().max().item()
        broken = broken_limits(parity, limits, largest_logit=largest, floor=None, attribution=None)
        problems += [f"file '{file}', fed as it says: {problem}" for problem in broken]
        worst = parity if worst is None or (parity.flips, parity.max_abs) > (worst.flips, worst.max_abs) else worst
    return Rung(
        name=f"{student}: {INPUTS}",
        against=None,
        parity=worst,
        limits=limits,
        exceeded=tuple(problems),
        note="Images as stored, prepared as each file's metadata says, against the model's own inputs.",
    )


def stored_preprocessing(path: Path) -> Preprocessing | None:
    """What a graph says about its inputs; None if it says nothing that can be read."""
    try:
        return Preprocessing.model_validate_json(metadata_of(path).get("preprocessing", ""))
    except ValidationError:
        return None


def check_inputs(path: Path, images: Tensor, preprocessing: Preprocessing) -> list[str]:
    """What is wrong with the interface of a graph for raw ``images`` [N, C, H, W]; empty if all is as it should be."""
    problems: list[str] = []
    stored = stored_preprocessing(path)
    if stored is None:
        problems.append(f"no preprocessing in its metadata, expected {_words(preprocessing)}")
    elif stored != preprocessing:
        problems.append(f"preprocessing {_words(stored)}, expected {_words(preprocessing)}")
    graph = load_graph(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if [value.name for value in inputs] != [INPUT_NAME]:
        problems.append(f"inputs {[value.name for value in inputs]}, expected ['{INPUT_NAME}']")
        return problems
    tensor = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    wanted = list(images.shape[1:])
    if sizes[1:] != wanted or sizes[:1] != [-1]:
        problems.append(f"input shape {sizes}, expected {[-1, *wanted]}")
    if tensor.elem_type != 1:
        problems.append(f"input type {tensor.elem_type}, expected 1 (float32)")
    said = metadata_of(path).get("input_shape")
    if said is not None and json.loads(said) != wanted:
        problems.append(f"input_shape {said} in its metadata, expected {wanted}")
    return problems


def _words(preprocessing: Preprocessing) -> str:
    def numbers(values: Iterable[float]) -> str:
        return ", ".join(f"{value:.3g}" for value in values)

    return f"scale {preprocessing.scale:g} mean ({numbers(preprocessing.mean)}) std ({numbers(preprocessing.std)})"


def _by_runtime(attribution: Attribution | None, limits: RungLimits, largest_logit: float) -> str:
    """What the runtime's own optimisation of the file changes, if that is worth a word."""
    if attribution is None or not attribution.runtime_max_abs:
        return ""
    flips = attribution.runtime_flips or 0.0
    if not flips and attribution.runtime_max_abs <= (limits.relative or 1e-3) * largest_logit:
        return ""
    return (
        f"ONNX Runtime's own optimisation changes {flips:.1%} of the answers"
        f" (a logit by up to {attribution.runtime_max_abs:.2g})."
    )


def _swapped_channels(run: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor, parity: Parity) -> str:
    """Whether the file agrees once its images' channels are reversed: RGB fed to BGR."""
    if images.shape[1] != 3:
        return ""
    with torch.inference_mode():
        turned = run(images.flip(1))
    if (turned - expected).abs().max().item() < 0.01 * parity.max_abs:
        return "With the channels reversed the file agrees: RGB and BGR are swapped."
    return ""


LAYER_COLUMNS = (
    *("student", "rung", "against", "order", "layer", "candidate_layer", "relative_error", "input_error", "own_share"),
    *("sqnr_db", "cosine", "max_abs", "clipped"),
)


def layer_rows(ladders: Iterable[Ladder]) -> list[dict[str, Any]]:
    """One row per hop and layer, for ``layer_diff.csv``."""
    return [
        {
            "student": ladder.student,
            "rung": rung.name.removeprefix(f"{ladder.student}: "),
            "against": (rung.against or "").removeprefix(f"{ladder.student}: "),
            **layer.model_dump(),
        }
        for ladder in ladders
        for rung in ladder.rungs
        if rung.attribution is not None
        for layer in rung.attribution.layers
    ]
