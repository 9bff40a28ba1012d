"""The part of a configuration both token families share."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from compression.types import Frozen
from compression.zoo.tokens import Stem


class TokenMixer(Frozen):
    """How an image becomes tokens, and how many blocks of which width follow."""

    width: PositiveInt = 96
    """Width of a token."""
    depth: PositiveInt = 4
    """Number of blocks."""
    mlp_ratio: Annotated[float, Field(gt=0, le=8)] = 2.0
    """Width inside the per-token MLP, as a multiple of ``width``."""
    patch_size: PositiveInt = 4
    """Side of the square one token stands for, pixels; a power of two with the ``conv`` stem."""
    stem: Stem = "conv"
    """``conv``: a few strided convolutions; ``patch``: one."""
    stem_width: PositiveInt = 32
    """Channels inside the ``conv`` stem."""

    @model_validator(mode="after")
    def _patch_fits_stem(self) -> Self:
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(
                f"patch_size has {self.patch_size}, expected a power of two with stem 'conv'. "
                "Use 2, 4, 8 or 16, or stem 'patch'."
            )
        return self
