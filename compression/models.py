"""Model specifications: everything about a network except its weights, as data."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from compression.edits import (
    AnyEdit,
    ReshapeParameter,
    ResizeModule,
    SetAttributes,
    SkipModule,
    apply_edits,
    diff_edits,
)
from compression.types import Frozen, Preprocessing
from compression.zoo import (
    AnyModel,
    DepthwiseCnn,
    GatedCnn,
    Group,
    Mixer,
    PlainCnn,
    ResidualCnn,
    TimmModel,
    TorchvisionModel,
    VisionTransformer,
)

__all__ = [
    "AnyEdit",
    "AnyModel",
    "DepthwiseCnn",
    "GatedCnn",
    "Group",
    "Mixer",
    "ModelSpec",
    "PlainCnn",
    "ReshapeParameter",
    "ResidualCnn",
    "ResizeModule",
    "SetAttributes",
    "SkipModule",
    "TimmModel",
    "TorchvisionModel",
    "VisionTransformer",
    "apply_edits",
    "build_model",
    "diff_edits",
]


class ModelSpec(Frozen):
    """The JSON half of a checkpoint: how to build the network, and what its inputs and outputs mean."""

    model: AnyModel
    """The network before any structural edit."""
    num_classes: PositiveInt
    """Number of logits."""
    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Channels, height and width of one image."""
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    """One name per logit, in order."""
    preprocessing: Preprocessing
    """How a raw image becomes an input."""
    edits: tuple[AnyEdit, ...] = ()
    """Structural edits, applied in order after the network was built."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, expected num_classes = {self.num_classes}"
            )
        channels = self.input_shape[0]
        for field in ("mean", "std"):
            found = len(getattr(self.preprocessing, field))
            if found != channels:
                raise ValueError(
                    f"preprocessing.{field} has {found} numbers, expected {channels}, one for each channel"
                )
        return self


def build_model(spec: ModelSpec) -> nn.Module:
    """The network ``spec`` describes, randomly initialised, in training mode; needs no pruning library.

    Raises:
        CheckpointError: The model name is unknown, or an edit does not fit the network.
    """
    model = spec.model.build(spec.num_classes, spec.input_shape)
    apply_edits(model, spec.edits)
    return model
