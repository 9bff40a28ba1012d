"""Links that go away and come back in the middle of downloads: every device gets there, and little is sent twice."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.devices.agent import pull
from tests.export.devices import namespaces

pytestmark = pytest.mark.slow
CYCLES = 6


@pytest.fixture(scope="module")
def separate() -> None:
    if reason := namespaces.can_separate():
        pytest.skip(reason)


def left_behind() -> list[str]:
    """Links and namespaces of this process."""
    shown = (["ip", "-o", "link"], ["ip", "netns", "list"])
    lines = [line for each in shown for line in subprocess.check_output(each, text=True).splitlines()]
    return [line for line in lines if namespaces.own_name() in line]


def test_eight_devices_finish_their_downloads_over_links_that_are_cut_six_times(separate: None, tmp_path: Path) -> None:
    found = namespaces.run_cut_links(tmp_path, devices=8, cycles=CYCLES)
    assert found["committed"] == 8, found
    assert found["exit_codes"] == [0] * 8
    assert found["in_downloads"] == 8 * CYCLES, found
    assert min(found["connections"]) > CYCLES, found
    assert min(found["arrived"]) > 0.95 * found["bundle_bytes"], found  # what had arrived was counted
    assert max(found["sent_twice"]) <= pull.CHUNK, found
    assert set(map(tuple, found["reports"].values())) == {("committed",)}
    assert left_behind() == []


def test_a_link_that_is_cut_passes_nothing_and_passes_all_when_it_is_back(separate: None) -> None:
    """Otherwise the test above would say nothing."""
    knock = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))"
    with namespaces.network(2) as net, socket.create_server((net.address, 0)) as server:

        def reaches(number: int, seconds: float) -> bool:
            arguments = [net.address, str(server.getsockname()[1]), str(seconds)]
            command = net.command(number, sys.executable, "-c", knock, *arguments)
            return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0

        for number, switch in enumerate((net.plug, net.pass_on)):
            assert reaches(number, 10)
            switch(number, False)
            assert not reaches(number, 0.5)
            assert reaches(1 - number, 10)
            switch(number, True)
            assert reaches(number, 10)


def test_nothing_is_left_of_a_network_whose_test_fails(separate: None) -> None:
    asleep: list[subprocess.Popen[bytes]] = []
    with pytest.raises(RuntimeError), namespaces.network(2) as net:
        assert len(left_behind()) == 5
        asleep.append(subprocess.Popen(net.command(0, "sleep", "60")))
        while (
            str(asleep[0].pid) not in subprocess.check_output(["ip", "netns", "pids", net.space(0)], text=True).split()
        ):
            time.sleep(0.01)
        raise RuntimeError
    assert left_behind() == []
    assert asleep[0].wait(10) < 0
