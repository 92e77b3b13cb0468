"""The in-memory pair keeps the promises of the protocols it stands in for."""

from __future__ import annotations

import asyncio

import pytest

from mesh.errors import TransportError
from mesh.transport import Stream
from tests.fakes.transport import stream_pair


async def test_bytes_arrive_in_order_and_end_is_seen() -> None:
    a, b = stream_pair()
    one: Stream = a
    await one.write(b"hello ")
    await one.write(memoryview(b"world"))
    await one.write_eof()
    assert await b.read_exactly(11) == b"hello world"
    assert await b.read() == b""
    await b.write(b"still open")
    assert await a.read(5) == b"still"


async def test_a_writer_waits_for_the_reader() -> None:
    a, b = stream_pair(window=4)
    writing = asyncio.create_task(a.write(b"123456"))
    await asyncio.sleep(0)
    assert not writing.done()
    assert await b.read_exactly(6) == b"123456"
    await writing


async def test_a_short_stream_is_an_eof_error() -> None:
    a, b = stream_pair()
    await a.write(b"abc")
    await a.write_eof()
    with pytest.raises(EOFError):
        await b.read_exactly(4)


async def test_abort_fails_both_ends() -> None:
    a, b = stream_pair()
    reading = asyncio.create_task(b.read())
    await asyncio.sleep(0)
    a.abort()
    with pytest.raises(TransportError):
        await reading
    with pytest.raises(TransportError):
        await a.write(b"x")
