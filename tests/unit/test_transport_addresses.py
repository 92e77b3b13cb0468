"""Addresses as people write them, and those a node tells of itself."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.discovery.addresses import choose_addresses, interface_addresses, own_addresses
from mesh.errors import UsageError
from mesh.transport.address import join_address, split_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.168.1.5:7842", "192.168.1.5", 7842),
        (" kitchen.lan:1 ", "kitchen.lan", 1),
        ("[fd00::5]:7842", "fd00::5", 7842),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_an_address_is_read(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)


@pytest.mark.parametrize(("text", "host"), [("kitchen", "kitchen"), ("fd00::5", "fd00::5"), ("[fd00::5]", "fd00::5")])
def test_a_missing_port_has_a_default(text: str, host: str) -> None:
    assert split_address(text, default_port=7842) == (host, 7842)
    with pytest.raises(UsageError):
        split_address(text)


@pytest.mark.parametrize(
    "text",
    ["", ":7842", "a:", "a:0", "a:65536", "a:x", "a:7٣", "fd00::5:7842:x", "[fd00::5", "[x]:1", "[::1]x:1", "[::1]:",
     "http://a:1", "a b:1", "a@b:1", "a\n:1", "x" * 200 + ":1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        split_address(text)
    assert "7842" in str(caught.value.remedy)


# Writing an address and reading it back gives the same host and port.
@given(st.ip_addresses(), st.integers(1, 65535))
def test_addresses_read_back(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    assert split_address(join_address(str(ip), port)) == (str(ip), port)


# Any text is an address or a usage error.
@given(st.text(max_size=140))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        host, port = split_address(text, default_port=1)
    except UsageError:
        return
    assert host
    assert 0 < port < 65536


INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["192.168.1.5", "fd00::5", "fe80::1%eth0"],
    "wlan0": ["10.0.0.9", "169.254.3.3"],
}


def test_a_socket_on_all_interfaces_is_reached_at_each_the_likely_ones_first() -> None:
    found = choose_addresses(["0.0.0.0:7842", "[::]:7842"], [], INTERFACES)
    assert found == ["192.168.1.5:7842", "10.0.0.9:7842", "172.17.0.1:7842", "[fd00::5]:7842"]


def test_what_the_owner_advertises_goes_first() -> None:
    found = choose_addresses(["0.0.0.0:7842"], ["home.example:9000", "203.0.113.7"], INTERFACES)
    assert found[:2] == ["home.example:9000", "203.0.113.7:7842"]


def test_a_socket_on_one_address_is_reached_there_only() -> None:
    assert choose_addresses(["127.0.0.1:7842"], [], INTERFACES) == ["127.0.0.1:7842"]
    assert choose_addresses(["10.0.0.9:1"], [], INTERFACES) == ["10.0.0.9:1"]


def test_a_machine_without_a_network_has_loopback() -> None:
    assert choose_addresses(["0.0.0.0:7842", "[::]:7842"], [], {"lo": ["127.0.0.1"]}) == [
        "127.0.0.1:7842",
        "[::1]:7842",
    ]


def test_this_machine_has_addresses() -> None:
    assert interface_addresses()
    assert own_addresses(["127.0.0.1:1"]) == ["127.0.0.1:1"]
