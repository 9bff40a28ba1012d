"""What candidates come from: the promise of every space, and the workshop in which it builds them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from compression import profile
from compression.augment import normalise
from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.models import ModelSpec
from compression.types import Frozen

if TYPE_CHECKING:
    from compression.distill.procedures.training import Training
    from compression.quantize.sensitivity import Sensitivity
    from compression.search.bank import PastTrial
    from compression.train import TrainConfig

CALIBRATION_IMAGES = 1024

Choices = dict[str, Any]
"""Name of a gene -> what was chosen: a number or a word."""

Genes = Mapping[str, tuple[Any, ...]]
"""For one space: name of a choice -> its values; numbers ascend."""

StartTraining = Callable[[nn.Module, "TrainConfig", Path], "Training"]
"""(model, schedule, folder for step checkpoints) -> a training of it on the panel, in place by ``.run()``."""


@dataclass(frozen=True)
class Operator:
    """One operator of a network at batch 1, as the latency model knows it."""

    kind: str
    """Its ONNX name: ``Conv``, ``Gemm``, ``MatMul``, ``Add``, ..."""
    in_channels: int
    out_channels: int
    height: int
    """Of the output; 1 for what is no image."""
    width: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1


class LatencyModel(Protocol):
    """Predicted p50 of one call in the runtime that ships, fitted to what was measured on this machine."""

    @property
    def batch(self) -> int:
        """Images per call."""
        ...

    def predict_ms(self, model: nn.Module, input_shape: tuple[int, int, int]) -> float:
        """Milliseconds of a whole network."""
        ...

    def operators_ms(self, operators: Sequence[Operator]) -> list[float]:
        """Milliseconds of each operator by itself, without what a call costs besides."""
        ...


@dataclass(frozen=True)
class Workshop:
    """What a space may use to build candidates, and samplers and filters to judge them."""

    parents: Mapping[str, tuple[nn.Module, ModelSpec]]
    """Teachers with a model, by name; never change them."""
    dataset: Dataset
    seed: int
    folder: Path
    """What is made once for a study and needed again (a trained supernet, scores) is kept here; survives a kill."""
    start_training: StartTraining | None = None
    """How trials are trained, for spaces that train something themselves."""
    latency: LatencyModel | None = None
    """None where the study has none."""
    best_teacher: str | None = None
    past: Sequence["PastTrial"] = ()
    """Trials of earlier studies, of this task and others."""
    memory: dict[str, Any] = field(default_factory=dict)
    """For what is costly to make or read and fits into memory; empty when the process starts."""
    sensitivity: Mapping[str, "Sensitivity"] = field(default_factory=dict)
    """Sensitivity tables of parents, by name, as far as they were measured."""

    def parent(self, name: str) -> tuple[nn.Module, ModelSpec]:
        """The teacher of that name.

        Raises:
            CompressionError: there is none.
        """
        if name not in self.parents:
            raise CompressionError(
                f"Search has parent '{name}', expected one of {', '.join(sorted(self.parents)) or 'no teachers'}. "
                "Name a teacher of the recipe."
            )
        return self.parents[name]

    def template(self) -> ModelSpec:
        """A spec with the classes, input shape and preprocessing of the data; its model is to be replaced."""
        from compression.zoo import PlainCnn

        return ModelSpec(
            model=PlainCnn(),
            num_classes=self.dataset.num_classes,
            input_shape=self.dataset.input_shape,
            class_names=self.dataset.class_names,
            preprocessing=self.dataset.preprocessing,
        )

    def calibration(self) -> tuple[Tensor, Tensor]:
        """Normalised calibration images [N,C,H,W] and labels [N], at most ``CALIBRATION_IMAGES``, evenly spread."""
        split = self.dataset.calibration
        count = len(split.labels)
        spread = torch.linspace(0, count - 1, min(count, CALIBRATION_IMAGES)).long()
        return normalise(split.images[spread], self.dataset.preprocessing), split.labels[spread]

    def training(self, model: nn.Module, train: "TrainConfig", name: str) -> "Training":
        """A training of ``model`` on the panel, as trials have it; a killed one goes on from ``folder/steps/name``.

        Raises:
            CompressionError: the study cannot train.
        """
        if self.start_training is None:
            raise CompressionError(
                f"Search has no way to train '{name}', expected one, because its space trains while it builds. "
                "Give run_study start_training."
            )
        return self.start_training(model, train, self.folder / "steps" / name)

    def teacher_macs(self) -> int:
        """Multiply-accumulates of the best teacher for one image.

        Raises:
            CompressionError: the study has no best teacher.
        """
        if self.best_teacher is None:
            raise CompressionError(
                "Search has a share of the best teacher and no best teacher, expected the name of one. "
                "Pass best_teacher, or give absolute limits."
            )
        model, spec = self.parent(self.best_teacher)
        return profile.macs(model, spec.input_shape)


class Space(Frozen):
    """Base of every space. Candidates depend on choices and workshop alone, so that they can be built again."""

    card: ClassVar[MethodCard]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name of the space in tables, e.g. ``prune-resnet-taylor``; equal ones get a number."""

    @property
    def parent_name(self) -> str | None:
        """The teacher whose weights or structure candidates start from; None when there is none."""
        return getattr(self, "parent", None)

    @property
    def trains_while_building(self) -> bool:
        """Whether ``build`` costs a training the first time."""
        return False

    @property
    def wants_latency_model(self) -> bool:
        """Whether ``build`` asks ``shop.latency``."""
        return False

    @property
    def wants_sensitivity(self) -> bool:
        """Whether ``first_choices`` reads the parent's table in ``shop.sensitivity``."""
        return False

    def first_choices(self, shop: Workshop) -> list[Choices]:
        """What a study proposes of this space before all else, best guess first; genes left out get their middle."""
        del shop
        return []

    @abstractmethod
    def genes(self, shop: Workshop) -> Genes:
        """What may be chosen; must be quick.

        Raises:
            CompressionError: the parent is missing, or leaves nothing to choose.
        """

    @abstractmethod
    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        """The candidate as its trial starts from it, eval mode, all weights trainable, and the spec that rebuilds it.

        Raises:
            CompressionError: the candidate cannot be built.
        """
