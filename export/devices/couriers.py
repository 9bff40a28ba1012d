"""How orders reach devices: through the repository that they pull from, or over SSH."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.devices import push
from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry, Registry, Rollout
from export.devices.repository import Order, Repository


class PullCourier:
    """Orders as signed targets of a repository; reports come by themselves, over HTTP, into the registry."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def order(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Publish the bundle, if it is not there, and an order for each device, in one step."""
        bundle = Path(rollout.bundle)
        order = Order(bundle=bundle.name, name=rollout.model, seq=rollout.seq)
        self._repository.publish(bundle, {device.id: order for device in devices})

    def withdraw(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Take back the orders of this rollout; in their place comes what the device runs, if that is kept."""
        now, kept = self._repository.orders, self._repository.bundles
        theirs: dict[str, Order | None] = {}
        for each in devices:
            if each.id in now and now[each.id].seq == rollout.seq:
                name, seq = str(each.active.get("name")), int(each.active.get("seq") or 0)
                file = f"{name}-{seq}.edgepkg"
                runs = seq != rollout.seq and file in kept
                theirs[each.id] = Order(bundle=file, name=name, seq=seq) if runs else None
        if theirs:
            self._repository.publish(orders=theirs)
        else:  # an earlier controller may have died before what it took back was signed
            self._repository.refresh()

    def collect(self) -> None:
        """Nothing to do: devices deliver."""


class PushCourier:
    """One connection for each device, several at a time; the report is the answer to the installation.

    Args:
        registry: Takes the reports.
        keys: Private keys to log in with, as paths or opened.
        at_once: Devices at a time.
        retry_s: How long after it could not be reached a device is tried again.
    """

    def __init__(self, registry: Registry, keys: push.Keys, *, at_once: int = 8, retry_s: float = 10.0) -> None:
        self._registry, self._keys, self._retry_s = registry, list(keys), retry_s
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="push")
        self._errands: dict[str, _Errand] = {}
        self.problems: dict[str, str] = {}
        """Device -> why it could not be reached the last time."""

    def order(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Begin to push."""
        for device in devices:
            if device.id not in self._errands:
                self._errands[device.id] = _Errand(device, rollout, self._pool.submit(self._push, device, rollout))

    def _push(self, device: DeviceEntry, rollout: Rollout) -> dict[str, Any]:
        async def push_and_ask() -> dict[str, Any]:
            report = await push.push(device, Path(rollout.bundle), self._keys)
            with suppress(DeviceError):  # the report counts, also of a device that has gone since
                self._registry.seen(device.id, await push.status(device, self._keys))
            return report

        return asyncio.run(push_and_ask())

    def withdraw(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Drop what has not begun; what has begun comes to its end."""
        for device in devices:
            errand = self._errands.get(device.id)
            if errand is not None and (errand.answer.cancel() or errand.answer.done()):
                del self._errands[device.id]

    def collect(self) -> None:
        """Hand the answers over; try those again that were not reached a while ago."""
        for name, errand in list(self._errands.items()):
            if not errand.answer.done():
                continue
            error = errand.answer.exception()
            if isinstance(error, push.UnreachableError):
                self.problems[name] = str(error)
                errand.tried_at = errand.tried_at or time.monotonic()
                if time.monotonic() - errand.tried_at >= self._retry_s:
                    again = self._pool.submit(self._push, errand.device, errand.rollout)
                    self._errands[name] = _Errand(errand.device, errand.rollout, again)
                continue
            del self._errands[name]
            self.problems.pop(name, None)
            if error is not None and not isinstance(error, DeviceError):
                raise error
            found = {"phase": "refused", "code": "ssh", "text": str(error)} if error else errand.answer.result()
            self._registry.receive(_complete(found, errand))

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class MixedCourier:
    """Each device by its transport.

    Args:
        pull: For devices that pull; None where there are none.
        push: For devices of transport ssh.
    """

    def __init__(self, pull: PullCourier | None, push: PushCourier) -> None:
        self._pull, self._push = pull, push

    def order(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Have devices take the bundle."""
        for courier, theirs in self._parted(devices):
            courier.order(rollout, theirs)

    def withdraw(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Take orders back."""
        for courier, theirs in self._parted(devices):
            courier.withdraw(rollout, theirs)

    def collect(self) -> None:
        """Hand reports over."""
        self._push.collect()

    def close(self) -> None:
        """Wait for what is under way."""
        self._push.close()

    @property
    def problems(self) -> dict[str, str]:
        """Device -> why it could not be reached the last time."""
        return self._push.problems

    def _parted(self, devices: Sequence[DeviceEntry]) -> list[tuple[PullCourier | PushCourier, list[DeviceEntry]]]:
        pulling = [device for device in devices if device.transport == "pull"]
        pushed = [device for device in devices if device.transport == "ssh"]
        if pulling and self._pull is None:
            raise DeviceError(f"Device '{pulling[0].id}' pulls, and there is no repository, expected one.")
        parts: list[tuple[PullCourier | PushCourier, list[DeviceEntry]]] = [(self._push, pushed)] if pushed else []
        return [*parts, (self._pull, pulling)] if pulling and self._pull is not None else parts


@dataclass
class _Errand:
    device: DeviceEntry
    rollout: Rollout
    answer: "Future[dict[str, Any]]"
    tried_at: float | None = None
    """When it was seen that the device was not reached."""


def _complete(report: dict[str, Any], errand: _Errand) -> dict[str, Any]:
    """A refusal before the bundle was understood says neither name nor number: they are those of the errand."""
    device, rollout = errand.device.id, errand.rollout
    key = f"{device}/{rollout.model}/{rollout.seq}/{report['phase']}"
    return {"key": key, "name": rollout.model, "seq": rollout.seq, "version": None, **report, "device": device}
