"""What a member does for two others that cannot reach each other: tell each where the other is, or carry. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.errors import UsageError
from mesh.transport.address import split_address
from mesh.wire.facts import NodeFacts, NodeId
from mesh.wire.messages import Apart, Carried, Carry, Introduce, Meet

MAX_MEETING = 6
"""Addresses told of one member: packets are sent to each of them."""
MAX_PAIRS = 64
MAX_PAIRS_OF_ONE = 16
IDLE_S = 60.0
"""A pair that sends nothing for so long has found another way; a live one sends several times a second."""
BURST_S = 0.25
MIN_BURST = 64 * 1024


@dataclass(frozen=True, slots=True)
class Reached:
    """A member with a direct link: where its packets come from, what it tells of itself, and its round trip."""

    address: str
    facts: NodeFacts
    rtt_ms: float


class Bucket:
    """Lets ``rate`` per second through, and ``burst`` at once."""

    __slots__ = ("_at", "_burst", "_full", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._full, self._at = burst, now

    @property
    def is_full(self) -> bool:
        """Nothing was taken, or it was long ago; as of the last ``take``."""
        return self._full >= self._burst

    def take(self, amount: float, now: float) -> bool:
        """Is there room for ``amount``? Then it is used up."""
        self._full = min(self._burst, self._full + (now - self._at) * self._rate)
        self._at = now
        if self._full < amount:
            return False
        self._full -= amount
        return True


def meeting_addresses(reached: Reached) -> tuple[str, ...]:
    """Where to look for a member, for one elsewhere: literal addresses only, the one we see first."""
    return sane_addresses((reached.address, *reached.facts.addresses), loopback=is_loopback(reached.address))


def sane_addresses(addresses: Iterable[str], *, loopback: bool) -> tuple[str, ...]:
    """Those that packets may be sent to on another member's word.

    Names are not resolved for it; multicast, broadcast and link-local reach whom nobody meant; loopback is this
    machine, and is for those only who talk to us over loopback themselves.
    """
    sane = []
    for address in dict.fromkeys(addresses):
        try:
            host, _ = split_address(address)
            ip = ipaddress.ip_address(host)
        except (UsageError, ValueError):
            continue
        mapped = getattr(ip, "ipv4_mapped", None)
        if mapped is not None or ip.is_multicast or ip.is_unspecified or ip.is_link_local or ip.is_reserved:
            continue
        if ip.is_loopback and not loopback:
            continue
        sane.append(address)
    return tuple(sane[:MAX_MEETING])


def is_loopback(address: str) -> bool:
    """Is a peer at ``address`` on this very machine?"""
    try:
        return ipaddress.ip_address(split_address(address)[0]).is_loopback
    except (UsageError, ValueError):
        return False


class Introducer:
    """Answers :class:`Introduce`: each asker, and each that is asked for, a bounded number of times."""

    ASKS_PER_S, ASKS_AT_ONCE = 1.0, 40.0
    MEETS_PER_S, MEETS_AT_ONCE = 2.0, 64.0

    def __init__(self) -> None:
        self._askers: dict[NodeId, Bucket] = {}
        self._targets: dict[NodeId, Bucket] = {}

    def gone(self, node: NodeId) -> None:
        """Its link is lost. What it may ask for does not grow by that: only buckets that are full are forgotten."""
        for buckets in (self._askers, self._targets):
            if node in buckets and buckets[node].is_full:
                del buckets[node]

    def introduce(
        self, asker: NodeId, request: Introduce, reached: dict[NodeId, Reached], now: float
    ) -> list[tuple[NodeId, Meet | Apart]]:
        """What to say to whom. ``reached`` are the members with direct links that understand it."""
        target = request.target
        ours, theirs = reached.get(asker), reached.get(target)
        if ours is None or theirs is None or asker == target:
            return [(asker, Apart(target, "unreachable"))]
        if not self._may(self._askers, asker, self.ASKS_PER_S, self.ASKS_AT_ONCE, now) or not self._may(
            self._targets, target, self.MEETS_PER_S, self.MEETS_AT_ONCE, now
        ):
            return [(asker, Apart(target, "too-many"))]
        return [
            (target, Meet(asker, meeting_addresses(ours), ours.rtt_ms)),
            (asker, Meet(target, meeting_addresses(theirs), theirs.rtt_ms)),
        ]

    @staticmethod
    def _may(buckets: dict[NodeId, Bucket], node: NodeId, rate: float, burst: float, now: float) -> bool:
        return buckets.setdefault(node, Bucket(rate, burst, now)).take(1, now)


@dataclass(slots=True)
class _Pair:
    nodes: frozenset[NodeId]
    bucket: Bucket
    used: float
    carried: int = 0
    dropped: int = 0


class RelayTable:
    """Which pairs this node carries for, each within a rate.

    Args:
        rate: bytes per second for each pair, both ways together; 0: carries for nobody.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._pairs: dict[int, _Pair] = {}
        self._last = 0

    @property
    def pairs(self) -> int:
        """How many are carried for now."""
        return len(self._pairs)

    @property
    def carried_bytes(self) -> int:
        """Over all present pairs."""
        return sum(pair.carried for pair in self._pairs.values())

    @property
    def dropped(self) -> int:
        """Datagrams over the rate, of all present pairs."""
        return sum(pair.dropped for pair in self._pairs.values())

    def carry(
        self, asker: NodeId, request: Carry, reached: dict[NodeId, Reached], now: float
    ) -> list[tuple[NodeId, Carried | Apart]]:
        """What to say to whom. The same pair asks twice, and gets the same channel."""
        target = request.target
        if asker not in reached or target not in reached or asker == target:
            return [(asker, Apart(target, "unreachable"))]
        self._sweep(now)
        nodes = frozenset((asker, target))
        channel = next((number for number, pair in self._pairs.items() if pair.nodes == nodes), None)
        if channel is None:
            mine = sum(asker in pair.nodes for pair in self._pairs.values())
            theirs = sum(target in pair.nodes for pair in self._pairs.values())
            if not self._rate or len(self._pairs) >= MAX_PAIRS or max(mine, theirs) >= MAX_PAIRS_OF_ONE:
                return [(asker, Apart(target, "full" if self._rate else "no-relay"))]
            channel = self._free()
            burst = max(MIN_BURST, self._rate * BURST_S)
            self._pairs[channel] = _Pair(nodes, Bucket(self._rate, burst, now), now)
        self._pairs[channel].used = now
        return [(target, Carried(asker, channel)), (asker, Carried(target, channel))]

    def pass_on(self, sender: NodeId, channel: int, size: int, now: float) -> NodeId | None:
        """Who is to get a datagram of ``size`` bytes; None: nobody, it is dropped."""
        pair = self._pairs.get(channel)
        if pair is None or sender not in pair.nodes:
            return None
        pair.used = now
        if not pair.bucket.take(size, now):
            pair.dropped += 1
            return None
        pair.carried += size
        return next(node for node in pair.nodes if node != sender)

    def gone(self, node: NodeId) -> None:
        """Its direct link is lost: nothing is carried for it any more."""
        self._pairs = {number: pair for number, pair in self._pairs.items() if node not in pair.nodes}

    def _sweep(self, now: float) -> None:
        self._pairs = {number: pair for number, pair in self._pairs.items() if now - pair.used < IDLE_S}

    def _free(self) -> int:
        """Not one that was in use a moment ago: datagrams of the former pair may still be on their way."""
        while True:
            self._last = (self._last + 1) % 2**15
            if self._last not in self._pairs:
                return self._last
