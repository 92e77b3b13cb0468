"""Both ends of one stream, over each lane."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

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


@dataclass
class QuicPair:
    """A dialer and a listener with one connection between them, as wide as members'."""

    dialer: Endpoint
    listener: Endpoint
    there: PeerConnection
    here: PeerConnection
    streams: list[Stream] = field(default_factory=list)

    async def stream(self) -> tuple[Stream, Stream]:
        """Both ends of a new one."""
        ours = await self.there.open_stream()
        await ours.write(b"!")
        await eventually(lambda: self.streams, every=0)
        theirs = self.streams.pop()
        assert await theirs.read_exactly(1) == b"!"
        return ours, theirs


@asynccontextmanager
async def quic_pair() -> AsyncIterator[QuicPair]:
    arrived: list[PeerConnection] = []
    dialer = Endpoint(NodeKey.generate(), SystemClock(), on_connection=lambda connection: None)
    listener = Endpoint(NodeKey.generate(), SystemClock(), on_connection=arrived.append)
    await dialer.start([("127.0.0.1", 0)])
    [address] = await listener.start([("127.0.0.1", 0)])
    there = await dialer.dial(address, expect=listener.key.id)
    await eventually(lambda: arrived)
    pair = QuicPair(dialer, listener, there, arrived[0])
    pair.here.on_stream = pair.streams.append
    there.widen()
    pair.here.widen()
    yield pair
    await dialer.close()
    await listener.close()


@asynccontextmanager
async def over_quic() -> AsyncIterator[tuple[Stream, Stream]]:
    async with quic_pair() as pair:
        yield await pair.stream()
