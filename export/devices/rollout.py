"""A bundle to many devices, in rings: who is next, when to stop, when it is over. Whoever asks keeps the state."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from compression.types import Frozen
from export.gate import Share

Outcome = Literal["waiting", "ordered", "committed", "refused", "rolled back", "timed out", "withdrawn"]
GOOD: tuple[Outcome, ...] = ("committed",)
BAD: tuple[Outcome, ...] = ("refused", "rolled back")
OPEN: tuple[Outcome, ...] = ("waiting", "ordered")


def _ascends(shares: tuple[float, ...]) -> tuple[float, ...]:
    if list(shares) != sorted(set(shares)) or (shares and shares[0] <= 0):
        raise ValueError(f"{list(shares)} does not ascend, expected shares such as [0.15, 0.5, 1.0]")
    return shares


class RolloutPolicy(Frozen):
    """How a bundle goes to the devices, and what stops it."""

    canary: PositiveInt = 1
    """Devices of the first ring."""
    shares: Annotated[tuple[Share, ...], AfterValidator(_ascends)] = (0.15, 0.5, 1.0)
    """Which part of all devices has been ordered to take it after the second, third, ... ring, rounded up."""
    concurrency: PositiveInt = 5
    """Most devices that are at it at the same time; as many may at most run a bad bundle before the stop."""
    max_failures: NonNegativeInt = 0
    """More failures than this stop the rollout; 0: the first one does."""
    min_reported: PositiveInt = 10
    """From so many reports on the share of failures counts too."""
    abort_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """This share of failures among the reports, or more, stops the rollout; null: shares do not count."""
    deadline_minutes: PositiveFloat = 60.0
    """After so long without a word a device is timed out."""
    silent: Literal["skip", "fail"] = "skip"
    """Whether a device that is timed out counts as a failure, or neither way."""
    bake_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Time between the last report of a ring and the first order of the next."""
    min_success: Share = 1.0
    """Share of good ones among a ring's reports that opens the next ring."""
    approve: Literal["never", "canary", "every ring"] = "never"
    """When a person is asked before the next ring: never, after the canaries, or after every ring."""


class Placement(Frozen):
    """One device in a rollout."""

    device: str
    ring: NonNegativeInt
    outcome: Outcome = "waiting"
    ordered_at: datetime | None = None
    reported_at: datetime | None = None


class Decision(Frozen):
    """What to do now."""

    action: Literal["order", "wait", "ask", "abort", "done"]
    """ask: a person decides whether the next ring may begin."""
    devices: tuple[str, ...] = ()
    """Whom to order to take it."""
    timed_out: tuple[str, ...] = ()
    """Who has been silent for too long; from now on ``timed out``."""
    reason: str = ""
    until: datetime | None = None
    """When to look again at the latest, if nobody reports."""


def rings_of(devices: Iterable[str], policy: RolloutPolicy, *, seed: str, first: Sequence[str] = ()) -> dict[str, int]:
    """Device -> ring, 0 for the canaries.

    Args:
        devices: All that shall take the bundle.
        policy: Sizes of the rings.
        seed: Of the order; another rollout has other canaries.
        first: Devices that come first in any case, such as those in a laboratory.
    """
    names = sorted(set(devices), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    names.sort(key=lambda name: name not in set(first))
    ends = [min(policy.canary, len(names)), *(math.ceil(share * len(names)) for share in policy.shares), len(names)]
    rings, begin, ring = {}, 0, 0
    for end in ends:
        if end > begin:
            rings |= dict.fromkeys(names[begin:end], ring)
            begin, ring = end, ring + 1
    return rings


def decide(placements: Sequence[Placement], policy: RolloutPolicy, now: datetime, approved: int = 0) -> Decision:
    """What to do, from what is known of every device; ``approved`` is the last ring that a person has let begin.

    The rollout is stopped when ``failed > max_failures``, or when ``reported >= min_reported`` and
    ``failed / reported >= abort_fraction``. Silent devices count neither way until their deadline.
    """
    late = tuple(
        each.device
        for each in placements
        if each.outcome == "ordered" and each.ordered_at is not None and now >= each.ordered_at + _deadline(policy)
    )
    seen = [each.model_copy(update={"outcome": "timed out"}) if each.device in late else each for each in placements]
    counted = count(seen)
    failed = counted["failed"] + (counted["timed out"] if policy.silent == "fail" else 0)
    reported = counted["reported"] + (counted["timed out"] if policy.silent == "fail" else 0)
    if failed > policy.max_failures:
        words = f"{failed} of {reported} devices failed, more than {policy.max_failures}."
        return Decision(action="abort", timed_out=late, reason=words)
    share = policy.abort_fraction
    if share is not None and reported >= policy.min_reported and failed >= share * reported:
        words = f"{failed} of {reported} devices failed, which is {100 * share:g} % or more."
        return Decision(action="abort", timed_out=late, reason=words)
    pending = [each for each in seen if each.outcome in OPEN]
    if not pending:
        return Decision(action="done", timed_out=late, reason="")
    ring = min(each.ring for each in pending)
    before = [each for each in seen if each.ring < ring]
    blocked = _gate(before, policy, now)
    if isinstance(blocked, Decision):
        return blocked.model_copy(update={"timed_out": late})
    asked = ring > approved and (policy.approve == "every ring" or (policy.approve == "canary" and ring == 1))
    if asked and all(each.outcome != "ordered" for each in seen if each.ring == ring):
        words = f"Ring {ring - 1} is good: {count(before)['good']} devices have it. Ring {ring} waits for approval."
        return Decision(action="ask", timed_out=late, reason=words)
    at_it = [each for each in seen if each.outcome == "ordered"]
    room = policy.concurrency - len(at_it)
    waiting = [each.device for each in pending if each.ring == ring and each.outcome == "waiting"]
    if waiting and room > 0:
        return Decision(action="order", devices=tuple(waiting[:room]), timed_out=late, reason=f"Ring {ring}.")
    ends = [each.ordered_at + _deadline(policy) for each in at_it if each.ordered_at is not None]
    words = f"Ring {ring}: {len(at_it)} devices are at it."
    return Decision(action="wait", timed_out=late, reason=words, until=min(ends, default=None))


def _gate(before: Sequence[Placement], policy: RolloutPolicy, now: datetime) -> Decision | None:
    """Why the next ring must not begin; None when it may."""
    if not before:
        return None
    newest = max(each.ring for each in before)
    last = [each for each in before if each.ring == newest]
    counted = count(last)
    if counted["reported"] and counted["good"] < policy.min_success * counted["reported"]:
        words = (
            f"Ring {newest}: {counted['good']} of {counted['reported']} reports are good, expected "
            f"{100 * policy.min_success:g} %."
        )
        return Decision(action="abort", reason=words)
    if not counted["reported"]:
        return Decision(action="abort", reason=f"Ring {newest}: no device has reported, so that nothing is known.")
    ended = max((each.reported_at for each in last if each.reported_at is not None), default=None)
    if ended is not None and now < ended + timedelta(minutes=policy.bake_minutes):
        until = ended + timedelta(minutes=policy.bake_minutes)
        return Decision(action="wait", reason=f"Ring {newest} is good; it is watched until {until:%H:%M}.", until=until)
    return None


def count(placements: Sequence[Placement]) -> Mapping[str, int]:
    """``good``, ``failed``, ``reported`` (both), ``timed out``, ``open``, ``withdrawn``."""
    good = sum(each.outcome in GOOD for each in placements)
    failed = sum(each.outcome in BAD for each in placements)
    return {
        **{"good": good, "failed": failed, "reported": good + failed},
        "timed out": sum(each.outcome == "timed out" for each in placements),
        "open": sum(each.outcome in OPEN for each in placements),
        "withdrawn": sum(each.outcome == "withdrawn" for each in placements),
    }


def _deadline(policy: RolloutPolicy) -> timedelta:
    return timedelta(minutes=policy.deadline_minutes)
