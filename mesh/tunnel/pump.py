"""Bytes between a local TCP socket and a stream of the mesh, both ways, with as little in between as there can be.

Each direction holds a bounded number of bytes and stops reading when the other side is slow. Ends are passed on one
direction at a time (half-close); a break on either side breaks the other at once, so that nobody waits for the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import Any, cast

from mesh.errors import TransportError
from mesh.transport.lane import Sink, Stream
from mesh.transport.received import Received, read_exactly
from mesh.transport.tcpstream import receive_room

HIGH_WATER = 1 << 20
"""Bytes waiting in one direction above which its source is not read any more. Prompt activations come in megabytes."""
CHUNK = 1 << 18
"""Bytes handed over at once at most."""


@dataclass(slots=True)
class Traffic:
    """What went through. ``up``: from the local socket into the mesh."""

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0


class LocalEnd(asyncio.BufferedProtocol):
    """One local TCP connection.

    Received bytes are kept as the pieces they came in. A ``StreamReader`` is as fast for small messages, but does not
    say when its socket has gone while nobody reads, and its writer hides half-closes.

    Args:
        high_water: bytes that wait in either direction before it is stopped.
    """

    def __init__(self, high_water: int = HIGH_WATER) -> None:
        self._high_water = high_water
        loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._room = receive_room()
        self._received = Received()
        self._ended = False
        self._aborted = False
        self._reading_paused = False
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._loop = loop
        self.sink: Sink | None = None
        """Is offered what comes, first, at once and in order. What it does not take is there to be read."""
        self.lost: asyncio.Future[Exception | None] = loop.create_future()
        """Done once the socket is gone, for whatever cause."""

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self._transport = transport
        transport.set_write_buffer_limits(self._high_water)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._aborted:
            transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._room[:nbytes])
        if self.sink is not None and not self._received.size and self.sink(data):
            return
        self._received.put(data)
        if self._received.size > self._high_water and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake_reader()

    @property
    def is_over(self) -> bool:
        """Cut, or the other side has ended its half and all it said was read."""
        closing = self._aborted or (self._transport is not None and self._transport.is_closing())
        return closing or (self._ended and not self._received.size)

    def eof_received(self) -> bool:
        self._ended = True
        self._wake_reader()
        return True  # our half stays open

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(exc)
        # An error that ended a tunnel keeps this object until garbage is collected.
        self._room = memoryview(b"")
        self._wake_reader()
        self.resume_writing()

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def _wake_reader(self) -> None:
        readable, self._readable = self._readable, None
        if readable is not None and not readable.done():
            readable.set_result(None)

    # what the pump calls

    async def _more(self) -> bool:
        """Wait for bytes; False at the end.

        Raises:
            ConnectionError: the socket is gone.
        """
        while not self._received.size:
            if self._ended:
                return False
            if self.lost.done():
                raise self.lost.result() or ConnectionResetError("closed")
            self._readable = self._loop.create_future()
            await self._readable
        return True

    async def read(self, limit: int = CHUNK) -> bytes:
        """What is there, at least one byte; ``b""`` at the end.

        Raises:
            ConnectionError: the socket is gone.
        """
        if not await self._more():
            return b""
        data = self._received.take(limit)
        if self._reading_paused and self._received.size <= self._high_water // 2 and self._transport is not None:
            self._reading_paused = False
            if not self.lost.done():
                self._transport.resume_reading()
        return data

    async def read_exactly(self, n: int) -> bytes:
        """Raises:
        EOFError: the other side ended first.
        ConnectionError: the socket is gone.
        """
        return await read_exactly(self.read, n)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hand over; waits only while more than ``high_water`` is unsent."""
        if self.lost.done() or self._transport is None:
            raise self.lost.result() or ConnectionResetError("closed")
        self._transport.write(data)
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def write_now(self, data: bytes) -> bool:
        """Hand over all of it, or nothing and return False, where :meth:`write` would wait or raise."""
        if self._writable is not None or self.lost.done() or self._transport is None:
            return False
        self._transport.write(data)
        return True

    def write_eof(self) -> None:
        if self._transport is not None and not self.lost.done():
            with contextlib.suppress(OSError):
                self._transport.write_eof()

    def close(self) -> None:
        """Close after what was written has gone out."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now, also when asyncio has not handed us the socket yet."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()


async def pump(local: LocalEnd, stream: Stream, traffic: Traffic, *, outlives_peer: bool = True) -> None:
    """Carry bytes both ways until both directions have ended, then close both sides.

    When the local side breaks, the stream is reset and the call returns: the other end learns it there.

    Args:
        outlives_peer: the local side may go on sending once the other has ended its half. Not so where the other is a
            server that never ends first: there its end is its death.

    Raises:
        TransportError: the stream broke, or ended when it must not; the local socket is closed by then.
    """
    up = asyncio.ensure_future(_carry_up(local, stream, traffic))
    down = asyncio.ensure_future(_carry_down(local, stream, traffic))
    clean = False
    _join(local, stream, traffic)
    try:
        waited_for: set[asyncio.Future[Any]] = {up, down}
        while waited_for and not local.lost.done():
            done, rest = await asyncio.wait({*waited_for, local.lost}, return_when=asyncio.FIRST_COMPLETED)
            for direction in done & waited_for:
                direction.result()
            waited_for = rest & waited_for
            if not outlives_peer and down in done and up in waited_for:
                raise TransportError("the server behind it closed the connection")
        clean = not waited_for
    except (ConnectionError, OSError):
        pass  # the local side; reset below
    finally:
        local.sink = None
        stream.pass_to(None)
        if clean:
            local.close()
        else:
            local.abort()
            stream.abort()
        for direction in (up, down):
            direction.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


def _join(local: LocalEnd, stream: Stream, traffic: Traffic) -> None:
    """Pass bytes on in the very call that brings them: a token's way through a ring is made of such steps.

    The two tasks get what the other side does not take at once, and the ends.
    """

    def up(data: bytes) -> bool:
        if taken := stream.write_now(data):
            traffic.up_bytes += len(data)
        return taken

    def down(data: bytes) -> bool:
        if taken := local.write_now(data):
            traffic.down_bytes += len(data)
        return taken

    local.sink = up
    stream.pass_to(down)


async def _carry_up(local: LocalEnd, stream: Stream, traffic: Traffic) -> None:
    while data := await local.read():
        await stream.write(data)
        traffic.up_bytes += len(data)
    await stream.write_eof()


async def _carry_down(local: LocalEnd, stream: Stream, traffic: Traffic) -> None:
    while data := await stream.read(CHUNK):
        await local.write(data)
        traffic.down_bytes += len(data)
    local.write_eof()


async def connect_local(port: int) -> LocalEnd:
    """A connection to our own engine's loopback ``port``.

    Raises:
        TransportError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    try:
        _, local = await loop.create_connection(LocalEnd, "127.0.0.1", port)
    except OSError as error:
        raise TransportError(f"the engine does not listen on 127.0.0.1:{port}: {error.strerror}") from error
    return local
