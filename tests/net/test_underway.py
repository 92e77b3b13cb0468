"""A host knows when the last request has left its llama-server, from whichever ingress it came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh.node.underway import UnderWay
from mesh.tunnel.member import HttpTunnel
from mesh.wire.codec import open_reply_decoder, read_frame
from mesh.wire.facts import Epoch
from mesh.wire.messages import Opened, OpenHttp
from tests.fakes.processes import node_id
from tests.fakes.transport import stream_pair

ONE = Epoch(1, node_id("a"))


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server that holds every connection until the client ends it."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_an_engine_that_nobody_asks_is_free_at_once(port: int) -> None:
    await asyncio.wait_for(UnderWay(HttpTunnel(lambda epoch: port)).none(), 2)


async def test_an_engine_is_free_when_its_own_ingress_and_the_last_member_have_gone(port: int) -> None:
    tunnel = HttpTunnel(lambda epoch: port)
    users = UnderWay(tunnel)
    own = await users.open(port)
    ours, theirs = stream_pair()
    carrying = asyncio.create_task(tunnel.serve(node_id("b"), OpenHttp(ONE), ours))
    reply = await read_frame(theirs, open_reply_decoder)
    assert isinstance(reply, Opened)
    free = asyncio.create_task(users.none())
    own.abort()
    await asyncio.wait_for(own.wait_closed(), 2)
    assert not free.done(), "a member still waits for its answer"
    theirs.abort()
    await asyncio.wait_for(free, 2)
    await carrying
