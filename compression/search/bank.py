"""Trials of earlier studies, as the predictor and the priors read them, and what a candidate is without training."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from compression import profile
from compression.checkpoint import read_spec
from compression.data.dataset import Dataset
from compression.models import ModelSpec, build_model
from compression.search.task_embedding import data_hash
from compression.search.trials import Objective, TrialResult
from compression.train import TrainConfig
from compression.types import Frozen

logger = logging.getLogger(__name__)

LEVELS = 6
"""Resolutions that features tell apart: that of the image, a half, a quarter, ... the last stands for all below."""


class PastTask(Frozen):
    """The data a study was about."""

    data: str
    """Name of the data."""
    data_hash: str
    """Equal for studies on the same images, labels and splits."""
    classes: Annotated[int, Field(ge=1)]
    input_shape: tuple[int, int, int]
    """Channels, height and width."""
    train_images: Annotated[int, Field(ge=0)]
    embedding: tuple[float, ...] = ()
    """See ``task_embedding``; empty when it was not made."""


class PastTrial(Frozen):
    """One trained candidate of an earlier study."""

    study: str
    """Fingerprint of the study."""
    number: int
    """Of the trial in its study."""
    task: PastTask
    teacher_accuracy: float | None = None
    """Validation accuracy of the best teacher, 0..1, where it is known."""
    objectives: tuple[Objective, ...]
    """What the study optimised."""
    kind: str
    """Of the space, e.g. ``prune``."""
    space: str
    """Label of the space, e.g. ``prune-resnet-taylor``."""
    choices: dict[str, Any]
    """Name of a gene -> what was chosen."""
    features: dict[str, float]
    """See ``features_of``."""
    epochs: int
    """Of its training."""
    steps: int
    """Optimiser steps of its training."""
    accuracy: Annotated[float, Field(ge=0.0, le=1.0)]
    """On the validation split."""
    ece: float | None = None
    latency_p50_ms: float | None = None
    size_bytes: int | None = None
    macs: Annotated[int, Field(ge=0)]
    """Multiply-accumulates for one image."""
    params: int | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Equal for two records of one trial."""
        return self.study, self.number


def task_of(dataset: Dataset, embedding: tuple[float, ...] = ()) -> PastTask:
    """The task facts of a dataset."""
    return PastTask(
        data=dataset.name,
        data_hash=data_hash(dataset),
        classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        train_images=len(dataset.train.labels),
        embedding=embedding,
    )


def past_trials(
    rows: Sequence[TrialResult],
    *,
    task: PastTask,
    study: str,
    objectives: tuple[Objective, ...],
    kinds: Mapping[str, str],
    train: TrainConfig,
    features: Mapping[int, Mapping[str, float]] | None = None,
    teacher_accuracy: float | None = None,
) -> list[PastTrial]:
    """The complete trials of a finished study, for its bank.

    Args:
        rows: of the study.
        task: what it was about.
        study: its fingerprint.
        objectives: what it optimised.
        kinds: label of a space -> its kind.
        train: schedule of a trial.
        features: number of a trial -> ``features_of`` its candidate; read from its checkpoint folder where missing,
            and a trial that has neither is left out, logged.
        teacher_accuracy: of the best teacher on the validation split, if known.
    """
    found: list[PastTrial] = []
    steps = _steps(train, task.train_images)
    for row in rows:
        if row.state != "complete" or row.accuracy is None or row.macs is None:
            continue
        known = (features or {}).get(row.number)
        if known is None and (known := features_at(row.checkpoint)) is None:
            logger.warning("trial %d has no checkpoint to read features from and is left out of the bank", row.number)
            continue
        found.append(
            PastTrial(
                study=study,
                number=row.number,
                task=task,
                teacher_accuracy=teacher_accuracy,
                objectives=objectives,
                kind=kinds[row.space],
                space=row.space,
                choices=row.choices,
                features=dict(known),
                epochs=train.epochs,
                steps=steps,
                accuracy=row.accuracy,
                ece=row.ece,
                latency_p50_ms=row.latency_p50_ms,
                size_bytes=row.size_bytes,
                macs=row.macs,
                params=row.params,
            )
        )
    return found


def _steps(train: TrainConfig, images: int) -> int:
    each = math.ceil(images / train.batch_size)
    return train.epochs * (each if train.max_steps_per_epoch is None else min(each, train.max_steps_per_epoch))


def write_bank(path: Path, trials: Iterable[PastTrial]) -> None:
    """One trial a line, as JSON; replaces ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(trial.model_dump_json() + "\n" for trial in trials)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_bank(paths: Iterable[Path]) -> list[PastTrial]:
    """The trials of all files, by study and number, each once; the order of ``paths`` does not matter.

    Lines and files that cannot be read are left out, logged.
    """
    found: dict[tuple[str, int], PastTrial] = {}
    for path in sorted(paths):
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            logger.warning("bank '%s' cannot be read and is left out (%s)", path, error.strerror)
            continue
        for number, line in enumerate(lines, start=1):
            try:
                trial = PastTrial.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"]) or "the text"
                logger.warning("line %d of bank '%s' is left out (%s: %s)", number, path, where, first["msg"])
                continue
            found.setdefault(trial.place, trial)
    return [found[place] for place in sorted(found)]


def features_of(model: nn.Module, spec: ModelSpec) -> dict[str, float]:
    """What the structure of a candidate says before training; takes one forward pass of one image.

    ``log_macs``, ``log_params``, ``log_size`` (base 10); ``depth``, convolutions and linear layers that ran;
    ``depthwise_share`` and ``other_share``, of the MACs in depthwise convolutions and in products without a layer
    (attention); ``tokens``, most positions a linear layer saw; ``attention_blocks``. For each level of resolution,
    0 that of the image: ``depth_<level>``, and the first, last, largest and mean width as log2 of channels,
    ``width_<level>_first`` and so on, 0 where no layer works. ``model`` is left as it was.
    """
    layers: list[_Layer] = []
    pixels = spec.input_shape[1] * spec.input_shape[2]
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                stack.callback(module.register_forward_hook(_noting(layers)).remove)
        macs = profile.macs(model, spec.input_shape)
    counted = sum(layer.macs for layer in layers)
    depthwise = sum(layer.macs for layer in layers if layer.depthwise)
    features = {
        "log_macs": math.log10(macs + 1),
        "log_params": math.log10(profile.params(model) + 1),
        "log_size": math.log10(profile.state_bytes(model) + 1),
        "depth": float(len(layers)),
        "depthwise_share": depthwise / max(macs, 1),
        "other_share": max(macs - counted, 0) / max(macs, 1),
        "tokens": float(max((layer.positions for layer in layers if layer.tokens), default=0)),
        "attention_blocks": float(sum(_is_attention(module) for module in model.modules())),
    }
    for level in range(LEVELS):
        widths = [
            math.log2(layer.width)
            for layer in layers
            if layer.positions and min(_level(pixels, layer.positions), LEVELS - 1) == level
        ]
        features[f"depth_{level}"] = float(len(widths))
        for name, of in (("first", lambda w: w[0]), ("last", lambda w: w[-1]), ("max", max), ("mean", _mean)):
            features[f"width_{level}_{name}"] = float(of(widths)) if widths else 0.0
    return features


def features_at(folder: Path | None) -> dict[str, float] | None:
    """``features_of`` the candidate whose checkpoint is in a folder, without its weights; None when none is there.

    Raises:
        CheckpointError: the spec is damaged.
    """
    if folder is None or not (folder / "spec.json").is_file():
        return None
    spec = read_spec(folder)
    with torch.random.fork_rng(devices=[]):
        model = build_model(spec)
    return features_of(model.eval(), spec)


class _Layer(NamedTuple):
    width: int
    """Outputs, channels or features."""
    macs: int
    positions: int
    """Pixels or tokens of the output; 0 where none are left, as in a classifier."""
    tokens: bool
    depthwise: bool


def _noting(layers: list[_Layer]) -> Callable[[Any, Any, Tensor], None]:
    def note(module: Any, _inputs: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            macs = output.numel() // len(output) * module.weight[0].numel()
            depthwise = module.groups > 1 and module.groups == module.in_channels
            layers.append(_Layer(output.shape[1], macs, output[0, 0].numel(), False, depthwise))
        else:
            width = output.shape[-1]
            positions = output.numel() // width if output.ndim > 2 else 0
            macs = output.numel() * module.weight.shape[1]
            layers.append(_Layer(width, macs, positions, positions > 0, False))

    return note


def _level(pixels: int, positions: int) -> int:
    """How often the side of the image was halved."""
    return max(round(0.5 * math.log2(pixels / positions)), 0)


def _is_attention(module: nn.Module) -> bool:
    heads = isinstance(getattr(module, "num_heads", None), int)
    return isinstance(module, nn.MultiheadAttention) or (heads and isinstance(getattr(module, "qkv", None), nn.Linear))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
