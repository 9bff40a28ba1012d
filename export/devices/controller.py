"""Carries a rollout out: asks ``rollout.decide`` what to do, does it, keeps everything in the registry.

It can be killed at any moment and started again. What is ordered is written down first and ordered after; an order
given twice does no harm, since a device takes a number only once. One controller works on a rollout at a time.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from export.devices.errors import DeviceError
from export.devices.registry import DeviceEntry, Registry, Rollout
from export.devices.rollout import GOOD, OPEN, Decision, Placement, count, decide

POLL_SECONDS = 2.0


class Courier(Protocol):
    """Brings orders to devices, and their reports back."""

    def order(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Have devices take the bundle; returns soon, the outcome comes with a report."""
        ...

    def withdraw(self, rollout: Rollout, devices: Sequence[DeviceEntry]) -> None:
        """Take orders back from devices that may not have begun."""
        ...

    def collect(self) -> None:
        """Hand reports that have come by now to the registry."""
        ...


def carry_out(
    registry: Registry,
    rollout_id: str,
    courier: Courier,
    *,
    holder: str,
    on_change: Callable[[Rollout, Sequence[Placement], Decision], None] = lambda rollout, placements, decision: None,
    poll_s: float = POLL_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Rollout:
    """Go on with a rollout until it is done, aborted or paused.

    Args:
        registry: Where it is kept.
        rollout_id: Which one.
        courier: Reaches the devices.
        holder: Names this controller; another one that lives keeps it out.
        on_change: Called after each step that changed something.
        poll_s: Seconds between two looks.
        sleep: Waits.

    Raises:
        DeviceError: another controller is at it.
    """
    if not registry.hold(rollout_id, holder):
        other = registry.rollout(rollout_id)
        raise DeviceError(
            f"Rollout '{rollout_id[:8]}' is carried out by '{other.holder}' until {other.held_until:%H:%M:%S} UTC, "
            "expected no other controller. Wait for it; a dead one loses its hold after a minute."
        )
    try:
        _finish(registry, rollout_id, courier)
        before = None
        while True:
            courier.collect()
            rollout = registry.rollout(rollout_id)
            if rollout.state != "running":
                return rollout
            decision = _step(registry, rollout, courier)
            placements = registry.placements(rollout_id)
            now = [each.outcome for each in placements]
            if now != before or decision.action in ("ask", "abort", "done"):
                on_change(registry.rollout(rollout_id), placements, decision)
            before = now
            if decision.action in ("ask", "abort", "done"):
                return registry.rollout(rollout_id)
            if not registry.hold(rollout_id, holder):
                raise DeviceError(f"Rollout '{rollout_id[:8]}' was taken over by another controller; this one leaves.")
            if decision.action == "wait":
                sleep(poll_s)
    finally:
        registry.let_go(rollout_id, holder)


def _step(registry: Registry, rollout: Rollout, courier: Courier) -> Decision:
    placements = registry.placements(rollout.id)
    decision = decide(placements, rollout.policy, datetime.now(UTC), rollout.approved)
    registry.mark(rollout.id, decision.timed_out, "timed out")
    if decision.action == "order":
        registry.mark(rollout.id, decision.devices, "ordered")
        courier.order(rollout, registry.devices(decision.devices))
    elif decision.action == "ask":
        registry.set_state(rollout.id, "paused", decision.reason)
    elif decision.action == "abort":
        stop(registry, rollout, courier, decision.reason)
    elif decision.action == "done":
        registry.set_state(rollout.id, "done", decision.reason)
    return decision


def stop(registry: Registry, rollout: Rollout, courier: Courier, reason: str, by: str = "") -> None:
    """Abort a rollout: nobody else is ordered, and orders are taken back from those who have not reported.

    A device that is at it all the same finishes, and goes back by itself when the bundle is bad.
    """
    registry.set_state(rollout.id, "aborted", reason, by)
    _withdraw(registry, rollout, courier)


def _withdraw(registry: Registry, rollout: Rollout, courier: Courier) -> None:
    placements = registry.placements(rollout.id)
    ordered = [each.device for each in placements if each.outcome not in ("waiting", *GOOD)]
    courier.withdraw(rollout, registry.devices(ordered))
    registry.mark(rollout.id, [each.device for each in placements if each.outcome in OPEN], "withdrawn")


def _finish(registry: Registry, rollout_id: str, courier: Courier) -> None:
    """What an earlier controller had written down, and may have died before it was done."""
    rollout = registry.rollout(rollout_id)
    names = [each.device for each in registry.placements(rollout_id) if each.outcome == "ordered"]
    if rollout.state == "running" and names:
        courier.order(rollout, registry.devices(names))
    elif rollout.state == "aborted":
        _withdraw(registry, rollout, courier)


def summary(rollout: Rollout, placements: Sequence[Placement]) -> str:
    """One sentence on where a rollout stands."""
    counted = count(placements)
    parts = [f"{counted['good']} of {len(placements)} devices have {rollout.model} {rollout.seq}"]
    parts += [f"{counted[name]} {name}" for name in ("failed", "timed out", "open", "withdrawn") if counted[name]]
    return ", ".join(parts) + (f". {rollout.reason}" if rollout.reason else ".")
