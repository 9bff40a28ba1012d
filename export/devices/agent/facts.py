"""What this device is, and which variant of a bundle fits it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from typing import Any, NamedTuple, Optional

from .errors import Refused

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt",),
    "openvino": ("openvino",),
}
FLAGS = {"avx2": "avx2", "avx512": "avx512f", "vnni": "vnni", "dot_product": "asimddp"}
"""Name in a statement -> what /proc/cpuinfo calls it (``vnni``: any flag that ends so)."""


class Choice(NamedTuple):
    """The variant that fits, and whether its engine must be built here first."""

    variant: dict[str, Any]
    rebuild: bool


def facts() -> dict[str, Any]:
    """What this device is; a fact that cannot be found out is None."""
    machine = platform.machine().lower()
    return {
        "isa": "arm" if machine.startswith(("arm", "aarch64")) else "x86",
        "system": f"{platform.system()}-{platform.machine()}".lower(),
        "cpu_features": _cpu_features(),
        "versions": {kind: version for kind in PACKAGES if (version := _version(kind))},
        "compute_capability": _compute_capability(),
        "memory_mib": _memory_mib(),
        "python": platform.python_version(),
    }


def _version(kind: str) -> Optional[str]:
    for package in PACKAGES[kind]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_features() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", file.read(), flags=re.MULTILINE)
    except OSError:
        found = None
    flags = set(found.group(1).split()) if found else set()
    return [name for name, flag in FLAGS.items() if flag in flags or any(each.endswith("_" + flag) for each in flags)]


def _compute_capability() -> Optional[str]:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"(\d+)\.(\d+)", done.stdout)
    return f"SM{found.group(1)}{found.group(2)}" if found else None


def _memory_mib() -> Optional[int]:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (OSError, ValueError):
        return None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is one of ``>=1.18,<2`` or ``==1.7.1.116``; what follows the numbers does not count."""
    have = _numbers(version)
    for each in wanted.split(","):
        found = re.fullmatch(r"\s*(==|>=|<=|<|>|!=)\s*([0-9][0-9.]*)\s*", each)
        if found is None:
            return False
        limit = _numbers(found.group(2))
        size = max(len(have), len(limit))
        left, right = (numbers + (0,) * (size - len(numbers)) for numbers in (have, limit))
        outcome = {
            **{"==": left == right, "!=": left != right, ">=": left >= right},
            **{"<=": left <= right, "<": left < right, ">": left > right},
        }
        if not outcome[found.group(1)]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, found.group(0).split("."))) if found else ()


def choose(statement: dict[str, Any], device: dict[str, Any]) -> Choice:
    """The first variant that fits; else the first whose engine may be built here from its ONNX file.

    Raises:
        Refused: none does; the text names every field that differs.
    """
    reasons = [differences(each, device) for each in statement["variants"]]
    for each, reason in zip(statement["variants"], reasons):
        if not reason:
            return Choice(each, rebuild=False)
    for each, reason in zip(statement["variants"], reasons):
        may_build = each["rebuild_from"] and each["runtime"] in device["versions"]
        if may_build and set(reason) <= {"runtime_versions", "compute_capability", "system"}:
            return Choice(each, rebuild=True)
    named = "; ".join(
        f"{each['id']}: "
        + ", ".join(f"{field} is {found}, expected {wanted}" for field, (found, wanted) in reason.items())
        for each, reason in zip(statement["variants"], reasons)
    )
    raise Refused("device", f"No variant of the bundle fits this device. {named}.")


def differences(variant: dict[str, Any], device: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field -> (what the device has, what the variant needs), for those that do not fit."""
    found: dict[str, tuple[Any, Any]] = {}
    version = device["versions"].get(variant["runtime"])
    if version is None or not satisfies(version, variant["runtime_versions"]):
        found["runtime_versions"] = (
            f"{variant['runtime']} {version}" if version else f"no {variant['runtime']}",
            variant["runtime_versions"],
        )
    for field in ("isa", "compute_capability", "system"):
        if variant[field] is not None and device[field] != variant[field]:
            found[field] = (device[field], variant[field])
    missing = [name for name in variant["cpu_features"] if name not in device["cpu_features"]]
    if missing:
        found["cpu_features"] = (device["cpu_features"], variant["cpu_features"])
    least, there = variant["min_memory_mib"], device["memory_mib"]
    if least is not None and there is not None and there < least:
        found["memory_mib"] = (there, f"at least {least}")
    return found
