"""Ports of this machine: a free one, who holds a taken one, whether a server answers."""

import socket
import urllib.error
import urllib.request
from contextlib import suppress

import psutil

from compression.errors import InputError

HOST = "127.0.0.1"
DEFAULT_PORTS = {"Prefect": 4200, "MLflow": 5000}
OPTIONS = {"Prefect": "--prefect-port", "MLflow": "--mlflow-port"}


def free_port(name: str, wanted: int | None, host: str = HOST) -> int:
    """``wanted`` if it is free, else an error that names who holds it; without a wish the first free one.

    Raises:
        InputError: the wanted port is taken, or the address is not one of this machine.
    """
    if wanted is not None:
        if is_free(wanted, host):
            return wanted
        raise InputError(
            f"Port {wanted} for {name} is in use{_holder(wanted)}, expected a free one. "
            f"Choose another with {OPTIONS[name]}, or leave the option out for a free one."
        )
    first = DEFAULT_PORTS[name]
    return next(port for port in range(first, first + 2000) if is_free(port, host))


def any_port() -> int:
    """Some free port, as the kernel gives them."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    """Whether a server answers there with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=3) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def require_address(host: str) -> None:
    """Raises InputError when nothing can listen at that address here."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise InputError(
                f"Address '{host}' cannot be listened at ({error.strerror or error}), expected an address of this "
                "machine. Give one of its own with --host, or 0.0.0.0 for all of them."
            ) from error


def is_free(port: int, host: str) -> bool:
    """Whether something can listen at that port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    with suppress(psutil.Error, PermissionError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by '{psutil.Process(connection.pid).name()}' (pid {connection.pid})"
    return ""
