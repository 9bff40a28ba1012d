"""Killed at every system call, and its power cut there: the device has the old or the new model, whole, and goes on.

Broken variants of the agent must not pass, or these tests say nothing.
"""

import os
from pathlib import Path

import pytest

from export.devices.agent import durable
from export.devices.agent.device import Device
from export.devices.agent.errors import Refused
from tests.export.devices import cuts
from tests.export.devices import made_up_bundle as made_up

pytestmark = [
    pytest.mark.skipif(not cuts.can_trace(), reason="needs strace, and leave to trace"),
    pytest.mark.timeout(3000),
]
BEFORE, AFTER = 2, 3
SAMPLE = 5
"""In the quick suite every so manieth call is enough."""


def base_device(root: Path, folder: Path) -> Path:
    """A device with two bundles installed, so that the other slot is occupied."""
    (root / "slots").mkdir(parents=True)
    durable.write_json(root / "config.json", {"device": "lab-1"})
    durable.write_json(root / "trust.json", made_up.trust())
    for seq in (1, BEFORE):
        Device(root).install(made_up.write(folder / f"{seq}.edgepkg", made_up.members(seq), seq=seq))
    return root


def good(folder: Path) -> Path:
    return made_up.write(folder / "good.edgepkg", made_up.members(AFTER), seq=AFTER)


def bad(folder: Path) -> Path:
    """It passes the test before the swap only as far as its files are right: its golden answers are others."""
    files = made_up.members(AFTER) | {"golden.npz": made_up.members(9)["golden.npz"]}
    return made_up.write(folder / "bad.edgepkg", files, seq=AFTER)


BUNDLES = {"good": (good, AFTER), "bad": (bad, BEFORE)}


def sweep(tmp_path: Path, kind: str, calls: tuple[str, ...], step: int, code: str = "") -> tuple[int, list[str]]:
    """(points tried, what went wrong) over kills of the installation of a bundle."""
    make, wanted = BUNDLES[kind]
    base, bundle = base_device(tmp_path / "base", tmp_path), make(tmp_path)
    with cuts.copy_of(base, tmp_path / "device") as root:
        found = cuts.points(root, bundle, calls, tmp_path / "trace", code)
    wrong = []
    for point in found[::step]:
        with cuts.copy_of(base, tmp_path / "device") as root:
            if not cuts.killed_at(point, root, bundle, code):
                wrong.append(f"not reached: {point}")
                continue
            fault = cuts.faults(root, BEFORE, wanted) or cuts.settle(root, bundle, wanted)
            if fault:
                wrong.append(f"{point}: {fault}")
    return len(found[::step]), wrong


@pytest.mark.parametrize("kind", BUNDLES)
def test_killed_before_some_changes_it_has_a_whole_model_and_goes_on(tmp_path: Path, kind: str) -> None:
    tried, wrong = sweep(tmp_path, kind, cuts.MUTATING, SAMPLE)
    assert wrong == []
    assert tried >= 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUNDLES)
def test_killed_before_any_change_it_has_a_whole_model_and_goes_on(tmp_path: Path, kind: str) -> None:
    tried, wrong = sweep(tmp_path, kind, cuts.MUTATING, 1)
    assert wrong == []
    assert tried >= 45


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", BUNDLES)
def test_killed_at_any_call_it_has_a_whole_model_and_goes_on(tmp_path: Path, kind: str) -> None:
    tried, wrong = sweep(tmp_path, kind, cuts.MUTATING + cuts.OTHERS, 1)
    assert wrong == []
    assert tried >= 250


# --- power cuts ---

WORST = "noauto_da_alloc,data=writeback,commit=300"
"""Nothing reaches the device but what is flushed, and names may get there before the bytes."""


def power_cuts(
    tmp_path: Path, kind: str, options: str, step: int, code: str = "", calls: tuple[str, ...] = cuts.MUTATING
) -> tuple[int, list[str]]:
    """(points tried, what went wrong) over power cuts in the installation of a bundle."""
    reason = cuts.can_mount(tmp_path)
    if reason:
        if os.environ.get("CI_REQUIRE_ROOT"):
            pytest.fail(reason)
        pytest.skip(reason)
    make, wanted = BUNDLES[kind]
    bundle = make(tmp_path)
    base, place = cuts.Disk(tmp_path / "base.img", options), tmp_path / "disk"
    base.make()
    with base.mounted(place):
        base_device(place / "device", tmp_path)
    with base.as_cut(tmp_path / "trace.img").mounted(place):
        found = cuts.points(place / "device", bundle, calls, tmp_path / "trace", code)
    wrong = []
    for point in found[::step]:
        for _ in range(2):  # once, on a busy machine, one of 200 was not reached; why is not known
            disk = base.as_cut(tmp_path / "now.img")
            with disk.mounted(place):
                reached = cuts.killed_at(point, place / "device", bundle, code)
                cut = disk.as_cut(tmp_path / "cut.img")
            if reached:
                break
        else:
            wrong.append(f"not reached: {point}")
            continue
        with cut.mounted(place):
            root = place / "device"
            fault = cuts.faults(root, BEFORE, wanted) or cuts.settle(root, bundle, wanted)
            if fault:
                wrong.append(f"{point}: {fault}")
    return len(found[::step]), wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUNDLES)
@pytest.mark.parametrize("options", [WORST, "defaults"], ids=["worst", "defaults"])
def test_with_its_power_cut_at_any_change_it_has_a_whole_model_and_goes_on(
    tmp_path: Path, kind: str, options: str
) -> None:
    tried, wrong = power_cuts(tmp_path, kind, options, 1)
    assert wrong == []
    assert tried >= 45


# --- broken on purpose ---

NO_FLUSH = (
    "import os, stat; flush = os.fsync; "
    "os.fsync = lambda file: flush(file) if stat.S_ISDIR(os.fstat(file).st_mode) else None"
)
"""Names are flushed, bytes are not: a name may then stand for an empty file."""
DELETE_AND_CREATE = (
    "import os; from export.devices.agent import durable; "
    "durable.point = lambda link, target: (os.path.lexists(link) and os.unlink(link), os.symlink(target, link))"
)


@pytest.mark.slow
def test_a_swap_that_deletes_first_is_caught(tmp_path: Path) -> None:
    _, wrong = sweep(tmp_path, "good", ("symlink", "unlink"), 1, DELETE_AND_CREATE)
    assert any("no model is active" in each for each in wrong)


@pytest.mark.slow
def test_an_agent_that_does_not_flush_bytes_is_caught(tmp_path: Path) -> None:
    _, wrong = power_cuts(tmp_path, "good", WORST, 1, NO_FLUSH, ("rename", "unlink", "fsync"))
    assert len(wrong) > 5


def replay(root: Path, folder: Path) -> str:
    """What becomes of a bundle that is older than the active one."""
    try:
        Device(root).install(folder / "1.edgepkg")
    except Refused as error:
        return error.code
    return "installed"


def test_a_replayed_bundle_is_refused(tmp_path: Path) -> None:
    assert replay(base_device(tmp_path / "device", tmp_path), tmp_path) == "floor"


def test_an_agent_without_a_floor_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = base_device(tmp_path / "device", tmp_path)
    monkeypatch.setattr(Device, "floor", property(lambda self: {"seq": {}, "time": 0.0, "repository": {}}))
    assert replay(root, tmp_path) == "installed"
