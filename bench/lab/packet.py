"""IPv4 packets as a NAT sees them: who speaks to whom, and the same packet with other names on it. Pure.

Checksums are mended by the difference (RFC 1624), so a packet that was damaged before stays damaged. A port of ICMP is
the identifier of an echo. Fragments have no ports and are nobody's: QUIC and TCP never make any.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

ICMP, TCP, UDP = 1, 6, 17
PROTOCOLS = {"icmp": ICMP, "tcp": TCP, "udp": UDP}
_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_CHECKSUM_AT = {ICMP: 2, TCP: 16, UDP: 6}
_HEADER_BYTES = {ICMP: 8, TCP: 20, UDP: 8}


class Endpoint(NamedTuple):
    """A packed IPv4 address and a port."""

    host: bytes
    port: int


class Flow(NamedTuple):
    """One direction of a conversation."""

    protocol: int
    source: Endpoint
    goal: Endpoint


def flow_of(packet: bytes) -> Flow | None:
    """Whose packet this is, or None: not IPv4, cut short, a fragment, or of a protocol that NATs do not carry."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    start, protocol = (packet[0] & 15) * 4, packet[9]
    if start < 20 or protocol not in _HEADER_BYTES or len(packet) < start + _HEADER_BYTES[protocol]:
        return None
    if (packet[6] << 8 | packet[7]) & 0x3FFF:
        return None
    if protocol == ICMP:
        identifier = packet[start + 4] << 8 | packet[start + 5]
        if packet[start] not in (_ECHO_REQUEST, _ECHO_REPLY):
            return None
        source, goal = (identifier, 0) if packet[start] == _ECHO_REQUEST else (0, identifier)
    else:
        source, goal = struct.unpack_from("!HH", packet, start)
    return Flow(protocol, Endpoint(packet[12:16], source), Endpoint(packet[16:20], goal))


def rewrite(packet: bytes, flow: Flow, *, partial: bool = False) -> bytes:
    """The same packet, as part of another ``flow`` of its protocol.

    Args:
        packet: one that :func:`flow_of` knows.
        partial: the kernel left the sum over the payload to the device, so that the checksum's place holds the sum over
            addresses and length only.
    """
    made = bytearray(packet)
    start, protocol = (made[0] & 15) * 4, flow.protocol
    hosts = flow.source.host + flow.goal.host
    old_hosts, made[12:20] = bytes(made[12:20]), hosts
    _mend(made, 10, old_hosts, hosts)
    at = start + _CHECKSUM_AT[protocol]
    if protocol == ICMP:
        identifier = flow.source.port if made[start] == _ECHO_REQUEST else flow.goal.port
        old, new = bytes(made[start + 4 : start + 6]), struct.pack("!H", identifier)
        made[start + 4 : start + 6] = new
        _mend(made, at, old, new)
        return bytes(made)
    ports = struct.pack("!HH", flow.source.port, flow.goal.port)
    old_ports, made[start : start + 4] = bytes(made[start : start + 4]), ports
    if partial:
        _mend(made, at, old_hosts, hosts, inverted=False)
    elif protocol == TCP or made[at] or made[at + 1]:  # a UDP checksum of zero means that there is none
        _mend(made, at, old_hosts + old_ports, hosts + ports)
        if protocol == UDP and not (made[at] or made[at + 1]):
            made[at] = made[at + 1] = 0xFF
    return bytes(made)


def _mend(made: bytearray, at: int, old: bytes, new: bytes, *, inverted: bool = True) -> None:
    total = made[at] << 8 | made[at + 1]
    if inverted:
        total ^= 0xFFFF
    words = f"!{len(old) // 2}H"
    total += sum(struct.unpack(words, new)) + sum(word ^ 0xFFFF for word in struct.unpack(words, old))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    if inverted:
        total ^= 0xFFFF
    made[at], made[at + 1] = total >> 8, total & 0xFF
