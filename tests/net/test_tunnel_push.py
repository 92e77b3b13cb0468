"""The way from a worker's rpc-server through the mesh to the next worker's, and who is kept off it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh.errors import TransportError
from mesh.tunnel import PushTunnels
from mesh.wire.codec import open_reply_decoder, read_frame
from mesh.wire.facts import Epoch
from mesh.wire.messages import OpenFailed, OpenPush
from tests.eventually import eventually
from tests.fakes.processes import node_id
from tests.fakes.transport import FakeStream, stream_pair
from tests.net.test_tunnel_carriage import WORKER_SECRET, At, Server, echo, ended

HOST, B, C, D = (node_id(letter) for letter in "abcd")
ONE, TWO = Epoch(1, HOST), Epoch(2, HOST)
OWN_SECRET = b"b" * 32


class Pair:
    """Worker b, whose successor is c; c's rpc-server echoes and wants :data:`WORKER_SECRET`."""

    def __init__(self, server: Server) -> None:
        self.streams: list[FakeStream] = []
        self.refusals: list[str] = []
        self.b = PushTunnels(self.open_bulk, lambda epoch: None, lambda peer, epoch: False)
        self.c = PushTunnels(
            self.open_bulk,
            lambda epoch: At(server.port) if epoch == ONE else None,
            lambda peer, epoch: peer == B,
        )
        self.sender = B
        self._tasks: set[asyncio.Task[None]] = set()

    async def open_bulk(self, worker: str, request: Any, **_: Any) -> FakeStream:
        assert isinstance(request, OpenPush)
        ours, theirs = stream_pair()
        self.streams.append(ours)
        task = asyncio.ensure_future(self.c.serve(self.sender, request, theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        reply = await read_frame(ours, open_reply_decoder)
        if isinstance(reply, OpenFailed):
            self.refusals.append(reply.code)
            ours.abort()
            raise TransportError(f"{worker} refused: {reply.message}")
        return ours

    async def connect(self, epoch: Epoch = ONE, said: bytes = OWN_SECRET) -> tuple[Any, asyncio.StreamWriter]:
        endpoint = await self.b.open(epoch, C, OWN_SECRET)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.rpartition(":")[2]))
        writer.write(said)
        return reader, writer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server(echo) as server:
        yield server


@pytest.fixture
async def pair(server: Server) -> AsyncIterator[Pair]:
    pair = Pair(server)
    yield pair
    await pair.b.close()
    await pair.c.close()


async def test_each_end_says_the_secret_of_its_own_server(pair: Pair, server: Server) -> None:
    reader, writer = await pair.connect()
    writer.write(b"activations")
    assert await asyncio.wait_for(reader.readexactly(11), 5) == b"activations"
    assert bytes(server.heard[0]) == WORKER_SECRET
    assert pair.b.traffic[C].up_bytes == 11


async def test_without_the_secret_not_even_a_stream_is_opened(pair: Pair) -> None:
    reader, _ = await pair.connect(said=b"x" * 32)
    assert await ended(reader)
    assert pair.streams == []


async def test_who_is_not_the_predecessor_is_refused(pair: Pair) -> None:
    pair.sender = D
    reader, _ = await pair.connect()
    assert await ended(reader)
    assert pair.refusals == ["fenced"]


async def test_an_epoch_that_does_not_run_here_is_refused(pair: Pair) -> None:
    reader, _ = await pair.connect(epoch=TWO)
    assert await ended(reader)
    assert pair.refusals == ["not-ready"]


@pytest.mark.parametrize("end", ["b drops c", "c drops b", "c stops"])
async def test_the_death_of_either_worker_ends_it_at_once(pair: Pair, server: Server, end: str) -> None:
    reader, writer = await pair.connect()
    writer.write(b"x")
    await asyncio.wait_for(reader.readexactly(1), 5)
    if end == "b drops c":
        pair.b.drop(C)
    elif end == "c drops b":
        pair.c.drop(B)
    else:
        await pair.c.close()
    assert await ended(reader)
    await eventually(lambda: server.open == 0)


async def test_the_death_of_another_member_changes_nothing(pair: Pair) -> None:
    reader, writer = await pair.connect()
    for tunnels in (pair.b, pair.c):
        tunnels.drop(D)
    writer.write(b"x")
    assert await asyncio.wait_for(reader.readexactly(1), 5) == b"x"
