"""What an installation costs, and what it withstands: each part is a claim of docs/devices.md with its bar.

    .venv/bin/python benchmarks/deployment.py install rollback swap serving mutants cuts links fleet size
    .venv/bin/python benchmarks/deployment.py cuts --step 10 --json deployment.json

Devices, servers and bundles are real and lie in a folder that is deleted; the model has ``--megabytes``. The machinery
of kills, power cuts and cut links is that of the tests. ``cuts`` needs root, strace and loop devices. Without a name
of a part all are run: about an hour on 2 cores. Exit code 1: a bar was missed.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from export.devices.agent import durable, package, pull, selftest  # noqa: E402
from export.devices.agent.device import Device  # noqa: E402
from export.devices.agent.errors import Failed, Refused  # noqa: E402
from tests.export.devices import cuts, test_agent_cuts  # noqa: E402
from tests.export.devices import made_up_bundle as made_up  # noqa: E402
from tests.export.devices.test_agent_package import TRUST, mutants  # noqa: E402
from tests.export.devices.test_agent_serving import Reader, Served  # noqa: E402

AGENT = ROOT / "export" / "devices" / "agent"


@dataclass
class Row:
    """One line of a table."""

    what: str
    count: int
    """How often it was done."""
    found: float
    unit: str = ""
    most: float | None = None
    """The bar: so much at most."""
    least: float | None = None
    """The bar: so much at least."""
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None where there is no bar."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.found <= self.most) and (self.least is None or self.found >= self.least)


def spread(what: str, seconds: list[float], unit: str = "s", most: float | None = None) -> list[Row]:
    """Median and maximum of what was timed; the bar is for the maximum."""
    times = [each * (1000 if unit == "ms" else 1) for each in seconds]
    return [
        Row(f"{what}, median", len(times), statistics.median(times), unit),
        Row(f"{what}, longest", len(times), max(times), unit, most=most),
    ]


# --- a model of a size ---


def large_members(megabytes: float, seed: int = 0) -> dict[str, bytes]:
    """Members of a bundle whose model has that size: images [N, 1, 4, 4] -> logits [N, 3]."""
    random = np.random.default_rng(seed)
    wide = int(np.sqrt(megabytes * 1e6 / 4))
    sizes = [16, wide, wide, 3]
    weights = [(random.normal(size=pair) / np.sqrt(pair[0])).astype(np.float32) for pair in itertools.pairwise(sizes)]
    nodes = [helper.make_node("Flatten", ["images"], ["x0"])]
    for place in range(3):
        result = "logits" if place == 2 else f"x{place + 1}"
        nodes.append(helper.make_node("MatMul", [f"x{place}", f"w{place}"], [result]))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    constants = [numpy_helper.from_array(each, f"w{place}") for place, each in enumerate(weights)]
    graph = helper.make_graph(nodes, "net", [images], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    inputs = random.normal(size=(11, 1, 4, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    golden = io.BytesIO()
    arrays: dict[str, Any] = {"inputs": inputs, "outputs-cpu": session.run(None, {"images": inputs})[0]}
    np.savez(golden, **arrays)
    return {"model.onnx": model, "golden.npz": golden.getvalue(), "sbom.cdx.json": b"{}"}


def new_device(root: Path) -> Device:
    (root / "slots").mkdir(parents=True)
    durable.write_json(root / "config.json", {"device": "lab-1", "threads": 1})
    durable.write_json(root / "trust.json", made_up.trust())
    return Device(root)


@contextmanager
def timed(owner: Any, name: str, times: list[float]) -> Iterator[None]:
    """Seconds of every call of a function while the block runs."""
    before = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return before(*arguments, **more)
        finally:
            times.append(time.perf_counter() - started)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- parts ---


def install(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """An installation by phase."""
    device, files = new_device(folder / "device"), large_members(options.megabytes)
    phases: dict[str, list[float]] = {
        "verify the bundle": [],
        "unpack, flush, read back": [],
        "self-tests": [],
        "swap": [],
        "commit": [],
    }
    places = [(package, "read"), (package, "unpack"), (selftest, "try_out"), (durable, "point"), (Device, "_commit")]
    whole: list[float] = []
    for seq in range(1, options.installs + 2):
        bundle = made_up.write(folder / "x.edgepkg", files, seq=seq)
        with ExitStack() as stack:
            for (owner, name), times in zip(places, phases.values(), strict=True):
                stack.enter_context(timed(owner, name, times if seq > 1 else []))
            started = time.perf_counter()
            device.install(bundle)
            if seq > 1:  # the first one finds no other slot
                whole.append(time.perf_counter() - started)
    tests = phases.pop("self-tests")
    phases |= {"self-test in the other slot": tests[::2], "self-test in place": tests[1::2]}
    for what, times in phases.items():
        yield Row(f"{what}, median", len(times), statistics.median(times), "s")
    yield from spread(f"whole, {options.megabytes:g} MB", whole)


def rollback(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """From a failed self-test after the swap until the old model answers; a server runs, and may have changed."""
    served = Served.__new__(Served)
    served.device = new_device(folder / "device")
    old = made_up.write(folder / "1.edgepkg", large_members(options.megabytes, 1), seq=1)
    bad = made_up.write(folder / "2.edgepkg", large_members(options.megabytes, 2), seq=2)
    served.device.install(old)
    served.start()
    served.serves(1)
    whole, ended, back, all_ = selftest.try_out, [0.0], list[float](), list[float]()
    changed = 0

    def try_out(slot: Path, threads: int = 0) -> dict[str, Any]:
        nonlocal changed
        found = whole(slot, threads)
        if slot.name == "current":
            changed += served.ask("GET", "/health")[1].get("seq") == 2
            ended[0] = time.perf_counter()
            raise Failed("golden", "Failed on purpose.")
        return found

    selftest.try_out = try_out
    try:
        for _ in range(options.rollbacks):
            started = time.perf_counter()
            try:
                served.device.install(bad, again=True)
            except Failed:
                served.serves(1)
                now = time.perf_counter()
                back.append(now - ended[0])
                all_.append(now - started)
    finally:
        selftest.try_out = whole
        served.end()
    yield Row("rolled back", options.rollbacks, len(back), least=options.rollbacks)
    yield Row("of these the server had changed to the bad one", options.rollbacks, changed)
    yield from spread("self-test failed to old model answers", back, most=5.0)
    yield from spread("beginning of the installation to old model answers", all_)


def swap(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The rename, and the swap with all that makes it durable."""
    for slot in "ab":
        (folder / "slots" / slot).mkdir(parents=True)
    renames, whole = list[float](), list[float]()
    with timed(os, "replace", renames), timed(durable, "point", whole):
        for number in range(options.swaps):
            durable.point(folder / "current", f"slots/{'ab'[number % 2]}")
    yield from spread("rename", renames, "ms", most=5.0)
    yield from spread("link made, renamed, folder flushed", whole, "ms")


def serving(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Models change below a server that two clients ask without a break."""
    served = Served(folder / "device", folder)
    readers = [Reader(served.port) for _ in range(2)]
    try:
        for reader in readers:
            reader.start()
        for number in range(options.swaps):
            slot, seq = (("a", 1), ("b", 2))[number % 2]
            durable.point(served.device.current, f"slots/{slot}")
            served.serves(seq)
        for reader in readers:
            reader.stop.set()
            reader.join(timeout=20)
    finally:
        served.end()
    answers = sum(reader.answers for reader in readers)
    wrong = [each for reader in readers for each in reader.wrong]
    yield Row("requests failed", answers + len(wrong), len(wrong), most=0, note="; ".join(wrong[:3]))
    yield Row("changes of the model", options.swaps, options.swaps)


def mutated(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Half of the mutants in the envelope, half anywhere."""
    whole = made_up.write(folder / "x.edgepkg").read_bytes()
    ends = 12 + int.from_bytes(whole[8:12], "big")
    half, broken, refused = options.mutants // 2, folder / "broken.edgepkg", 0
    heads = [head + whole[ends:] for head in mutants(whole[:ends], half, 3)]
    for mutant in [*mutants(whole, options.mutants - half, 4), *heads]:
        broken.write_bytes(mutant)
        try:
            package.read(broken, TRUST)
        except Refused:
            refused += 1
    yield Row("mutants refused before they are unpacked", options.mutants, refused, least=options.mutants)


def cut(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """SIGKILL at system calls, and power cuts there; then the same with agents that are broken on purpose."""
    tests, step = test_agent_cuts, options.step
    numbers = iter(range(1000))

    def place() -> Path:
        found = folder / str(next(numbers))
        found.mkdir()
        return found

    if not cuts.can_trace():
        yield Row("kills", 0, 0, note="needs strace, and leave to trace")
        return
    kills, changes, states = 0, 0, 0
    for kind in tests.BUNDLES:
        for what, calls in (("before a change", cuts.MUTATING), ("at another call", cuts.OTHERS)):
            tried, wrong = tests.sweep(place(), kind, calls, step)
            kills, changes = kills + tried, changes + tried * (calls is cuts.MUTATING)
            yield Row(f"{kind} bundle, killed {what}: broken", tried, len(wrong), most=0, note="; ".join(wrong[:2]))
    whole = step == 1  # the bars are for every call
    yield Row("killed, over all", kills, kills, least=500 if whole else None)
    yield Row("killed before a change, over all", changes, changes, least=90 if whole else None)
    tried, wrong = tests.sweep(place(), "good", ("symlink", "unlink"), 1, tests.DELETE_AND_CREATE)
    yield Row("broken agent, deletes before it links: noticed", tried, len(wrong), least=1)
    reason = cuts.can_mount(place())
    if reason:
        yield Row("power cuts", 0, 0, note=reason)
        return
    for kind in tests.BUNDLES:
        for what, how in (("worst options", tests.WORST), ("default options", "defaults")):
            tried, wrong = tests.power_cuts(place(), kind, how, step)
            states += tried
            yield Row(f"{kind} bundle, power cut, {what}: broken", tried, len(wrong), most=0, note="; ".join(wrong[:2]))
    yield Row("power cuts, over all", states, states, least=190 if whole else None)
    few = max(1, step // 10)  # some points are harmless without a flush, too
    calls = ("rename", "unlink", "fsync")
    tried, wrong = tests.power_cuts(place(), "good", tests.WORST, few, tests.NO_FLUSH, calls)
    yield Row("broken agent, does not flush bytes: noticed", tried, len(wrong), least=1)


def links(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Downloads over links that are cut and come back, each device in a network namespace."""
    from tests.export.devices import namespaces

    if reason := namespaces.can_separate():
        yield Row("links", 0, 0, note=reason)
        return
    devices, cycles = options.links, options.cycles
    found = namespaces.run_cut_links(folder, devices=devices, cycles=cycles)
    yield Row("devices that have the bundle at the end", devices, found["committed"], least=devices)
    yield Row("cuts in a download", devices * cycles, found["in_downloads"], least=devices * cycles)
    twice = found["sent_twice"]
    yield Row("most bytes sent again after a cut", len(twice), max(twice, default=0), "bytes", most=pull.CHUNK)
    yield Row("time", 1, found["seconds"], "s")


def fleet(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """A good bundle and two bad ones to devices that are programs."""
    from tests.export.devices.fleet import Bad, roll_out_to_fleet

    count = options.devices
    kinds: tuple[Bad | None, ...] = (None, "wrong answers", "crashes after the swap")
    for kind in kinds:
        place = folder / (kind or "good").partition(" ")[0]
        place.mkdir()
        found, name = roll_out_to_fleet(place, count, kind), kind or "good"
        words = f"{found['state']}. {found['reason']}".strip()
        most = {"tried": 1, "run": 0} if kind else {"tried": None, "run": None}
        least = None if kind else count
        yield Row(
            f"{name}: devices that tried it", count, found["reached"], most=most["tried"], least=least, note=words
        )
        yield Row(f"{name}: devices that run it at the end", count, found["remaining"], most=most["run"], least=least)
        yield Row(f"{name}: devices that work at the end", count, found["working"], least=count)
        yield Row(f"{name}: devices that installed it twice", count, found["twice"], most=0)
        yield Row(f"{name}: time", 1, found["seconds"], "s", most=120)


def size(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Logical lines of the agent by file; what a start of it costs without a model."""
    total = 0
    for file in sorted(AGENT.glob("*.py")):
        with file.open("rb") as source:
            lines = sum(each.type == tokenize.NEWLINE for each in tokenize.tokenize(source.readline))
        total += lines
        yield Row(file.name, 1, lines, "logical lines")
    yield Row("all", 1, total, "logical lines")
    shutil.copytree(AGENT, folder / "edge_agent", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import json, sys, time; started = time.perf_counter()\n{}\nseconds = time.perf_counter() - started\n"
    code += "peak = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024\n"
    code += "assert 'onnxruntime' not in sys.modules; print(json.dumps([seconds, peak]))"
    starts = {
        "Python alone": "pass",
        "agent": "import edge_agent.__main__",
        "agent that pulls": "import edge_agent.pull",
    }
    for what, start in starts.items():
        command = [sys.executable, "-c", code.format(start)]
        samples = [
            json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)
            for _ in range(6)
        ][1:]  # the first one compiles
        seconds, peaks = zip(*samples, strict=True)
        yield Row(f"{what}: import, median", len(samples), 1000 * statistics.median(seconds), "ms")
        most = 30.0 if what == "agent" else None
        yield Row(f"{what}: memory, median", len(samples), statistics.median(peaks), "MiB", most=most)


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Row]]] = {
    **{"install": install, "rollback": rollback, "swap": swap, "serving": serving, "mutants": mutated},
    **{"cuts": cut, "links": links, "fleet": fleet, "size": size},
}


# --- tables ---


def show(console: Console, part: str, rows: list[Row], seconds: float) -> None:
    table = Table("", "count", "found", "bar", "", title=f"{part} ({seconds:.0f} s)", title_justify="left")
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in rows:
        bar = "" if row.passed is None else f"<= {row.most:g}" if row.most is not None else f">= {row.least:g}"
        verdict = {None: "", True: "[green]passed", False: "[red]missed"}[row.passed]
        table.add_row(row.what, f"{row.count:,}", f"{row.found:,.4g} {row.unit}".strip(), bar, verdict)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.what}: {row.note}", markup=False, style="dim")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of the model: install, rollback")
    parser.add_argument("--installs", type=int, default=10)
    parser.add_argument("--rollbacks", type=int, default=10)
    parser.add_argument("--swaps", type=int, default=1000, help="swap, serving")
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--step", type=int, default=1, help="cuts: every so manieth call")
    parser.add_argument("--devices", type=int, default=20, help="fleet")
    parser.add_argument("--links", type=int, default=8, help="links: devices")
    parser.add_argument("--cycles", type=int, default=6, help="links: so often each is cut")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"part '{unknown[0]}' is unknown, expected one of {', '.join(PARTS)}")
    console, found, missed = Console(), dict[str, Any](), False
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="stillhouse-deployment-") as folder:
            started = time.monotonic()
            rows = list(PARTS[part](Path(folder), options))
            seconds = time.monotonic() - started
        show(console, part, rows, seconds)
        missed |= any(row.passed is False for row in rows)
        found[part] = {"seconds": seconds, "rows": [{**asdict(row), "passed": row.passed} for row in rows]}
        if options.json is not None:  # so that a run that is ended early leaves its figures
            content = {"cores": os.cpu_count(), "load": os.getloadavg(), "parts": found}
            options.json.write_text(json.dumps(content, indent=1))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
