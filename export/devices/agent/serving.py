"""``agent serve``: answers inference over HTTP on loopback with the active model, and never drops a request.

A new model is loaded and tried beside the old one, then the reference is changed; a request in progress ends with the
model it began with. A model that cannot be loaded changes nothing, and ``/health`` says why.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional

from . import durable
from .device import Device
from .model import Model

HOST = "127.0.0.1"
LOOK_SECONDS = 0.1
MAX_BODY = 64 << 20


class Active:
    """The model that answers now."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.model: Optional[Model] = None
        self.failed = self.reason = ""
        self._seen: Optional[str] = None
        self._one_at_a_time = threading.Lock()  # an engine's context is for one request at a time

    def look(self) -> None:
        """Change to what ``current`` points to, if that is another model than a moment ago."""
        try:
            place = os.path.realpath(os.readlink(self.device.current)) if self.device.active else None
        except OSError:
            place = None
        statement = self.device.statement(self.device.active)
        mark = f"{place} {statement['content']['sha256']} {statement['seq']}" if statement else None
        if mark == self._seen or statement is None:
            return
        self._seen = mark
        try:
            model = Model(self.device.current, self.device.config["threads"])
            shape = [1 if size < 0 else size for size in model.statement["input"]["shape"]]
            import numpy as np

            logits = model.run(model.prepare(np.zeros(shape)))  # the whole way from a raw image, here a black one
            if not np.isfinite(logits).all():
                raise ValueError("a black image gets answers that are no finite numbers")
        except Exception as error:
            self.failed, self.reason = statement["content"]["sha256"], f"{type(error).__name__}: {error}"[:500]
            return
        self.model, self.failed, self.reason = model, "", ""

    def health(self) -> dict[str, Any]:
        """Which model answers, and why not another one."""
        statement = self.model.statement if self.model else None
        shown = {name: statement[name] for name in ("name", "version", "seq")} if statement else {}
        digest = statement["content"]["sha256"] if statement else None
        return {**shown, "sha256": digest, "failed": self.failed, "reason": self.reason, "pid": os.getpid()}

    def answer(self, inputs: Any, raw: bool) -> dict[str, Any]:
        """Labels and probabilities of images [N, C, H, W]; ``raw``: not yet prepared."""
        import numpy as np

        model = self.model
        if model is None:
            raise LookupError("No model is active. Install a bundle first.")
        images = np.asarray(inputs, dtype=np.float32)
        wanted = model.statement["input"]["shape"]
        if images.ndim != len(wanted) or list(images.shape[1:]) != wanted[1:] or len(images) == 0:
            raise ValueError(f"inputs have shape {list(images.shape)}, expected {['N', *wanted[1:]]}")
        prepared = model.prepare(images) if raw else images
        if model.variant["runtime"] in ("onnxruntime", "openvino"):
            logits = model.run(prepared)
        else:
            with self._one_at_a_time:
                logits = model.run(prepared)
        shares, names = model.probabilities(logits), model.statement["labels"]
        chosen = [int(place) for place in shares.argmax(axis=1)]
        labels = [names[place] if place < len(names) else str(place) for place in chosen]
        model_of = {name: model.statement[name] for name in ("name", "version", "seq")}
        return {"labels": labels, "classes": chosen, "probabilities": shares.tolist(), "model": model_of}


class Handler(BaseHTTPRequestHandler):
    """GET /health, POST /predict {"inputs": [...], "raw": true}."""

    protocol_version = "HTTP/1.1"
    wbufsize = 64 << 10
    disable_nagle_algorithm = True  # else every answer on a kept connection waits 40 ms for an acknowledgement
    active: Active

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._say(200 if self.active.model else 503, self.active.health())
        return self._say(404, {"error": "expected /health or /predict"})

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("content-length") or 0)
        except ValueError:
            length = -1
        if self.path != "/predict" or not 0 < length <= MAX_BODY:
            self.close_connection = True
            return self._say(404 if self.path != "/predict" else 413, {"error": "expected POST /predict with a body"})
        try:
            body = json.loads(self.rfile.read(length))
            return self._say(200, self.active.answer(body["inputs"], bool(body.get("raw", True))))
        except LookupError as error:
            missing = isinstance(error, KeyError)
            return self._say(400 if missing else 503, {"error": "expected inputs" if missing else str(error)})
        except (ValueError, TypeError, AttributeError) as error:
            return self._say(400, {"error": str(error)})

    def _say(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class Server(ThreadingHTTPServer):
    """One thread for each connection; the address is this machine's alone."""

    daemon_threads = True
    request_queue_size = 128


def serve(device: Device, port: int) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP has it look at once."""
    device.crashed()
    active = Active(device)
    active.look()
    stop, wake = threading.Event(), threading.Event()
    handler = type("Bound", (Handler,), {"active": active})
    with Server((HOST, port), handler) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: (stop.set(), wake.set()))
        signal.signal(signal.SIGHUP, lambda *_: wake.set())
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        place = device.root / "serving.json"
        with suppress(OSError):  # without it an installation does not ask this server, which is better than none
            durable.write_json(place, {"port": server.server_port, "pid": os.getpid()})
        print(f"Serving on http://{HOST}:{server.server_port}", flush=True)
        while not stop.is_set():
            active.look()
            wake.wait(LOOK_SECONDS)
            wake.clear()
        server.shutdown()
        place.unlink(missing_ok=True)
    device.ran_well()


def ask(root: Path) -> Optional[dict[str, Any]]:
    """What the server of a device says of itself; None when there is none."""
    found = durable.read_json(root / "serving.json", None)
    if found is None:
        return None
    try:
        with urllib.request.urlopen(f"http://{HOST}:{found['port']}/health", timeout=3) as response:
            health = json.loads(response.read())
    except urllib.error.HTTPError as error:
        health = json.loads(error.read() or b"{}")
    except (OSError, ValueError):
        return None
    return health if health.get("pid") == found["pid"] else None
