"""In-memory streams and connections with the manners of the real ones: bounded, half-closable, resettable."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mesh.errors import TransportError
from mesh.transport.lane import Path, Sink, Stream

FAKE_WINDOW = 1 << 20


class _Pipe:
    """One direction."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.buffer = bytearray()
        self.ended = False
        self.broken: str | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def breaks(self, reason: str) -> None:
        if self.broken is None and not (self.ended and not self.buffer):
            self.broken = reason
            self.buffer.clear()
            self._wake()

    async def read(self, limit: int) -> bytes:
        while not self.buffer and not self.ended and self.broken is None:
            await self._change()
        if self.broken is not None:
            raise TransportError(self.broken)
        data = bytes(self.buffer[:limit])
        del self.buffer[: len(data)]
        self._wake()
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while True:
            if self.broken is not None:
                raise TransportError(self.broken)
            if self.ended:
                raise TransportError("our half of the stream has ended")
            if not len(view):
                return
            room = self.window - len(self.buffer)
            if room > 0:
                self.buffer += view[:room]
                view = view[room:]
                self._wake()
            else:
                await self._change()

    def end(self) -> None:
        self.ended = True
        self._wake()


class FakeStream:
    """One end of :func:`stream_pair`."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def closed(self) -> bool:
        if self._incoming.broken is not None or self._outgoing.broken is not None:
            return True
        return self._outgoing.ended and self._incoming.ended and not self._incoming.buffer

    async def read(self, limit: int = 65536) -> bytes:
        return await self._incoming.read(limit)

    async def read_exactly(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            some = await self._incoming.read(n - len(data))
            if not some:
                raise EOFError(f"the stream ended after {len(data)} of {n} bytes")
            data += some
        return bytes(data)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._outgoing.write(data)

    def write_now(self, data: bytes) -> bool:
        return False

    def pass_to(self, sink: Sink | None) -> None:
        pass

    async def write_eof(self) -> None:
        self._outgoing.end()

    def abort(self, code: int = 0) -> None:
        self.breaks(f"the stream was reset (code {code})")

    def stops_reading(self, reason: str) -> None:
        """The other end cannot write any more; what this one says still arrives."""
        self._incoming.breaks(reason)

    def breaks(self, reason: str) -> None:
        """Inject a fault: both halves fail with ``reason``."""
        self._incoming.breaks(reason)
        self._outgoing.breaks(reason)


def stream_pair(window: int = FAKE_WINDOW) -> tuple[FakeStream, FakeStream]:
    """Two ends of one stream."""
    there, back = _Pipe(window), _Pipe(window)
    return FakeStream(back, there), FakeStream(there, back)


class FakeConnection:
    """One end of :func:`connection_pair`."""

    def __init__(self, peer: str, peer_key: bytes, *, dialed: bool, window: int) -> None:
        self.peer = peer
        self.peer_key = peer_key
        self.address = "127.0.0.1:7842"
        self.path: Path = "quic"
        self.dialed = dialed
        self.rtt_ms: float | None = 0.1
        self.last_heard = 0.0
        self.closed = False
        self.on_stream: Callable[[Stream], None] = lambda stream: stream.abort()
        self.on_close: Callable[[str], None] = lambda reason: None
        self.other: FakeConnection | None = None
        self._window = window
        self._streams: list[FakeStream] = []

    async def open_stream(self) -> FakeStream:
        await asyncio.sleep(0)
        if self.closed or self.other is None:
            raise TransportError(f"the connection to {self.peer} is closed")
        ours, theirs = stream_pair(self._window)
        self._streams.append(ours)
        self.other._streams.append(theirs)
        asyncio.get_running_loop().call_soon(self.other.on_stream, theirs)
        return ours

    def widen(self) -> None:
        pass

    def close(self, code: int = 0, reason: str = "") -> None:
        for end in (self, self.other):
            if end is not None and not end.closed:
                end.closed = True
                for stream in end._streams:
                    stream.breaks(f"the connection to {end.peer} is closed: {reason}")
                asyncio.get_running_loop().call_soon(end.on_close, reason)


def connection_pair(
    dialer: str = "a" * 26, listener: str = "b" * 26, *, window: int = FAKE_WINDOW
) -> tuple[FakeConnection, FakeConnection]:
    """``(at the dialer, at the listener)``."""
    ours = FakeConnection(listener, b"b" * 32, dialed=True, window=window)
    theirs = FakeConnection(dialer, b"a" * 32, dialed=False, window=window)
    ours.other, theirs.other = theirs, ours
    return ours, theirs
