"""Where a server is asked: on this machine, and on a cluster."""

from __future__ import annotations

import socket

import pytest

from gendist.protocols import UserError
from gendist.serve.addresses import asked_at, free_port, is_here, to_call

ELSEWHERE = "192.0.2.1"  # for documentation (RFC 5737): no machine has it


@pytest.mark.parametrize(
    ("host", "address", "asked"),
    [
        ("0.0.0.0", f"{ELSEWHERE}:6379", ELSEWHERE),
        ("::", "[2001:db8::1]:6379", "2001:db8::1"),
        ("0.0.0.0", "ray://head:10001", "head"),
        ("0.0.0.0", "auto", "127.0.0.1"),
        ("127.0.0.1", "auto", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1:6379", "127.0.0.1"),
        ("192.0.2.7", f"{ELSEWHERE}:6379", "192.0.2.7"),
    ],
)
def test_a_cluster_is_asked_where_its_proxies_listen(host, address, asked):
    assert asked_at(host, address) == asked


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_another_machine_that_would_answer_itself_alone_is_not_asked(host):
    with pytest.raises(UserError, match=r"give --host 0\.0\.0\.0"):
        asked_at(host, f"{ELSEWHERE}:6379")


def test_this_machine_is_here_and_others_are_not():
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert not is_here(ELSEWHERE)
    assert not is_here("no.such.host.invalid")


def test_a_free_port_can_be_had():
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1", 0))) as server, pytest.raises(UserError, match="in use"):
        free_port("127.0.0.1", server.getsockname()[1])


@pytest.mark.parametrize(
    ("url", "called"),
    [
        ("http://0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://[::]:80", "http://[::1]:80"),
        ("http://10.0.0.1:80", "http://10.0.0.1:80"),
    ],
)
def test_all_addresses_are_called_by_one(url, called):
    assert to_call(url) == called
