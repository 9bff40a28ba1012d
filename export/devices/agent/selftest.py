"""Does the model of a slot work on this device? Asked in a process of its own, which may crash, hang or eat memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .errors import Failed
from .model import Model, chosen

STARTUP_SECONDS = 60.0
"""Until the model is loaded, where the statement sets no limit."""


def try_out(slot: Path, threads: int = 0) -> dict[str, Any]:
    """What was measured: p50_ms, p95_ms, memory_mib, load_s, max_abs.

    Raises:
        Failed: it crashed, took too long, answers otherwise than it should, is too slow or too large.
    """
    limits = chosen(slot)[0]["limits"]
    seconds = (limits["startup_s"] or STARTUP_SECONDS) + 30.0
    command = [sys.executable, "-m", __name__, str(slot), str(threads)]
    here = str(Path(__file__).resolve().parents[__name__.count(".")])
    places = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": places}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Failed("hang", f"The self-test has not ended after {seconds:.0f} s, expected it to.") from None
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise Failed("crash", f"The self-test was ended by {name}, expected an answer.")
    try:
        found = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        tail = " ".join(err.split())[-400:]
        raise Failed("crash", f"The self-test ended with exit code {process.returncode}: {tail}") from None
    found["seconds"] = round(time.monotonic() - started, 3)
    if found.get("code"):
        raise Failed(found["code"], found["text"])
    for field, unit in (("p50_ms", "ms"), ("p95_ms", "ms"), ("memory_mib", "MiB"), ("load_s", "s")):
        limit = limits["startup_s"] if field == "load_s" else limits[field]
        if limit is not None and found[field] > limit:
            raise Failed("limit", f"{field} is {found[field]:.3f} {unit}, expected at most {limit:g}.")
    return found


def measure(slot: Path, threads: int) -> dict[str, Any]:
    """Load the model, compare its answers with the golden ones, time it. Called in the process of its own."""
    import numpy as np

    before, started = _peak_mib(), time.monotonic()
    model = Model(slot, threads)
    load = time.monotonic() - started
    statement, variant = model.statement, model.variant
    with np.load(slot / statement["golden"], allow_pickle=False) as golden:
        inputs, wanted = golden["inputs"], golden[f"outputs-{variant['id']}"]
    outputs = np.concatenate([model.run(each[None]) for each in inputs])
    if outputs.shape != wanted.shape:
        return _bad("shape", f"It answers in shape {list(outputs.shape)}, expected {list(wanted.shape)}.")
    if not np.isfinite(outputs).all():
        return _bad("not finite", "It answers with values that are no finite numbers.")
    tolerance = variant["tolerance"]
    difference = float(np.abs(outputs - wanted).max())
    if not np.allclose(outputs, wanted, rtol=tolerance["rtol"], atol=tolerance["atol"]):
        return _bad("golden", f"Its answers differ by up to {difference:.4g} from the golden ones, more than allowed.")
    if (outputs.argmax(axis=1) != wanted.argmax(axis=1)).any():
        return _bad("golden", "It chooses another class than the golden answer for at least one input.")
    limits, one, times = variant["limits"], inputs[:1], []
    for number in range(int(limits["warmup"] or 5) + int(limits["runs"] or 50)):
        began = time.perf_counter()
        model.run(one)
        if number >= int(limits["warmup"] or 5):
            times.append(1000 * (time.perf_counter() - began))
    return {
        **{"p50_ms": float(np.percentile(times, 50)), "p95_ms": float(np.percentile(times, 95)), "load_s": load},
        **{"memory_mib": _peak_mib() - before, "max_abs": difference, "variant": variant["id"]},
    }


def _bad(code: str, text: str) -> dict[str, Any]:
    return {"code": code, "text": text}


def _peak_mib() -> float:
    """Most memory this program ever had; what getrusage says counts the process that started it, too."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(file.read().partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
