"""Rings, gates and the rule that stops a rollout, at its edges; and what holds whatever devices do."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from export.devices.rollout import BAD, Decision, Placement, RolloutPolicy, decide, rings_of

MANY = {"max_failures": 9}
NOW = datetime(2026, 1, 31, 2, 0, tzinfo=UTC)


def placements(*outcomes: str, ring: int = 0) -> list[Placement]:
    return [
        Placement(
            device=f"{ring}-{number}",
            ring=ring,
            outcome=outcome,
            ordered_at=None if outcome == "waiting" else NOW,
            reported_at=NOW if outcome in ("committed", *BAD) else None,
        )
        for number, outcome in enumerate(outcomes)
    ]


def test_rings_grow_to_all_devices() -> None:
    names = [f"d{number}" for number in range(20)]
    rings = rings_of(names, RolloutPolicy(), seed="a")
    assert sorted(rings) == sorted(names)
    assert [list(rings.values()).count(ring) for ring in range(4)] == [1, 2, 7, 10]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (7, [1, 1, 2, 3])])
def test_few_devices_make_few_rings(count: int, sizes: list[int]) -> None:
    rings = rings_of([f"d{number}" for number in range(count)], RolloutPolicy(), seed="a")
    assert [list(rings.values()).count(ring) for ring in range(len(sizes))] == sizes
    assert len(rings) == count


def test_shares_that_do_not_reach_all_leave_a_last_ring() -> None:
    rings = rings_of([f"d{number}" for number in range(10)], RolloutPolicy(shares=(0.5,)), seed="a")
    assert [list(rings.values()).count(ring) for ring in range(3)] == [1, 4, 5]


def test_the_order_depends_on_the_rollout_and_those_named_come_first() -> None:
    names = [f"d{number}" for number in range(50)]
    one, other = (rings_of(names, RolloutPolicy(), seed=seed) for seed in "ab")
    assert one != other
    assert one == rings_of(reversed(names), RolloutPolicy(), seed="a")
    assert rings_of(names, RolloutPolicy(), seed="a", first=["d7"])["d7"] == 0


@pytest.mark.parametrize("shares", [(0.5, 0.15), (0.5, 0.5), (0.0, 1.0), (1.5,)])
def test_shares_that_do_not_ascend_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        RolloutPolicy(shares=shares)


@pytest.mark.parametrize(
    ("outcomes", "policy", "action"),
    [
        # number of failures: more than max_failures
        (["rolled back", "waiting"], {}, "abort"),
        (["refused", "waiting"], {}, "abort"),
        (["rolled back", "committed", "waiting"], {"max_failures": 1}, "order"),
        (["rolled back", "rolled back", "waiting"], {"max_failures": 1}, "abort"),
        # share: from min_reported on, at equality too
        (
            ["rolled back", "committed", "waiting"],
            {**MANY, "min_reported": 2, "abort_fraction": 0.5},
            "abort",
        ),
        (
            ["rolled back", "committed", "waiting"],
            {**MANY, "min_reported": 3, "abort_fraction": 0.5},
            "order",
        ),
        (
            ["rolled back", "committed", "waiting"],
            {**MANY, "min_reported": 2, "abort_fraction": 0.51},
            "order",
        ),
        (
            ["committed", "committed", "waiting"],
            {**MANY, "min_reported": 2, "abort_fraction": 0.01},
            "order",
        ),
        (["rolled back"] * 3, {**MANY, "min_reported": 3, "abort_fraction": 1.0}, "abort"),
        # silence
        (["timed out", "waiting"], {}, "order"),
        (["timed out", "waiting"], {"silent": "fail"}, "abort"),
        # ends
        (["committed"], {}, "done"),
        (["committed", "timed out"], {}, "done"),
        ([], {}, "done"),
        (["withdrawn"], {}, "done"),
        (["ordered"], {}, "wait"),
        (["waiting"], {}, "order"),
    ],
)
def test_the_rule_at_its_edges(outcomes: list[str], policy: dict, action: str) -> None:
    assert decide(placements(*outcomes), RolloutPolicy(**policy), NOW).action == action


def test_the_next_ring_waits_for_the_ring_before() -> None:
    found = decide([*placements("ordered"), *placements("waiting", ring=1)], RolloutPolicy(), NOW)
    assert found.action == "wait"
    found = decide([*placements("committed"), *placements("waiting", "waiting", ring=1)], RolloutPolicy(), NOW)
    assert (found.action, found.devices) == ("order", ("1-0", "1-1"))


def test_a_ring_of_which_nobody_reported_opens_nothing() -> None:
    found = decide([*placements("timed out"), *placements("waiting", ring=1)], RolloutPolicy(), NOW)
    assert found.action == "abort"
    assert "nothing is known" in found.reason


def test_a_ring_that_is_not_good_enough_opens_nothing() -> None:
    seen = [*placements("committed", "rolled back"), *placements("waiting", ring=1)]
    policy = RolloutPolicy(max_failures=5, min_success=0.5)
    assert decide(seen, policy, NOW).action == "order"
    assert decide(seen, policy.model_copy(update={"min_success": 0.51}), NOW).action == "abort"


def test_a_good_ring_is_watched_for_a_while() -> None:
    seen = [*placements("committed"), *placements("waiting", ring=1)]
    policy = RolloutPolicy(bake_minutes=10)
    found = decide(seen, policy, NOW + timedelta(minutes=9))
    assert (found.action, found.until) == ("wait", NOW + timedelta(minutes=10))
    assert decide(seen, policy, NOW + timedelta(minutes=10)).action == "order"


def test_no_more_devices_are_at_it_than_allowed() -> None:
    seen = placements("ordered", "ordered", "waiting", "waiting")
    assert decide(seen, RolloutPolicy(concurrency=3), NOW).devices == ("0-2",)
    assert decide(seen, RolloutPolicy(concurrency=2), NOW).action == "wait"


def test_a_silent_device_is_timed_out_at_its_deadline() -> None:
    policy = RolloutPolicy(deadline_minutes=5, canary=2)
    seen = placements("ordered", "committed")
    early = decide(seen, policy, NOW + timedelta(minutes=4))
    assert (early.action, early.timed_out, early.until) == ("wait", (), NOW + timedelta(minutes=5))
    late = decide(seen, policy, NOW + timedelta(minutes=5))
    assert (late.action, late.timed_out) == ("done", ("0-0",))


policies = st.builds(
    RolloutPolicy,
    canary=st.integers(1, 4),
    shares=st.sampled_from([(1.0,), (0.5, 1.0), (0.15, 0.5, 1.0), (0.3,)]),
    concurrency=st.integers(1, 6),
    max_failures=st.integers(0, 4),
    min_reported=st.integers(1, 6),
    abort_fraction=st.none() | st.floats(0.05, 1.0),
    deadline_minutes=st.just(5.0),
    silent=st.sampled_from(["skip", "fail"]),
    bake_minutes=st.sampled_from([0.0, 3.0]),
    min_success=st.floats(0.0, 1.0),
)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 25),
    policy=policies,
    fates=st.lists(st.sampled_from(["committed", "rolled back", "refused", "silent"]), min_size=25, max_size=25),
    minutes=st.lists(st.integers(0, 7), min_size=25, max_size=25),
)
def test_whatever_devices_do_it_ends_and_keeps_its_bounds(
    count: int, policy: RolloutPolicy, fates: list[str], minutes: list[int]
) -> None:
    """Devices report some minutes after they were ordered, or never; the clock goes on by minutes."""
    names = [f"d{number}" for number in range(count)]
    rings = rings_of(names, policy, seed="s")
    seen = {name: Placement(device=name, ring=ring) for name, ring in rings.items()}
    fate = {name: (fates[number], minutes[number]) for number, name in enumerate(names)}
    ordered: list[str] = []
    for minute in range(2000):
        now = NOW + timedelta(minutes=minute)
        for name, each in seen.items():
            word, after = fate[name]
            if each.outcome == "ordered" and word != "silent" and now >= each.ordered_at + timedelta(minutes=after):
                seen[name] = each.model_copy(update={"outcome": word, "reported_at": now})
        found: Decision = decide(list(seen.values()), policy, now)
        for name in found.timed_out:
            seen[name] = seen[name].model_copy(update={"outcome": "timed out"})
        if found.action in ("abort", "done"):
            break
        for name in found.devices:
            assert seen[name].outcome == "waiting"
            seen[name] = seen[name].model_copy(update={"outcome": "ordered", "ordered_at": now})
            ordered.append(name)
        at_it = [each for each in seen.values() if each.outcome == "ordered"]
        assert len(at_it) <= policy.concurrency
        begun = max((each.ring for each in at_it), default=0)
        assert not [each for each in seen.values() if each.ring < begun and each.outcome in ("waiting", "ordered")]
    else:
        raise AssertionError("it did not end")
    assert len(ordered) == len(set(ordered))
    bad = sum(each.outcome in BAD for each in seen.values())
    assert bad <= policy.max_failures + policy.concurrency
    if found.action == "done":
        assert all(each.outcome not in ("waiting", "ordered") for each in seen.values())


@pytest.mark.parametrize(("approve", "asked"), [("never", []), ("canary", [1]), ("every ring", [1, 2, 3])])
def test_a_person_is_asked_before_the_rings_that_the_policy_says(approve: Any, asked: list[int]) -> None:
    policy = RolloutPolicy(approve=approve, concurrency=20)
    rings = rings_of([f"d{number}" for number in range(20)], policy, seed="s")
    outcomes: dict[str, Any] = dict.fromkeys(rings, "waiting")
    approved, seen = 0, []
    for _ in range(20):
        placements = [Placement(device=name, ring=ring, outcome=outcomes[name]) for name, ring in rings.items()]
        decision = decide(placements, policy, NOW, approved)
        if decision.action == "done":
            break
        if decision.action == "ask":
            approved += 1
            seen.append(approved)
        for name in decision.devices:
            outcomes[name] = "committed"
    assert seen == asked
    assert set(outcomes.values()) == {"committed"}
