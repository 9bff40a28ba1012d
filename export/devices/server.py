"""What devices that pull talk to: the repository as static files, and a place for their reports.

Bytes need no protection, since everything in the repository is signed; TLS for reports is a proxy's matter. A report
is proven by HMAC-SHA256 of its body with the secret that the device and the registry share.
"""

import hashlib
import hmac
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from export.devices.errors import DeviceError
from export.devices.registry import Registry

logger = logging.getLogger(__name__)

MAX_REPORT = 256 << 10
"""Bytes of a report; the largest real ones are a few kilobytes."""
REFRESH_SECONDS = 3600.0
"""How often the repository's short-lived metadata are signed anew, while the server runs."""


def device_app(repository: Path, registry: Registry, refresh: Callable[[], None] | None = None) -> Starlette:
    """The web application.

    ``GET /metadata/...`` and ``/targets/...``: the repository, with ranges and entity tags. ``POST /reports``: a report
    or a status of a device. ``GET /health``: 200.

    Args:
        repository: Folder of ``export.devices.repository``.
        registry: Takes the reports.
        refresh: Signs short-lived metadata anew; called at the start and each hour. None: somebody else does.
    """

    async def reports(request: Request) -> Response:
        if int(request.headers.get("content-length") or MAX_REPORT + 1) > MAX_REPORT:
            return JSONResponse({"error": f"expected a report of at most {MAX_REPORT} bytes"}, 413)
        body = await request.body()
        name, proof = (request.headers.get(f"x-stillhouse-{field}", "") for field in ("device", "proof"))
        return await run_in_threadpool(_take, registry, name, proof, body)

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def running(_app: Starlette) -> AsyncIterator[None]:
        stop = threading.Event()

        def often() -> None:
            while refresh is not None and not stop.is_set():
                try:
                    refresh()
                except Exception:
                    logger.exception("The repository was not signed anew; it is tried again in an hour.")
                stop.wait(REFRESH_SECONDS)

        thread = threading.Thread(target=often, name="refresh", daemon=True)
        thread.start()
        yield
        stop.set()
        await run_in_threadpool(thread.join, 10.0)

    files = [Mount(f"/{name}", StaticFiles(directory=repository / name)) for name in ("metadata", "targets")]
    routes = [Route("/reports", reports, methods=["POST"]), Route("/health", health), *files]
    return Starlette(routes=routes, lifespan=running)


def _take(registry: Registry, name: str, proof: str, body: bytes) -> Response:
    try:
        device = registry.device(name)
    except DeviceError:
        return JSONResponse({"error": f"device '{name[:64]}' is not in the registry"}, 404)
    wanted = hmac.new(device.secret.encode(), body, hashlib.sha256).hexdigest()
    if not device.secret or not hmac.compare_digest(wanted, proof):
        return JSONResponse({"error": "the proof is not of this device's secret"}, 401)
    try:
        report: dict[str, Any] = json.loads(body)
        if report["device"] != name:
            return JSONResponse({"error": f"the report is of another device than '{name}'"}, 401)
        if report["phase"] == "status":
            registry.seen(name, report)
            return JSONResponse({"new": True})
        return JSONResponse({"new": registry.receive(report)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return JSONResponse({"error": f"the report cannot be read ({type(error).__name__}: {error})"}, 400)
