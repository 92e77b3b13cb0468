"""Which addresses of ours others see from outside, from what servers and members say. Pure.

A server's word is anybody's: an address counts when two witnesses name it, or as unconfirmed when one does and nobody
names another. A member's word is enough: it could tell the others any address for itself just as well. A NAT that
gives each partner another port (symmetric, or mapping by address and port in RFC 4787) has no address worth telling.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mesh.errors import UsageError
from mesh.transport.address import split_address

MAX_WITNESSES = 64
Kind = Literal["unknown", "open", "cone", "symmetric"]
"""``open``: we are seen under addresses of our own. ``cone``: one mapping for everybody, which others can be told."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the witnesses come to: addresses worth telling, those of them that one server alone named, and the NAT."""

    addresses: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()
    kind: Kind = "unknown"


class Witnesses:
    """Who sees us where. A witness is named by where it is, or by its node id; its last word counts."""

    def __init__(self) -> None:
        self._servers: dict[str, str] = {}
        self._members: dict[str, str] = {}

    def server(self, name: str, address: str) -> None:
        """A STUN server says that we come from ``address``."""
        if is_public(address) and (name in self._servers or len(self._servers) < MAX_WITNESSES):
            self._servers[name] = address

    def member(self, node: str, address: str) -> None:
        """A linked member says so."""
        if is_public(address) and (node in self._members or len(self._members) < MAX_WITNESSES):
            self._members[node] = address

    def forget(self, node: str) -> None:
        """The link to a member is lost, and its word with it."""
        self._members.pop(node, None)

    def only(self, names: Collection[str]) -> None:
        """What servers other than these said is history."""
        self._servers = {name: address for name, address in self._servers.items() if name in names}

    def silent(self, names: Collection[str]) -> None:
        """These servers do not answer any more."""
        self._servers = {name: address for name, address in self._servers.items() if name not in names}

    def conclude(self, own: Collection[str]) -> Seen:
        """What to believe now.

        Args:
            own: ``host:port`` of this node's sockets on its interfaces.
        """
        votes = Counter([*self._servers.values(), *self._members.values()])
        foreign = {address: count for address, count in votes.items() if address not in own}
        if not foreign:
            return Seen(kind="open" if votes else "unknown")
        trusted = set(self._members.values())
        addresses: list[str] = []
        unconfirmed: list[str] = []
        symmetric = False
        for host in dict.fromkeys(split_address(address)[0] for address in foreign):
            named = {a: n for a, n in foreign.items() if split_address(a)[0] == host}
            agreed = [a for a, n in sorted(named.items(), key=lambda item: -item[1]) if n > 1]
            if agreed:
                addresses.append(agreed[0])
            elif len(named) > 1:
                symmetric = True
            elif (only := next(iter(named))) in trusted:
                addresses.append(only)
            elif len(foreign) == 1:
                unconfirmed.append(only)
        kind: Kind = "symmetric" if symmetric and not addresses else "cone" if addresses or unconfirmed else "unknown"
        return Seen(tuple(addresses), tuple(unconfirmed), kind)


def is_public(address: str) -> bool:
    """Could this be where a node is seen from another machine?"""
    try:
        host, _ = split_address(address)
        ip = ipaddress.ip_address(host)
    except (UsageError, ValueError):
        return False
    return not (ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_link_local) and len(address) <= 64
