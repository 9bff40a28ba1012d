"""A controller as a program, killed with SIGKILL at every thing that it writes down or does, and followed by another.

``test_controller.py`` has the same within one process, at the courier's calls alone.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.export.devices.fleet import KEPT_OUT, LEASE_SECONDS, Bad, Fleet, Polling, fleet_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DEVICES = 2
BASE, SEQ = 1, 2


@dataclass
class Outcome:
    """What came of a rollout."""

    killed: bool
    state: str
    outcomes: dict[str, int]
    installs: int
    """Over all devices, by their own journals."""
    twice: list[str]
    active: Counter[int | None]
    orders: int
    """Orders of the bundle that devices find at the end, apart from those that they have followed."""
    events: list[str]

    @property
    def same(self) -> tuple[Any, ...]:
        """What must not depend on kills."""
        return self.state, self.outcomes, self.installs, self.twice, self.active, self.orders, self.events


def ended(process: ForkServerProcess, seconds: float = 100.0) -> int | None:
    """Its exit code."""
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def until_taken_over(fleet: Fleet, rollout: str) -> None:
    """Start controllers until one is let in; those before the lease is over are refused."""
    give_up = time.monotonic() + 60
    while (code := ended(fleet.controller(rollout, "two"))) != 0:
        assert code == KEPT_OUT
        assert "expected no other controller" in (fleet.folder / "two.error").read_text()
        assert time.monotonic() < give_up
        time.sleep(0.1)


def events(fleet: Fleet) -> list[str]:
    """What was decided, in its order; which device was first is up to the rollout."""
    return [f"{each['event']} {len(each.get('devices', []))}" for each in fleet.registry.audit()]


def carried_out(folder: Path, bad: Bad | None, kill_at: int | None) -> Outcome:
    """A rollout by one controller that is killed, and another that goes on."""
    folder.mkdir()
    with fleet_of(folder, DEVICES + bool(bad), based=True) as fleet:
        policy: dict[str, Any] = {"canary": 2} if bad else {"canary": 1, "shares": (1.0,)}
        rollout = fleet.start(SEQ, bad, **policy, concurrency=2)
        first = next(each.device for each in fleet.registry.placements(rollout) if each.ring == 0)
        # of the two canaries of a bad bundle one sleeps, so that there is an order to take back
        only: Callable[[], list[str]] = (lambda: [first]) if bad else (lambda: list(fleet.roots))
        with Polling(fleet, only):
            code = ended(fleet.controller(rollout, "one", kill_at))
            assert code in (0, -signal.SIGKILL)
            killed = code != 0
            until_taken_over(fleet, rollout)
        before = fleet.registry.rollout(rollout)
        for name in [*fleet.roots, *fleet.roots]:  # who slept wakes up; who has it does not take it again
            fleet.poll_here(name)
        outcomes = Counter(fleet.outcomes(rollout).values())
        installs = fleet.installs(SEQ)
        return Outcome(
            killed=killed,
            state=f"{before.state} {before.reason}",
            outcomes=dict(sorted(outcomes.items())),
            installs=sum(installs.values()),
            twice=[name for name, times in installs.items() if times > 1],
            active=Counter(fleet.active().values()),
            orders=len(fleet.touched(SEQ)),
            events=events(fleet),
        )


@pytest.mark.parametrize(("bad", "least"), [(None, 20), ("wrong answers", 20)], ids=["a good bundle", "a bad bundle"])
def test_killed_at_any_step_it_is_followed_and_nobody_installs_twice(
    tmp_path: Path, bad: Bad | None, least: int
) -> None:
    wanted = carried_out(tmp_path / "unbroken", bad, None)
    assert not wanted.killed
    assert wanted.active == Counter({BASE: DEVICES + 1} if bad else {SEQ: DEVICES})
    assert (wanted.installs, wanted.orders) == ((0, 1) if bad else (DEVICES, DEVICES))
    wrong, point = list[str](), 0
    while (found := carried_out(tmp_path / f"{point}", bad, point)).killed:
        if found.same != wanted.same:
            wrong.append(f"{point}: {found}")
        point += 1
    assert found.same == wanted.same
    assert wrong == []
    assert point >= least


def test_of_two_controllers_that_start_at_once_one_carries_it_out(tmp_path: Path) -> None:
    with fleet_of(tmp_path, DEVICES, based=True) as fleet:
        rollout = fleet.start(SEQ, concurrency=2)
        with Polling(fleet, lambda: list(fleet.roots)):
            both = [fleet.controller(rollout, name) for name in ("one", "two")]
            codes = [ended(each) for each in both]
        assert sorted(codes, key=str) == [0, KEPT_OUT]
        assert fleet.registry.rollout(rollout).state == "done"
        assert fleet.installs(SEQ) == dict.fromkeys(fleet.roots, 1)
        assert events(fleet).count("rollout done 0") == 1


def test_a_controller_that_is_stopped_for_longer_than_its_lease_leaves(tmp_path: Path) -> None:
    """As a machine that sleeps: it wakes up, and another one is at it."""
    with fleet_of(tmp_path, DEVICES, based=True) as fleet:
        rollout = fleet.start(SEQ, concurrency=1)
        sleeper = fleet.controller(rollout, "sleeper")
        give_up = time.monotonic() + 60
        while not fleet.ordered(rollout):
            assert time.monotonic() < give_up
            time.sleep(0.02)
        os.kill(sleeper.pid or 0, signal.SIGSTOP)
        time.sleep(2 * LEASE_SECONDS)
        other = fleet.controller(rollout, "other")
        while fleet.registry.rollout(rollout).holder != "other":
            assert time.monotonic() < give_up
            time.sleep(0.02)
        os.kill(sleeper.pid or 0, signal.SIGCONT)
        assert ended(sleeper) == KEPT_OUT
        assert "taken over" in (fleet.folder / "sleeper.error").read_text()
        with Polling(fleet, lambda: list(fleet.roots)):
            assert ended(other) == 0
        assert fleet.installs(SEQ) == dict.fromkeys(fleet.roots, 1)
