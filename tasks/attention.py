"""Attention: whether students and their INT8 files look where the teacher looks."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compression.attention import Agreement, AttentionConfig, compare_maps, grad_cam, occlusion_drops
from compression.augment import normalise
from compression.checkpoint import load_checkpoint
from compression.data import Dataset, open_dataset
from compression.errors import ShapeError
from compression.metrics import evaluating
from compression.types import Preprocessing
from export.profiles import open_as_meant
from export.runtime import predict_fn
from export.temperature import divides_by
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE

LARGEST_PICTURE = 96
"""Pixels on the longer side of a stored picture."""


@dataclass(frozen=True)
class Look:
    """What one model makes of N images."""

    answers: Tensor
    """Its own answers, int64 [N]."""
    maps: Tensor | None
    """Where the evidence for the teacher's answer lies, [N,H,W]; none without gradients."""
    drops: Tensor | None
    """What the teacher's answer loses where a place is covered, [N,rows,columns]; none where not asked for."""
    failure: str = ""
    """Why a network has no maps."""


@stage(
    "attention",
    code=(
        *MODEL_CODE,
        *("compression.attention", "compression.features", "compression.augment"),
        *("export.runtime", "export.temperature", "export.profiles"),
    ),
    libraries=("torch", "onnxruntime-gpu"),
)
def compare_attention(
    work: Work,
    *,
    name: str,
    config: AttentionConfig,
    teacher: StageResult,
    students: Mapping[str, StageResult],
    quantized: Mapping[str, StageResult],
    data: StageResult,
    seed: int,
) -> StageOutput:
    """Compare the teacher's maps with each student's, and its occlusion drops with each INT8 graph's.

    ``teacher`` and ``students`` are checkpoints, ``quantized`` are graphs, by student name. Images are drawn from the
    validation split, and the class is always the teacher's answer. ``attention.json`` holds the numbers and the maps
    of a few images.
    """
    dataset = open_dataset(work.open(data))
    split, total = dataset.validation, 1 + len(students) + len(quantized)
    chosen = _drawn(len(split.labels), config.images, seed)
    images = torch.as_tensor(split.images)[chosen]
    patch = config.patch if quantized else None
    first = look_of_network(work.open(teacher), images, None, patch)
    work.report("comparing attention", 1, total)
    looks: dict[str, Look] = {}
    for student, result in students.items():
        looks[student] = look_of_network(work.open(result), images, first.answers, patch)
        work.report("comparing attention", 1 + len(looks), total)
    for student, result in quantized.items():
        graph = work.open(result) / "model.onnx"
        looks[f"{student}.int8"] = look_of_graph(graph, images, first.answers, config.patch, dataset.preprocessing)
        work.report("comparing attention", 1 + len(looks), total)

    compared: list[tuple[str, str, str, Agreement]] = []
    for model, look in looks.items():
        if look.maps is not None and first.maps is not None:
            compared.append((model, "grad_cam", "teacher", compare_maps(first.maps, look.maps)))
        if look.drops is not None and first.drops is not None:
            compared.append((model, "occlusion", "teacher", compare_maps(first.drops, look.drops)))
        parent = looks.get(model.removesuffix(".int8"), look)
        if parent is not look and look.drops is not None and parent.drops is not None:
            compared.append((model, "occlusion", "float student", compare_maps(parent.drops, look.drops)))
    rows = [
        {"model": model, "method": method, "against": against, **found.model_dump(exclude={"images"})}
        for model, method, against, found in compared
    ]
    content = {
        "teacher": teacher.name,
        "rows": rows,
        "failures": {model: look.failure for model, look in {"teacher": first, **looks}.items() if look.failure},
        "pictures": [
            _picture(place, dataset, chosen, first, looks, compared)
            for place in range(min(config.pictures, len(chosen)))
        ],
    }
    with work.store.put("attention") as draft:
        (draft.folder / "attention.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    metrics = {
        f"{row['model']}/{row['method']}_{key}": float(row[key])
        for row in rows
        for key in ("pearson", "spearman", "iou", "skipped")
        if row["against"] == "teacher" and row[key] is not None
    }
    return StageOutput(artifact=draft.done(), metrics=metrics)


def look_of_network(folder: Path, images: Tensor, classes: Tensor | None, patch: float | None) -> Look:
    """How a checkpoint looks at raw images [N,channels,H,W]; at its own answers' evidence where ``classes`` is None."""
    model, spec = load_checkpoint(folder)
    shown = normalise(images, spec.preprocessing)
    with evaluating(model), torch.no_grad():
        answers = model(shown).argmax(dim=1)
        wanted = answers if classes is None else classes
        drops = None if patch is None else occlusion_drops(model, shown, wanted, patch=patch)
    try:
        return Look(answers, grad_cam(model, shown, wanted), drops)
    except ShapeError as error:
        return Look(answers, None, drops, failure=str(error))


def look_of_graph(path: Path, images: Tensor, classes: Tensor, patch: float, preprocessing: Preprocessing) -> Look:
    """How an ONNX graph looks at raw images [N,channels,H,W]; a temperature inside it is taken out again."""
    run, factor = predict_fn(open_as_meant(path)), divides_by(path)
    shown = normalise(images, preprocessing)
    drops = occlusion_drops(lambda batch: run(batch) * factor, shown, classes, patch=patch)
    return Look(run(shown).argmax(dim=1), None, drops)


def _drawn(available: int, wanted: int, seed: int) -> Tensor:
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:wanted].sort().values


def _picture(
    place: int,
    dataset: Dataset,
    chosen: Tensor,
    teacher: Look,
    looks: Mapping[str, Look],
    compared: list[tuple[str, str, str, Agreement]],
) -> dict[str, Any]:
    """Everything the report shows of one image."""
    row = int(chosen[place])
    image = torch.as_tensor(dataset.validation.images[row]).double() / dataset.preprocessing.scale
    size = image.shape[1:]
    agreements = {(model, method): found for model, method, against, found in compared if against == "teacher"}

    def seen(model: str, look: Look) -> dict[str, Any]:
        method = "occlusion" if look.maps is None else "grad_cam"
        drawn = look.drops if look.maps is None else look.maps
        found = agreements[model, method].images[place] if (model, method) in agreements else None
        return {
            "predicted": dataset.class_names[int(look.answers[place])],
            "method": method,
            "agreement": None if found is None else found.model_dump(),
            "map": None if drawn is None else _packed(_heat(drawn[place], size).unsqueeze(0)),
        }

    return {
        "id": int(dataset.validation.ids[row]),
        "label": dataset.class_names[int(dataset.validation.labels[row])],
        "image": _packed(image if len(image) in (1, 3) else image.mean(dim=0, keepdim=True)),
        "teacher": seen("teacher", teacher),
        "models": {model: seen(model, look) for model, look in looks.items()},
    }


def _heat(values: Tensor, size: torch.Size) -> Tensor:
    """A map [h,w] at the image's size, 0..1."""
    values = values.double().clamp_min(0)
    heat = F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    return heat / heat.max().clamp_min(1e-12)


def _packed(picture: Tensor) -> dict[str, Any]:
    """A picture [channels,H,W] in 0..1 as bytes in base64, row by row, made smaller where it is large."""
    longer = max(picture.shape[1:])
    if longer > LARGEST_PICTURE:
        size = [max(1, round(side * LARGEST_PICTURE / longer)) for side in picture.shape[1:]]
        picture = F.interpolate(picture[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return {"shape": list(pixels.shape), "data": base64.b64encode(pixels.tobytes()).decode("ascii")}
