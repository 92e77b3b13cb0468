"""Where others may reach this node: what goes into invites and facts."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, Sequence

import psutil

from mesh.transport.address import join_address, split_address

MAX_ADDRESSES = 16
_VIRTUAL = ("docker", "br-", "veth", "virbr", "vmnet", "vboxnet", "cni", "flannel", "lxc")
"""Interfaces that only this machine and its guests see; their addresses go last."""


def own_addresses(bound: Sequence[str], advertise: Sequence[str] = ()) -> list[str]:
    """Addresses to try for this node, the likeliest first.

    Args:
        bound: ``host:port`` of each socket, as the endpoint reports them.
        advertise: what the owner says (a forwarded port, a public name); goes first. A port may be left out.

    Raises:
        UsageError: an advertised address is not one.
    """
    return choose_addresses(bound, advertise, interface_addresses())


def interface_addresses() -> dict[str, list[str]]:
    """The IP addresses of each interface that is up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }


def choose_addresses(
    bound: Sequence[str], advertise: Sequence[str], interfaces: Mapping[str, Iterable[str]]
) -> list[str]:
    """The pure half of :func:`own_addresses`."""
    sockets = [split_address(address) for address in bound]
    port = sockets[0][1] if sockets else None
    chosen = [join_address(*split_address(address, default_port=port)) for address in advertise]
    loopback = []
    for host, number in sockets:
        ip = ipaddress.ip_address(host)
        if not ip.is_unspecified:
            chosen.append(join_address(host, number))
            continue
        found = [(rank, other) for rank, other in _ranked(interfaces) if other.version == ip.version]
        chosen += [join_address(str(other), number) for _, other in sorted(found, key=lambda pair: pair[0])]
        loopback.append(join_address("127.0.0.1" if ip.version == 4 else "::1", number))
    # A machine without a network still serves several nodes of its own.
    return list(dict.fromkeys(chosen or loopback))[:MAX_ADDRESSES]


def _ranked(
    interfaces: Mapping[str, Iterable[str]],
) -> Iterable[tuple[int, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    for name, addresses in interfaces.items():
        for text in addresses:
            try:
                ip = ipaddress.ip_address(text.partition("%")[0])
            except ValueError:
                continue
            # Link-local needs a scope, which means something else on every machine.
            if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
                continue
            yield (2 if name.startswith(_VIRTUAL) else 0) + (ip.version == 6), ip
