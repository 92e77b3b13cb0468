"""A home router's address translation, in the kinds that decide who can punch through to whom. Pure: time comes in.

Words are RFC 4787's. Mapping: does the port seen outside depend on whom the machine inside speaks to? Filtering: who
may answer? The four classic kinds (RFC 3489) are :data:`KINDS`. Only what goes out keeps a mapping alive, and after
``timeouts_s`` without it both the mapping and the right to answer are gone. TCP is carried by the same rules without a
look at its state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from bench.lab.packet import ICMP, TCP, UDP, Endpoint, Flow

MAX_MAPPINGS = 4096
"""Of one protocol; a full table takes no newcomers until something expires."""
MAX_REMOTES = 1024
"""Whom one mapping may be speaking to at a time."""
TIMEOUTS_S: Mapping[int, float] = {ICMP: 60.0, TCP: 7440.0, UDP: 60.0}
_LOWEST_PORT = 1024
_PORTS = 65536 - _LOWEST_PORT


class Dependence(Enum):
    """What of the other end a rule looks at."""

    NOTHING = "nothing"
    ADDRESS = "address"
    ADDRESS_AND_PORT = "address and port"

    def of(self, remote: Endpoint) -> Endpoint | None:
        """``remote``, with what the rule does not look at left out."""
        if self is Dependence.NOTHING:
            return None
        return remote if self is Dependence.ADDRESS_AND_PORT else Endpoint(remote.host, 0)


@dataclass(frozen=True, slots=True)
class NatKind:
    """How a NAT maps and filters."""

    mapping: Dependence
    filtering: Dependence


KINDS = {
    "full-cone": NatKind(Dependence.NOTHING, Dependence.NOTHING),
    "address-restricted": NatKind(Dependence.NOTHING, Dependence.ADDRESS),
    "port-restricted": NatKind(Dependence.NOTHING, Dependence.ADDRESS_AND_PORT),
    "symmetric": NatKind(Dependence.ADDRESS_AND_PORT, Dependence.ADDRESS_AND_PORT),
}


@dataclass(slots=True)
class Lease:
    """One port of the outside address and whose it is.

    ``mapped_for`` is as much of the other end as the mapping looks at. ``remotes`` are those who may answer (as much of
    them as the filter looks at) and when they were last written to, the longest silent first. A ``forwarded`` lease is
    the owner's doing: it never ends and lets everyone in.
    """

    protocol: int
    inside: Endpoint
    mapped_for: Endpoint | None
    port: int
    used: float
    remotes: OrderedDict[Endpoint | None, float] = field(default_factory=OrderedDict)
    forwarded: bool = False


class _Table:
    """Leases of one protocol, the longest unused first."""

    def __init__(self) -> None:
        self.by_inside: OrderedDict[tuple[Endpoint, Endpoint | None], Lease] = OrderedDict()
        self.by_port: dict[int, Lease] = {}
        self.forwards: dict[Endpoint, Lease] = {}


class Nat:
    """One home router.

    Args:
        public: its packed outside address.
        chance: returns a number in [0, 1).
        preserve_port: give a machine the port outside that it uses inside, where that is free and the mapping is the
            same for everyone.
        hairpin: whether machines inside reach each other through the outside address.
        timeouts_s: by protocol number.
    """

    def __init__(
        self,
        public: bytes,
        kind: NatKind,
        chance: Callable[[], float],
        *,
        preserve_port: bool = True,
        hairpin: bool = False,
        timeouts_s: Mapping[int, float] = TIMEOUTS_S,
    ) -> None:
        self.public, self.kind, self.hairpin = public, kind, hairpin
        self._chance, self._preserve_port, self._timeouts = chance, preserve_port, dict(timeouts_s)
        self._tables = {protocol: _Table() for protocol in self._timeouts}
        self.refused_out = self.refused_in = 0

    # -- packets ---------------------------------------------------------------------------------------------------

    def outbound(self, flow: Flow, now: float) -> Flow | None:
        """What a packet from inside looks like outside, or None when it does not get there."""
        lease = self._lease_out(flow, now)
        if lease is None or not self._note(lease, flow.goal, now):
            self.refused_out += 1
            return None
        return flow._replace(source=Endpoint(self.public, lease.port))

    def inbound(self, flow: Flow, now: float) -> Flow | None:
        """What a packet to the outside address looks like inside, or None when the NAT keeps it out."""
        lease = self._tables[flow.protocol].by_port.get(flow.goal.port)
        if lease is None or not self._lets_in(lease, flow.source, now):
            self.refused_in += 1
            return None
        return flow._replace(goal=lease.inside)

    def owner(self, flow: Flow) -> bytes | None:
        """The machine that a packet to the outside address is for, if anybody's, whether or not it may pass."""
        lease = self._tables[flow.protocol].by_port.get(flow.goal.port)
        return None if lease is None else lease.inside.host

    # -- what its owner does ---------------------------------------------------------------------------------------

    def reboot(self) -> None:
        """Forget all conversations; forwarded ports stay."""
        for table in self._tables.values():
            table.by_inside.clear()
            table.by_port = {lease.port: lease for lease in table.forwards.values()}
            for lease in table.forwards.values():
                lease.remotes.clear()

    def renumber(self, public: bytes) -> None:
        """Get another outside address, as after a new dial-up; conversations are forgotten."""
        self.public = public
        self.reboot()

    def forward(self, protocol: int, port: int, inside: Endpoint) -> None:
        """Let everyone reach ``inside`` at ``port``."""
        table = self._tables[protocol]
        taken = table.by_port.get(port)
        if taken is not None:
            self._drop(table, taken)
        old = table.forwards.pop(inside, None)
        if old is not None:
            del table.by_port[old.port]
        table.forwards[inside] = table.by_port[port] = Lease(protocol, inside, None, port, 0.0, forwarded=True)

    def forget(self, host: bytes) -> None:
        """A machine left the home: its ports are free, and what was forwarded to it no longer is."""
        for table in self._tables.values():
            for lease in [lease for lease in table.by_port.values() if lease.inside.host == host]:
                self._drop(table, lease)

    def leases(self, now: float) -> Iterator[Lease]:
        """What is mapped at the moment."""
        for table in self._tables.values():
            yield from (lease for lease in table.by_port.values() if lease.forwarded or not self._expired(lease, now))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _lease_out(self, flow: Flow, now: float) -> Lease | None:
        if flow.protocol == ICMP and not flow.source.port:  # a reply, and nothing asks from outside
            return None
        table = self._tables[flow.protocol]
        forwarded = table.forwards.get(flow.source)
        if forwarded is not None and (
            self.kind.mapping is Dependence.NOTHING or self._knows(forwarded, flow.goal, now)
        ):
            return forwarded
        key = (flow.source, self.kind.mapping.of(flow.goal))
        lease = table.by_inside.get(key)
        if lease is not None and self._expired(lease, now):
            self._drop(table, lease)
            lease = None
        if lease is None:
            self._expire(table, now)
            if len(table.by_inside) >= MAX_MAPPINGS:
                return None
            lease = Lease(flow.protocol, *key, self._free_port(table, flow.source.port), now)
            table.by_port[lease.port] = table.by_inside[key] = lease
        lease.used = now
        table.by_inside.move_to_end(key)
        return lease

    def _free_port(self, table: _Table, wanted: int) -> int:
        independent = self.kind.mapping is Dependence.NOTHING
        if independent and self._preserve_port and wanted and wanted not in table.by_port:
            return wanted
        offset = int(self._chance() * _PORTS)
        while _LOWEST_PORT + offset in table.by_port:  # ends: there are more ports than a table holds
            offset = (offset + 1) % _PORTS
        return _LOWEST_PORT + offset

    def _note(self, lease: Lease, remote: Endpoint, now: float) -> bool:
        """Remember that ``remote`` may answer; False when there are too many to remember."""
        scope = remote if lease.forwarded else self.kind.filtering.of(remote)
        remotes, timeout = lease.remotes, self._timeouts[lease.protocol]
        if scope not in remotes and len(remotes) >= MAX_REMOTES:
            oldest = next(iter(remotes))
            if now - remotes[oldest] <= timeout:
                return False
            del remotes[oldest]
        remotes[scope] = now
        remotes.move_to_end(scope)
        return True

    def _lets_in(self, lease: Lease, remote: Endpoint, now: float) -> bool:
        if lease.forwarded:
            # So that answers leave by the port that was asked, whatever the kind.
            return self._note(lease, remote, now)
        return self._knows(lease, self.kind.filtering.of(remote), now)

    def _knows(self, lease: Lease, scope: Endpoint | None, now: float) -> bool:
        written = lease.remotes.get(scope)
        return written is not None and now - written <= self._timeouts[lease.protocol]

    def _expired(self, lease: Lease, now: float) -> bool:
        return now - lease.used > self._timeouts[lease.protocol]

    def _expire(self, table: _Table, now: float) -> None:
        while table.by_inside:
            lease = next(iter(table.by_inside.values()))
            if not self._expired(lease, now):
                return
            self._drop(table, lease)

    def _drop(self, table: _Table, lease: Lease) -> None:
        del table.by_port[lease.port]
        if lease.forwarded:
            del table.forwards[lease.inside]
        else:
            del table.by_inside[lease.inside, lease.mapped_for]
