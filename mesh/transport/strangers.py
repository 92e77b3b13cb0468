"""Who may begin a handshake: strangers in bounded numbers, and under load only from addresses they proved to hold.

A first packet costs its sender nothing, and may name any sender; a handshake costs us a few milliseconds and some
hundred kilobytes. So few are begun for the asking. While more are under way, first packets are answered with a Retry
(RFC 9000, section 8.1.2), for which nothing is kept: whoever comes back with the token in it is where it says it is.
Addresses of members have places of their own, so that no crowd keeps them out.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.packet import QuicPacketType, encode_quic_retry, pull_quic_header
from aioquic.quic.retry import QuicRetryTokenHandler

CALM = 64
"""Handshakes under way with addresses that proved nothing; beyond it they are asked to come back with a token."""
MAX_HALF_OPEN = 256
"""Handshakes of strangers under way at once; beyond it their first packets are dropped, and they try again."""
MAX_HALF_OPEN_EACH = 32
"""Of them from one address: who fills that leaves the others room."""
MAX_KNOWN = 64
MAX_KNOWN_EACH = 8
"""Places for the addresses of members, above those of strangers."""
HANDSHAKE_DEADLINE_S = 5.0
"""From a first packet to the end of the handshake. Its place stays taken for so long when nothing comes of it: noise
that only looks like a first packet costs as much as one."""
_CID_BYTES = 8


def neighbourhood(host: str) -> str:
    """What one stranger can come from: an IPv4 address, or the /64 that every IPv6 host has to itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_address(int(address) >> 64 << 64))


class Room:
    """Places for those who have proven nothing: so many in all, so many for one source. Pure."""

    def __init__(self, total: int, each: int) -> None:
        self._total = total
        self._each = each
        self._inside = 0
        self._sources: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._inside

    def enter(self, source: str) -> bool:
        """Take a place; False: there is none for ``source``."""
        if self._inside >= self._total or self._sources[source] >= self._each:
            if not self._sources[source]:
                del self._sources[source]
            return False
        self._inside += 1
        self._sources[source] += 1
        return True

    def leave(self, source: str) -> None:
        """Give a place back."""
        self._inside -= 1
        self._sources[source] -= 1
        if not self._sources[source]:
            del self._sources[source]


@dataclass(slots=True, eq=False)
class Place:
    """Of one handshake under way."""

    source: str
    room: Room
    until: float
    proven: bool
    taken: bool = True


@dataclass(frozen=True, slots=True)
class Admitted:
    """Begin the handshake.

    Attributes:
        original_cid: where the dialer sent its very first packet.
        retry_cid: where our Retry told it to send; None: there was none.
    """

    place: Place
    original_cid: bytes
    retry_cid: bytes | None


@dataclass(frozen=True, slots=True)
class FirstPacket:
    """What is readable of a first packet."""

    cid: bytes
    source_cid: bytes
    token: bytes
    version: int


def read_first_packet(data: bytes) -> FirstPacket | None:
    """The head of an Initial; None when it is none."""
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=_CID_BYTES)
    except ValueError:
        return None
    if header.packet_type is not QuicPacketType.INITIAL or header.version is None:
        return None
    return FirstPacket(header.destination_cid, header.source_cid, header.token, header.version)


class Porter:
    """Decides over first packets.

    Args:
        is_known: does a member live at this host?
    """

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self._tokens = QuicRetryTokenHandler()
        self._strangers = Room(MAX_HALF_OPEN, MAX_HALF_OPEN_EACH)
        self._known = Room(MAX_KNOWN, MAX_KNOWN_EACH)
        self._unproven = 0
        self._places: deque[Place] = deque()  # in the order in which they fall free

    @property
    def half_open(self) -> int:
        """Places taken."""
        return len(self._strangers) + len(self._known)

    def weigh(self, packet: FirstPacket, host: str, port: int | None, now: float) -> Admitted | bytes | None:
        """Begin a handshake, or answer with these bytes, or say nothing.

        Args:
            port: None: it came through the member that ``host`` names, and cannot be forged.
        """
        while self._places and (not self._places[0].taken or self._places[0].until <= now):
            self.leave(self._places.popleft())
        original, retry_cid, proven = packet.cid, None, port is None
        if packet.token and port is not None:
            try:
                original = self._tokens.validate_token(
                    address=(host, port), destination_cid=packet.cid, token=packet.token, now=now
                )
            except ValueError:
                return None  # we gave it to somebody else, or never
            retry_cid, proven = packet.cid, True
        source = host if port is None else neighbourhood(host)
        if port is not None and self._is_known(host) and self._known.enter(source):
            return Admitted(self._take(source, self._known, now, proven=True), original, retry_cid)
        if not proven and self._unproven >= CALM:
            return self._retry(packet, (host, port or 0), now)
        if not self._strangers.enter(source):
            return None if proven else self._retry(packet, (host, port or 0), now)
        return Admitted(self._take(source, self._strangers, now, proven=proven), original, retry_cid)

    def leave(self, place: Place) -> None:
        """The handshake is done, or its time is."""
        if place.taken:
            place.taken = False
            place.room.leave(place.source)
            self._unproven -= not place.proven

    def _take(self, source: str, room: Room, now: float, *, proven: bool) -> Place:
        place = Place(source, room, now + HANDSHAKE_DEADLINE_S, proven)
        self._unproven += not proven
        self._places.append(place)
        return place

    def _retry(self, packet: FirstPacket, address: tuple[str, int], now: float) -> bytes:
        cid = os.urandom(_CID_BYTES)
        return encode_quic_retry(
            version=packet.version,
            source_cid=cid,
            destination_cid=packet.source_cid,
            original_destination_cid=packet.cid,
            retry_token=self._tokens.create_token(
                address=address, original_destination_connection_id=packet.cid, retry_source_connection_id=cid, now=now
            ),
        )
