"""An accepted run as it lies on the disk, and the keys, the trust and the order that bundles of it are made with."""

import hashlib
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle.build import Order
from export.bundle.trust import make_trust
from export.profiles import build_manifest
from export.targets import OnnxRuntimeTarget, TensorRtRtxTarget
from tests.export.made_up_run import make_run

A, B, C = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(3))
TRUST = make_trust([A.public_key(), B.public_key()], threshold=2)
CREATED = "2026-11-26T02:11:05Z"
ORDER = Order(seq=7, created=CREATED, keys=(A, B))
DIGEST = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("data", "residual", "outside")}


def put_target(run: Path, target, files: dict[str, bytes], **facts) -> None:
    """A target's folder, as a run leaves it."""
    place = run / "export" / target.name
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    manifest = build_manifest(target, {name: place / name for name in files}, {"recipe": run.parent.name, **facts})
    (place / "manifest.json").write_text(manifest.model_dump_json())


def put_engines(run: Path, source, target=None, student="student", generations=("SM86", "SM89")) -> None:
    """Engines as they are built on a machine that cannot run them; their bytes are made up."""
    target = target or TensorRtRtxTarget(name="rtx", precision="int8")
    described = json.loads(build_manifest(OnnxRuntimeTarget(), {"a.onnx": source.path}, {}).model_dump_json())
    graph = {key: described[key] for key in ("opset", "input", "output", "preprocessing", "class_names")}
    files = {}
    for generation in generations:
        about = {"backend_version": "1.7.1.116", "compute_capability": generation, "graph": graph}
        about |= {"onnx_sha256": source.sha256, "precision": "int8", "profile": {"images": [[1], [8], [32]]}}
        stem = f"{student}.rtx-{(generation or 'here').lower()}"
        files[f"{stem}.engine"] = f"an engine for {generation}, ".encode() * 100
        files[f"{stem}.json"] = json.dumps(about).encode()
    put_target(run, target, files)


def make_accepted(root: Path, exported) -> Path:
    run = make_run(root)
    lineage = [{"stage": "data", "name": "noise", "output": DIGEST["data"]}]
    lineage += [
        {"stage": "teacher_outputs", "name": name, "output": DIGEST["outside"]} for name in ("residual", "outside")
    ]
    lineage += [{"stage": "teacher", "name": "residual", "output": DIGEST["residual"]}]
    (run / "lineage.json").write_text(json.dumps(lineage))
    (run / "data.json").write_text(json.dumps({"sha256": DIGEST["data"]}))
    packages = {"torch": "2.14.1", "onnx": "1.23.2", "tensorrt": "not installed"}
    (run / "env.json").write_text(
        json.dumps({"python": "3.11.7", "packages": packages, "commit": "3f9c2a1" + "0" * 33})
    )
    (run / "model_card.md").write_text("# A card\n")
    registered = {"registered": {"model": "edge-classifier", "version": 3}, "mlflow_run": "abc"}
    (run / "summary.json").write_text(json.dumps(registered))
    graph = exported.float32.path.read_bytes()
    put_target(
        run,
        OnnxRuntimeTarget(name="cpu", precision="float32"),
        {"model.onnx": graph},
        accepted=True,
        file="student-float32",
    )
    put_target(run, OnnxRuntimeTarget(name="refused", precision="float32"), {"model.onnx": graph}, accepted=False)
    put_engines(run, exported.symmetric, student="student-float32")
    return run
