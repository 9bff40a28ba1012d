"""A TCP proxy between a device and its server: does to connections what networks do, and counts what it passes on."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import uvicorn

MAX = 64 << 10
BYTES_ACKED = 120
"""Place of tcpi_bytes_acked in the kernel's struct tcp_info."""
TCP_CLOSE = 7


def _as_it_is(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Fault:
    """What happens to one connection; without arguments nothing does."""

    delay_s: float = 0.0
    request: Callable[[bytes], bytes] = _as_it_is
    """Changes what the server is asked."""
    head: Callable[[bytes], bytes] = _as_it_is
    """Changes the head of its answer."""
    instead: bytes | None = None
    """The whole answer, of which the server knows nothing."""
    after: int | None = None
    """So many bytes of the answer, its head included, are passed on; then:"""
    then: Literal["cut", "reset", "silence", "drip"] = "cut"
    drip_s: float = 0.02


HALF_OPEN = Fault(instead=b"", after=0, then="silence")
"""Accepted, and never answered; the server is not asked."""
LOST_REPLY = Fault(after=0)
"""The server did what it was asked to, and nobody hears of it."""


@dataclass
class Exchange:
    """One connection of a device."""

    line: str = ""
    start: int = 0
    """First byte that was asked for."""
    head: int = 0
    passed: int = 0
    """Bytes of the answer that were sent to the device, the head included."""
    acked: int = 0
    """Those of them that the device's kernel has acknowledged."""
    device: str = ""
    """Its address."""

    @property
    def came(self) -> int:
        """Bytes of the body that have reached the device."""
        return max(0, min(self.acked, self.passed) - self.head)


@dataclass
class FaultyProxy:
    """Listens on a free port of ``host`` while the ``with`` block runs."""

    server: tuple[str, int]
    host: str = "127.0.0.1"
    exchanges: list[Exchange] = field(default_factory=list)
    """In the order in which the connections were accepted."""

    def __enter__(self) -> "FaultyProxy":
        self._once: list[tuple[str, Fault]] = []
        self._always: list[tuple[str, Fault]] = []
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server((self.host, 0), backlog=128)
        self._listening.settimeout(0.02)
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)
        self._listening.close()
        assert not any(thread.is_alive() for thread in self._threads)

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self._listening.getsockname()[1]}"

    def plan(self, place: str, *faults: Fault) -> None:
        """One fault for each of the next connections whose request line contains ``place``."""
        self._once += [(place, fault) for fault in faults]

    def always(self, place: str, fault: Fault) -> None:
        """A fault for all of them."""
        self._always.append((place, fault))

    def heal(self) -> None:
        """No faults from now on."""
        self._once.clear()
        self._always.clear()

    def of(self, place: str, device: str = "") -> list[Exchange]:
        """The connections that asked for a place, oldest first."""
        return [each for each in self.exchanges if place in each.line and device in ("", each.device)]

    def sent_twice(self, place: str, device: str = "") -> list[int]:
        """For each connection but the first: bytes that had reached the device before and were sent to it again."""
        rows = self.of(place, device)
        return [max(0, one.start + one.came - two.start) for one, two in pairwise(rows)]

    # --- connections ---

    def _begin(self, act: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=act, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                device, (address, *_) = self._listening.accept()
                exchange = Exchange(device=address)
                self.exchanges.append(exchange)
                self._begin(self._serve, device, exchange)

    def _serve(self, device: socket.socket, exchange: Exchange) -> None:
        device.settimeout(0.1)
        with device, suppress(OSError):
            try:
                self._answer(device, exchange)
                self._wait_for_receipt(device, exchange)
            finally:
                exchange.acked = _acknowledged(device)

    def _answer(self, device: socket.socket, exchange: Exchange) -> None:
        request = self._request(device)
        exchange.line = request.partition(b"\r\n")[0].decode()
        if asked := re.search(rb"\r\nrange: bytes=(\d+)-", request, re.IGNORECASE):
            exchange.start = int(asked[1])
        fault = self._fault(exchange.line)
        self._closing.wait(fault.delay_s)
        if fault.instead is not None:
            exchange.head = fault.instead.find(b"\r\n\r\n") + 4
            self._pass_on(device, [fault.instead], fault, exchange)
            return
        with socket.create_connection(self.server, timeout=30) as server:
            server.sendall(fault.request(request))
            head, rest = _head(server)
            head = fault.head(head)
            exchange.head = len(head)
            chunks = iter(lambda: server.recv(MAX), b"")
            self._pass_on(device, (data for part in ((head + rest,), chunks) for data in part), fault, exchange)

    def _fault(self, line: str) -> Fault:
        for number, (place, fault) in enumerate(self._once):
            if place in line:
                del self._once[number]
                return fault
        return next((fault for place, fault in self._always if place in line), Fault())

    def _request(self, device: socket.socket) -> bytes:
        device.settimeout(5)
        head, body = _head(device)
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        while length and len(body) < int(length[1]):
            body += device.recv(MAX)
        device.settimeout(0.1)
        return head + body

    def _pass_on(self, device: socket.socket, chunks: Iterable[bytes], fault: Fault, exchange: Exchange) -> None:
        for chunk in chunks:
            left = len(chunk) if fault.after is None else fault.after - exchange.passed
            self._send(device, chunk[:left], exchange)
            if fault.after is not None and exchange.passed == fault.after:
                if fault.then == "drip":
                    self._drip(device, chunk[left:], fault.drip_s, exchange)
                elif fault.then == "silence":
                    self._wait_for_end(device)
                elif fault.then == "reset":
                    self._wait_for_receipt(device, exchange)  # what is not sent yet would be thrown away
                    device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return

    def _send(self, device: socket.socket, data: bytes, exchange: Exchange) -> None:
        while data and not self._closing.is_set():
            with suppress(TimeoutError):
                count = device.send(data)
                exchange.passed += count
                data = data[count:]

    def _drip(self, device: socket.socket, data: bytes, pause_s: float, exchange: Exchange) -> None:
        for number in range(len(data)):
            self._send(device, data[number : number + 1], exchange)
            if self._closing.wait(pause_s):
                return

    def _wait_for_receipt(self, device: socket.socket, exchange: Exchange) -> None:
        deadline = time.monotonic() + 1.0
        while _is_open(device) and _acknowledged(device) < exchange.passed and time.monotonic() < deadline:
            self._closing.wait(0.001)

    def _wait_for_end(self, device: socket.socket) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                if not device.recv(MAX):
                    return


def _head(connection: socket.socket) -> tuple[bytes, bytes]:
    """The head of a message, and what came with it already."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(MAX)
        if not more:
            raise ConnectionResetError("the message has no end")
        data += more
    end = data.index(b"\r\n\r\n") + 4
    return data[:end], data[end:]


def _acknowledged(connection: socket.socket) -> int:
    return struct.unpack_from("=Q", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), BYTES_ACKED)[0]


def _is_open(connection: socket.socket) -> bool:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[0] != TCP_CLOSE


@contextmanager
def running(app: Any) -> Iterator[tuple[str, int]]:
    """Host and port of a web application on loopback while the block runs."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield "127.0.0.1", server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
