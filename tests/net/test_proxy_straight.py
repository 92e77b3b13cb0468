"""Tokens that go straight to their client's socket: only where that changes nothing a client could see."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from mesh.proxy.straight import Straight, straight
from tests.eventually import eventually
from tests.net.proxy_ingress import Ingress, an_engine, an_ingress

WORDS = [f"word{n} " for n in range(40)]
CHAT = "/v1/chat/completions"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What took the short way."""
    seen: list[bytes] = []
    write = Straight.write

    def noted(self: Straight, data: bytes) -> None:
        seen.append(data)
        write(self, data)

    monkeypatch.setattr(Straight, "write", noted)
    yield seen


async def raw(port: int, version: str) -> bytes:
    """The whole answer to a streamed chat, as it comes over the wire."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"stream": true}'
    head = f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(10):
        answer = await reader.read(-1)
    writer.close()
    return answer


def unchunked(body: bytes) -> bytes:
    """Raises ValueError: not chunks, or not all of them."""
    out = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            assert body == b"\r\n"
            return out
        assert body[int(size, 16) :][:2] == b"\r\n"
        out, body = out + body[: int(size, 16)], body[int(size, 16) + 2 :]


async def one_by_one(ingress: Ingress, step: asyncio.Semaphore) -> None:
    """Each word once the client has the one before."""
    before = ingress.tokens()
    for number in range(len(WORDS)):
        step.release()
        await eventually(lambda number=number: ingress.tokens() > before + number)  # type: ignore[misc]


async def streamed(version: str) -> tuple[bytes, bytes]:
    """Head and body of a streamed answer."""
    step = asyncio.Semaphore(0)
    async with an_engine(words=WORDS, step=step) as (_, engine_port), an_ingress() as ingress:
        ingress.serve_tcp(engine_port)
        answer, _ = await asyncio.gather(raw(ingress.port, version), one_by_one(ingress, step))
        assert ingress.tokens() == len(WORDS)
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.lower(), body


async def test_a_client_gets_the_same_bytes_either_way(written: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    head, body = await streamed("1.1")
    assert b"transfer-encoding: chunked" in head
    quick = unchunked(body)
    assert quick.count(b"word") == len(WORDS)
    assert len(written) > len(WORDS) - 5, "most tokens"

    written.clear()
    monkeypatch.setattr("mesh.proxy.reply.straight", lambda send: None)
    assert unchunked((await streamed("1.1"))[1]) == quick
    assert written == []


async def test_a_client_that_knows_no_chunks_gets_none(written: list[bytes]) -> None:
    head, body = await streamed("1.0")
    assert b"chunked" not in head
    assert body.count(b"word") == len(WORDS)
    assert written == []


async def test_a_client_that_does_not_read_is_waited_for(written: list[bytes]) -> None:
    """What it has no room for takes the long way, in order."""
    words = [f"{n:05d}" + "x" * 4000 + " " for n in range(1200)]
    async with an_engine(words=words) as (_, engine_port), an_ingress() as ingress:
        ingress.serve_tcp(engine_port)
        reader, writer = await asyncio.open_connection("127.0.0.1", ingress.port, limit=1 << 14)
        body = b'{"stream": true}'
        writer.write(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n" % CHAT.encode() + body)
        async with asyncio.timeout(30):
            await eventually(lambda: ingress.tokens() >= 20)  # it has begun, and then stands still
            before = -1.0
            while (now := ingress.tokens()) != before:
                before = now
                await asyncio.sleep(0.2)
            assert before < len(words), "everything fitted: nobody had to wait"
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += await reader.read(1 << 20)
        writer.close()
    text = unchunked(answer.partition(b"\r\n\r\n")[2])
    positions = [text.index(f"{n:05d}x".encode()) for n in range(len(words))]
    assert positions == sorted(positions)
    assert written


def test_where_the_server_is_another_one_there_is_no_short_way() -> None:
    async def send(message: object) -> None: ...

    assert straight(send) is None
