"""What a bundle says: the signed payload, docs/bundle.md field by field."""

import datetime as dt
import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from compression.types import Frozen, Preprocessing
from export.profiles import Digest
from export.targets import Isa

MAX_FILES, MAX_CONTENT, MAX_DEPTH = 256, (1 << 32) - 1, 4
"""Members, their bytes together (a ZIP archive without extensions holds no more), and parts of a path."""
PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
GOLDEN, PROVENANCE, SBOM, CARD = "golden.npz", "provenance.dsse.json", "sbom.cdx.json", "model_card.md"
MODEL_ENDS = (".onnx", ".engine", ".xml", ".bin")


def _is_time(text: str) -> str:
    dt.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    return text


Path_ = Annotated[str, StringConstraints(pattern=rf"^{PART}(/{PART}){{0,{MAX_DEPTH - 1}}}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Text = Annotated[str, StringConstraints(max_length=200)]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$"), AfterValidator(_is_time)]
_VERSION = r"(==|>=|<=|<|>|!=)[0-9][0-9.]*"
Versions = Annotated[str, StringConstraints(pattern=rf"^{_VERSION}(,{_VERSION})*$", max_length=200)]
Runtime = Literal["onnxruntime", "tensorrt_rtx", "tensorrt", "openvino"]
Size = PositiveInt
Open = Annotated[int, Field(ge=-1, le=-1)]
"""An open size; a literal would also take -1.0."""


class Content(Frozen):
    """The ZIP archive as a whole."""

    length: PositiveInt
    sha256: Digest


class Member(Frozen):
    """One file of the content."""

    path: Path_
    length: NonNegativeInt
    sha256: Digest


class Tolerance(Frozen):
    """``|found - golden| <= atol + rtol * |golden|`` for each number."""

    rtol: PositiveFloat
    atol: PositiveFloat


class Limits(Frozen):
    """What a device may take at batch 1; none: not limited."""

    warmup: NonNegativeInt | None
    runs: PositiveInt | None
    p50_ms: PositiveFloat | None
    p95_ms: PositiveFloat | None
    memory_mib: PositiveFloat | None
    startup_s: PositiveFloat | None


class Variant(Frozen):
    """One form of the model, and which devices it is for."""

    id: Name
    runtime: Runtime
    runtime_versions: Versions
    file: Path_
    isa: Isa | None
    cpu_features: tuple[Name, ...]
    compute_capability: Annotated[str, StringConstraints(pattern=r"^SM\d{2,3}$")] | None
    system: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.-]{1,64}$")] | None
    precision: Text
    batches: tuple[Annotated[int, Field(ge=1, le=1)], PositiveInt] | None
    min_memory_mib: PositiveFloat | None
    rebuild_from: Path_ | None
    temperature: PositiveFloat | None
    tolerance: Tolerance
    limits: Limits


class Input(Frozen):
    """What goes in; the batch is open."""

    name: Text
    dtype: Text
    shape: tuple[Open, Size, Size, Size]


class Output(Frozen):
    """What comes out; the batch is open."""

    name: Text
    dtype: Text
    shape: tuple[Open, Size]


class Lineage(Frozen):
    """Where the model comes from."""

    run: Text
    mlflow_run: Text | None
    recipe_sha256: Digest
    data_sha256: Digest
    teachers: dict[str, Digest]
    commit: Text | None
    flow_run: Text | None


class Statement(Frozen):
    """The payload of a bundle's envelope."""

    schema_: Annotated[int, Field(alias="schema", ge=1, le=1)] = 1
    kind: Literal["model"]
    name: Name
    version: Text
    seq: PositiveInt
    created: Time
    not_after: Time | None
    content: Content
    files: Annotated[tuple[Member, ...], Field(min_length=1, max_length=MAX_FILES)]
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    input: Input
    output: Output
    preprocessing: Preprocessing | None
    labels: tuple[Text, ...]
    golden: Path_
    lineage: Lineage

    @model_validator(mode="after")
    def _paths_are_safe(self) -> Self:
        paths = [each.path for each in self.files]
        if paths != sorted(paths):
            raise ValueError("files are not sorted by path")
        seen: set[str] = set()
        for path in paths:
            if path.lower() in seen:
                raise ValueError(f"path {path!r} is there twice, or differs from another in case alone")
            seen.add(path.lower())
        for path in paths:
            parts = path.lower().split("/")
            if inside := next((p for p in ("/".join(parts[:n]) for n in range(1, len(parts))) if p in seen), None):
                raise ValueError(f"path {path!r} lies in {inside!r}, which is a file")
        if sum(each.length for each in self.files) > MAX_CONTENT:
            raise ValueError(f"files have more than {MAX_CONTENT:,} bytes together")
        return self

    @model_validator(mode="after")
    def _names_are_there(self) -> Self:
        paths = {each.path for each in self.files}
        for variant in self.variants:
            for path in filter(None, (variant.file, variant.rebuild_from)):
                if path not in paths:
                    raise ValueError(f"variant {variant.id!r} needs {path!r}, which is not among the files")
        ids = [variant.id for variant in self.variants]
        if len(set(ids)) != len(ids):
            raise ValueError("two variants have the same id")
        if self.golden not in paths:
            raise ValueError(f"golden needs {self.golden!r}, which is not among the files")
        if self.labels and len(self.labels) != self.output.shape[1]:
            raise ValueError(f"there are {len(self.labels)} labels for {self.output.shape[1]} classes")
        if self.preprocessing is not None:
            counts = {len(self.preprocessing.mean), len(self.preprocessing.std)}
            if counts != {self.input.shape[1]}:
                raise ValueError(f"preprocessing has {sorted(counts)} channels, the input {self.input.shape[1]}")
        return self

    def models(self) -> tuple[Member, ...]:
        """The files a runtime loads."""
        return tuple(each for each in self.files if is_model(each.path))

    def member(self, path: str) -> Member:
        """One of the files, which has to be there."""
        return next(each for each in self.files if each.path == path)


def is_model(path: str) -> bool:
    """Whether a runtime loads a member."""
    return path.endswith(MODEL_ENDS)


def file_name(name: str, seq: int) -> str:
    """What a bundle is called."""
    return f"{name}-{seq}.edgepkg"


def seq_of(file: str, name: str) -> int | None:
    """The number in the name of a bundle of a model; None for other files."""
    found = re.fullmatch(rf"{re.escape(name)}-([1-9][0-9]*)\.edgepkg", file)
    return int(found.group(1)) if found else None
