"""The registry: reports count once, one rollout and one controller at a time, a log that nobody changes unseen."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from export.devices.errors import DeviceError
from export.devices.registry import LEASE, DeviceEntry, Registry, audit_table
from export.devices.rollout import RolloutPolicy
from tests.compression import postgres

NOW = datetime(2026, 1, 31, 2, 0, tzinfo=UTC)
POSTGRESQL = pytest.param(
    "postgresql",
    marks=[
        pytest.mark.servers,
        pytest.mark.skipif(
            postgres.programs() is None, reason="PostgreSQL is not installed (apt-get install postgresql)"
        ),
    ],
)


@pytest.fixture(scope="module", params=["sqlite", POSTGRESQL])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of PostgreSQL the URL; of SQLite, which has none, nothing."""
    with served(request.param) as url:
        yield url


@contextmanager
def served(database: str) -> Iterator[str]:
    if database == "sqlite":
        yield ""
        return
    with postgres.server() as url:
        engine = sa.create_engine(url)
        give_up = time.monotonic() + 60
        while not answers(engine):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield url
        with engine.begin() as connection:  # the server ends when all its clients have left, those of failed tests too
            others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
            connection.execute(sa.text(others))
        engine.dispose()


def answers(engine: sa.Engine) -> bool:
    """Its port is open a moment before it takes clients."""
    try:
        engine.connect().close()
    except OperationalError:
        return False
    return True


@pytest.fixture
def url(server: str, tmp_path: Path) -> str:
    """Of a database without tables."""
    if not server:
        return f"sqlite:///{tmp_path / 'devices.db'}"
    return empty_database(server)


def empty_database(server: str) -> str:
    """The URL of a new database."""
    name = f"d{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    engine.dispose()
    return server.rpartition("/")[0] + f"/{name}"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    found = Registry(url)
    for number in range(4):
        found.add(DeviceEntry(id=f"lab-{number}", transport="pull", first=number == 2))
    yield found
    found.close()


def report(device: str, phase: str = "committed", seq: int = 7, **more: Any) -> dict[str, Any]:
    key = f"{device}/digits/{seq}/{phase}"
    return {"key": key, "device": device, "phase": phase, "name": "digits", "version": "3", "seq": seq, **more}


def start(registry: Registry, **policy: Any) -> str:
    return registry.start(model="digits", seq=7, bundle="digits-7.edgepkg", policy=RolloutPolicy(**policy)).id


def outcomes(registry: Registry, rollout: str) -> dict[str, str]:
    return {each.device: each.outcome for each in registry.placements(rollout)}


def test_devices_are_kept_and_named_once(registry: Registry, url: str) -> None:
    with pytest.raises(DeviceError, match="expected a new name"):
        registry.add(DeviceEntry(id="lab-1", transport="ssh"))
    registry.remove("lab-1")
    with pytest.raises(DeviceError, match="not in the registry"):
        registry.device("lab-1")
    again = Registry(url)
    assert [each.id for each in again.devices()] == ["lab-0", "lab-2", "lab-3"]
    again.close()


def test_a_rollout_has_every_device_in_a_ring_and_the_named_ones_first(registry: Registry) -> None:
    rollout = start(registry)
    found = {each.device: each.ring for each in registry.placements(rollout)}
    assert sorted(found) == ["lab-0", "lab-1", "lab-2", "lab-3"]
    assert found["lab-2"] == 0
    assert list(found.values()).count(0) == 1


def test_one_rollout_of_a_model_at_a_time(registry: Registry) -> None:
    rollout = start(registry)
    with pytest.raises(DeviceError, match="is being rolled out"):
        start(registry)
    registry.start(model="other", seq=1, bundle="b", policy=RolloutPolicy())
    registry.set_state(rollout, "aborted", "a bad one")
    assert registry.rollout(rollout[:8]).state == "aborted"
    start(registry)


@pytest.mark.parametrize("devices", [[], ["lab-9"]])
def test_a_rollout_to_nobody_is_refused(registry: Registry, devices: list[str]) -> None:
    with pytest.raises(DeviceError, match="expected devices of the registry"):
        registry.start(model="digits", seq=7, bundle="b", policy=RolloutPolicy(), devices=devices)


def test_a_report_counts_once(registry: Registry) -> None:
    rollout = start(registry)
    registry.mark(rollout, ["lab-2"], "ordered", NOW)
    assert registry.receive(report("lab-2"), NOW) is True
    assert registry.receive(report("lab-2", at=5), NOW + timedelta(hours=1)) is False
    (placed,) = [each for each in registry.placements(rollout) if each.device == "lab-2"]
    assert (placed.outcome, placed.ordered_at, placed.reported_at) == ("committed", NOW, NOW)
    assert registry.device("lab-2").active["seq"] == 7
    assert registry.device("lab-2").last_seen == NOW
    assert len(registry.reports("lab-2")) == 1


def test_reports_of_strangers_are_refused_and_of_other_bundles_change_no_rollout(registry: Registry) -> None:
    rollout = start(registry)
    with pytest.raises(DeviceError, match="not in the registry"):
        registry.receive(report("stranger"))
    registry.receive(report("lab-0", seq=6))
    assert set(outcomes(registry, rollout).values()) == {"waiting"}


def test_a_bad_end_is_no_active_model(registry: Registry) -> None:
    rollout = start(registry)
    registry.receive(report("lab-0", seq=6))
    registry.receive(report("lab-0", "rolled back", text="too slow"))
    assert outcomes(registry, rollout)["lab-0"] == "rolled back"
    assert registry.device("lab-0").active["seq"] == 6


def test_who_reported_meanwhile_is_not_ordered_or_timed_out(registry: Registry) -> None:
    rollout = start(registry)
    registry.mark(rollout, ["lab-0", "lab-1"], "ordered", NOW)
    registry.receive(report("lab-0"))
    registry.mark(rollout, ["lab-0", "lab-1"], "timed out")
    assert outcomes(registry, rollout) == {
        **{"lab-0": "committed", "lab-1": "timed out", "lab-2": "waiting", "lab-3": "waiting"}
    }
    registry.receive(report("lab-1"))  # late, but good to know
    assert outcomes(registry, rollout)["lab-1"] == "committed"


def test_one_controller_at_a_time_and_the_next_when_it_is_dead(registry: Registry) -> None:
    rollout = start(registry)
    assert registry.hold(rollout, "a", NOW)
    assert registry.hold(rollout, "a", NOW + LEASE / 2)
    assert not registry.hold(rollout, "b", NOW + LEASE)
    assert registry.hold(rollout, "b", NOW + 2 * LEASE)
    assert not registry.hold(rollout, "a", NOW + 2 * LEASE)
    registry.let_go(rollout, "a")  # it is not its to give
    assert not registry.hold(rollout, "a", NOW + 2 * LEASE)
    registry.let_go(rollout, "b")
    assert registry.hold(rollout, "a", NOW + 2 * LEASE)


def test_of_many_that_ask_at_once_one_holds(registry: Registry) -> None:
    rollout = start(registry)
    got: list[str] = []

    def ask(name: str) -> None:
        if registry.hold(rollout, name):
            got.append(name)

    threads = [threading.Thread(target=ask, args=(f"c{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_every_decision_is_in_the_log(registry: Registry) -> None:
    rollout = start(registry)
    registry.mark(rollout, ["lab-2"], "ordered")
    registry.receive(report("lab-2", "rolled back", text="wrong answers"))
    registry.set_state(rollout, "aborted", "1 of 1 devices failed.")
    events = [each["event"] for each in registry.audit()]
    assert events == ["device added"] * 4 + ["rollout started", "ordered", "device rolled back", "rollout aborted"]


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_log_that_was_changed_is_noticed(registry: Registry, harm: str) -> None:
    third = audit_table.c.number == 3
    with registry.engine.begin() as connection:
        if harm == "change":
            connection.execute(sa.update(audit_table).where(third).values(event='{"event": "nothing"}'))
        else:
            connection.execute(sa.delete(audit_table).where(third))
    with pytest.raises(DeviceError, match="unbroken chain"):
        registry.audit()
