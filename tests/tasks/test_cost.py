import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import cost
from tasks.cost import Meter

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"


def package(folder: Path, number: int, energy: int, span: int = 1_000_000) -> Path:
    place = folder / f"intel-rapl:{number}"
    place.mkdir(parents=True)
    (place / "name").write_text(f"package-{number}\n")
    (place / "max_energy_range_uj").write_text(f"{span - 1}\n")
    (place / "energy_uj").write_text(f"{energy}\n")
    return place / "energy_uj"


def test_cpu_seconds_count_this_process_and_its_children() -> None:
    with Meter() as meter:
        exec(BURN.format(0.3))
        own = meter.cpu_seconds
        subprocess.run([sys.executable, "-c", BURN.format(0.5)], check=True)
        time.sleep(0.2)
        both = meter.cpu_seconds
    assert 0.28 <= own < 0.6
    assert 0.48 <= both - own < 1.5


def test_energy_is_the_sum_over_packages(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 1000), package(tmp_path, 1, 5000)
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "name").write_text("core\n")
    (part / "energy_uj").write_text("1\n")
    with Meter(tmp_path) as meter:
        first.write_text("201000\n")
        second.write_text("305000\n")
        assert meter.energy_j == pytest.approx(0.5)
        first.write_text("301000\n")
        assert meter.energy_j == pytest.approx(0.6)


def test_a_counter_that_starts_again_at_zero_is_read_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "SECONDS_BETWEEN_READINGS", 0.02)
    file = package(tmp_path, 0, 900_000)
    with Meter(tmp_path) as meter:
        for value in (100_000, 900_000, 100_000):  # +0.2 J, +0.8 J, +0.2 J: once around and a bit
            draft = tmp_path / "draft"
            draft.write_text(f"{value}\n")
            draft.replace(file)
            time.sleep(0.3)
        assert meter.energy_j == pytest.approx(1.2)


def test_energy_is_none_where_the_machine_does_not_tell(tmp_path: Path) -> None:
    with Meter(tmp_path / "absent") as meter:
        assert meter.energy_j is None
    file = package(tmp_path, 0, 0)
    with Meter(tmp_path) as meter:
        file.unlink()
        assert meter.energy_j is None
    with Meter(tmp_path) as meter:  # one package cannot be read: half a sum is no answer
        assert meter.energy_j is None
