"""In-memory streams with the manners of the real ones: bounded, half-closable, resettable."""

from __future__ import annotations

import asyncio

from mesh.errors import TransportError
from mesh.transport.lane import Sink

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
