"""The part of a configuration all convolutional families share: a stem, then stages of blocks."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from compression.types import Frozen


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"kernel size has {value}, expected an odd number so that padding keeps the size")
    return value


OddKernel = Annotated[int, Field(gt=0, le=15), AfterValidator(_odd)]


class Stages(Frozen):
    """Stem convolution followed by stages; ``widths``, ``depths`` and ``strides`` have one entry a stage."""

    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 128)
    """Channels of each stage."""
    depths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 1)
    """Blocks in each stage."""
    strides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2, 1, 2)
    """Stride of the first block of each stage."""
    kernel: OddKernel = 3
    """Kernel size inside the blocks, pixels."""
    stem_width: PositiveInt = 16
    """Channels after the stem."""
    stem_kernel: OddKernel = 3
    """Kernel size of the stem, pixels."""
    stem_stride: PositiveInt = 1
    """Stride of the stem; 2 quarters the cost of everything after it."""

    @model_validator(mode="after")
    def _one_entry_a_stage(self) -> Self:
        counts = {len(self.widths), len(self.depths), len(self.strides)}
        if len(counts) != 1:
            raise ValueError(
                f"model '{type(self).__name__}' has {len(self.widths)} widths, {len(self.depths)} depths and "
                f"{len(self.strides)} strides, expected the same number of each. Give one entry a stage."
            )
        return self

    def scaled(self, *, width: float = 1.0, depth_delta: int = 0, round_to: int = 8) -> Self:
        """The same family, wider or narrower and deeper or shallower.

        Args:
            width: Factor on every channel count; the result is rounded to the nearest multiple of
                ``round_to`` and is at least ``round_to``.
            depth_delta: Blocks added to (or, if negative, taken from) each stage; one block remains.
            round_to: Channel counts are multiples of this.
        """
        return type(self).model_validate(
            self.model_dump()
            | {
                "widths": tuple(_rounded(value * width, round_to) for value in self.widths),
                "stem_width": _rounded(self.stem_width * width, round_to),
                "depths": tuple(max(1, depth + depth_delta) for depth in self.depths),
            }
        )

    def block_plan(self) -> list[tuple[int, int, int]]:
        """(in_channels, out_channels, stride) of every block after the stem, in order."""
        plan = []
        channels = self.stem_width
        for width, depth, stride in zip(self.widths, self.depths, self.strides, strict=True):
            for index in range(depth):
                plan.append((channels, width, stride if index == 0 else 1))
                channels = width
        return plan


def _rounded(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
