"""The lab's STUN server, against RFC 5769's vectors."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.stunserver import address_of, answer

TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")


def request(attributes: bytes = b"", kind: int = 1, magic: int = 0x2112A442) -> bytes:
    return struct.pack("!HHI", kind, len(attributes), magic) + TRANSACTION + attributes


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (("192.0.2.1", 32853), "0001a147e112a643"),
        (("2001:db8:1234:5678:11:2233:4455:6677", 32853), "0002a1470113a9faa5d3f179bc25f4b5bed2b9d9"),
    ],
)
def test_it_says_what_address_it_sees(source: tuple[str, int], value: str) -> None:
    response = answer(request(), source)
    assert response is not None
    kind, length, magic = struct.unpack_from("!HHI", response)
    assert (kind, length, magic, response[8:20]) == (0x0101, len(response) - 20, 0x2112A442, TRANSACTION)
    assert response[20:24] == struct.pack("!HH", 0x0020, len(value) // 2)
    assert response[24:].startswith(bytes.fromhex(value))


def test_attributes_it_may_pass_over_change_nothing() -> None:
    software = struct.pack("!HH", 0x8022, 5) + b"mesh\0\0\0\0"
    assert answer(request(software), ("192.0.2.1", 1)) == answer(request(), ("192.0.2.1", 1))


def test_what_it_must_understand_and_does_not_is_an_error() -> None:
    response = answer(request(struct.pack("!HH", 0x0003, 4) + bytes(4)), ("192.0.2.1", 1))
    assert response is not None
    assert struct.unpack_from("!H", response) == (0x0111,)
    assert struct.pack("!HHH", 0x000A, 2, 0x0003) in response


@pytest.mark.parametrize(
    "datagram",
    [b"", request()[:19], request() + b"\0", request(magic=1), request(kind=0x0101), request(struct.pack("!HH", 6, 4))],
)
def test_what_is_no_binding_request_gets_no_answer(datagram: bytes) -> None:
    assert answer(datagram, ("192.0.2.1", 1)) is None


@given(st.binary(max_size=100), st.booleans())
def test_garbage_is_survived(data: bytes, framed: bool) -> None:
    answer(request(data) if framed else data, ("192.0.2.1", 1))


def test_addresses_are_read_with_their_port() -> None:
    assert address_of("1.2.3.4:5") == ("1.2.3.4", 5)
    assert address_of("[2001:db8::1]:5") == ("2001:db8::1", 5)
    with pytest.raises(ValueError, match="appear"):
        address_of("nonsense")
