"""What a run exports to: one frozen config per runtime, joined in ``AnyTarget``."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from compression.types import Frozen

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(?:[-_][a-z0-9]+)*$", max_length=40)]
"""A name that is safe as a folder: small letters, digits, single dashes or underscores between them."""

RtxComputeCapability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
"""The GPU generations TensorRT-RTX 1.7 builds for without a GPU. SM87 (Jetson Orin) is not among them."""


class OnnxRuntimeTarget(Frozen):
    """A CPU served by ONNX Runtime: one .onnx file, measured on the machine that runs the recipe."""

    kind: Literal["onnxruntime"] = "onnxruntime"
    name: Slug = "cpu"
    """Folder and table name of this target; unique within a recipe."""
    precision: Literal["float32", "int8"] = "int8"
    """The lowest precision to try; the float32 file is always built beside it as the reference."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads of one inference (intra-op)."""
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 32)
    """Batches to measure; the latency budget is held against the first one."""
    max_latency_p95_ms: PositiveFloat | None = None
    """Latency budget in milliseconds (95th percentile); none: no budget."""
    max_size_kib: PositiveFloat | None = None
    """Size budget of the shipped file in KiB; none: no budget."""


class _EngineTarget(Frozen):
    """What both TensorRT flavours share: precision and the batch range an engine accepts."""

    name: Slug
    """Folder and table name of this target; unique within a recipe."""
    precision: Literal["float16", "int8"] = "int8"
    """Precision of the graph the engine is built from; engines are strongly typed."""
    min_batch: PositiveInt = 1
    """Smallest batch the engine accepts."""
    opt_batch: PositiveInt = 8
    """The batch its kernels are tuned for."""
    max_batch: PositiveInt = 32
    """Largest batch the engine accepts."""
    max_size_kib: PositiveFloat | None = None
    """Size budget of one engine in KiB; none: no budget."""

    @model_validator(mode="after")
    def _batches_ascend(self) -> Self:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            found = f"{self.min_batch}, {self.opt_batch}, {self.max_batch}"
            raise ValueError(
                f"Target '{self.name}' has min, opt, max batch {found}, expected an ascending order."
                " Set min_batch <= opt_batch <= max_batch."
            )
        return self


class TensorRtRtxTarget(_EngineTarget):
    """TensorRT-RTX engines, built ahead of time on any machine, one per GPU generation; not run here."""

    kind: Literal["tensorrt_rtx"] = "tensorrt_rtx"
    name: Slug = "rtx"
    """Folder and table name of this target; unique within a recipe."""
    compute_capabilities: Annotated[tuple[RtxComputeCapability, ...], Field(min_length=1)] = ("SM86", "SM89")
    """One engine is built for each."""


class TensorRtTarget(_EngineTarget):
    """Classic TensorRT (e.g. Jetson Orin): the engine belongs to the GPU and version that built it."""

    kind: Literal["tensorrt"] = "tensorrt"
    name: Slug = "tensorrt"
    """Folder and table name of this target; unique within a recipe."""


AnyTarget = OnnxRuntimeTarget | TensorRtRtxTarget | TensorRtTarget
