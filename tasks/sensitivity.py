"""Stage between a trained model and what is decided about its layers: the sensitivity table of the model."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from compression.augment import normalise
from compression.checkpoint import load_checkpoint
from compression.data import open_dataset
from compression.data.dataset import Split
from compression.quantize.sensitivity import Format, LayerSensitivity, Sensitivity, SensitivityConfig, sensitivity
from compression.types import Preprocessing
from tasks.progress import step_reporter
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE

TABLE = "sensitivity.json"
TABLE_CSV = "sensitivity.csv"


@stage(
    "sensitivity",
    code=(
        *MODEL_CODE,
        "compression.quantize.sensitivity",
        "compression.quantize.annotator",
        "compression.quantize.folding",
        "compression.quantize.learned_steps",
        "compression.quantize.number_format",
        "compression.quantize.observers",
        "compression.quantize.prepared",
        "compression.quantize.rounding",
    ),
    libraries=("torch", "torchao"),
)
def measure_sensitivity(
    work: Work,
    *,
    name: str,
    config: SensitivityConfig,
    model: StageResult,
    data: StageResult,
    seed: int,
) -> StageOutput:
    """What each layer of a float model costs by itself, in INT8 and narrower, on validation images."""
    dataset = open_dataset(work.open(data))
    network, spec = load_checkpoint(work.open(model))
    images, labels = drawn_images(dataset.validation, spec.preprocessing, count=config.images, seed=seed)
    calibration, _ = drawn_images(dataset.calibration, spec.preprocessing, count=config.images, seed=seed)
    table = sensitivity(
        network,
        spec.input_shape,
        images,
        labels,
        calibration=calibration,
        formats=config.formats,
        on_step=step_reporter(work.report, f"measuring the layers of {name}"),
    )
    with work.store.put("sensitivity") as draft:
        (draft.folder / TABLE).write_text(table.model_dump_json(indent=1), encoding="utf-8")
        write_csv(draft.folder / TABLE_CSV, table)
    work.run.log_file(work.store.place(draft.done()) / TABLE_CSV, "sensitivity")
    worst: dict[Format, str] = {}
    for each in config.formats:
        if table.column(each):
            worst[each] = table.worst(each)[0]
    metrics = {f"worst_kl_{key(each)}": table.column(each)[layer].kl for each, layer in worst.items()}
    metrics |= {"worst_kl": max((row.kl for row in table.rows), default=0.0), "layers": float(len(table.layers))}
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"worst": worst, "num_samples": table.num_samples})


def drawn_images(split: Split, preprocessing: Preprocessing, *, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``count`` normalised images [N, C, H, W] of a split and their labels [N], as ``seed`` draws them."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = order.sort().values
    return normalise(torch.as_tensor(split.images)[chosen], preprocessing), torch.as_tensor(split.labels)[chosen]


def open_table(folder: Path) -> Sensitivity:
    """The table of a sensitivity artifact."""
    return Sensitivity.model_validate_json((folder / TABLE).read_text(encoding="utf-8"))


def write_csv(path: Path, table: Sensitivity) -> None:
    """One line per layer and format, layers in the order they run."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(LayerSensitivity.model_fields))
        writer.writeheader()
        writer.writerows(row.model_dump() for row in table.rows)


def key(format: str) -> str:
    """The name of a format in a metric: ``int8 weights`` is ``int8_weights``."""
    return format.replace("-", "_").replace(" ", "_")
