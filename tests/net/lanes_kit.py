"""Both ends of one stream, over each lane."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.clock import SystemClock
from mesh.identity.key import NodeKey
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Stream
from mesh.transport.tcp import TICKET_BYTES, TcpLane
from mesh.transport.tcpstream import TcpStream
from tests.eventually import eventually


@asynccontextmanager
async def over_tcp() -> AsyncIterator[tuple[Stream, Stream]]:
    key, found = NodeKey.generate(), list[TcpStream]()

    async def anybody(ticket: bytes) -> str | None:
        return "b" * 26

    listener, dialer = TcpLane(key), TcpLane(NodeKey.generate())
    listener.recognise, listener.on_stream = anybody, lambda peer, stream: found.append(stream)
    [address] = await listener.start([("127.0.0.1", 0)])
    ours = await dialer.dial(address, expect=key.id, ticket=bytes(TICKET_BYTES), opening=b"!", timeout=5)
    await eventually(lambda: found)
    await found[0].read_exactly(1)
    found[0].trust()
    ours.trust()
    yield ours, found[0]
    await dialer.close()
    await listener.close()


@asynccontextmanager
async def over_quic() -> AsyncIterator[tuple[Stream, Stream]]:
    arrived, streams = list[PeerConnection](), list[Stream]()
    dialer = Endpoint(NodeKey.generate(), SystemClock(), on_connection=lambda connection: None)
    listener = Endpoint(NodeKey.generate(), SystemClock(), on_connection=arrived.append)
    await dialer.start([("127.0.0.1", 0)])
    [address] = await listener.start([("127.0.0.1", 0)])
    there = await dialer.dial(address, expect=listener.key.id)
    await eventually(lambda: arrived)
    arrived[0].on_stream = streams.append
    there.widen()
    arrived[0].widen()
    ours = await there.open_stream()
    await ours.write(b"!")
    await eventually(lambda: streams)
    await streams[0].read_exactly(1)
    yield ours, streams[0]
    await dialer.close()
    await listener.close()
