"""A bundle from a run folder, or from an older bundle."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import ValidationError

from compression.errors import ExportError
from export.bundle import BundleError
from export.bundle.content import Measured, Source, describe, measure, whole
from export.bundle.envelope import canonical, first_problem
from export.bundle.golden import answers, dump_golden, golden_inputs, tolerance
from export.bundle.package import Package, write_package
from export.bundle.provenance import open_provenance, provenance_of, seal_provenance
from export.bundle.sbom import sbom_of
from export.bundle.statement import (
    CARD,
    GOLDEN,
    PROVENANCE,
    SBOM,
    Limits,
    Lineage,
    Statement,
    Variant,
    file_name,
    is_model,
    seq_of,
)
from export.bundle.trust import Trust
from export.latency import Timing
from export.profiles import Manifest, ManifestFile, read_manifest
from export.report.run_folder import RunFolder, open_run
from export.temperature import divides_by, temperature_of

WARMUP, RUNS = 20, 200
"""Calls at batch 1 a device leaves out, and times."""
LEAST_MS = 5.0
"""No limit is below: what calling a tiny model takes depends on the device more than on the model."""
LOADED = {"onnxruntime": ".onnx", "openvino": ".xml", "tensorrt_rtx": ".engine", "tensorrt": ".engine"}
"""Kind of target -> the file its runtime loads; OpenVINO finds the ``.bin`` beside it by its name."""
ORDER = ("tensorrt_rtx", "tensorrt", "openvino", "onnxruntime")


@dataclass(frozen=True)
class Order:
    """What whoever issues a bundle decides."""

    seq: int
    """Above every one before, for this name."""
    created: str
    """As 2026-01-31T02:11:05Z."""
    keys: Sequence[Ed25519PrivateKey]
    not_after: str | None = None
    margin: float = 3.0
    """A device may take this many times what was measured here; 0: as long as it likes."""
    rebuild: bool = False
    """Whether devices may build an engine themselves; the ONNX files it is built from then come along."""
    flow_run: str | None = None
    """Id of the flow run that made the run folder."""


@dataclass(frozen=True)
class Accepted:
    """A run that may be bundled."""

    run: RunFolder
    name: str
    version: str
    """Registered version, or ``unregistered``."""
    targets: tuple[tuple[Manifest, Path], ...]
    """Manifest and folder of each target that was not refused, accepted ones first."""


@dataclass(frozen=True)
class _Form:
    """A variant to be, and the graph that answers for it."""

    fields: Mapping[str, Any]
    """What of the variant is known from the files alone."""
    manifest: Manifest
    graph: Path | None
    """The ONNX file it was made from; none: that is not at hand."""
    timing: Timing | None

    @property
    def id(self) -> str:
        """Of the variant."""
        return str(self.fields["id"])


def accepted_run(folder: Path) -> Accepted:
    """What of a run folder can be bundled.

    Raises:
        BundleError: the run was not accepted, or nothing in it was.
    """
    run = open_run(folder)
    if run.verdict is None or run.verdict.outcome != "accept":
        found = run.verdict.outcome if run.verdict else "no verdict"
        raise BundleError(
            f"Run '{run.name}' has the verdict '{found}', expected 'accept'. Only an accepted model is bundled;"
            " report.html says why this one was not."
        )
    found = [
        (read_manifest(path.parent), path.parent) for path in sorted((run.path / "export").glob("*/manifest.json"))
    ]
    kept = [(manifest, place) for manifest, place in found if manifest.accepted is not False]
    kept.sort(key=lambda each: each[0].accepted is not True)
    if not kept or not kept[0][0].accepted:
        raise BundleError(f"Run '{run.name}' has no accepted file in 'export', expected one. Run the recipe again.")
    registered = _json(run.path / "summary.json").get("registered") or {}
    name = str(registered.get("model") or run.path.parent.name)
    return Accepted(run, name, str(registered.get("version") or "unregistered"), tuple(kept))


def next_seq(folder: Path, name: str, version: str = "") -> int:
    """One above the highest bundle of a name in a folder, or its registered version if that is higher."""
    found = [seq_of(path.name, name) or 0 for path in folder.glob("*.edgepkg")] if folder.is_dir() else []
    return max([1, *(seq + 1 for seq in found), *([int(version)] if version.isdecimal() else [])])


def build_bundle(
    accepted: Accepted, out: Path, order: Order, images: NDArray[Any], sources: Mapping[str, Path] | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Write the bundle of a run into a folder; returns the file, and what a reader should know about it.

    Args:
        accepted: The run.
        out: The folder.
        order: What whoever issues it decides.
        images: At least 8 real ones [N, C, H, W], normalised as the model sees them.
        sources: SHA-256 -> ONNX file with it, of the graphs that engines were built from, where they are at hand.

    Raises:
        BundleError: the order or the run does not make a bundle; the message says why.
    """
    _check_seq(out, accepted.name, order.seq)
    run, notes = accepted.run, list[str]()
    members, forms = _collect(accepted, sources or {}, order, notes)
    first = accepted.targets[0][0]
    inputs = golden_inputs(images, _shape(first))
    outputs = _golden(forms, inputs, notes)
    members[GOLDEN] = dump_golden(inputs, outputs)
    if (run.path / CARD).is_file():
        members[CARD] = whole(run.path / CARD)
    try:
        lineage = _lineage(run, order.flow_run)
        models = [each.member for each in measure({path: data for path, data in members.items() if is_model(path)})]
        recipe = str(first.recipe or run.path.parent.name)
        provenance = provenance_of(models, lineage, recipe=recipe, versions=_versions(run))
        members[PROVENANCE] = seal_provenance(provenance, order.keys)
        members[SBOM] = canonical(sbom_of(accepted.name, accepted.version, models, run.env, order.created))
        measured = measure(members)
        statement = Statement(
            kind="model",
            name=accepted.name,
            version=accepted.version,
            seq=order.seq,
            created=order.created,
            not_after=order.not_after,
            content=describe(measured),
            files=tuple(each.member for each in measured),
            variants=tuple(_variant(form, outputs, order.margin) for form in forms),
            input=first.input.model_dump(),  # type: ignore[arg-type]
            output=first.output.model_dump(),  # type: ignore[arg-type]
            preprocessing=first.preprocessing,
            labels=first.class_names,
            golden=GOLDEN,
            lineage=lineage,
        )
    except ValidationError as error:
        raise BundleError(
            f"Run '{run.name}' has {first_problem(error)}. Run the recipe again, or correct it."
        ) from error
    return _write(out, statement, measured, order.keys), tuple(notes)


def reissue(old: Package, out: Path, order: Order, trust: Trust) -> tuple[Path, tuple[str, ...]]:
    """Issue what an older bundle holds under a new number, so that devices go back to it.

    Members, limits and golden data stay as they are; the provenance is signed again, by the keys of today.

    Args:
        old: The older bundle.
        out: Where the new one goes.
        order: Its number, dates and keys.
        trust: With which the older one was checked.

    Raises:
        BundleError: the number is not a new one.
    """
    _check_seq(out, old.statement.name, order.seq)
    if order.seq <= old.statement.seq:
        raise BundleError(
            f"Bundle '{old.path.name}' has seq {old.statement.seq}, expected one below {order.seq}. Raise --seq."
        )
    members: dict[str, Source] = {each.path: old.piece(each.path) for each in old.statement.files}
    if PROVENANCE in members:
        provenance = open_provenance(old.read(PROVENANCE), trust, old.statement)
        members[PROVENANCE] = seal_provenance(provenance, order.keys)
    measured = measure(members)
    changes: dict[str, Any] = {"seq": order.seq, "created": order.created, "not_after": order.not_after}
    changes |= {"content": describe(measured), "files": tuple(each.member for each in measured)}
    statement = old.statement.model_copy(update=changes)
    note = f"It holds what {old.path.name} holds: version {statement.version}, run {statement.lineage.run}."
    return _write(out, statement, measured, order.keys), (note,)


def _write(out: Path, statement: Statement, measured: Sequence[Measured], keys: Sequence[Ed25519PrivateKey]) -> Path:
    path = out / file_name(statement.name, statement.seq)
    write_package(path, statement, measured, keys)
    return path


def _check_seq(out: Path, name: str, seq: int) -> None:
    lowest = next_seq(out, name)
    if seq < lowest:
        raise BundleError(
            f"Bundle '{file_name(name, seq)}' has seq {seq}, expected {lowest} or more: '{out}' holds higher ones, and"
            " devices take higher ones only. Raise --seq, or leave it out."
        )


def _collect(
    accepted: Accepted, sources: Mapping[str, Path], order: Order, notes: list[str]
) -> tuple[dict[str, Source], list[_Form]]:
    """The exported files by their path in the bundle, and the variants in the order in which devices try them."""
    main = accepted.targets[0][0]
    student = str(main.facts.get("file") or "").partition(".")[0]
    members: dict[str, Source] = {}
    forms: list[_Form] = []
    for manifest, place in accepted.targets:
        files = [each for each in manifest.files if _belongs(each, manifest, student, notes)]
        found = list(_forms(manifest, files, place, accepted, sources, order.rebuild))
        if not found:
            continue
        _fits(manifest, main)
        for each in files:
            members[f"models/{manifest.target}/{each.file}"] = whole(place / each.file)
        members[f"models/{manifest.target}/manifest.json"] = whole(place / "manifest.json")
        for form in found:
            if form.fields["rebuild_from"] is not None and form.graph is not None:
                members[form.fields["rebuild_from"]] = whole(form.graph)
        forms += found

    def tried(form: _Form) -> tuple[Any, ...]:
        manifest = form.manifest
        other = manifest.precision != main.precision
        free = (form.fields["compute_capability"] is None, manifest.isa is None, -len(manifest.cpu_features))
        return ORDER.index(manifest.kind), other, *free, form.id

    return members, sorted(forms, key=tried)


def _belongs(file: ManifestFile, manifest: Manifest, student: str, notes: list[str]) -> bool:
    """Whether a file is of the model that ships; what was not judged here may be of its rivals."""
    if not manifest.accepted and student and not file.file.startswith(f"{student}."):
        notes.append(f"{manifest.target}: left out {file.file}, which is not of {student}.")
        return False
    if manifest.kind == "tensorrt" and not manifest.compute_capabilities:
        notes.append(f"{manifest.target}: left out {file.file}: for which GPU generation it was built is not known.")
        return False
    return True


def _forms(
    manifest: Manifest,
    files: Sequence[ManifestFile],
    place: Path,
    accepted: Accepted,
    sources: Mapping[str, Path],
    rebuild: bool,
) -> Iterator[_Form]:
    if manifest.batches is not None and manifest.batches[0] != 1:
        raise BundleError(
            f"Target '{manifest.target}' has {manifest.batches[0]} as its smallest batch, expected 1: devices check one"
            " image after the other. Set min_batch: 1 in the recipe."
        )
    loaded = [each for each in files if each.file.endswith(LOADED[manifest.kind])]
    timing = _timing(accepted.run, manifest)
    for each in loaded:
        generation = each.compute_capability
        which = generation or (Path(each.file).stem if len(loaded) > 1 else None)
        is_graph = manifest.kind == "onnxruntime"
        graph = place / each.file if is_graph else _source(each, sources)
        if is_graph or not rebuild or graph is None:
            built_from = None
        else:
            built_from = f"models/{manifest.target}/source-{(each.source_sha256 or '')[:12]}.onnx"
        fields = {
            "id": re.sub(r"[^a-z0-9._-]", "-", "-".join(filter(None, (manifest.target, which))).lower()),
            "runtime": manifest.kind,
            "runtime_versions": manifest.runtime_versions,
            "file": f"models/{manifest.target}/{each.file}",
            "isa": manifest.isa,
            "cpu_features": manifest.cpu_features,
            "compute_capability": generation,
            "system": manifest.system,
            "precision": manifest.precision,
            "rebuild_from": built_from,
        }
        yield _Form(fields, manifest, graph, timing)


def _source(file: ManifestFile, sources: Mapping[str, Path]) -> Path | None:
    path = sources.get(file.source_sha256 or "")
    if path is not None and hashlib.sha256(path.read_bytes()).hexdigest() != file.source_sha256:
        raise BundleError(f"Graph '{path}' has other bytes than {file.file} was built from. Leave it out.")
    return path


def _fits(manifest: Manifest, main: Manifest) -> None:
    """Refuse targets that are fed or answer in different ways: a bundle says it once."""
    for field in ("input", "output", "preprocessing", "class_names"):
        if getattr(manifest, field) != getattr(main, field):
            raise BundleError(
                f"Target '{manifest.target}' has another {field} than '{main.target}', expected the same. Export them"
                " in one run."
            )


def _shape(manifest: Manifest) -> tuple[int, int, int]:
    if len(manifest.input.shape) != 4 or manifest.input.dtype != "float32":
        raise BundleError(
            f"Target '{manifest.target}' has the input {manifest.input.dtype} {list(manifest.input.shape)}, expected"
            " float32 images [-1, C, H, W]. Only image classifiers are bundled."
        )
    _, channels, height, width = manifest.input.shape
    return channels, height, width


def _golden(forms: Sequence[_Form], inputs: NDArray[np.float32], notes: list[str]) -> dict[str, NDArray[np.float32]]:
    """Answers by variant, of the graph it was made from; of the accepted file where that is not at hand."""
    known: dict[Path, NDArray[np.float32]] = {}
    main = next(form for form in forms if form.manifest.accepted and form.graph is not None)
    outputs: dict[str, NDArray[np.float32]] = {}
    for form in forms:
        graph = form.graph or main.graph
        if graph is None:
            raise BundleError(f"Variant '{form.id}' has no graph to answer for it, expected one. Export it again.")
        if graph not in known:
            known[graph] = answers(graph, inputs)
        if form.graph is None:
            notes.append(
                f"{form.id}: the graph it was built from is not at hand, so a device compares it with the answers of"
                f" {main.id}, within wide limits."
            )
        outputs[form.id] = known[graph]
    return outputs


def _variant(form: _Form, outputs: Mapping[str, NDArray[np.float32]], margin: float) -> Variant:
    """What a device is told of a form: how to read its answers, how far they may be off, how long they may take."""
    manifest, left = form.manifest, None
    if form.graph is not None and (temperature := temperature_of(form.graph)) is not None:
        left = temperature / divides_by(form.graph)
    return Variant(
        **form.fields,
        batches=manifest.batches,  # type: ignore[arg-type]
        min_memory_mib=_mib(form.timing.peak_rss_bytes) if form.timing is not None else None,
        temperature=left,
        tolerance=tolerance(outputs[form.id], manifest.precision, same_form=form.graph is not None),
        limits=_limits(form.timing, margin),
    )


def _timing(run: RunFolder, manifest: Manifest) -> Timing | None:
    """What was measured of a target's file at batch 1."""
    if run.latency is None or not manifest.accepted:
        return None
    try:
        return run.latency.row(str(manifest.facts.get("file")), 1)
    except ExportError:
        return None


def _limits(timing: Timing | None, margin: float) -> Limits:
    """What a device may take; how long a start takes there is not measured here."""
    if timing is None or margin <= 0:
        return Limits.model_validate(dict.fromkeys(Limits.model_fields))
    return Limits(
        warmup=WARMUP,
        runs=RUNS,
        p50_ms=round(max(timing.latency_p50_ms * margin, LEAST_MS), 6),
        p95_ms=round(max(timing.latency_p95_ms * margin, LEAST_MS), 6),
        memory_mib=_mib(timing.peak_rss_bytes, margin),
        startup_s=None,
    )


def _mib(size_bytes: float | None, factor: float = 1.0) -> float | None:
    """Whole MiB, rounded up; what was not measured stays so."""
    return None if size_bytes is None else float(math.ceil(size_bytes * factor / 2**20))


def _lineage(run: RunFolder, flow_run: str | None) -> Lineage:
    recipe = run.path / "recipe.resolved.yaml"
    teachers = {
        row["name"]: row["output"]
        for stage in ("teacher_outputs", "teacher")  # a teacher that is only known by its answers has but these
        for row in run.lineage
        if row.get("stage") == stage
    }
    commit = str(run.env.get("commit") or "")
    return Lineage(
        run=run.path.name,
        mlflow_run=_json(run.path / "summary.json").get("mlflow_run"),
        recipe_sha256=hashlib.sha256(recipe.read_bytes()).hexdigest() if recipe.is_file() else "",
        data_sha256=str(run.data.get("sha256")),
        teachers=teachers,
        commit=commit if re.fullmatch(r"[0-9a-f]{7,40}", commit) else None,
        flow_run=flow_run,
    )


def _versions(run: RunFolder) -> dict[str, str]:
    packages = {str(name): str(found) for name, found in (run.env.get("packages") or {}).items()}
    return {name: found for name, found in packages.items() if found != "not installed"}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
