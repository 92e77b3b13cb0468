"""An engine's HTTP as its client reads it: framing, ends, and what is no answer."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.http11 import MAX_HEAD_BYTES, Http11, Http11Error
from tests.fakes.transport import FakeStream, stream_pair

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7\r\n, world\r\n0\r\n\r\n"
SIZED = b"HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\n\r\nhello, world"


async def said(connection: Http11) -> bytes:
    body = b""
    while part := await connection.read():
        body += part
    return body


async def heard(answer: bytes, *, method: str = "GET", ends: bool = False) -> tuple[Http11, FakeStream]:
    """A connection whose engine has answered so; its head is read."""
    ours, theirs = stream_pair()
    await theirs.write(answer)
    if ends:
        await theirs.write_eof()
    connection = Http11(ours)
    await connection.ask(method, b"/props", [(b"Host", b"localhost")])
    return connection, theirs


@given(st.sampled_from([CHUNKED, SIZED]), st.data())
def test_an_answer_is_the_same_wherever_the_network_cuts_it(answer: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1))))

    async def check() -> None:
        ours, theirs = stream_pair()
        connection = Http11(ours)
        asking = asyncio.create_task(connection.ask("POST", b"/v1/x?y=1", [(b"Content-Length", b"3")], (b"a", b"bc")))
        assert (await theirs.read()) == b"POST /v1/x?y=1 HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"

        async def answering() -> None:
            for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
                await theirs.write(answer[begin:end])
                await asyncio.sleep(0)

        telling = asyncio.create_task(answering())
        await asking
        assert await said(connection) == b"hello, world"
        await telling
        assert connection.status == int(answer[9:12]) and connection.is_idle

    asyncio.run(check())


async def test_a_connection_is_asked_again_when_its_answer_is_whole_and_not_before() -> None:
    connection, engine = await heard(SIZED + SIZED[:10])
    assert not connection.is_idle
    assert await said(connection) == b"hello, world"
    assert not connection.is_idle, "something comes that nobody asked for"
    connection, engine = await heard(SIZED)
    await said(connection)
    await engine.write(CHUNKED)
    await connection.ask("GET", b"/", [])
    assert (connection.status, await said(connection)) == (200, b"hello, world")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_some_answers_have_no_body(status: bytes) -> None:
    connection, _ = await heard(b"HTTP/1.1 " + status + b"\r\n\r\n")
    assert await said(connection) == b"" and connection.is_idle


async def test_the_answer_to_head_is_its_headers() -> None:
    connection, _ = await heard(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n", method="HEAD")
    assert await said(connection) == b"" and not connection.is_idle


async def test_what_comes_before_the_answer_is_not_it() -> None:
    connection, _ = await heard(b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED)
    assert connection.status == 404 and await said(connection) == b"hello, world" and connection.is_idle


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    connection, _ = await heard(b"HTTP/1.1 200 OK\r\n\r\nhello", ends=True)
    assert await said(connection) == b"hello" and not connection.is_idle


@pytest.mark.parametrize("cut", [1, 20, len(CHUNKED) - 30, len(CHUNKED) - 1])
async def test_an_answer_that_stops_before_its_end_is_no_answer(cut: int) -> None:
    with pytest.raises(Http11Error):
        await said((await heard(CHUNKED[:cut], ends=True))[0])


@pytest.mark.parametrize(
    "answer",
    [
        b"\x15\x03\x01\x00\x02\x02\x28 this is TLS",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * MAX_HEAD_BYTES,
        b"",
    ],
)
async def test_what_is_no_answer_is_said_to_be_none(answer: bytes) -> None:
    with pytest.raises(Http11Error):
        await said((await heard(answer, ends=True))[0])


@pytest.mark.parametrize("target", [b"/a b", b"/a\r\nX: y", b"", b"/\0"])
async def test_a_head_that_would_be_read_as_something_else_is_not_sent(target: bytes) -> None:
    ours, theirs = stream_pair()
    with pytest.raises(Http11Error):
        await Http11(ours).ask("GET", target, [])
    with pytest.raises(Http11Error):
        await Http11(ours).ask("GET", b"/", [(b"X", b"y\r\nZ: 1")])
    await ours.write_eof()
    assert await theirs.read() == b""


async def test_a_refusal_half_way_through_a_large_body_is_heard() -> None:
    ours, theirs = stream_pair(1 << 14)
    connection = Http11(ours)
    asking = asyncio.create_task(connection.ask("POST", b"/", [(b"Content-Length", b"1000000")], (b"x" * 1000000,)))
    await theirs.read()
    await theirs.write(SIZED)
    theirs.stops_reading("too large")
    await asking
    assert connection.status == 404
