"""Who may begin a handshake."""

from __future__ import annotations

import os

import pytest
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.packet import QuicPacketType, QuicProtocolVersion, pull_quic_header
from hypothesis import given
from hypothesis import strategies as st

from mesh.transport import strangers
from mesh.transport.strangers import (
    CALM,
    HANDSHAKE_DEADLINE_S,
    MAX_HALF_OPEN,
    MAX_HALF_OPEN_EACH,
    MAX_KNOWN_EACH,
    Admitted,
    FirstPacket,
    Porter,
    Room,
    neighbourhood,
    read_first_packet,
)

HOME = "10.0.0.5"


def porter() -> Porter:
    return Porter(lambda host: host == HOME)


def first(token: bytes = b"", cid: bytes | None = None) -> FirstPacket:
    return FirstPacket(cid or os.urandom(8), b"source!!", token, QuicProtocolVersion.VERSION_1)


def host(number: int) -> str:
    return f"203.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def crowded(one: Porter, now: float = 0.0) -> None:
    """As many strangers as are begun for the asking."""
    for number in range(CALM):
        assert isinstance(one.weigh(first(), host(number), 1, now), Admitted)


def retried(one: Porter, at: str, port: int, now: float) -> tuple[FirstPacket, bytes]:
    """What a dialer says that obeys the Retry, and where it sent first."""
    packet = first()
    answer = one.weigh(packet, at, port, now)
    assert isinstance(answer, bytes)
    header = pull_quic_header(Buffer(data=answer), host_cid_length=8)
    assert header.packet_type is QuicPacketType.RETRY
    assert len(answer) < 200, "less than was sent to us: no amplifier"
    return first(header.token, header.source_cid), packet.cid


def test_few_strangers_are_let_in_for_the_asking_then_they_must_prove_their_address() -> None:
    one = porter()
    crowded(one)
    again, original = retried(one, "203.0.200.1", 7, 0.0)
    verdict = one.weigh(again, "203.0.200.1", 7, 0.1)
    assert isinstance(verdict, Admitted)
    assert (verdict.original_cid, verdict.retry_cid) == (original, again.cid)


def test_a_token_is_good_for_the_address_and_the_time_it_was_made_for() -> None:
    one = porter()
    crowded(one)
    again, _ = retried(one, "203.0.200.1", 7, 0.0)
    assert one.weigh(again, "203.0.200.2", 7, 0.1) is None, "another address"
    assert one.weigh(again, "203.0.200.1", 8, 0.1) is None, "another port"
    assert one.weigh(first(again.token), "203.0.200.1", 7, 0.1) is None, "another connection"
    assert one.weigh(first(b"x" * 60, again.cid), "203.0.200.1", 7, 0.1) is None, "made up"
    assert porter().weigh(again, "203.0.200.1", 7, 0.1) is None, "another node's, or an earlier run's"
    assert one.weigh(again, "203.0.200.1", 7, 40.0) is None, "old"


def test_nothing_is_kept_for_those_who_are_asked_to_come_back() -> None:
    one = porter()
    crowded(one)
    for number in range(10_000):
        assert isinstance(one.weigh(first(), host(number), number % 60_000 + 1, 1.0), bytes)
    assert one.half_open == CALM
    assert len(one._places) == CALM


def test_one_address_cannot_take_all_places_not_even_with_tokens() -> None:
    one = porter()
    crowded(one)
    admitted = 0
    for port in range(1, 100):
        again, _ = retried(one, "203.0.200.1", port, 0.0)
        admitted += one.weigh(again, "203.0.200.1", port, 0.0) is not None
    assert admitted == MAX_HALF_OPEN_EACH
    again, _ = retried(one, "203.0.200.9", 1, 0.0)
    assert isinstance(one.weigh(again, "203.0.200.9", 1, 0.0), Admitted)


def test_all_addresses_together_are_bounded() -> None:
    one = porter()
    crowded(one)
    for number in range(1000):
        again, _ = retried(one, host(5000 + number), 1, 0.0)
        one.weigh(again, host(5000 + number), 1, 0.0)
    assert one.half_open == MAX_HALF_OPEN


def test_members_come_in_however_many_strangers_there_are() -> None:
    one = porter()
    crowded(one)
    for number in range(1000):
        again, _ = retried(one, host(5000 + number), 1, 0.0)
        one.weigh(again, host(5000 + number), 1, 0.0)
    for _ in range(MAX_KNOWN_EACH):
        verdict = one.weigh(first(), HOME, 7842, 0.0)
        assert isinstance(verdict, Admitted)
        assert verdict.retry_cid is None


def test_who_claims_a_members_address_gets_only_its_few_places() -> None:
    one = porter()
    crowded(one)
    verdicts = [one.weigh(first(), HOME, port, 0.0) for port in range(1, 100)]
    assert sum(isinstance(verdict, Admitted) for verdict in verdicts) == MAX_KNOWN_EACH
    assert all(isinstance(verdict, bytes) for verdict in verdicts[MAX_KNOWN_EACH:]), "the others must prove it"


def test_a_place_stays_taken_until_its_time_whatever_became_of_it() -> None:
    """Noise that only looks like a first packet must not make us begin handshakes without end."""
    one = porter()
    crowded(one, 100.0)
    late = 100.0 + HANDSHAKE_DEADLINE_S
    assert isinstance(one.weigh(first(), host(9999), 1, late - 0.1), bytes)
    assert isinstance(one.weigh(first(), host(9999), 1, late + 0.1), Admitted)
    assert one.half_open == 1


def test_a_handshake_that_is_done_frees_its_place_once() -> None:
    one = porter()
    verdict = one.weigh(first(), host(1), 1, 0.0)
    assert isinstance(verdict, Admitted)
    one.leave(verdict.place)
    one.leave(verdict.place)
    assert one.half_open == 0
    assert isinstance(one.weigh(first(), host(1), 1, 60.0), Admitted)
    assert one.half_open == 1


def test_what_comes_through_a_relay_is_bounded_by_that_relay() -> None:
    one = porter()
    verdicts = [one.weigh(first(), "relay:" + "a" * 26, None, 0.0) for _ in range(100)]
    assert sum(isinstance(verdict, Admitted) for verdict in verdicts) == MAX_HALF_OPEN_EACH
    assert not any(isinstance(verdict, bytes) for verdict in verdicts)


@pytest.mark.parametrize(
    ("host", "counted_as"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::"),
        ("relay:abc", "relay:abc"),
    ],
)
def test_hosts_of_one_ipv6_network_count_as_one(host: str, counted_as: str) -> None:
    assert neighbourhood(host) == counted_as


@given(st.binary(max_size=1300))
def test_any_bytes_are_a_first_packet_or_none(data: bytes) -> None:
    packet = read_first_packet(b"\xc0\x00\x00\x00\x01" + data)
    assert packet is None or len(packet.token) <= len(data)
    read_first_packet(data)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60))
def test_a_room_never_holds_more_than_it_has_places(steps: list[tuple[bool, str]]) -> None:
    room = Room(5, 2)
    inside: list[str] = []
    for enters, source in steps:
        if enters:
            fits = len(inside) < 5 and inside.count(source) < 2
            assert room.enter(source) == fits
            inside += [source] * fits
        elif source in inside:
            room.leave(source)
            inside.remove(source)
        assert len(room) == len(inside)
        assert set(room._sources) == set(inside), "nothing is kept of who left or was not let in"


def test_the_numbers_fit_together() -> None:
    assert CALM < MAX_HALF_OPEN
    assert strangers.MAX_HALF_OPEN_EACH < CALM
