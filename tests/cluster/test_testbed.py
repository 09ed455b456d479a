"""The test bed does what is said of it, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import testbed
import testbed_network
from testbed import Testbed, why_not

pytestmark = [pytest.mark.ray, pytest.mark.multihost, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

# Of two hosts: what one sends to the other, by a protocol without any repetition.
SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
    for number in range(int(sys.argv[2])):
        sending.sendto(b"%d" % number, (sys.argv[1], 9999))
"""
RECEIVE = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiving:
    receiving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    receiving.bind((sys.argv[1], 9999))
    print("ready", flush=True)
    receiving.settimeout(2.0)
    arrived = 0
    try:
        while True:
            receiving.recv(100)
            arrived += 1
    except TimeoutError:
        print(arrived)
"""


def num_arrived(bed: Testbed, num_sent: int) -> int:
    sender, receiver = bed.hosts
    with receiver.popen(sys.executable, "-c", RECEIVE, receiver.address, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sender.run(sys.executable, "-c", SEND, receiver.address, str(num_sent))
        return int(process.stdout.read())


def traces(name: str) -> list[str]:
    return [found for found in testbed._found() if found.startswith(name)]


def test_what_a_killed_trial_has_left_is_gone_with_the_next():
    no_process = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    subprocess.run(["ip", "link", "add", f"gdtrial{no_process}", "type", "bridge"], check=True)
    subprocess.run(["ip", "netns", "add", f"gdtrial{no_process}-a"], check=True)
    assert testbed_network.packet_arrives()
    left = [*testbed_network.links(), *testbed_network.namespaces()]
    assert not [name for name in left if name.startswith(f"gdtrial{no_process}")]


def test_hosts_are_cut_mended_lossy_and_killed():
    with Testbed(num_hosts=2) as bed, Testbed(num_hosts=1) as beside:
        assert num_arrived(bed, 1000) == 1000
        how = bed.lossy(bed.hosts[1], loss=0.2)
        assert how in ("netem", "a classifier's program")
        assert 600 < num_arrived(bed, 1000) < 980
        bed.mend(bed.hosts[1])
        assert num_arrived(bed, 1000) == 1000
        bed.cut(bed.hosts[1])
        assert num_arrived(bed, 100) == 0
        bed.mend(bed.hosts[1])
        assert num_arrived(bed, 100) == 100
        sleeping = bed.hosts[1].popen("sleep", "1000")
        bed.kill(bed.hosts[1])
        assert sleeping.wait(10) == -signal.SIGKILL
        assert not bed.hosts[1].pids()
        added = bed.add_host()
        assert added.run("true").returncode == 0
        assert beside.hosts[0].address.rpartition(".")[0] != added.address.rpartition(".")[0]
    assert not traces(bed.name)
    assert not traces(beside.name)


def test_a_maker_that_is_killed_leaves_nothing():
    program = (
        f"import sys; sys.path.insert(0, {str(Path(testbed.__file__).parent)!r})\n"
        "from testbed import Testbed\nbed = Testbed(1)\nbed.hosts[0].popen('sleep', '1000')\nprint(bed.name, flush=True)\n"
        "import signal; signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        name = maker.stdout.readline().strip()
        assert traces(name)
        os.kill(maker.pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while traces(name):
            assert time.monotonic() < until
            time.sleep(0.05)


def test_only_what_a_maker_has_marked_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(testbed, "FOLDERS", tmp_path)
    name = f"{testbed.PREFIX}cafe"
    for other in (f"{name}-mine", name, "gdbcafe"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "file").write_text("mine")
    (tmp_path / f"{name}-mine" / testbed.OWNER).write_text("1 1")
    testbed.remove_leftovers()
    testbed.remove(name)
    assert len(list(tmp_path.glob("*/file"))) == 3
    (tmp_path / name / testbed.OWNER).write_text("1 1")
    os.chown(tmp_path / name / testbed.OWNER, 1000, 1000)
    testbed.remove_leftovers()
    assert (tmp_path / name / "file").exists()
    os.chown(tmp_path / name / testbed.OWNER, 0, 0)
    testbed.remove_leftovers()
    assert not (tmp_path / name).exists()


def test_a_subnet_is_free_where_no_route_but_the_default_goes_there(monkeypatch):
    routes = [{"dst": "default"}, {"dst": "10.77.0.0/23"}, {"dst": "10.77.2.9"}]
    monkeypatch.setattr(testbed_network, "ip", lambda *arguments: json.dumps(routes))
    assert testbed_network.free_subnet() == "10.77.3"
    routes.append({"dst": "10.0.0.0/8"})
    with pytest.raises(testbed.NoTestbed, match="no subnet is free"):
        testbed_network.free_subnet()
