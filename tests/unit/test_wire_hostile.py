"""Whatever a peer sends is a message within its bounds, or a typed refusal."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mesh.errors import WireError
from mesh.transport.received import read_exactly
from mesh.wire.codec import (
    MAX_FRAME,
    MAX_OPEN_FRAME,
    control_decoder,
    decode,
    encode,
    open_decoder,
    open_reply_decoder,
    read_frame,
)
from mesh.wire.messages import Control, Hello, Open, OpenReply, Ping, Propose
from tests.hostile import twisted, values

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    Control: control_decoder, Open: open_decoder, OpenReply: open_reply_decoder,
}  # fmt: skip


class Bytes:
    """A stream that brings ``data`` in pieces, then ends; counts what was asked of it at once."""

    def __init__(self, data: bytes, piece: int = 3) -> None:
        self.data = data
        self.piece = piece
        self.most_asked = 0

    async def read(self, limit: int) -> bytes:
        self.most_asked = max(self.most_asked, limit)
        taken, self.data = self.data[: min(limit, self.piece)], self.data[min(limit, self.piece) :]
        return taken

    async def read_exactly(self, n: int) -> bytes:
        return await read_exactly(self.read, n)


@pytest.mark.parametrize("union", DECODERS, ids=["control", "open", "reply"])
def test_every_message_reads_back_as_it_was_written(union: Any) -> None:
    @PATIENT
    @given(values(union))
    def holds(message: Any) -> None:
        frame = encode(message)
        assert decode(DECODERS[union], frame[4:]) == message
        assert asyncio.run(read_frame(Bytes(frame), DECODERS[union])) == message

    holds()


@pytest.mark.parametrize("union", DECODERS, ids=["control", "open", "reply"])
def test_changed_messages_are_refused_or_within_their_bounds(union: Any) -> None:
    """A field of another type, too long, missing, out of range: what decodes, encodes to something that decodes."""

    @PATIENT
    @given(twisted(union))
    def holds(data: bytes) -> None:
        try:
            message = decode(DECODERS[union], data)
        except WireError:
            return
        assert decode(DECODERS[union], encode(message)[4:]) == message

    holds()


@given(st.binary(max_size=3000))
@example(b"\xdd\xff\xff\xff\xff")  # an array of four thousand million elements
@example(b"\xdf\xff\xff\xff\xff" + b"\x81" * 100)  # a map of as many
@example(b"\xc6\xff\xff\xff\xff")  # bytes of as many
@example(b"\x91" * 3000)  # deeper than any recursion
def test_any_bytes_are_a_message_or_a_refusal(data: bytes) -> None:
    for decoder in DECODERS.values():
        try:
            decode(decoder, data)
        except WireError as error:
            assert len(error.message) < 2000


@given(st.integers(MAX_FRAME + 1, 2**32 - 1))
def test_an_announced_length_over_the_limit_is_refused_before_a_byte_is_awaited(length: int) -> None:
    stream = Bytes(length.to_bytes(4, "big") + bytes(100))
    with pytest.raises(WireError, match="limit"):
        asyncio.run(read_frame(stream, control_decoder))
    assert stream.most_asked == 4


def test_a_first_frame_has_a_smaller_limit() -> None:
    with pytest.raises(WireError):
        asyncio.run(read_frame(Bytes((MAX_OPEN_FRAME + 1).to_bytes(4, "big")), open_decoder, MAX_OPEN_FRAME))


@given(st.data())
def test_a_cut_frame_is_an_end_not_a_message(data: st.DataObject) -> None:
    frame = encode(Ping(data.draw(st.integers(0, 2**62))))
    cut = data.draw(st.integers(1, len(frame) - 1))
    with pytest.raises((EOFError, WireError)):
        asyncio.run(read_frame(Bytes(frame[:cut]), control_decoder))


def test_a_message_of_the_wrong_kind_is_not_confused_with_another() -> None:
    for union, decoder in DECODERS.items():
        for other in DECODERS:
            if other is not union and union is not Control:
                with pytest.raises(WireError):
                    decode(decoder, encode(Ping(1))[4:])


def test_bounds_are_there_for_everything_that_can_grow() -> None:
    """Every text, bytes, array and map that a peer can send has a greatest length, and every number a range."""
    unbounded: list[str] = []
    seen: set[type] = set()

    def look(kind: Any, where: str) -> None:
        info = msgspec.inspect
        if isinstance(kind, info.StrType | info.BytesType | info.VarTupleType | info.DictType):
            literal_pattern = getattr(kind, "pattern", None)
            if kind.max_length is None and not literal_pattern:
                unbounded.append(where)
        if isinstance(kind, info.VarTupleType):
            look(kind.item_type, f"{where}[]")
        elif isinstance(kind, info.DictType):
            look(kind.key_type, f"{where} keys")
            look(kind.value_type, f"{where} values")
        elif isinstance(kind, info.UnionType):
            for one in kind.types:
                look(one, where)
        elif isinstance(kind, info.TupleType):
            for one in kind.item_types:
                look(one, where)
        elif isinstance(kind, info.Metadata):
            look(kind.type, where)
        elif isinstance(kind, info.StructType) and kind.cls not in seen:
            seen.add(kind.cls)
            for field in kind.fields:
                look(field.type, f"{kind.cls.__name__}.{field.name}")

    for union in DECODERS:
        look(msgspec.inspect.type_info(union), "")
    assert Hello in seen
    assert Propose in seen
    assert unbounded == []
