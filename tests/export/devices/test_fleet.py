"""Twenty agents, each a program with a folder of its own: a good bundle reaches all, a bad one reaches one."""

from pathlib import Path

import pytest

from tests.export.devices.fleet import Bad, roll_out_to_fleet

DEVICES = 20
RINGS = [1, 3, 10, 20]


@pytest.mark.slow
def test_a_good_bundle_reaches_every_device_once(tmp_path: Path) -> None:
    found = roll_out_to_fleet(tmp_path, DEVICES)
    assert (found["state"], found["rings"]) == ("done", RINGS)
    assert (found["reached"], found["remaining"], found["twice"]) == (DEVICES, DEVICES, 0)
    assert found["seconds"] < 120


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "phase"), [("wrong answers", "refused"), ("crashes after the swap", "rolled back")])
def test_a_bad_bundle_reaches_one_device_which_goes_back(tmp_path: Path, bad: Bad, phase: str) -> None:
    found = roll_out_to_fleet(tmp_path, DEVICES, bad)
    assert (found["state"], found["rings"]) == ("aborted", RINGS)
    assert "1 of 1 devices failed" in found["reason"]
    assert (found["reached"], found["remaining"], found["working"]) == (1, 0, DEVICES)
    assert list(found["outcomes"].values()).count(phase) == 1
    assert list(found["outcomes"].values()).count("withdrawn") == DEVICES - 1
    assert found["seconds"] < 120
