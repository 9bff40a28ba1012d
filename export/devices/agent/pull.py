"""Pulls from a TUF repository over HTTP: what this device shall run, and the bundle, resumed where it was cut off.

The repository says in the target ``devices/<name>.json`` which bundle a device shall have. Metadata are verified by
``tuf``; the versions seen are kept in the floor besides, flushed, since a power cut can take tuf's own copies with it,
and old metadata would be taken for new. Delegations are not followed: one role orders, and no other is asked. Needs the
package ``tuf``.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Optional

from . import durable, package
from .device import SPARE_BYTES, Device
from .errors import Failed, Refused

CHUNK = 64 << 10
STALL_SECONDS = 15.0
"""Without a byte for so long a connection counts as dead."""
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Between attempts; the last one again and again."""
ROLES = ("root", "timestamp", "snapshot", "targets")
ANSWER_SECONDS = 300.0
"""Metadata and replies that take longer are those of a server that wants to keep us waiting."""
MAX_ROTATIONS = 1 << 16
"""The chain of roots is walked from the first one at each poll, so this is for the whole life of a device."""
UNEXPECTED = (http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError)
"""What else comes of reading what strangers write: it must not end an agent that polls for ever."""
MAX_ORDER = 64 << 10
MAX_BUNDLE = package.MAX_BYTES + package.MAX_ENVELOPE + 12
TAG = re.compile(r'"[!#-~]{0,200}"')
"""Entity tags that are sent back. What else a server says could make the next one refuse our requests for ever."""
LEFT = re.compile(r"[0-9a-f]{64}\.(part|etag|edgepkg)")
"""Downloads of the inbox."""


def poll(device: Device, patience_s: float = 3600.0) -> dict[str, Any]:
    """Fetch and install what the repository wants this device to have; what came of it.

    Raises:
        Refused: metadata that are not to be trusted, or a bundle that is not; nothing was changed.
        Failed: the bundle was tried and rolled back.
    """
    base = str(device.config["repository"]).rstrip("/")
    if not base:
        raise Refused("no repository", "config.json names no repository, expected its address.")
    with device.locked("polling"):  # two at once would write one download
        return _poll(device, base, patience_s)


def _poll(device: Device, base: str, patience_s: float) -> dict[str, Any]:
    order, info = _ordered(device, base)
    if order is None:
        return {"phase": "nothing", "text": "The repository has nothing for this device."}
    if order["seq"] <= device.floor["seq"].get(order["name"], 0):
        return {"phase": "nothing", "text": f"{order['name']} {order['seq']} was installed here before."}
    if info is None:
        raise Refused("repository", f"The repository has no '{order['bundle']}', expected the bundle it names.")
    digest = info.hashes.get("sha256")
    if not package.DIGEST(digest) or not 0 < info.length <= MAX_BUNDLE:
        raise Refused("repository", f"'{order['bundle']}' has no SHA-256 or {info.length} bytes, expected a bundle's.")
    # a bundle is another attempt when it is ordered otherwise, or other keys are trusted
    attempt = {"sha256": digest, "name": order["name"], "seq": order["seq"], "trust": device.trust.version}
    tried = durable.read_json(device.root / "tried.json", {})
    if isinstance(tried, dict) and tried.get("attempt") == attempt and tried["at"] <= time.time():
        return {"phase": "nothing", "text": f"{order['name']} {order['seq']} was tried here, and is not taken."}
    url = f"{base}/targets/{_hashed(order['bundle'], digest)}"
    file = fetch(url, device.root / "inbox", info.length, digest, patience_s)
    if _ordered(device, base)[0] != order:  # it may have taken hours; the file is kept, and found by the next poll
        return {"phase": "nothing", "text": f"{order['name']} {order['seq']} was taken back while it was fetched."}
    try:
        said = package.read(file, device.trust).statement
        if (said["name"], said["seq"]) != (order["name"], order["seq"]):
            text = f"Bundle '{order['bundle']}' is {said['name']} {said['seq']}"
            raise Refused("order", f"{text}, expected {order['name']} {order['seq']} as ordered.")
        return device.install(file)
    except (Refused, Failed) as error:
        if error.code not in ("disk", "trust"):
            at = time.time() if error.code == "expired" else 0.0  # a clock that is set back was wrong then
            durable.write_json(device.root / "tried.json", {"attempt": attempt, "at": at})
        raise
    finally:
        file.unlink()


def _ordered(device: Device, base: str) -> tuple[Optional[dict[str, Any]], Any]:
    """What the repository wants this device to have now, and what it says of that bundle; None where there is nothing.

    Raises:
        Refused: metadata that are not to be trusted.
    """
    updater, exceptions = _updater(device, base)
    try:
        updater.refresh()
        _keep_floor(device)
        order = _order(device, updater)
        return order, updater.get_targetinfo(order["bundle"]) if order else None
    except (exceptions.RepositoryError, exceptions.DownloadError, OSError, *UNEXPECTED) as error:
        raise Refused(
            "repository", f"Repository '{base}' cannot be trusted now ({type(error).__name__}: {error})."
        ) from error


def _order(device: Device, updater: Any) -> Optional[dict[str, Any]]:
    """What the repository wants this device to have; None: nothing.

    Raises:
        Refused: the order, though signed, is none.
    """
    path = f"devices/{device.config['device']}.json"
    wanted = updater.get_targetinfo(path)
    if wanted is None:
        return None
    if wanted.length > MAX_ORDER:
        raise Refused("order", f"Order '{path}' has {wanted.length} bytes, expected at most {MAX_ORDER}.")
    try:
        order = json.loads(Path(updater.download_target(wanted)).read_bytes())
        name, seq, bundle = order["name"], order["seq"], order["bundle"]
    except UNEXPECTED as error:
        raise Refused("order", f"Order '{path}' cannot be read ({type(error).__name__}: {error}).") from error
    if not isinstance(name, str) or type(seq) is not int or not package.path_is_plain(bundle):
        raise Refused("order", f"Order '{path}' has no plain name, seq and bundle, expected them.")
    return {"name": name, "seq": seq, "bundle": bundle}


def deliver(device: Device) -> int:
    """Send the reports that wait to where config.json says, oldest first, then the status; how many. The rest waits.

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
        with _asked(urllib.request.Request(address, body, headers), ANSWER_SECONDS) as answer:
            said = answer.read(CHUNK)
        never = answer.status in (400, 413) and b'"error"' in said  # only the server itself may say so of a report
        if not never and not (answer.status == 200 and b'"new"' in said):
            raise ConnectionError(f"'{address}' has answered something else than a place for reports")

    sent = 0
    with suppress(OSError, http.client.HTTPException, Refused), device.locked("delivering"):
        sent = device.send(send)
        send({"phase": "status", **device.status()})
    return sent


def _hashed(path: str, digest: str) -> str:
    """Where a consistent repository keeps a target."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{digest}.{name}" if folder else f"{digest}.{name}"


def _updater(device: Device, base: str) -> tuple[Any, Any]:
    try:
        from tuf.api import exceptions
        from tuf.ngclient import Updater, UpdaterConfig
        from tuf.ngclient.fetcher import FetcherInterface
    except ImportError as error:
        raise Refused("no tuf", "Package tuf is not installed, expected it for pulling. pip install tuf.") from error

    class Fetcher(FetcherInterface):
        """urllib with time limits; tuf's own one waits for two minutes, and for ever when bytes come one by one."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                with _asked(_request(url), ANSWER_SECONDS) as answer:
                    if answer.status != 200:
                        raise exceptions.DownloadHTTPError(f"HTTP status {answer.status}", answer.status)
                    yield from iter(lambda: answer.read1(CHUNK), b"")
            except (OSError, http.client.HTTPException) as error:
                raise exceptions.DownloadError(f"{type(error).__name__}: {error}") from error

    for name in ("metadata", "inbox"):
        (device.root / name).mkdir(exist_ok=True)
    root = device.root / "root.json"
    try:
        updater = Updater(
            **{"metadata_dir": str(device.root / "metadata"), "metadata_base_url": f"{base}/metadata/"},
            **{"target_dir": str(device.root / "inbox"), "target_base_url": f"{base}/targets/"},
            **{"fetcher": Fetcher(), "bootstrap": root.read_bytes()},
            config=UpdaterConfig(max_root_rotations=MAX_ROTATIONS, max_delegations=0),
        )
    except (exceptions.RepositoryError, OSError) as error:
        text = f"'{root}' is no root of a repository ({error}), expected its 1.root.json. Copy it there again."
        raise Refused("root", text) from error
    return updater, exceptions


def _keep_floor(device: Device) -> None:
    """Raises Refused when metadata are older than those seen before; else has them, and the floor, on disk."""
    floor, folder = device.floor, device.root / "metadata"
    seen = {**dict.fromkeys(ROLES, 0), **floor.get("repository", {})}
    signed = {role: json.loads((folder / f"{role}.json").read_bytes())["signed"] for role in ROLES}
    lowest = {**seen, **dict.fromkeys(_started_anew(folder, seen["root"], signed["root"]), 0)}
    for role in ROLES:
        found, until = signed[role]["version"], signed[role]["expires"]
        if found < lowest[role]:
            code, text = "replay", f"version {found}, expected {lowest[role]} or more"
        elif package.moment(until) < floor["time"]:  # whatever the clock says
            code, text = "expired", f"been good until {until}, before the newest bundle here was made"
        else:
            seen[role] = found
            continue
        for path in folder.glob("*.json"):
            path.unlink()
        raise Refused(code, f"{role} metadata have {text}.")
    if seen != floor.get("repository"):
        for path in [*folder.rglob("*.json"), folder / "root_history", folder]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        durable.write_json(device.root / "floor.json", {**floor, "repository": seen})


def _started_anew(folder: Path, version: int, root: dict[str, Any]) -> set[str]:
    """Roles whose versions may begin again: their keys were replaced since that root, so nothing old is signed for now.

    It is how a repository recovers when somebody with stolen keys has used up the version numbers (TUF, 5.3.11).
    """
    try:
        before = json.loads((folder / "root_history" / f"{version}.root.json").read_bytes())["signed"]["roles"]
    except FileNotFoundError:
        return set()
    replaced = {
        role
        for role in ROLES[1:]
        if len({*before[role]["keyids"]} & {*root["roles"][role]["keyids"]}) < root["roles"][role]["threshold"]
    }
    return replaced | ({"targets"} if "snapshot" in replaced else set())


def _request(url: str, headers: Optional[dict[str, str]] = None) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"accept-encoding": "identity", **(headers or {})})


@contextmanager
def _asked(request: urllib.request.Request, seconds: float) -> Iterator[Any]:
    """The answer to a request, also one of refusal. It is cut off after so long, however steadily single bytes come.

    Raises:
        TimeoutError: it was cut, or no byte came for ``STALL_SECONDS``.
    """
    sockets: list[Any] = []
    late = threading.Event()

    def cut() -> None:
        late.set()
        for each in sockets:
            with suppress(OSError):  # it is closed already
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    class Answer(http.client.HTTPResponse):
        def __init__(self, sock: Any, *rest: Any, **named: Any) -> None:
            sockets.append(sock)
            super().__init__(sock, *rest, **named)
            if late.is_set():  # of an earlier one, which sent us here
                cut()

    def connection(kind: Any) -> Any:
        def make(host: str, **named: Any) -> Any:
            made = kind(host, **named)
            made.response_class = Answer
            return made

        return make

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: Any) -> Any:
            return self.do_open(connection(http.client.HTTPConnection), req)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: Any) -> Any:
            return self.do_open(connection(http.client.HTTPSConnection), req)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        try:
            answer = urllib.request.build_opener(Plain, Secure).open(request, timeout=STALL_SECONDS)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            yield answer
    except Exception as error:
        if late.is_set():
            raise TimeoutError(f"It took more than {seconds:g} s") from error
        raise
    finally:
        timer.cancel()
    if late.is_set():  # what ended there only looks whole
        raise TimeoutError(f"It took more than {seconds:g} s")


def fetch(url: str, folder: Path, length: int, digest: str, patience_s: float) -> Path:
    """A file of that length and SHA-256, below ``folder``; a part that is there already is not fetched again.

    Raises:
        Refused: other content than wanted, or nothing came for ``patience_s`` seconds.
    """
    part, mark, whole = (folder / f"{digest}.{kind}" for kind in ("part", "etag", "edgepkg"))
    for path in folder.iterdir():
        if LEFT.fullmatch(path.name) and not path.name.startswith(digest):
            path.unlink()
    if whole.exists():  # a kill came before it was installed
        os.replace(whole, part)
    most = part.stat().st_size if part.exists() else 0
    free, wanted = shutil.disk_usage(folder).free, length - most + SPARE_BYTES
    if free < wanted:
        raise Refused("disk", f"The disk has {free >> 20} MiB free, expected {wanted >> 20}. Free some space.")
    give_up, tries, reason = time.monotonic() + patience_s, 0, ""
    while (have := part.stat().st_size if part.exists() else 0) < length:
        if time.monotonic() > give_up:
            raise Refused(
                "network", f"'{url}' did not come: {have} of {length} bytes in time. {reason} The part is kept."
            )
        try:
            _fetch_more(url, part, mark, have, length, max(give_up - time.monotonic(), STALL_SECONDS))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}."
        now = part.stat().st_size if part.exists() else 0
        if now >= min(most + CHUNK, length):  # the same bytes once more are no progress, nor are drops
            give_up, tries, most = time.monotonic() + patience_s, 0, now
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
    os.replace(part, whole)
    durable.flush_folder(folder)
    return whole


def _fetch_more(url: str, part: Path, mark: Path, have: int, length: int, seconds: float) -> None:
    """One request. What a cut leaves is kept for the next one."""
    tag: Optional[str] = mark.read_text() if mark.exists() else None
    headers = {"range": f"bytes={have}-", **({"if-range": tag} if tag else {})} if have else {}
    with _asked(_request(url, headers), seconds) as response:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the server has encoded it")
        if response.status not in (200, 206):
            raise ValueError(f"the server sent {response.status}, expected the file")
        place = f"bytes {have}-{length - 1}/{length}"
        if response.status == 206 and response.headers.get("content-range") != place:
            raise ValueError(f"the server sent {response.headers.get('content-range')}, expected {place}")
        if response.status == 200 and (response.length or 0) < length:  # a page of somebody on the way
            raise ValueError(f"the server sent {response.length} bytes, expected {length}")
        if have and response.status != 206:
            have = 0  # another file than before: from the start
        found = TAG.fullmatch(response.headers.get("etag") or "")
        mark.write_text(found[0] if found else "")
        with open(part, "r+b" if part.exists() else "wb") as file:
            file.truncate(have)
            file.seek(have)
            while have < length:
                chunk = response.read1(min(CHUNK, length - have))
                if not chunk:
                    break
                file.write(chunk)
                file.flush()
                have += len(chunk)
