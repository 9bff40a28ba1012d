"""Pulls from a TUF repository over HTTP: what this device shall run, and the bundle, resumed where it was cut off.

The repository says in the target ``devices/<name>.json`` which bundle a device shall have. Metadata are verified by
``tuf``; the versions seen are kept in the floor besides, flushed, since a power cut can take tuf's own copies with it,
and old metadata would be taken for new. Needs the package ``tuf``.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator, Optional

from . import durable, package
from .device import Device
from .errors import Failed, Refused

CHUNK = 64 << 10
STALL_SECONDS = 15.0
"""Without a byte for so long a connection counts as dead."""
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Between attempts; the last one again and again."""
ROLES = ("root", "timestamp", "snapshot", "targets")


def poll(device: Device, patience_s: float = 3600.0) -> dict[str, Any]:
    """Fetch and install what the repository wants this device to have; what came of it.

    Raises:
        Refused: metadata that are not to be trusted, or a bundle that is not; nothing was changed.
        Failed: the bundle was tried and rolled back.
    """
    base = str(device.config["repository"]).rstrip("/")
    if not base:
        raise Refused("no repository", "config.json names no repository, expected its address.")
    updater, exceptions = _updater(device, base)
    try:
        updater.refresh()
        _keep_floor(device)
        wanted = updater.get_targetinfo(f"devices/{device.config['device']}.json")
        if wanted is None:
            return {"phase": "nothing", "text": "The repository has nothing for this device."}
        order = json.loads(Path(updater.download_target(wanted)).read_bytes())
        if order["seq"] <= device.floor["seq"].get(order["name"], 0):
            return {"phase": "nothing", "text": f"{order['name']} {order['seq']} was installed here before."}
        info = updater.get_targetinfo(order["bundle"])
        if info is None:
            raise Refused("repository", f"The repository has no '{order['bundle']}', expected the bundle it names.")
    except (exceptions.RepositoryError, exceptions.DownloadError, KeyError, TypeError, ValueError) as error:
        raise Refused(
            "repository", f"Repository '{base}' cannot be trusted now ({type(error).__name__}: {error})."
        ) from error
    digest = info.hashes["sha256"]
    if durable.read_json(device.root / "tried.json", "") == digest:
        return {"phase": "nothing", "text": f"{order['name']} {order['seq']} was tried here, and is not taken."}
    url = f"{base}/targets/{_hashed(order['bundle'], digest)}"
    file = fetch(url, device.root / "inbox", info.length, digest, patience_s)
    try:
        return device.install(file)
    except (Refused, Failed) as error:
        if error.code not in ("disk", "trust"):
            durable.write_json(device.root / "tried.json", digest)
        raise
    finally:
        file.unlink()


def deliver(device: Device) -> int:
    """Send the reports that wait to where config.json says, oldest first; how many. The rest waits.

    Each is signed with the device's secret (HMAC-SHA256), and has a key by which a second delivery is known.
    """
    address, secret = device.config["report_to"], str(device.config.get("secret", ""))
    if not address:
        return 0

    def send(report: dict[str, Any]) -> None:
        body = json.dumps(report).encode()
        proof = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        headers = {
            "content-type": "application/json",
            "x-stillhouse-device": report["device"],
            "x-stillhouse-proof": proof,
        }
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=STALL_SECONDS):
            pass

    try:
        return device.send(send)
    except OSError:
        return 0


def _hashed(path: str, digest: str) -> str:
    """Where a consistent repository keeps a target."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{digest}.{name}" if folder else f"{digest}.{name}"


def _updater(device: Device, base: str) -> tuple[Any, Any]:
    try:
        from tuf.api import exceptions
        from tuf.ngclient import Updater
        from tuf.ngclient.fetcher import FetcherInterface
    except ImportError as error:
        raise Refused("no tuf", "Package tuf is not installed, expected it for pulling. pip install tuf.") from error

    class Fetcher(FetcherInterface):
        """urllib with a time limit; tuf's own one waits for two minutes."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                response = _open(url, {})
            except urllib.error.HTTPError as error:
                raise exceptions.DownloadHTTPError(f"HTTP status {error.code}", error.code) from error
            return iter(lambda: response.read(CHUNK), b"")

    for name in ("metadata", "inbox"):
        (device.root / name).mkdir(exist_ok=True)
    return (
        Updater(
            **{"metadata_dir": str(device.root / "metadata"), "metadata_base_url": f"{base}/metadata/"},
            **{"target_dir": str(device.root / "inbox"), "target_base_url": f"{base}/targets/"},
            **{"fetcher": Fetcher(), "bootstrap": (device.root / "root.json").read_bytes()},
        ),
        exceptions,
    )


def _keep_floor(device: Device) -> None:
    """Raises Refused when metadata are older than those seen before; else has them, and the floor, on disk."""
    floor, folder = device.floor, device.root / "metadata"
    seen = dict(floor.get("repository", {}))
    for role in ROLES:
        found = json.loads((folder / f"{role}.json").read_bytes())["signed"]["version"]
        if found < seen.get(role, 0):
            for path in folder.glob("*.json"):
                path.unlink()
            raise Refused("replay", f"{role} metadata have version {found}, expected {seen[role]} or more.")
        seen[role] = found
    if seen != floor.get("repository"):
        for path in [*folder.rglob("*.json"), folder]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        durable.write_json(device.root / "floor.json", {**floor, "repository": seen})


def _open(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers={"accept-encoding": "identity", **headers})
    return urllib.request.urlopen(request, timeout=STALL_SECONDS)


def fetch(url: str, folder: Path, length: int, digest: str, patience_s: float) -> Path:
    """A file of that length and SHA-256, below ``folder``; a part that is there already is not fetched again.

    Raises:
        Refused: other content than wanted, or nothing came for ``patience_s`` seconds.
    """
    part, mark = folder / f"{digest}.part", folder / f"{digest}.etag"
    give_up, tries, reason = time.monotonic() + patience_s, 0, ""
    while (have := part.stat().st_size if part.exists() else 0) < length:
        if time.monotonic() > give_up:
            raise Refused(
                "network", f"'{url}' did not come: {have} of {length} bytes in time. {reason} The part is kept."
            )
        try:
            came = _fetch_more(url, part, mark, have, length)
        except (OSError, http.client.HTTPException, ValueError) as error:
            came, reason = 0, f"{type(error).__name__}: {error}."
        if came or (part.exists() and part.stat().st_size > have):
            give_up, tries = time.monotonic() + patience_s, 0
        else:
            time.sleep(PAUSES[min(tries, len(PAUSES) - 1)])
            tries += 1
    with open(part, "rb") as file:
        found = package.digest_of(file)
        os.fsync(file.fileno())
    mark.unlink(missing_ok=True)
    if found != digest or have != length:
        part.unlink()
        raise Refused("digest", f"'{url}' has other content than the repository says. It is fetched anew next time.")
    whole = folder / f"{digest}.edgepkg"
    os.replace(part, whole)
    durable.flush_folder(folder)
    return whole


def _fetch_more(url: str, part: Path, mark: Path, have: int, length: int) -> int:
    """One request; bytes that came. What a cut leaves is kept for the next one."""
    tag: Optional[str] = mark.read_text() if mark.exists() else None
    headers = {"range": f"bytes={have}-", **({"if-range": tag} if tag else {})} if have else {}
    with _open(url, headers) as response:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the server has encoded it")
        place = f"bytes {have}-{length - 1}/{length}"
        if response.status == 206 and response.headers.get("content-range") != place:
            raise ValueError(f"the server sent {response.headers.get('content-range')}, expected {place}")
        if have and response.status != 206:
            have = 0  # another file than before: from the start
        mark.write_text(response.headers.get("etag") or "")
        came = 0
        with open(part, "r+b" if part.exists() else "wb") as file:
            file.truncate(have)
            file.seek(have)
            while have + came < length:
                chunk = response.read1(min(CHUNK, length - have - came))
                if not chunk:
                    break
                file.write(chunk)
                file.flush()
                came += len(chunk)
    return came
