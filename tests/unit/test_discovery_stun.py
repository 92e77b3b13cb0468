"""What a STUN client takes for an answer, and what it makes of several."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.discovery.public import MAX_WITNESSES, Seen, Witnesses
from mesh.discovery.stun import (
    COOKIE,
    SENDS,
    Answered,
    Look,
    Query,
    Received,
    Silent,
    StunClient,
    Target,
    Tick,
    decode_answer,
    encode_request,
)

ONE, TWO, THREE = ("198.51.100.1", 3478), ("198.51.100.2", 3478), ("198.51.100.3", 3478)
US = ("203.0.113.7", 40000)


def answer(transaction: bytes, address: Target, before: bytes = b"") -> bytes:
    ip = ipaddress.ip_address(address[0])
    mask = COOKIE + transaction
    port = address[1] ^ int.from_bytes(mask[:2], "big")
    host = bytes(a ^ b for a, b in zip(ip.packed, mask, strict=False))
    value = bytes([0, 1 if ip.version == 4 else 2]) + port.to_bytes(2, "big") + host
    body = before + b"\x00\x20" + len(value).to_bytes(2, "big") + value
    return b"\x01\x01" + len(body).to_bytes(2, "big") + COOKIE + transaction + body


def client() -> StunClient:
    numbers = itertools.count(1)
    return StunClient(lambda size: next(numbers).to_bytes(size, "big"))


def asked(stun: StunClient, *servers: Target, now: float = 0.0) -> dict[Target, bytes]:
    """Transactions by server."""
    queries = [effect for effect in stun.handle(Look(servers), now) if isinstance(effect, Query)]
    return {query.target: query.data[8:] for query in queries}


# Whatever comes, the decoder says None or an address, and nothing else happens.
@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda tail: b"\x01\x01\x00\x0c" + COOKIE + tail))
def test_any_bytes_are_an_answer_or_nothing(data: bytes) -> None:
    decode_answer(data)


# What a server mangles on the way of a true answer is refused or still an address, never an exception.
@given(st.integers(0, 43), st.integers(0, 255))
def test_a_mangled_answer_does_no_harm(at: int, byte: int) -> None:
    data = bytearray(answer(b"t" * 12, ("2001:db8::1", 7842)))
    data[at] = byte
    decode_answer(bytes(data))


@given(st.ip_addresses(), st.integers(1, 65535), st.binary(min_size=12, max_size=12))
def test_an_answer_is_read_as_it_was_written(ip: ipaddress.IPv4Address, port: int, transaction: bytes) -> None:
    software = b"\x80\x22\x00\x03abc\x00"  # an attribute nobody needs, with padding
    assert decode_answer(answer(transaction, (str(ip), port), software)) == (transaction, (str(ip), port))


def test_a_request_is_twenty_bytes() -> None:
    assert encode_request(b"t" * 12) == b"\x00\x01\x00\x00\x21\x12\xa4\x42" + b"t" * 12


def test_an_answer_counts_from_the_server_that_was_asked_and_for_its_transaction_only() -> None:
    stun = client()
    transactions = asked(stun, ONE, TWO)
    right = answer(transactions[ONE], US)
    assert stun.handle(Received(right, TWO), 0.1) == []
    assert stun.handle(Received(right, ("192.0.2.66", 3478)), 0.1) == []
    assert stun.handle(Received(answer(b"x" * 12, US), ONE), 0.1) == []
    assert stun.handle(Received(right, ONE), 0.1) == [Answered(ONE, US)]
    assert stun.handle(Received(right, ONE), 0.1) == []  # once


def test_a_silent_server_is_asked_a_few_times_and_then_left_alone() -> None:
    stun = client()
    queries = len(asked(stun, ONE))
    while (due := stun.next_timer()) is not None:
        effects = stun.handle(Tick(), due)
        queries += sum(isinstance(effect, Query) for effect in effects)
    assert queries == SENDS
    assert effects == [Silent((ONE,))]


def test_an_answer_of_an_earlier_round_is_late() -> None:
    stun = client()
    first = asked(stun, ONE)
    asked(stun, ONE, now=10)
    assert stun.handle(Received(answer(first[ONE], US), ONE), 10) == []


def believed(servers: dict[str, str], members: dict[str, str] | None = None, own: tuple[str, ...] = ()) -> Seen:
    witnesses = Witnesses()
    for name, address in servers.items():
        witnesses.server(name, address)
    for node, address in (members or {}).items():
        witnesses.member(node, address)
    return witnesses.conclude(own)


SEEN, LIE = "203.0.113.7:40000", "192.0.2.99:53"


def test_two_servers_that_agree_are_believed_and_a_liar_beside_them_is_not() -> None:
    assert believed({"a": SEEN, "b": LIE, "c": SEEN}) == Seen((SEEN,), (), "cone")


def test_one_server_alone_is_unconfirmed() -> None:
    assert believed({"a": SEEN}) == Seen((), (SEEN,), "cone")


def test_two_servers_that_name_different_hosts_are_both_not_believed() -> None:
    assert believed({"a": SEEN, "b": LIE}) == Seen((), (), "unknown")


def test_a_members_word_is_enough_and_settles_what_a_liar_says() -> None:
    assert believed({}, {"m": SEEN}) == Seen((SEEN,), (), "cone")
    assert believed({"b": LIE}, {"m": SEEN}) == Seen((SEEN,), (), "cone")


def test_another_port_for_each_witness_is_a_symmetric_nat_with_nothing_to_tell() -> None:
    assert believed({"a": "203.0.113.7:1", "b": "203.0.113.7:2"}) == Seen((), (), "symmetric")
    assert believed({"a": "203.0.113.7:1"}, {"m": "203.0.113.7:2"}).kind == "symmetric"


def test_who_is_seen_under_its_own_address_is_in_the_open() -> None:
    assert believed({"a": SEEN, "b": SEEN}, own=(SEEN,)) == Seen((), (), "open")


def test_a_witness_that_left_is_forgotten() -> None:
    witnesses = Witnesses()
    witnesses.member("m", SEEN)
    witnesses.forget("m")
    assert witnesses.conclude(()) == Seen()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:5", "224.0.0.1:5", "0.0.0.0:5", "169.254.1.1:5", "kitchen:5", "x", "", "1.2.3.4:0"]
)
def test_what_can_be_no_address_of_ours_is_not_heard(address: str) -> None:
    assert believed({"a": address}, {"m": address}) == Seen()


def test_witnesses_are_bounded() -> None:
    witnesses = Witnesses()
    for number in range(10 * MAX_WITNESSES):
        witnesses.member(str(number), f"203.0.113.7:{number + 1}")
        witnesses.server(str(number), f"203.0.113.7:{number + 1}")
    assert len(witnesses._members) == len(witnesses._servers) == MAX_WITNESSES
