"""Bundles written by hand, byte by byte as docs/bundle.md says: right ones, and wrong ones signed by a trusted key."""

import base64
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

KIND = "application/vnd.stillhouse.edgepkg.v1+json"


def key(number: int = 1) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def public(private: Ed25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def key_id(private: Ed25519PrivateKey) -> str:
    return hashlib.sha256(public(private)).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def trust(*keys: Ed25519PrivateKey, threshold: int = 1, version: int = 1) -> dict[str, Any]:
    names = {key_id(each): base64.b64encode(public(each)).decode() for each in keys or (key(),)}
    return {"version": version, "threshold": threshold, "keys": names}


def envelope(payload: Any, *keys: Ed25519PrivateKey, kind: str = KIND) -> bytes:
    body = payload if isinstance(payload, bytes) else canonical(payload)
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)
    rows = [
        {"keyid": key_id(each), "sig": base64.b64encode(each.sign(message)).decode()}
        for each in sorted(keys or (key(),), key=key_id)
    ]
    return canonical({"payload": base64.b64encode(body).decode(), "payloadType": kind, "signatures": rows})


def net(weights: np.ndarray) -> bytes:
    """An ONNX file: images [N, 1, 4, 4] -> logits [N, 3]."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "net", [images], [logits], [numpy_helper.from_array(weights, "weights")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def members(seed: int = 0, padding: int = 0) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    weights = random.normal(size=(16, 3)).astype(np.float32)
    inputs = random.normal(size=(11, 1, 4, 4)).astype(np.float32)
    golden = io.BytesIO()
    np.savez(golden, inputs=inputs, **{"outputs-cpu": inputs.reshape(11, 16) @ weights})
    found = {"model.onnx": net(weights), "golden.npz": golden.getvalue(), "sbom.cdx.json": b"{}"}
    return found | ({"engines/padding.bin": random.bytes(padding)} if padding else {})


def archive(files: Mapping[str, bytes], **options: Any) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as written:
        for name in sorted(files):
            written.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), files[name], **options)
    return content.getvalue()


def statement(files: Mapping[str, bytes], content: bytes, **changes: Any) -> dict[str, Any]:
    variant = {
        **{"id": "cpu", "runtime": "onnxruntime", "runtime_versions": ">=1.18,<3", "file": "model.onnx", "isa": None},
        **{"cpu_features": [], "compute_capability": None, "system": None, "precision": "float32"},
        **{"min_memory_mib": None, "rebuild_from": None, "batches": None, "temperature": None},
        "tolerance": {"rtol": 1e-4, "atol": 1e-4},
        "limits": {"warmup": 1, "runs": 5, "p50_ms": 1000, "p95_ms": 1000, "memory_mib": 4000, "startup_s": 30},
    }
    rows = [
        {"path": name, "length": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in sorted(files)
    ]
    return {
        **{"schema": 1, "kind": "model", "name": "digits", "version": "1", "seq": 1, "not_after": None},
        **{"created": "2026-01-31T02:11:05Z", "files": rows, "variants": [variant], "labels": ["a", "b", "c"]},
        "content": {"length": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "input": {"name": "images", "dtype": "float32", "shape": [-1, 1, 4, 4]},
        "output": {"name": "logits", "dtype": "float32", "shape": [-1, 3]},
        **{"preprocessing": None, "lineage": {}, "golden": "golden.npz"},
        **changes,
    }


def write(
    path: Path,
    files: Mapping[str, bytes] | None = None,
    *,
    content: bytes | None = None,
    keys: tuple[Ed25519PrivateKey, ...] = (),
    change: Callable[[dict[str, Any]], Any] = lambda said: None,
    **changes: Any,
) -> Path:
    """A bundle; ``changes`` replace fields of its statement, ``change`` edits it, before it is signed."""
    files = members() if files is None else files
    content = archive(files) if content is None else content
    said = statement(files, content, **changes)
    change(said)
    signed = envelope(said, *keys)
    path.write_bytes(b"EDGEPKG1" + len(signed).to_bytes(4, "big") + signed + content)
    return path


def check_net(data: bytes) -> None:
    onnx.checker.check_model(onnx.load_model_from_string(data))
