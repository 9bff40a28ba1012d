"""Clocks that are wrong (D9): nothing is lost by it, and with the right one the device is updated."""

# pyright: reportPrivateImportUsage=false

import datetime
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from export.devices import repository as repositories
from export.devices.repository import Order
from tests.export.devices import cuts
from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.test_agent_pull import Fleet
from tests.export.devices.tuf_attacker import ONLINE, Attacker, both, committed, copied, fleet_with_bundle_2, past


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, dict[str, bytes]]]:
    """A fleet whose device has bundle 2, to be copied, and its repository of before."""
    yield from fleet_with_bundle_2(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def attacker(start: tuple[Fleet, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attacker:
    return copied(start, tmp_path, monkeypatch)


YEAR = 365.25 * 86400
TO_1970 = -time.time() + 3600
WRONG_CLOCK = """
import datetime, time
real = time.time
time.time = lambda: real() + {seconds}
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(time.time(), tz)
datetime.datetime = Shifted
"""


@contextmanager
def clock(seconds: float) -> Iterator[None]:
    """This process has a clock that is wrong by so much, in the agent and in tuf."""
    real = time.time

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Shifted":
            return cls.fromtimestamp(time.time(), tz)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + seconds)
        patch.setattr(datetime, "datetime", Shifted)
        yield


def test_with_a_clock_ten_years_ahead_all_has_expired_and_it_heals(attacker: Attacker) -> None:
    attacker.fleet.order(3)
    attacker.honest = attacker.files()
    with clock(10 * YEAR):
        attacker.must_fail("is expired")
    committed(attacker, 3)


def test_with_a_clock_in_1970_it_is_updated_and_says_so_and_goes_on(attacker: Attacker) -> None:
    attacker.fleet.order(3)
    with clock(TO_1970):
        committed(attacker, 3)
        assert attacker.device.status()["clock_skew_s"] > 50 * YEAR
    attacker.fleet.order(4)
    committed(attacker, 4)
    assert attacker.device.status()["clock_skew_s"] == 0


@pytest.mark.parametrize("role", ONLINE)
def test_with_a_clock_in_1970_what_expired_before_the_newest_bundle_was_made_is_refused(
    attacker: Attacker, role: str
) -> None:
    def expire(metadata: Metadata) -> None:
        metadata.signed.expires = datetime.datetime(2026, 1, 31, 2, 11, 4, tzinfo=datetime.UTC)

    attacker.publish({role: both(attacker.order_evil, expire) if role == "targets" else expire})
    with clock(TO_1970):
        attacker.must_fail(f"{role} metadata have been good until")
    attacker.must_recover(*ONLINE)


def test_metadata_that_have_expired_on_the_device_are_renewed(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that was off for some days, while the repository was signed anew."""
    for role in repositories.EXPIRY:
        monkeypatch.setitem(repositories.EXPIRY, role, datetime.timedelta(days=200))
    attacker.rotate(*ONLINE)
    attacker.fleet.order(3)
    with clock(150 * 86400):
        committed(attacker, 3)


def test_a_bundle_that_only_a_wrong_clock_found_expired_is_taken_with_the_right_one(attacker: Attacker) -> None:
    until = (past(-1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    bundle = made_up.write(attacker.fleet.folder / "digits-3.edgepkg", made_up.members(3), seq=3, not_after=until)
    attacker.fleet.repository.publish(bundle, {"lab-1": Order(bundle=bundle.name, name="digits", seq=3)})
    with clock(2 * 86400):
        attacker.must_fail("was to be installed until")
    committed(attacker, 3)


def poll_in_its_own_process(attacker: Attacker, seconds: float) -> tuple[int, str]:
    command = cuts.agent(attacker.device.root, "poll", code=f"exec({WRONG_CLOCK.format(seconds=seconds)!r})")
    done = subprocess.run(command, env=cuts.environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "code"), [(10 * YEAR, 2), (TO_1970, 0)], ids=["ten_years_ahead", "in_1970"])
def test_the_agents_command_is_not_ended_by_a_wrong_clock(attacker: Attacker, seconds: float, code: int) -> None:
    attacker.fleet.order(3)
    found, said = poll_in_its_own_process(attacker, seconds)
    assert (found, attacker.fleet.active()) == (code, 2 if code else 3), said
    attacker.fleet.order(4)
    assert poll_in_its_own_process(attacker, 0)[0] == 0
    assert attacker.fleet.active() == 4
