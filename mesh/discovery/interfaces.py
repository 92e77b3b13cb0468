"""Which interfaces of this machine take part in local discovery, and which networks are behind them."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from mesh.discovery.lan import MAX_ADDRESSES, Network

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
MAX_INTERFACES = 16


@dataclass(frozen=True, slots=True)
class Address:
    """One of an interface. ``length`` is that of its network's prefix, bits."""

    ip: str
    length: int


@dataclass(frozen=True, slots=True)
class Ground:
    """Where to announce and listen.

    Attributes:
        sources: what zeroconf takes: an IPv4 address, or the index of an interface with IPv6.
        announced: the addresses by which others reach this node.
        networks: whoever is in one of these is near.
    """

    sources: tuple[str | int, ...]
    announced: tuple[str, ...]
    networks: tuple[Network, ...]


def look(bound: Sequence[str]) -> Ground:
    """The ground of a node whose sockets are bound to ``bound`` hosts, as it is now."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {
        name: [address for entry in entries if (address := _address(entry)) is not None]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }
    indexes = {}
    for name in found:
        with contextlib.suppress(OSError):
            indexes[name] = socket.if_nametoindex(name)
    return choose(bound, found, indexes)


def choose(bound: Sequence[str], found: Mapping[str, Iterable[Address]], indexes: Mapping[str, int]) -> Ground:
    """The pure half of :func:`look`. Loopback is ground only for a node that is bound to nothing else."""
    sources: dict[str | int, None] = {}
    announced: dict[str, None] = {}
    networks: dict[Network, None] = {}
    for name, addresses in found.items():
        for address in addresses:
            ip = ipaddress.ip_address(address.ip.partition("%")[0])
            wildcard = any(host in _WILDCARDS and ipaddress.ip_address(host).version == ip.version for host in bound)
            named = any(host not in _WILDCARDS and ipaddress.ip_address(host.partition("%")[0]) == ip for host in bound)
            if not named and (not wildcard or ip.is_loopback):
                continue
            if len(sources) < MAX_INTERFACES:
                if ip.version == 4:
                    sources[str(ip)] = None
                elif name in indexes and not ip.is_loopback:  # zeroconf cannot be heard over ::1
                    sources[indexes[name]] = None
            networks[ipaddress.ip_network((str(ip), address.length), strict=False)] = None
            if not ip.is_link_local:
                announced[str(ip)] = None
    return Ground(tuple(sources), tuple(announced)[:MAX_ADDRESSES], tuple(networks))


def _address(entry: object) -> Address | None:
    family, ip, mask = getattr(entry, "family", None), getattr(entry, "address", ""), getattr(entry, "netmask", None)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        bits = int(ipaddress.ip_address(str(mask).partition("/")[0])).bit_count() if mask else None
    except ValueError:
        bits = None
    # Windows tells no netmask for IPv6: a network is 64 bits there, as it is nearly everywhere.
    return Address(ip, bits if bits is not None else 24 if family == socket.AF_INET else 64)
