"""Faults of one device, D7, D10 and D12 of docs/reliability.md: archives, models and bundles that are not for it."""

import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.devices.agent import durable, selftest
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed, Refused
from export.devices.agent.model import Model
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.crafted_archives import ARCHIVES
from tests.export.devices.test_agent_device import active, new_device, not_finite, wrong_outputs
from tests.export.devices.test_agent_package import EVIL_NAMES, wrong_archives


def made(folder: Path, seq: int, files: dict[str, bytes] | None = None, **more: Any) -> Path:
    return made_up.write(folder / f"{seq}.edgepkg", files or made_up.members(seq), seq=seq, **more)


def answers(root: Path, seq: int) -> bool:
    """Whether the active model still gives the answers of its number."""
    with np.load(io.BytesIO(made_up.members(seq)["golden.npz"])) as arrays:
        found = Model(root / "current", 1).run(arrays["inputs"])
        return np.allclose(found, arrays["outputs-cpu"], atol=1e-4)


# --- D7: archives ---


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A device with one model, which nothing here changes."""
    folder = tmp_path_factory.mktemp("lab")
    device = new_device(folder / "device")
    device.install(made(folder, 1))
    return device


OWN = ("state.json", "refused.json", "reports", "lock")
"""What a device writes down about a refusal."""


def outside(root: Path) -> dict[str, bytes]:
    """Every file around and in a device, but its own notes."""
    found = {}
    for path in root.parent.rglob("*"):
        name = path.relative_to(root.parent)
        if not any(part in OWN for part in name.parts):
            found[str(name)] = bytes(str(path.readlink()), "utf-8") if path.is_symlink() else b""
            if path.is_file() and not path.is_symlink():
                found[str(name)] = path.read_bytes()
    return found


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_crafted_archive_is_refused_and_leaves_nothing_behind(lab: Device, tmp_path: Path, kind: str) -> None:
    files = made_up.members(2)
    path = made(tmp_path, 2, files, content=ARCHIVES[kind](files))
    before = outside(lab.root)
    with pytest.raises(Refused) as caught:
        lab.install(path)
    assert caught.value.code in ("archive", "slot")
    assert outside(lab.root) == before
    assert not Path("/tmp/evil").exists()
    assert active(lab) == 1


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_path_that_is_not_plain_is_refused_where_statement_and_archive_agree_on_it(
    lab: Device, tmp_path: Path, name: str
) -> None:
    path = made(tmp_path, 2, {**made_up.members(2), name: b"evil"})
    before = outside(lab.root)
    with pytest.raises(Refused) as caught:
        lab.install(path)
    assert caught.value.code == "statement"
    assert outside(lab.root) == before


def test_there_are_enough_crafted_archives() -> None:
    assert len(ARCHIVES) >= 60
    assert len(ARCHIVES) + len(EVIL_NAMES) + len(wrong_archives()) >= 120


# --- D10: models that do not work here ---


def looping(iterations: int, seed: int = 2) -> dict[str, bytes]:
    """A right model that thinks for long: its last step is a loop that changes nothing."""
    files = made_up.members(seed)
    graph = onnx.load_model_from_string(files["model.onnx"]).graph
    graph.node[-1].output[0] = "first"
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["value", "nought"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.array(0.0, np.float32), "nought")],
    )
    graph.node.append(helper.make_node("Loop", ["times", "always", "first"], ["logits"], body=body))
    graph.initializer.append(numpy_helper.from_array(np.array(iterations, np.int64), "times"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    return files | {"model.onnx": _serialized(graph)}


def hungry(seed: int = 2) -> dict[str, bytes]:
    """A right model that needs 200 MiB on the way."""
    files = made_up.members(seed)
    graph = onnx.load_model_from_string(files["model.onnx"]).graph
    graph.node[-1].output[0] = "first"
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["most"], keepdims=0),
        helper.make_node("Expand", ["most", "wide"], ["much"]),
        helper.make_node("ReduceMean", ["much"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "nought"], ["nothing"]),
        helper.make_node("Add", ["first", "nothing"], ["logits"]),
    ]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([50 << 20], np.int64), "wide"))
    graph.initializer.append(numpy_helper.from_array(np.array(0.0, np.float32), "nought"))
    return files | {"model.onnx": _serialized(graph)}


def _serialized(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def limits(**changes: float) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["variants"][0]["limits"].update(changes)


def self_tests_of(device: Device) -> list[psutil.Process]:
    """Self-tests that run now."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if str(device.root) in " ".join(child.cmdline()) and "selftest" in " ".join(child.cmdline()):
                found.append(child)
    return found


@contextmanager
def struck(device: Device, number: int, slot: str | None = None) -> Iterator[None]:
    """Its self-test gets a signal; with a slot, the one that begins when that slot is active."""
    over = threading.Event()

    def strike() -> None:
        while not over.is_set():
            for child in self_tests_of(device):
                if slot is None or device.active == slot:
                    with suppress(psutil.Error):
                        child.send_signal(number)
                        return
            time.sleep(0.002)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for child in self_tests_of(device):
            with suppress(psutil.Error):
                child.kill()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each self-test was over."""
    found: list[float] = []
    call = selftest.try_out

    def timed(slot: Path, threads: int = 0) -> dict[str, Any]:
        try:
            return call(slot, threads)
        finally:
            found.append(time.monotonic())

    monkeypatch.setattr(selftest, "try_out", timed)
    return found


def said(device: Device) -> dict[str, Any]:
    """The newest report that waits to be sent."""
    return json.loads(device.reports()[-1].read_text())


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """With number 1 active."""
    found = new_device(tmp_path / "device")
    found.install(made(tmp_path, 1))
    return found


@pytest.mark.parametrize(
    ("files", "change", "code", "words"),
    [
        (wrong_outputs, limits(), "golden", "differ by up to"),
        (not_finite, limits(), "not finite", "no finite numbers"),
        pytest.param(
            *(lambda: looping(20_000), limits(runs=2, p50_ms=2.0), "limit", "p50_ms is"), marks=pytest.mark.slow
        ),
        pytest.param(hungry, limits(runs=1, memory_mib=100), "limit", "memory_mib is", marks=pytest.mark.slow),
    ],
    ids=["wrong outputs", "NaN", "slow", "memory"],
)
def test_a_model_that_does_not_work_here_is_refused_with_the_reason_and_at_once(
    device: Device, tmp_path: Path, ended: list[float], files: Any, change: Any, code: str, words: str
) -> None:
    with pytest.raises(Failed):
        device.install(made(tmp_path, 2, files(), change=change))
    assert time.monotonic() - ended[-1] < 5
    assert (said(device)["phase"], said(device)["code"]) == ("refused", code)
    assert words in said(device)["text"]
    assert active(device) == 1
    assert answers(device.root, 1)


@pytest.mark.slow
def test_models_that_are_slow_or_large_work_where_their_limits_allow_it(device: Device, tmp_path: Path) -> None:
    """The two above are refused for their limits alone."""
    assert device.install(made(tmp_path, 2, looping(1000)))["phase"] == "committed"
    report = device.install(made(tmp_path, 3, hungry(3), change=limits(runs=1)))
    assert report["phase"] == "committed"
    assert report["memory_mib"] > 180


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_self_test_that_crashes_is_a_refusal_with_its_signal(
    device: Device, tmp_path: Path, ended: list[float], name: str
) -> None:
    with struck(device, signal.Signals[name]), pytest.raises(Failed):
        device.install(made(tmp_path, 2, looping(1 << 40)))
    assert time.monotonic() - ended[-1] < 5
    assert (said(device)["phase"], said(device)["code"]) == ("refused", "crash")
    assert f"ended by {name}" in said(device)["text"]
    assert active(device) == 1


@pytest.mark.slow
def test_a_model_that_hangs_is_refused_when_its_time_is_over(
    device: Device, tmp_path: Path, ended: list[float]
) -> None:
    started = time.monotonic()
    try:
        with pytest.raises(Failed):
            device.install(made(tmp_path, 2, looping(1 << 40), change=limits(startup_s=1.0)))
    finally:
        left = self_tests_of(device)
        for child in left:
            child.kill()
    assert left == []
    assert 31 <= ended[-1] - started < 36
    assert time.monotonic() - ended[-1] < 5
    assert (said(device)["phase"], said(device)["code"]) == ("refused", "hang")
    assert active(device) == 1


def test_a_model_that_is_damaged_between_its_tests_is_rolled_back(
    device: Device, tmp_path: Path, ended: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = durable.point

    def damaging(link: Path, target: str) -> None:
        point(link, target)
        if target == "slots/b":
            (device.slot("b") / "model.onnx").write_bytes(made_up.members(9)["model.onnx"])

    monkeypatch.setattr(durable, "point", damaging)
    with pytest.raises(Failed, match="golden"):
        device.install(made(tmp_path, 2))
    assert time.monotonic() - ended[-1] < 5
    assert (said(device)["phase"], said(device)["code"]) == ("rolled back", "golden")
    assert said(device)["rollback_s"] < 5
    assert answers(device.root, 1)


@pytest.mark.parametrize("name", ["SIGSEGV", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_model_that_fails_in_place_is_rolled_back_with_the_reason(
    device: Device, tmp_path: Path, ended: list[float], name: str
) -> None:
    """It passes in its slot; what answers from ``current`` crashes, or stands still."""
    with struck(device, signal.Signals[name], "b"), pytest.raises(Failed):
        device.install(made(tmp_path, 2, change=limits(startup_s=1.0)))
    assert time.monotonic() - ended[-1] < 5
    found = said(device)
    assert (found["phase"], found["code"]) == ("rolled back", "crash" if name == "SIGSEGV" else "hang")
    assert found["rollback_s"] < 5
    assert active(device) == 1
    assert answers(device.root, 1)


# --- D12: bundles for others ---


def test_every_field_of_every_variant_that_differs_is_named(device: Device, tmp_path: Path) -> None:
    device.config["facts"] = {"isa": "x86", "compute_capability": "SM75", "cpu_features": ["avx2"], "memory_mib": 512}

    def two(said: dict[str, Any]) -> None:
        (cpu,) = said["variants"]
        arm = {**cpu, "id": "arm", "isa": "arm", "cpu_features": ["dot_product"], "min_memory_mib": 1024}
        gpu = {**cpu, "id": "gpu", "compute_capability": "SM87", "system": "linux-aarch64", "runtime": "tensorrt"}
        said["variants"] = [arm, {**gpu, "runtime_versions": "==10.3"}]

    with pytest.raises(Refused) as caught:
        device.install(made(tmp_path, 2, change=two))
    text = str(caught.value)
    for words in (
        "arm: isa is x86, expected arm",
        "cpu_features is ['avx2'], expected ['dot_product']",
        "memory_mib is 512, expected at least 1024",
        "gpu: runtime_versions is no tensorrt, expected ==10.3",
        "compute_capability is SM75, expected SM87",
        "expected linux-aarch64",
    ):
        assert words in text
    assert said(device)["text"] == text
    assert active(device) == 1
