"""What devices reported of a bundle: a run in MLflow, tags of the model's versions, points of the latency model.

All of it may be done again with what is known by then: nothing is there twice. What this MLflow does not know, or this
machine does not have, is a line in the log, never an error: the bundle may have been made elsewhere.
"""

import csv
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from compression.checkpoint import load_checkpoint
from compression.errors import InputError, StillhouseError
from export.bundle.build import accepted_run
from export.bundle.statement import Statement
from export.devices.registry import PHASES, DeviceEntry, Rollout
from export.devices.rollout import BAD, GOOD, Placement
from export.latency_model import DevicePoint, add_points, operators_in_blocks
from tasks import registry, tracking
from tasks.artifacts import Artifact, Store
from tasks.registry import Version
from tasks.settings import settings
from tasks.stage import stage_lock

logger = logging.getLogger(__name__)

DEVICES = "devices"
"""Tag of a version: device -> seq, sha256, p50_ms, as JSON; ``devices.2`` and so on go on where there are many."""
PER_TAG = 50  # MLflow took 5,000 characters per tag for a long time
MEASURED = ("p50_ms", "p95_ms", "memory_mib", "max_abs")
COLUMNS: tuple[str, ...] = ("device", "outcome", "reason", "variant", *MEASURED, "load_s", "facts")

Report = Mapping[str, Any]


def record(
    statement: Statement,
    rollout: Rollout,
    reports: Sequence[Report],
    devices: Sequence[DeviceEntry],
    placements: Sequence[Placement] = (),
) -> str | None:
    """Write down where a rollout stands: a child of the recipe's run, and which device runs which version.

    The child is one for each rollout. It is RUNNING until the rollout ends, then FINISHED, or FAILED when it was
    aborted.

    Args:
        statement: What the bundle says.
        rollout: As it is now.
        reports: All that the devices reported, oldest first; those of other bundles say what a device went back to.
        devices: As the registry has them now; those of whom no report is given stay at the version they are at.
        placements: The rollout's devices, to tell those that are silent from those that were not asked.

    Returns:
        The id of the child; None where MLflow does not know the recipe's run.

    Raises:
        ArtifactError: the store of MLflow does not answer.
    """
    if not _mlflow_is_there():
        logger.warning("MLflow has no store at '%s': nothing is written down there.", settings().tracking_uri)
        return None
    _tag_versions(statement, reports, devices)
    parent = statement.lineage.mlflow_run
    if parent is None or not _is_known(parent):
        logger.warning(
            "Rollout of %s %d is not written down in MLflow, which does not know its run '%s'.",
            *(statement.name, statement.seq, parent),
        )
        return None
    rows = _rows(rollout, reports, devices, placements)
    params = {"rollout": rollout.id, "model": rollout.model, "version": statement.version, "seq": rollout.seq}
    params |= {"bundle_sha256": statement.content.sha256, "policy": rollout.policy}
    name = f"{rollout.model}-{rollout.seq}"
    with (
        stage_lock(f"deploy-{rollout.id}", f"deploy '{name}'"),
        tracking.stage_run(tracking.Run(parent), stage="deploy", name=name, key=rollout.id, params=params) as run,
    ):
        run.tag({"rollout": rollout.id, "rollout.state": rollout.state, "rollout.reason": rollout.reason})
        known = tracking.client().get_run(run.id).data.metrics
        log = tracking.Run(run.id).log_metrics
        log({key: value for key, value in _measurements(rows).items() if key not in known})
        step = sum(_is_of(report, rollout) for report in reports)
        log({key: value for key, value in _summary(rows).items() if known.get(key) != value}, step=step)
        with tempfile.TemporaryDirectory() as folder:
            run.log_file(_table(Path(folder) / "devices.csv", rows))
    if rollout.state == "aborted":
        run.finish("FAILED")
    elif rollout.state != "done":
        tracking.client().update_run(run.id, status="RUNNING")
    return run.id


def running_on(name: str) -> dict[int, list[str]]:
    """Version of a model -> the devices that run it; versions that no device runs are left out."""
    found = {version.version: sorted(_devices_of(version)) for version in registry.versions(name)}
    return {version: devices for version, devices in found.items() if devices}


def forget(device: str) -> int:
    """Take a device that is no longer one of ours away from all versions; how many named it.

    Raises:
        ArtifactError: the store of MLflow does not answer.
    """
    if not _mlflow_is_there():
        return 0
    count = 0
    for name in registry.names():
        with registry.locked(name):
            for version in registry.versions(name):
                devices = _devices_of(version)
                if devices.pop(device, None) is not None:
                    _write(version, devices)
                    count += 1
    return count


def feed_latency(statement: Statement, reports: Sequence[Report], devices: Sequence[DeviceEntry]) -> int:
    """Add what devices measured of a bundle to the points of the latency model; how many were not known.

    The network is read from the student's checkpoint: a bundle whose run or store is not on this machine adds nothing.
    """
    variants = {each.id: each for each in statement.variants}
    good = [
        report
        for report in reports
        if report.get("phase") == "committed"
        and report.get("sha256") == statement.content.sha256
        and report.get("variant") in variants
        and report.get("p50_ms") is not None
    ]
    if not good:
        return 0
    try:
        model, spec = load_checkpoint(_student(statement))
    except StillhouseError as error:
        logger.warning("Bundle %s %d adds nothing to the latency model: %s", statement.name, statement.seq, error)
        return 0
    operators = operators_in_blocks(model, spec.input_shape)
    facts = {each.id: each.facts for each in devices}
    points = []
    for report in good:
        variant = variants[report["variant"]]
        try:
            point = DevicePoint(
                device=report["device"],
                facts=facts.get(report["device"], {}),
                model=statement.name,
                seq=statement.seq,
                model_sha256=statement.member(variant.file).sha256,
                variant=variant.id,
                runtime=variant.runtime,
                precision=variant.precision,
                input_shape=spec.input_shape,
                operators=operators,
                p50_ms=report["p50_ms"],
            )
        except ValidationError as error:
            logger.warning("Report '%s' adds nothing to the latency model: %s", report.get("key"), error)
            continue
        points.append(point)
    locks = settings().home_dir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "latency-devices.lock"):
        return add_points(settings().home_dir / "latency", points)


def _student(statement: Statement) -> Path:
    """The checkpoint of the network in a bundle, verified.

    Raises:
        InputError: the run folder is not here, or not that of an accepted run.
        ArtifactError: the checkpoint is no longer in the store.
    """
    folder = settings().runs_dir / statement.name / statement.lineage.run
    if not folder.is_dir():
        raise InputError(f"Run folder '{folder}' is not on this machine, expected the run that the bundle was made of.")
    accepted = accepted_run(folder)
    student = str(accepted.targets[0][0].facts.get("file") or "").partition(".")[0]
    made = {row["stage"]: row for row in accepted.run.lineage if row.get("name") == student}
    row = made.get("sparsify") or made.get("distill")
    if row is None:
        raise InputError(f"Run '{accepted.run.name}' has no training of '{student}' in its lineage, expected one.")
    artifact = Artifact(kind="checkpoint", sha256=row["output"], size_bytes=row["size_bytes"])
    return Store(settings().store_dir).open(artifact)


# --- the rollout's run ---


def _mlflow_is_there() -> bool:
    """Whether there is a store: asking for one that is not there would make it."""
    uri = settings().tracking_uri
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def _is_known(run_id: str) -> bool:
    wanted = f"attributes.run_id = '{run_id}'"
    return run_id.isalnum() and bool(tracking.client().search_runs([tracking.experiment_id()], wanted))


def _is_of(report: Report, rollout: Rollout) -> bool:
    same = (report.get("name"), report.get("seq")) == (rollout.model, rollout.seq)
    return same and report.get("phase") in PHASES


def _rows(
    rollout: Rollout, reports: Iterable[Report], devices: Sequence[DeviceEntry], placements: Sequence[Placement]
) -> list[dict[str, Any]]:
    """One row for each device of the rollout, by name."""
    last: dict[str, Report] = {}
    measured: dict[str, Report] = {}
    for report in reports:
        if _is_of(report, rollout):
            last[report["device"]] = report
            if report["phase"] == "committed":
                measured[report["device"]] = report
    facts = {each.id: each.facts for each in devices}
    placed = {each.device: each.outcome for each in placements}
    rows = []
    for name in sorted(placed or facts.keys() | last.keys()):
        report, found = last.get(name, {}), measured.get(name, {})
        row: dict[str, Any] = {column: _number(found.get(column)) for column in (*MEASURED, "load_s")}
        row |= {"device": name, "facts": facts.get(name, {}), "reason": report.get("text") or ""}
        row |= {"variant": found.get("variant")}
        row["outcome"] = PHASES[report["phase"]] if report else placed.get(name, "no report")
        rows.append(row)
    return rows


def _number(value: Any) -> float | None:
    """What a device says it measured, if it is a number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _measurements(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of each device."""
    return {f"{key}.{row['device']}": row[key] for row in rows for key in MEASURED if row[key] is not None}


def _summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of all devices together; times of those that run it."""
    outcomes = [row["outcome"] for row in rows]
    found = {"devices_good": float(sum(each in GOOD for each in outcomes))}
    found["devices_failed"] = float(sum(each in BAD for each in outcomes))
    times = [row["p50_ms"] for row in rows if row["outcome"] in GOOD and row["p50_ms"] is not None]
    return found | ({"p50_ms_median": median(times), "p50_ms_max": max(times)} if times else {})


def _table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "facts": json.dumps(row["facts"], sort_keys=True)} for row in rows)
    return path


# --- which device runs what ---


def _tag_versions(statement: Statement, reports: Sequence[Report], devices: Sequence[DeviceEntry]) -> None:
    """Write devices that reported at the versions that they run, and take them away from all others, of any model."""
    told = {report["device"] for report in reports}
    now = {device.id: _running(device, reports) for device in devices if device.id in told}
    unknown = {(str(each["name"]), str(each["version"])) for each in now.values() if each}
    for name in registry.names():
        with registry.locked(name):
            for version in registry.versions(name):
                place = (name, str(version.version))
                unknown.discard(place)
                if place == (statement.name, statement.version) and not _is_in(statement, version):
                    logger.warning("Version %s of '%s' in MLflow is another model than the bundle's.", place[1], name)
                    continue
                before = _devices_of(version)
                here = {device: entry for device, entry in before.items() if device not in now}
                for device, active in now.items():
                    if active and place == (active["name"], str(active["version"])):
                        here[device] = _entry(active, reports, device, before.get(device, {}))
                _write(version, here)
    for name, version in sorted(unknown):
        logger.warning("MLflow has no version '%s' of model '%s', which devices run: it gets no tag.", version, name)


def _running(device: DeviceEntry, reports: Iterable[Report]) -> Mapping[str, Any] | None:
    """What a device runs: what it said last, unless it has gone back from that since."""
    mine = [each for each in reports if each["device"] == device.id and each["phase"] in ("committed", "rolled back")]
    last = {each.get("sha256"): each["phase"] for each in mine}
    if device.active and last.get(device.active.get("sha256")) != "rolled back":
        return device.active
    good = [each for each in mine if each["phase"] == "committed" and last[each.get("sha256")] == "committed"]
    return good[-1] if good else None


def _entry(
    active: Mapping[str, Any], reports: Iterable[Report], device: str, before: Mapping[str, Any]
) -> dict[str, Any]:
    """What a tag says of a device; the time of an earlier tag where the reports given here do not have it."""
    sha256 = str(active["sha256"])
    p50_ms = before.get("p50_ms") if before.get("sha256") == sha256[:12] else None
    for report in reports:
        if report["device"] == device and report.get("sha256") == sha256:
            p50_ms = _number(report.get("p50_ms", p50_ms))
    return {"seq": active["seq"], "sha256": sha256[:12], "p50_ms": p50_ms}


def _is_in(statement: Statement, version: Version) -> bool:
    """Whether the registered file is one of the bundle's; the number alone could be that of another server."""
    return version.tags.get("sha256") in {each.sha256 for each in statement.models()}


def _is_part(key: str) -> bool:
    return key == DEVICES or key.startswith(f"{DEVICES}.")


def _devices_of(version: Version) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, text in version.tags.items():
        if _is_part(key):
            found |= json.loads(text)
    return found


def _write(version: Version, devices: Mapping[str, Mapping[str, Any]]) -> None:
    names = sorted(devices)
    parts = [names[start : start + PER_TAG] for start in range(0, len(names), PER_TAG)]
    wanted = {
        DEVICES if number == 1 else f"{DEVICES}.{number}": json.dumps({name: devices[name] for name in part})
        for number, part in enumerate(parts, start=1)
    }
    registry.tag(version, wanted)
    for key in [key for key in version.tags if _is_part(key) and key not in wanted]:
        tracking.client().delete_model_version_tag(version.name, str(version.version), key)
