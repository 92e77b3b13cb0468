"""Packets with other names on them, against checksums computed from scratch."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.packet import ICMP, TCP, UDP, Endpoint, Flow, flow_of, rewrite

ENDPOINTS = st.builds(Endpoint, st.binary(min_size=4, max_size=4), st.integers(0, 65535))
PAYLOADS = st.binary(max_size=64)
CHECKSUM_AT = {ICMP: 22, TCP: 36, UDP: 26}


def summed(data: bytes) -> int:
    """The Internet checksum's sum, not inverted."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header(packet: bytes) -> bytes:
    return packet[12:20] + struct.pack("!HH", packet[9], len(packet) - 20)


def build(flow: Flow, payload: bytes, *, partial: bool = False) -> bytes:
    """A packet with every checksum right, or with the sum over the pseudo header that the kernel leaves to a device."""
    ports = struct.pack("!HH", flow.source.port, flow.goal.port)
    if flow.protocol == UDP:
        body = ports + struct.pack("!HH", 8 + len(payload), 0) + payload
    elif flow.protocol == TCP:
        body = ports + struct.pack("!IIBBHHH", 1, 2, 0x50, 0x18, 500, 0, 0) + payload
    else:
        body = struct.pack("!BBHHH", 8, 0, 0, flow.source.port, 1) + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0x4000, 64, flow.protocol, 0)
    header += flow.source.host + flow.goal.host
    packet = bytearray(header + body)
    packet[10:12] = struct.pack("!H", summed(header) ^ 0xFFFF)
    pseudo = b"" if flow.protocol == ICMP else pseudo_header(bytes(packet))
    total = summed(pseudo) if partial else summed(pseudo + body) ^ 0xFFFF
    if flow.protocol == UDP and not partial and not total:
        total = 0xFFFF
    at = CHECKSUM_AT[flow.protocol]
    packet[at : at + 2] = struct.pack("!H", total)
    return bytes(packet)


def is_sound(packet: bytes) -> bool:
    """Whether a receiver would take the packet."""
    pseudo = b"" if packet[9] == ICMP else pseudo_header(packet)
    return summed(packet[:20]) == 0xFFFF and summed(pseudo + packet[20:]) == 0xFFFF


def completed(packet: bytes) -> bytes:
    """What a device makes of a partial checksum: the sum over all of it, in its place."""
    at, made = CHECKSUM_AT[packet[9]], bytearray(packet)
    made[at : at + 2] = struct.pack("!H", summed(packet[20:]) ^ 0xFFFF)
    return bytes(made)


# Whatever it is renamed to, a sound packet stays sound, says the new names, and carries the same payload.
@given(st.sampled_from([TCP, UDP]), ENDPOINTS, ENDPOINTS, ENDPOINTS, ENDPOINTS, PAYLOADS)
def test_a_renamed_packet_is_sound(
    protocol: int, a: Endpoint, b: Endpoint, c: Endpoint, d: Endpoint, payload: bytes
) -> None:
    packet = build(Flow(protocol, a, b), payload)
    assert flow_of(packet) == Flow(protocol, a, b)
    assert is_sound(packet)
    renamed = rewrite(packet, Flow(protocol, c, d))
    assert flow_of(renamed) == Flow(protocol, c, d)
    assert is_sound(renamed)
    assert renamed.endswith(payload)


# A checksum that the kernel left half done is still half done, and comes out right when finished.
@given(st.sampled_from([TCP, UDP]), ENDPOINTS, ENDPOINTS, ENDPOINTS, ENDPOINTS, PAYLOADS)
def test_a_partial_checksum_can_still_be_finished(
    protocol: int, a: Endpoint, b: Endpoint, c: Endpoint, d: Endpoint, payload: bytes
) -> None:
    packet = build(Flow(protocol, a, b), payload, partial=True)
    renamed = completed(rewrite(packet, Flow(protocol, c, d), partial=True))
    assert flow_of(renamed) == Flow(protocol, c, d)
    assert is_sound(renamed)


@given(ENDPOINTS, ENDPOINTS, st.integers(1, 65535), PAYLOADS)
def test_an_echo_is_known_by_its_identifier(a: Endpoint, b: Endpoint, identifier: int, payload: bytes) -> None:
    flow = Flow(ICMP, a, b._replace(port=0))
    packet = build(flow, payload)
    assert flow_of(packet) == flow
    renamed = rewrite(packet, Flow(ICMP, Endpoint(b"\x09" * 4, identifier), flow.goal))
    assert is_sound(renamed)
    assert flow_of(renamed) == Flow(ICMP, Endpoint(b"\x09" * 4, identifier), flow.goal)


def flow(protocol: int = UDP) -> Flow:
    return Flow(protocol, Endpoint(b"\x0a\x00\x00\x01", 7), Endpoint(b"\x0a\x00\x00\x02", 9))


def test_a_datagram_without_a_checksum_gets_none() -> None:
    packet = bytearray(build(flow(), b"hello"))
    packet[26:28] = b"\0\0"
    renamed = rewrite(bytes(packet), flow()._replace(source=Endpoint(b"\x01\x02\x03\x04", 5)))
    assert renamed[26:28] == b"\0\0"


def test_a_damaged_packet_stays_damaged() -> None:
    packet = bytearray(build(flow(), b"hello"))
    packet[-1] ^= 1
    assert not is_sound(rewrite(bytes(packet), flow()._replace(source=Endpoint(b"\x01\x02\x03\x04", 5))))


@pytest.mark.parametrize("bits", [b"\x20\x00", b"\x00\x01", b"\x3f\xff"])
def test_fragments_are_nobodys(bits: bytes) -> None:
    packet = bytearray(build(flow(), b"hello"))
    packet[6:8] = bits
    assert flow_of(bytes(packet)) is None


# Whatever comes is either understood or refused, never an error; and no prefix of a packet's headers is a packet.
@given(st.binary(max_size=80), st.sampled_from([TCP, UDP, ICMP]))
def test_garbage_is_refused(data: bytes, protocol: int) -> None:
    found = flow_of(data)
    if found is not None:
        rewrite(data, found)
    whole = build(flow(protocol), b"")
    assert flow_of(whole) is not None
    assert all(flow_of(whole[:length]) is None for length in range(len(whole)))
