"""Carries out how members are reached that cannot just be dialed, and what this node does for others in that.

What is decided is decided in :mod:`mesh.membership.crossing` and :mod:`mesh.membership.introducer`.

A relayed datagram is one DATAGRAM frame on a link: two bytes of channel, then the datagram. The first bit says whether
it comes from the relay (1) or goes to it (0): a member may be a relay for a peer and use that peer as its relay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mesh.clock import Clock
from mesh.membership import crossing
from mesh.membership.crossing import Crossing
from mesh.membership.dialer import Dialer
from mesh.membership.introducer import Introducer, Reached, RelayTable, is_loopback, sane_addresses
from mesh.membership.link import Link
from mesh.pump import Pump
from mesh.transport.lane import Connection, Lane
from mesh.wire.facts import NodeId
from mesh.wire.messages import Apart, Carried, Carry, Control, Introduce, Meet, Seen
from mesh.wire.messages import Crossing as Message

log = logging.getLogger(__name__)

MAX_CHANNELS = 128
"""Through all relays together; the oldest goes first."""
CHECK_S = 0.5
SILENT_CHECKS = 3
"""Checks in a row that find a link silent before another path is looked for: one alone may be our own sleep."""
SILENT_S = 1.0
"""Without a packet; members are pinged after a quarter of that."""
_FROM_RELAY = 0x80
_UNKNOWN_RTT_MS = 1000.0


class Channel:
    """A way to ``peer`` through the member at the other end of ``link``. See :class:`mesh.transport.lane.Detour`."""

    def __init__(self, link: Link, peer: NodeId, number: int) -> None:
        self.peer = peer
        self._link = link
        self._head = number.to_bytes(2, "big")

    @property
    def address(self) -> str:
        return f"relay:{self._link.peer}"

    def send(self, datagrams: Iterable[tuple[bytes, Any]]) -> None:
        for data, _ in datagrams:
            self._link.connection.send_datagram(self._head + data)


class Ways:
    """One for each node.

    Args:
        links: all links by peer; read only.
        is_member: does a node hold a valid grant?
        on_moved: a link goes another way now.
        on_seen: told where a member sees this node.
        relay_rate: bytes per second for each pair of others; 0: this node does not carry.
    """

    def __init__(
        self,
        lane: Lane,
        me: NodeId,
        clock: Clock,
        links: Mapping[NodeId, Link],
        dialer: Dialer,
        *,
        is_member: Callable[[NodeId], bool],
        on_moved: Callable[[Link], None],
        on_seen: Callable[[NodeId, str], None],
        relay_rate: int,
    ) -> None:
        self._lane = lane
        self._me = me
        self._clock = clock
        self._links = links
        self._dialer = dialer
        self._is_member = is_member
        self._on_moved = on_moved
        self._on_seen = on_seen
        self._crossing = Pump(Crossing(me, self._may_dial), self._effect, crossing.Tick, clock)
        self._introducer = Introducer()
        self._table = RelayTable(relay_rate)
        self._channels: dict[tuple[NodeId, int], Channel] = {}
        self._silent: dict[Link, int] = {}
        """How many checks in a row found nothing new."""
        self._checker: asyncio.TimerHandle | None = None

    # -- what the links tell -----------------------------------------------------------------------------------------

    def wanted(self, peer: NodeId) -> None:
        """There is no link to a member."""
        self._crossing.feed(crossing.Wanted(peer))

    def unwanted(self, peer: NodeId) -> None:
        """It is none any more."""
        self._crossing.feed(crossing.Unwanted(peer))

    def up(self, link: Link) -> None:
        """A member is linked."""
        link.connection.on_datagram = lambda data: self._datagram(link, data)
        link.connection.on_path = lambda: self._path_changed(link)
        if self._checker is None:
            self._checker = asyncio.get_running_loop().call_later(CHECK_S, self._check)
        self._linked(link)

    def down(self, link: Link) -> None:
        """A link is lost, and with it what went through it."""
        peer = link.peer
        self._silent.pop(link, None)
        self._introducer.gone(peer)
        self._table.gone(peer)
        self._crossing.feed(crossing.HelperGone(peer))
        for key in [key for key in self._channels if key[0] == peer]:
            del self._channels[key]
        for other in [other for other in self._links.values() if other.address == f"relay:{peer}"]:
            self._fell_silent(other)

    def heard(self, link: Link, message: Message) -> None:
        """A member says or asks something about paths."""
        if link.connection.path == "relay":
            return
        match message:
            case Seen(address):
                self._on_seen(link.peer, address)
            case Introduce():
                self._answer(self._introducer.introduce(link.peer, message, self._reached(), self._clock.now()))
            case Carry():
                self._answer(self._table.carry(link.peer, message, self._reached(), self._clock.now()))
            case Carried(peer, number):
                if peer != self._me and self._is_member(peer):
                    self._learn_channel(link, peer, number)
                    self._feed(crossing.Heard(link.peer, message))
            case Meet(peer, addresses, rtt_ms):
                sane = sane_addresses(addresses, loopback=is_loopback(link.address))
                self._feed(crossing.Heard(link.peer, Meet(peer, sane, rtt_ms)))
            case Apart():
                self._feed(crossing.Heard(link.peer, message))

    def is_better(self, onto: Connection, link: Link) -> bool:
        """Should ``link`` go on over the path of ``onto``? Direct is better than relayed, and any than a dead one."""
        if self._is_silent(link):
            return True
        return link.connection.path == "relay" and onto.path != "relay"

    def own_addresses_changed(self) -> None:
        """This node moved: look for better paths."""
        self._feed(crossing.Moved())

    @property
    def relaying(self) -> tuple[int, int, int]:
        """Pairs carried for now, bytes carried for them, datagrams dropped for their rate."""
        return self._table.pairs, self._table.carried_bytes, self._table.dropped

    def close(self) -> None:
        """No more timers."""
        self._crossing.stop()
        if self._checker is not None:
            self._checker.cancel()

    # -- within ------------------------------------------------------------------------------------------------------

    def _linked(self, link: Link) -> None:
        relayed = link.connection.path == "relay"
        self._crossing.feed(crossing.Linked(link.peer, relayed))
        if not relayed and link.facts.crosses:
            self._crossing.feed(_helper(link))
            link.send(Seen(link.address))

    def _path_changed(self, link: Link) -> None:
        if self._links.get(link.peer) is link:
            log.info("%s is reached at %s now", link.peer, link.address)
            self._silent.pop(link, None)
            self._on_moved(link)
            self._linked(link)

    def _check(self) -> None:
        """Has any link fallen silent, or is one heard again?"""
        self._checker = asyncio.get_running_loop().call_later(CHECK_S, self._check)
        now = self._clock.now()
        for link in list(self._links.values()):
            if not link.facts.crosses:
                continue
            if now - link.last_heard > SILENT_S:
                self._silent[link] = self._silent.get(link, 0) + 1
                if self._silent[link] == SILENT_CHECKS:
                    self._fell_silent(link)
            elif self._silent.pop(link, 0) >= SILENT_CHECKS:
                self._crossing.feed(crossing.Linked(link.peer, link.connection.path == "relay"))

    def _fell_silent(self, link: Link) -> None:
        log.info("nothing comes from %s at %s: looking for another path", link.peer, link.address)
        self._silent[link] = SILENT_CHECKS
        self._feed(crossing.Silent(link.peer))

    def _is_silent(self, link: Link) -> bool:
        return self._silent.get(link, 0) >= SILENT_CHECKS

    def _may_dial(self, peer: NodeId) -> bool:
        link = self._links.get(peer)
        return (link is None or link.connection.path == "relay" or link in self._silent) and self._is_member(peer)

    def _feed(self, event: crossing.Event) -> None:
        for link in self._links.values():
            if link.facts.crosses and link.connection.path != "relay":
                self._crossing.feed(_helper(link))  # round trips change
        self._crossing.feed(event)

    def _effect(self, effect: crossing.Effect) -> None:
        match effect:
            case crossing.Tell(via, message):
                self._send(via, message)
            case crossing.Dial(peer, addresses):
                self._dialer.punch(peer, addresses)
            case crossing.DialOver(peer, via, number):
                channel = self._channels.get((via, number))
                if channel is not None:
                    self._dialer.dial_over(peer, channel)

    def _send(self, peer: NodeId, message: Control) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.send(message)

    def _reached(self) -> dict[NodeId, Reached]:
        return {
            peer: Reached(link.address, link.facts, link.rtt_ms or _UNKNOWN_RTT_MS)
            for peer, link in self._links.items()
            if link.facts.crosses and link.connection.path != "relay"
        }

    def _answer(self, answers: Iterable[tuple[NodeId, Meet | Carried | Apart]]) -> None:
        for peer, message in answers:
            self._send(peer, message)

    def _learn_channel(self, link: Link, peer: NodeId, number: int) -> None:
        known = self._channels.get((link.peer, number))
        if known is None or known.peer != peer:
            self._channels[link.peer, number] = Channel(link, peer, number)
            while len(self._channels) > MAX_CHANNELS:
                del self._channels[next(iter(self._channels))]

    def _datagram(self, link: Link, data: bytes) -> None:
        if len(data) <= 2 or link.connection.path == "relay":
            return
        number = (data[0] & ~_FROM_RELAY) << 8 | data[1]
        if data[0] & _FROM_RELAY:
            channel = self._channels.get((link.peer, number))
            if channel is not None:
                self._lane.receive_over(channel, data[2:])
            return
        to = self._table.pass_on(link.peer, number, len(data), self._clock.now())
        target = None if to is None else self._links.get(to)
        if target is not None and target.connection.path != "relay":
            target.connection.send_datagram(bytes((data[0] | _FROM_RELAY, data[1])) + data[2:])


def _helper(link: Link) -> crossing.Helper:
    return crossing.Helper(link.peer, link.rtt_ms or _UNKNOWN_RTT_MS, link.facts.relay_only)
