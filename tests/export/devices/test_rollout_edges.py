"""Rules of a rollout at their edges, D15 of docs/reliability.md: none, one, all, exactly at a limit and next to it."""

from datetime import timedelta

import pytest

from export.devices.rollout import Placement, RolloutPolicy, decide, rings_of
from tests.export.devices.test_rollout import NOW, placements

FAILED, GOOD, SILENT, WAITS, AT_IT = "rolled back", "committed", "timed out", "waiting", "ordered"


@pytest.mark.parametrize(
    ("outcomes", "policy", "action"),
    [
        # no device, one device
        ([], {"silent": "fail"}, "done"),
        ([WAITS], {"max_failures": 0}, "order"),
        ([GOOD], {}, "done"),
        ([FAILED], {}, "abort"),
        ([FAILED], {"max_failures": 1}, "done"),
        ([SILENT], {}, "done"),
        ([SILENT], {"silent": "fail"}, "abort"),
        # every device fails
        ([FAILED] * 10, {"max_failures": 10}, "done"),
        ([FAILED] * 10, {"max_failures": 10, "abort_fraction": 1.0}, "abort"),
        ([*[FAILED] * 9, GOOD], {"max_failures": 10, "abort_fraction": 1.0}, "done"),
        # exactly at a share, and a hair below
        ([*[FAILED] * 1, *[GOOD] * 9], {"max_failures": 9, "abort_fraction": 0.1}, "abort"),
        ([*[FAILED] * 3, *[GOOD] * 7], {"max_failures": 9, "abort_fraction": 0.3}, "abort"),
        ([*[FAILED] * 3, *[GOOD] * 7], {"max_failures": 9, "abort_fraction": 0.31}, "done"),
        # exactly at min_reported, and one below
        ([*[FAILED] * 5, *[GOOD] * 4, WAITS], {"max_failures": 9, "abort_fraction": 0.1}, "order"),
        ([*[FAILED] * 5, *[GOOD] * 5, WAITS], {"max_failures": 9, "abort_fraction": 0.1}, "abort"),
        # the silent count in a share only where they are failures
        ([*[SILENT] * 5, *[GOOD] * 5, WAITS], {"max_failures": 9, "abort_fraction": 0.5}, "order"),
        ([*[SILENT] * 5, *[GOOD] * 5, WAITS], {"max_failures": 9, "abort_fraction": 0.5, "silent": "fail"}, "abort"),
        # all places taken, one free, none wanted
        ([AT_IT, WAITS], {"concurrency": 1}, "wait"),
        ([AT_IT, WAITS], {"concurrency": 2}, "order"),
        ([AT_IT, GOOD], {"concurrency": 1}, "wait"),
    ],
)
def test_the_rule_at_more_of_its_edges(outcomes: list[str], policy: dict, action: str) -> None:
    assert decide(placements(*outcomes), RolloutPolicy(**policy), NOW).action == action


@pytest.mark.parametrize(
    ("good", "bad", "min_success", "action"),
    [
        (0, 2, 0.0, "order"),
        (1, 1, 0.5, "order"),
        (1, 1, 0.500001, "abort"),
        (2, 0, 1.0, "order"),
        (3, 1, 0.75, "order"),
    ],
)
def test_the_gate_at_its_edges(good: int, bad: int, min_success: float, action: str) -> None:
    seen = [*placements(*[GOOD] * good, *[FAILED] * bad), *placements(WAITS, ring=1)]
    policy = RolloutPolicy(max_failures=9, min_success=min_success)
    assert decide(seen, policy, NOW).action == action


@pytest.mark.parametrize(("seconds", "timed_out"), [(299, ()), (300, ("d",)), (301, ("d",))])
def test_the_deadline_at_its_edge(seconds: int, timed_out: tuple[str, ...]) -> None:
    at_it = Placement(device="d", ring=0, outcome="ordered", ordered_at=NOW)
    found = decide([at_it], RolloutPolicy(deadline_minutes=5), NOW + timedelta(seconds=seconds))
    assert found.timed_out == timed_out


@pytest.mark.parametrize(("count", "first"), [(1, 1), (3, 3), (5, 3)])
def test_more_canaries_than_devices_are_all_devices(count: int, first: int) -> None:
    rings = rings_of([f"d{number}" for number in range(count)], RolloutPolicy(canary=3, shares=()), seed="s")
    assert list(rings.values()).count(0) == first
    assert len(rings) == count
