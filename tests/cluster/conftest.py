"""One cluster of several hosts for all tests of what it survives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "cluster"))

from testbed import Testbed, why_not


@pytest.fixture(scope="session")
def hosts() -> Iterator[Testbed]:
    """A head, on which drivers run, and three hosts with room for one worker each."""
    if reason := why_not():
        pytest.skip(reason)
    with Testbed(num_hosts=4, num_cpus=1, head_cpus=0) as bed:
        bed.start_ray()
        yield bed


@pytest.fixture
def bed(hosts: Testbed) -> Iterator[Testbed]:
    """The same, whole again for each test, which leaves none of its commands running."""
    for host in hosts.hosts:
        hosts.mend(host)
    alive = hosts.alive()
    for host in hosts.hosts[1:]:
        if host.address not in alive:
            hosts.restart(host)
    hosts.wait_for(hosts.hosts)
    try:
        yield hosts
    finally:
        hosts.end_programs()
