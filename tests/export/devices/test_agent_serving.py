"""``agent serve``: right answers, clear refusals, and no request lost while models change below it."""

import http.client
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.devices.agent import durable, serving
from export.devices.agent.device import Device
from export.devices.agent.errors import Failed
from tests.export.devices import cuts
from tests.export.devices import made_up_bundle as made_up


class Served:
    """A device with two models, one in each slot, and its server."""

    def __init__(self, root: Path, folder: Path) -> None:
        (root / "slots").mkdir(parents=True)
        durable.write_json(root / "config.json", {"device": "lab-1"})
        durable.write_json(root / "trust.json", made_up.trust())
        self.device = Device(root)
        for seq in (1, 2):
            self.device.install(made_up.write(folder / f"{seq}.edgepkg", made_up.members(seq), seq=seq))
        self.start()

    def start(self) -> None:
        command = [*cuts.agent(self.device.root, "serve", "--port", "0")]
        self.process = subprocess.Popen(command, env=cuts.environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            connection.request(method, path, data)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def serves(self, seq: int, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while self.ask("GET", "/health")[1].get("seq") != seq:
            assert time.monotonic() < deadline, f"number {seq} is not served"
            time.sleep(0.01)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=15) == 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path / "device", tmp_path)
    yield found
    found.end()


def golden(seq: int) -> tuple[np.ndarray, list[int]]:
    import io

    with np.load(io.BytesIO(made_up.members(seq)["golden.npz"])) as arrays:
        return arrays["inputs"], arrays["outputs-cpu"].argmax(axis=1).tolist()


def test_it_answers_as_the_model_does(served: Served) -> None:
    inputs, classes = golden(2)
    status, found = served.ask("POST", "/predict", {"inputs": inputs.tolist()})
    assert status == 200
    assert found["classes"] == classes
    assert found["labels"] == ["abc"[place] for place in classes]
    assert np.sum(found["probabilities"], axis=1) == pytest.approx(1)
    assert found["model"]["seq"] == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/predict", {"inputs": [[1, 2]]}, 400, "expected"),
        ("POST", "/predict", {"inputs": []}, 400, "expected"),
        ("POST", "/predict", {"image": []}, 400, "expected inputs"),
        ("POST", "/predict", b"no json", 400, ""),
        ("POST", "/predict", [1], 400, ""),
        ("POST", "/predict", b"", 413, "with a body"),
        ("POST", "/other", {}, 404, "/predict"),
        ("GET", "/etc/passwd", None, 404, "/health"),
    ],
)
def test_a_wrong_request_is_told_what_was_expected(
    served: Served, method: str, path: str, body: Any, status: int, says: str
) -> None:
    found, answer = served.ask(method, path, body)
    assert found == status
    assert says in answer["error"]
    assert served.ask("GET", "/health")[0] == 200


class Reader(threading.Thread):
    """Asks without a break on one connection; remembers what went wrong, and which models answered."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.stop = port, threading.Event()
        self.answers, self.wrong, self.models = 0, list[str](), set[int]()
        self.truth = {seq: golden(seq) for seq in (1, 2)}

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        body = {seq: json.dumps({"inputs": inputs.tolist()}) for seq, (inputs, _) in self.truth.items()}
        while not self.stop.is_set():
            try:
                connection.request("POST", "/predict", body[1])
                answer = connection.getresponse()
                found = json.loads(answer.read())
                if answer.status != 200:
                    self.wrong.append(f"{answer.status} {found}")
                    continue
                self.models.add(found["model"]["seq"])
                self.answers += 1
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(repr(error))
                connection.close()
        connection.close()


@pytest.mark.parametrize("swaps", [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_no_request_is_lost_while_models_change(served: Served, swaps: int) -> None:
    readers = [Reader(served.port) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(swaps):
        slot, seq = (("a", 1), ("b", 2))[number % 2]
        durable.point(served.device.current, f"slots/{slot}")
        served.serves(seq)
    for reader in readers:
        reader.stop.set()
        reader.join(timeout=20)
    assert [wrong for reader in readers for wrong in reader.wrong] == []
    assert all(reader.models == {1, 2} for reader in readers)
    assert sum(reader.answers for reader in readers) > 5 * swaps


def test_an_installation_waits_for_the_server_to_change(served: Served, tmp_path: Path) -> None:
    report = served.device.install(made_up.write(tmp_path / "3.edgepkg", made_up.members(3), seq=3))
    assert report["serving"] is True
    assert served.ask("GET", "/health")[1]["seq"] == 3


def test_what_the_server_cannot_load_is_rolled_back_and_never_answers(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests in a process of their own pass, as where a file is damaged just after them."""
    from export.devices.agent import selftest

    broken = made_up.members(3) | {"model.onnx": b"no model"}
    monkeypatch.setattr(selftest, "try_out", lambda slot, threads: {})
    with pytest.raises(Failed, match="does not serve it"):
        served.device.install(made_up.write(tmp_path / "3.edgepkg", broken, seq=3))
    served.serves(2)
    inputs, classes = golden(2)
    assert served.ask("POST", "/predict", {"inputs": inputs.tolist()})[1]["classes"] == classes


def test_without_a_model_it_says_so(tmp_path: Path) -> None:
    root = tmp_path / "device"
    (root / "slots").mkdir(parents=True)
    durable.write_json(root / "trust.json", made_up.trust())
    found = Served.__new__(Served)
    found.device = Device(root)
    found.start()
    try:
        assert found.ask("GET", "/health")[0] == 503
        assert found.ask("POST", "/predict", {"inputs": [[[[0.0] * 4] * 4]]})[0] == 503
        found.device.install(made_up.write(tmp_path / "1.edgepkg", made_up.members(1), seq=1))
        assert found.ask("GET", "/health")[1]["seq"] == 1
    finally:
        found.end()


def test_it_listens_on_this_machine_alone_and_leaves_no_address_behind(served: Served) -> None:
    import psutil

    places = {each.laddr.ip for each in psutil.Process(served.process.pid).net_connections() if each.status == "LISTEN"}
    assert places == {"127.0.0.1"}
    assert serving.ask(served.device.root) is not None
    served.end()
    assert serving.ask(served.device.root) is None
    assert not (served.device.root / "serving.json").exists()


def test_a_server_that_is_killed_again_and_again_gets_the_model_before(served: Served) -> None:
    for _ in range(3):
        served.process.kill()
        served.process.wait()
        served.start()
    served.serves(1)
    assert served.device.status()["last"]["phase"] == "rolled back"
