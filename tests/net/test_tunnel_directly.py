"""Bytes that are passed on in the call that brings them, and bytes that have to wait: in one order, over both lanes."""

from __future__ import annotations

import asyncio
import random

import pytest

from mesh.transport.tcpstream import TcpStream
from mesh.tunnel.pump import HIGH_WATER, LocalEnd, Traffic, connect_local, pump
from tests.eventually import eventually
from tests.net.lanes_kit import over_quic, over_tcp

Local = tuple[LocalEnd, asyncio.StreamReader, asyncio.StreamWriter]


LANES = pytest.mark.parametrize("lane", [over_tcp, over_quic])


async def local_pair() -> Local:
    """A local end, and the program at the other end of its socket."""
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    local = await connect_local(server.sockets[0].getsockname()[1])
    reader, writer = await accepted
    server.close()
    return local, reader, writer


@LANES
async def test_bytes_keep_their_order_whoever_is_slow(lane: object) -> None:
    """Sizes and pauses at random, both ways at once, until each side has been full again and again."""
    async with lane() as (here, there):  # type: ignore[operator]
        ends = [await local_pair(), await local_pair()]
        traffic = [Traffic(), Traffic()]
        streams = [here, there]
        pumps = [asyncio.ensure_future(pump(e[0], s, t)) for e, s, t in zip(ends, streams, traffic, strict=True)]
        dice = random.Random(5)
        said = [dice.randbytes(6 * HIGH_WATER) for _ in ends]

        async def speak(number: int) -> None:
            writer, rest, dice = ends[number][2], memoryview(said[number]), random.Random(number)
            while rest:
                size = dice.choice((1, 100, 5_000, 70_000, 700_000))
                writer.write(rest[:size])
                rest = rest[size:]
                await writer.drain()
                for _ in range(dice.choice((0, 1, 20))):
                    await asyncio.sleep(0)
            writer.write_eof()

        async def listen(number: int) -> bytes:
            reader, heard, dice = ends[number][1], bytearray(), random.Random(10 + number)
            while data := await reader.read(dice.choice((100, 10_000, 300_000))):
                heard += data
                for _ in range(dice.choice((0, 0, 200))):
                    await asyncio.sleep(0)
            return bytes(heard)

        async with asyncio.timeout(60):
            heard = await asyncio.gather(*(listen(n) for n in (0, 1)), *(speak(n) for n in (0, 1)))
            await asyncio.gather(*pumps)
        assert heard[0] == said[1]
        assert heard[1] == said[0]
        assert [t.up_bytes for t in traffic] == [t.down_bytes for t in reversed(traffic)] == [len(s) for s in said]
        for _, _, writer in ends:
            writer.close()


@LANES
async def test_a_small_message_needs_no_task_on_its_way(lane: object, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lane() as (here, there):  # type: ignore[operator]
        ends = [await local_pair(), await local_pair()]
        pumps = [asyncio.ensure_future(pump(e[0], s, Traffic())) for e, s in zip(ends, (here, there), strict=True)]
        await asyncio.sleep(0)
        queued: list[bytes] = []
        for local, _, _ in ends:
            monkeypatch.setattr(local, "_wake_reader", lambda: queued.append(b"a task is to take it"))
        ends[0][2].write(b"activations")
        async with asyncio.timeout(5):
            assert await ends[1][1].readexactly(11) == b"activations"
        assert not queued
        for (_, _, writer), pumping in zip(ends, pumps, strict=True):
            writer.close()
            pumping.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def test_what_waits_is_never_overtaken_on_the_way_into_the_mesh() -> None:
    local, _, writer = await local_pair()
    taken: list[bytes] = []
    answers = iter([False, True, True])

    def sink(data: bytes) -> bool:
        if answer := next(answers):
            taken.append(data)
        return answer

    local.sink = sink
    for data in (b"first", b"second"):
        local.get_buffer(-1)[: len(data)] = data
        local.buffer_updated(len(data))
    assert not taken, "the second must not go before the first"
    assert await local.read() == b"firstsecond"
    local.abort()
    writer.close()


async def test_a_writer_that_was_just_woken_goes_before_what_comes_now() -> None:
    async with over_tcp() as (here, there):
        assert isinstance(here, TcpStream)
        here.pause_writing()
        writing = asyncio.ensure_future(here.write(b"first"))
        await eventually(lambda: here._writer is not None, every=0)
        here.resume_writing()
        assert not here.write_now(b"second"), "the first waits for its turn of the loop"
        await writing
        assert here.write_now(b"second")
        assert await there.read_exactly(11) == b"firstsecond"


@LANES
async def test_what_waits_is_never_overtaken_on_the_way_out_of_the_mesh(lane: object) -> None:
    async with lane() as (here, there):  # type: ignore[operator]
        offered: list[bytes] = []

        def sink(data: bytes) -> bool:
            offered.append(data)
            return len(offered) > 1

        there.pass_to(sink)
        await here.write(b"first")
        await eventually(lambda: offered)
        await here.write(b"second")
        unread = there._received if isinstance(there, TcpStream) else there._chunks
        await eventually(lambda: unread.size == 11)
        assert await there.read_exactly(11) == b"firstsecond"
        assert offered == [b"first"], "the second must not be offered while the first waits"
        await here.write(b"third")
        await eventually(lambda: len(offered) == 2)
