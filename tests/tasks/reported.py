"""A run that was accepted, its bundle, and a fleet that reports on it: what devices send back is tested with it."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compression.checkpoint import save_checkpoint
from compression.models import ModelSpec
from compression.types import Preprocessing
from compression.zoo import ResidualCnn
from export.bundle.build import accepted_run, build_bundle
from export.bundle.package import open_package
from export.bundle.statement import Statement
from export.bundle.trust import dump_trust
from export.devices.agent.device import Device
from export.devices.registry import DeviceEntry, Registry, Rollout
from export.devices.rollout import RolloutPolicy
from export.latency_model import OnnxRuntimeClock, build_latency_model
from export.onnx_graph import to_onnx
from export.targets import OnnxRuntimeTarget
from tasks import feedback, registry, tracking
from tasks.artifacts import Artifact, Store
from tasks.settings import settings
from tests.export.bundle.accepted import DIGEST, ORDER, TRUST, put_target
from tests.export.made_up_run import make_run
from tests.export.test_latency_on_device import Sized
from tests.flows.registered import add_version

SHAPE = (1, 8, 8)
MODEL = "edge-classifier"
STUDENT = "student-float32"
NETS = 12


class Lab:
    """A run that was accepted and registered, its bundle, and what a real agent reported when it took it."""

    def __init__(self, root: Path) -> None:
        Store(settings().store_dir).prepare()
        self.net = ResidualCnn(widths=(16, 16), depths=(1, 1), strides=(1, 2), stem_width=16).build(4, SHAPE).eval()
        with tracking.recipe_run(MODEL, {"recipe": {"name": MODEL}}, {}) as parent:
            self.parent = parent.id
        self.run = make_run(root)
        graph = to_onnx(
            self.net,
            root / "model.onnx",
            input_shape=SHAPE,
            metadata={"class_names": '["a", "b", "c", "d"]'},
            fast=True,
        )
        for version in (1, 2, 3):
            assert add_version(MODEL, sha256=graph.sha256) == version
        self.checkpoint = self._kept()
        made = {"stage": "distill", "name": STUDENT, "output": self.checkpoint.sha256}
        lineage = [{"stage": "data", "name": "d", "output": DIGEST["data"]}, {**made, "size_bytes": 1}]
        (self.run / "lineage.json").write_text(json.dumps(lineage))
        (self.run / "data.json").write_text(json.dumps({"sha256": DIGEST["data"]}))
        registered = {"registered": {"model": MODEL, "version": 1}, "mlflow_run": self.parent}
        (self.run / "summary.json").write_text(json.dumps(registered))
        target = OnnxRuntimeTarget(name="cpu", precision="float32")
        put_target(self.run, target, {"model.onnx": graph.path.read_bytes()}, accepted=True, file=f"{STUDENT}.float32")
        images = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype(np.float32)
        order = replace(ORDER, seq=1, margin=0.0)
        self.bundle, _ = build_bundle(accepted_run(self.run), root / "out", order, images)
        self.statement = open_package(self.bundle, TRUST).statement
        (root / "agent" / "slots").mkdir(parents=True)
        (root / "agent" / "config.json").write_text('{"device": "lab-1"}')
        (root / "agent" / "trust.json").write_bytes(dump_trust(TRUST))
        agent = Device(root / "agent")
        self.report = agent.install(self.bundle)
        self.status = agent.status()

    def _kept(self) -> Artifact:
        spec = ModelSpec(
            model=ResidualCnn(widths=(16, 16), depths=(1, 1), strides=(1, 2), stem_width=16),
            num_classes=4,
            input_shape=SHAPE,
            class_names=("a", "b", "c", "d"),
            preprocessing=Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)),
        )
        with Store(settings().store_dir).put("checkpoint") as draft:
            save_checkpoint(self.net, spec, draft.folder)
        return draft.done()


class Fleet:
    """Devices in a real registry of devices, and the rollouts to them."""

    def __init__(self, folder: Path, lab: Lab, count: int = 3) -> None:
        self.lab = lab
        self.registry = Registry(f"sqlite:///{folder / 'devices.db'}")
        self.names = [f"lab-{number}" for number in range(1, count + 1)]
        for name in self.names:
            self.registry.add(DeviceEntry(id=name, transport="pull"))
            self.registry.seen(name, {"facts": self.lab.status["facts"]})

    def bundle(self, seq: int, version: str | None = None) -> Statement:
        """What another bundle of the same model says."""
        content = self.lab.statement.content.model_copy(update={"sha256": f"{seq:02d}" * 32})
        changes = {"seq": seq, "version": version or str(seq), "content": content}
        return self.lab.statement if seq == 1 else self.lab.statement.model_copy(update=changes)

    def start(self, statement: Statement) -> Rollout:
        made = {"bundle": "x.edgepkg", "policy": RolloutPolicy(canary=1)}
        return self.registry.start(model=statement.name, seq=statement.seq, **made)

    def says(self, name: str, statement: Statement, phase: str = "committed", **more: Any) -> None:
        """The report that the agent made, from another device or about another bundle."""
        told = {key: value for key, value in self.lab.report.items() if phase == "committed" or key != "p50_ms"}
        told |= {
            "device": name,
            "name": statement.name,
            "phase": phase,
            "seq": statement.seq,
            "version": statement.version,
        }
        told |= {"sha256": statement.content.sha256, "key": f"{name}/{statement.name}/{statement.seq}/{phase}"}
        assert self.registry.receive({**told, **more})

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report for name in self.names for report in self.registry.reports(name)]

    def record(self, statement: Statement, rollout: Rollout) -> str | None:
        now, placed = self.registry.rollout(rollout.id), self.registry.placements(rollout.id)
        return feedback.record(statement, now, self.reports, self.registry.devices(), placed)


def forget() -> None:
    """Take the tags of devices off all versions."""
    for version in registry.versions(MODEL):
        feedback._write(version, {})
    assert feedback.running_on(MODEL) == {}


def run_of(rollout: Rollout) -> Any:
    (found,) = tracking._search({"stage_key": rollout.id})
    return found


def history(run_id: str) -> dict[str, list[tuple[int, float, int]]]:
    metrics = tracking.client().get_run(run_id).data.metrics
    return {
        key: [(each.step, each.value, each.timestamp) for each in tracking.client().get_metric_history(run_id, key)]
        for key in metrics
    }


def table(run_id: str, folder: Path) -> dict[str, dict[str, str]]:
    path = tracking.client().download_artifacts(run_id, "devices.csv", str(folder))
    with Path(path).open(newline="", encoding="utf-8") as file:
        return {row["device"]: row for row in csv.DictReader(file)}


def table_here() -> Any:
    """A table of this machine, without the minute it takes to measure one."""
    clock = Sized(SHAPE, dict(OnnxRuntimeClock(SHAPE, batch=1).facts))
    return build_latency_model(SHAPE, batch=1, folder=settings().home_dir / "latency", nets=NETS, clock=clock)
