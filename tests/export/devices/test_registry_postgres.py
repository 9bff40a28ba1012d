"""Several programs at one registry at the same moment, in SQLite and in PostgreSQL: each has connections of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from export.devices.errors import DeviceError
from export.devices.registry import LEASE, DeviceEntry, Registry, reports_table
from export.devices.rollout import RolloutPolicy
from tests.export.devices.test_registry import NOW, POSTGRESQL, empty_database, outcomes, report, served

ROUNDS = 20


@pytest.fixture(scope="module", params=["sqlite", POSTGRESQL])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with served(request.param) as url:
        yield url


@pytest.fixture
def url(server: str, tmp_path: Path) -> str:
    return empty_database(server) if server else f"sqlite:///{tmp_path / 'devices.db'}"


@pytest.fixture
def registries(url: str) -> Iterator[list[Registry]]:
    """Four, of one database with four devices."""
    with ExitStack() as stack:
        found = [stack.enter_context(closing(Registry(url))) for _ in range(4)]
        for number in range(4):
            found[0].add(DeviceEntry(id=f"lab-{number}", transport="pull"))
        yield found


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each returned, or the error that it raised; all begin at the same moment."""
    found: list[Any] = [None] * len(calls)
    start_ = threading.Barrier(len(calls))

    def go(place: int) -> None:
        start_.wait(timeout=20)
        try:
            found[place] = calls[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=go, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def start(registry: Registry, model: str = "digits") -> str:
    return registry.start(model=model, seq=7, bundle="digits-7.edgepkg", policy=RolloutPolicy()).id


def test_a_report_that_comes_over_two_connections_at_once_counts_once(registries: list[Registry]) -> None:
    one, two, *_ = registries
    for seq in range(1, ROUNDS + 1):
        said = report("lab-1", seq=seq)
        assert sorted(at_once(lambda: one.receive(said), lambda: two.receive(said)), key=str) == [False, True]  # noqa: B023
    assert len(one.reports("lab-1")) == ROUNDS
    assert sum(each["event"] == "device committed" for each in one.audit()) == ROUNDS


def test_a_report_whose_first_delivery_was_cut_off_counts_at_the_second(registries: list[Registry]) -> None:
    one, two, *_ = registries
    rollout = start(one)
    said, came = report("lab-1"), list[bool]()
    second = threading.Thread(target=lambda: came.append(two.receive(said)))
    with one.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        row = {"key": said["key"], "device": "lab-1", "body": said, "at": datetime.now(UTC)}
        connection.execute(sa.insert(reports_table).values(row))
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive(), "it waits to see what becomes of the first"
        connection.rollback()
    second.join(timeout=20)
    assert came == [True]
    assert outcomes(one, rollout)["lab-1"] == "committed"


def test_of_two_controllers_that_ask_at_once_one_holds(registries: list[Registry]) -> None:
    one, two, *_ = registries
    rollout = start(one)
    for number in range(ROUNDS):
        now = NOW + number * 2 * LEASE  # the holder of before is dead by now
        got = at_once(lambda: one.hold(rollout, f"a{number}", now), lambda: two.hold(rollout, f"b{number}", now))  # noqa: B023
        assert sorted(got) == [False, True]
        found = two.rollout(rollout)
        assert found.holder == (f"a{number}" if got[0] else f"b{number}")
        assert found.held_until == now + LEASE


def test_a_controller_that_renews_while_another_asks_keeps_it(registries: list[Registry]) -> None:
    one, two, *_ = registries
    rollout = start(one)
    assert one.hold(rollout, "a", NOW)
    for number in range(1, ROUNDS):
        now = NOW + number * LEASE / 2
        assert at_once(lambda: one.hold(rollout, "a", now), lambda: two.hold(rollout, "b", now)) == [True, False]  # noqa: B023


def test_the_log_is_an_unbroken_chain_whoever_writes_it(registries: list[Registry]) -> None:
    rollout = start(registries[0])
    before = len(registries[0].audit())

    def write(number: int) -> None:
        registry, device = registries[number], f"lab-{number}"
        for seq in range(1, ROUNDS + 1):
            registry.receive(report(device, seq=100 + seq))
            registry.mark(rollout, [f"lab-{each}" for each in range(4)], "ordered")
            registry.add(DeviceEntry(id=f"new-{number}-{seq}", transport="pull"))
            registry.remove(f"new-{number}-{seq}")
            registry.seen(device, {"active": {}, "facts": {}})
            registry.audit()

    assert at_once(*(lambda number=number: write(number) for number in range(4))) == [None] * 4
    assert len(registries[1].audit()) - before == 4 * ROUNDS * 4


def test_of_two_rollouts_of_a_model_that_begin_at_once_one_does(registries: list[Registry]) -> None:
    one, two, *_ = registries
    for number in range(ROUNDS):
        found = at_once(lambda: start(one, f"m{number}"), lambda: start(two, f"m{number}"))  # noqa: B023
        assert [type(each) for each in sorted(found, key=lambda each: type(each).__name__)] == [DeviceError, str], found


def test_a_device_that_is_entered_twice_at_once_is_refused_once(registries: list[Registry]) -> None:
    one, two, *_ = registries
    for number in range(ROUNDS):
        device = DeviceEntry(id=f"new-{number}", transport="pull")
        found = at_once(lambda: one.add(device), lambda: two.add(device))  # noqa: B023
        assert {type(each) for each in found} == {type(None), DeviceError}, found


def test_an_end_is_decided_once(registries: list[Registry]) -> None:
    one, two, *_ = registries
    for number in range(ROUNDS):
        rollout = start(one, f"m{number}")
        done, aborted = at_once(
            lambda: one.set_state(rollout, "done", "all have it"),  # noqa: B023
            lambda: two.set_state(rollout, "aborted", "stop"),  # noqa: B023
        )
        assert {done, aborted} == {True, False}
        assert one.rollout(rollout).state == ("done" if done else "aborted")


def test_programs_that_open_an_empty_database_at_once_all_may(url: str) -> None:
    found = at_once(*[lambda: Registry(url)] * 4)
    for each in found:
        if isinstance(each, Registry):
            each.close()
    assert [each for each in found if not isinstance(each, Registry)] == []
