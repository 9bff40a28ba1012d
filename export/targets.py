"""What a run exports to: one frozen config per runtime, joined in ``AnyTarget``."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from compression.types import Frozen

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(?:[-_][a-z0-9]+)*$", max_length=40)]
"""A name that is safe as a folder: small letters, digits, single dashes or underscores between them."""

RtxComputeCapability = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
"""The GPU generations TensorRT-RTX 1.7 builds for without a GPU. SM87 (Jetson Orin) is not among them."""

Isa = Literal["x86", "arm"]
"""Instruction set of a CPU, as far as it decides how integers are written."""

_TOO_OLD = {
    "bfloat16": (("SM75",), "bfloat16 needs SM80 or newer"),
    "int4": (("SM75",), "4-bit integers need SM80 or newer"),
    "int8": (("SM75",), "its head is a float32 product, which needs SM80 or newer"),
    "fp8": (("SM75", "SM80", "SM86"), "8-bit floats need SM89 or newer"),
}
"""Precision -> GPU generations TensorRT-RTX refuses to build it for, and why."""


class OnnxRuntimeTarget(Frozen):
    """A CPU served by ONNX Runtime: one .onnx file, measured if the machine that runs the recipe is such a CPU."""

    kind: Literal["onnxruntime"] = "onnxruntime"
    name: Slug = "cpu"
    """Folder and table name of this target; unique within a recipe."""
    precision: Literal["float32", "int8", "int4"] = "int8"
    """The lowest precision to try; the float32 file is always built beside it as the reference. ``int4`` stores the
    weights of linear layers alone: for transformers; small convolutional networks gain nothing."""
    isa: Literal["native", "x86", "arm"] = "native"
    """Which CPUs the INT8 file is written for: uint8 activations on x86, int8 ones on ARM. ``native``: whatever runs
    the recipe. A file for another kind of CPU than this one is built and its answers are checked, but it is not
    timed and does not ship by itself."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads of one inference (intra-op)."""
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 32)
    """Batches to measure; the latency budget is held against the first one."""
    max_latency_p95_ms: PositiveFloat | None = None
    """Latency budget in milliseconds (95th percentile); none: no budget."""
    max_size_kib: PositiveFloat | None = None
    """Size budget of the shipped file in KiB; none: no budget."""


class OpenVinoTarget(Frozen):
    """An Intel CPU, GPU or NPU served by OpenVINO: .xml and .bin, converted from our ONNX file; built, not timed.

    Needs the extra ``openvino``. The answers on this CPU can be checked; its speed is not measured.
    """

    kind: Literal["openvino"] = "openvino"
    name: Slug = "openvino"
    """Folder and table name of this target; unique within a recipe."""
    precision: Literal["float32", "int8"] = "int8"
    """Which graph is converted."""
    max_size_kib: PositiveFloat | None = None
    """Size budget of both files in KiB; none: no budget."""


class _EngineTarget(Frozen):
    """What both TensorRT flavours share: precision and the batch range an engine accepts."""

    name: Slug
    """Folder and table name of this target; unique within a recipe."""
    precision: Literal["float16", "bfloat16", "int8", "fp8", "int4"] = "int8"
    """Precision of the graph the engine is built from; engines are strongly typed. ``fp8`` needs SM89 or newer;
    ``int4`` stores the weights of linear layers alone: for transformers, not for small convolutional networks."""
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

    @model_validator(mode="after")
    def _generations_know_the_format(self) -> Self:
        refused, why = _TOO_OLD.get(self.precision, ((), ""))
        found = [each for each in self.compute_capabilities if each in refused]
        if found:
            raise ValueError(
                f"Target '{self.name}' has precision {self.precision} with compute capability {', '.join(found)},"
                f" expected another: {why}. Remove {', '.join(found)}, or choose float16."
            )
        return self


class TensorRtTarget(_EngineTarget):
    """Classic TensorRT 10 or 11 (e.g. Jetson Orin): the engine belongs to the GPU and version that built it."""

    kind: Literal["tensorrt"] = "tensorrt"
    name: Slug = "tensorrt"
    """Folder and table name of this target; unique within a recipe."""
    version_compatible: bool = False
    """Let newer releases of TensorRT run the engine too (an engine of 10 also in 11); it can be slower."""
    hardware_compatible: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    """Let other GPUs run the engine: those of the same generation, or all from Ampere on; it can be slower."""


AnyTarget = OnnxRuntimeTarget | OpenVinoTarget | TensorRtRtxTarget | TensorRtTarget
