"""One stream of a QUIC connection, with bounded memory on both sides."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mesh.errors import TransportError
from mesh.transport.lane import Sink
from mesh.transport.received import Received, read_exactly

if TYPE_CHECKING:
    from mesh.transport.connection import PeerConnection

SEND_BUFFER = 2 * 1024 * 1024
"""Bytes written but not acknowledged, at most; a window of 20 MB/s at 40 ms fits twice."""


class QuicStream:
    """See :class:`mesh.transport.lane.Stream`."""

    __slots__ = (
        "_chunks",
        "_connection",
        "_delivered",
        "_ended",
        "_finished",
        "_id",
        "_read_error",
        "_reader",
        "_sink",
        "_write_error",
        "_writer",
    )

    def __init__(self, connection: PeerConnection, stream_id: int) -> None:
        self._connection = connection
        self._id = stream_id
        self._chunks = Received()
        self._delivered = 0
        self._finished = False  # the peer's half
        self._ended = False  # our half
        self._read_error: str | None = None
        self._write_error: str | None = None
        self._reader: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._writer: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        read_over = self._read_error is not None or (self._finished and not self._chunks.size)
        return read_over and (self._ended or self._write_error is not None)

    async def read(self, limit: int = 65536) -> bytes:
        while not self._chunks.size:
            if self._read_error is not None:
                raise TransportError(self._read_error, code="stream-reset")
            if self._finished:
                return b""
            if self._reader is not None:
                raise RuntimeError("two tasks read one stream")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._chunks.take(limit)
        self._connection.consume(self._id, len(data))
        return data

    async def read_exactly(self, n: int) -> bytes:
        return await read_exactly(self.read, n)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            self._check_writable()
            room = SEND_BUFFER - self._connection.unsent(self._id)
            if room > 0:
                self._connection.send(self._id, view[:room])
                view = view[room:]
                continue
            if self._writer is not None:
                raise RuntimeError("two tasks write one stream")
            self._writer = asyncio.get_running_loop().create_future()
            self._connection.waiting_writers.add(self)
            try:
                await self._writer
            finally:
                self._writer = None
                self._connection.waiting_writers.discard(self)
        self._check_writable()

    def write_now(self, data: bytes) -> bool:
        if self._writer is not None or self._write_error is not None or self._ended:
            return False
        if len(data) > SEND_BUFFER - self._connection.unsent(self._id):
            return False
        self._connection.send(self._id, data)
        return True

    def pass_to(self, sink: Sink | None) -> None:
        self._sink = sink

    async def write_eof(self) -> None:
        if self._ended:
            return
        self._check_writable()
        self._ended = True
        self._connection.send(self._id, b"", end=True)
        self._connection.stream_changed(self._id)

    def abort(self, code: int = 0) -> None:
        if self._finished and self._ended:
            return
        self._connection.abort_stream(self._id, code)
        reason = "the stream was aborted on this side"
        if not self._finished and self._read_error is None:
            self._fail_reading(reason)
        if not self._ended:
            self._fail_writing(reason)
        self._connection.stream_changed(self._id)

    # -- called by the connection ------------------------------------------------------------------------------------

    def feed(self, data: bytes, *, end: bool) -> None:
        """Bytes came in order; after an abort they are thrown away."""
        self._delivered += len(data)
        if end:
            self._finished = True
        if self._read_error is not None:
            self._connection.consume(self._id, len(data))
            return
        if data and self._sink is not None and not self._chunks.size and self._sink(data):
            self._connection.consume(self._id, len(data))
        elif data:
            self._chunks.put(data)
        _wake(self._reader)

    def reset_by_peer(self, code: int) -> None:
        self._finished = True
        self._fail_reading(f"the peer reset the stream (code {code})")

    def stopped_by_peer(self, code: int) -> None:
        if not self._ended:
            self._fail_writing(f"the peer reset the stream (code {code})")

    def lose(self, reason: str) -> None:
        """The connection is gone. What arrived before may still be read, a last word above all."""
        if not self._finished and self._read_error is None:
            self._read_error = reason
            _wake(self._reader)
        if self._write_error is None:
            self._fail_writing(reason)

    @property
    def done(self) -> bool:
        """Nothing more can come from the peer, and we have said all we had to."""
        return self._finished and (self._ended or self._write_error is not None)

    @property
    def peer_done(self) -> bool:
        return self._finished

    @property
    def delivered(self) -> int:
        return self._delivered

    @property
    def id(self) -> int:
        return self._id

    def room_again(self) -> None:
        _wake(self._writer)

    # -- within ------------------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self._write_error is not None:
            raise TransportError(self._write_error, code="stream-reset")
        if self._ended:
            raise TransportError("our half of the stream has ended", code="stream-ended")

    def _fail_reading(self, reason: str) -> None:
        unread = self._chunks.clear()
        self._read_error = reason
        if unread:
            self._connection.consume(self._id, unread)
        _wake(self._reader)

    def _fail_writing(self, reason: str) -> None:
        self._write_error = reason
        _wake(self._writer)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
