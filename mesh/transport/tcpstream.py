"""One stream over a TCP connection of its own: the kernel's flow control is the stream's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

from mesh.errors import TransportError
from mesh.transport.lane import Sink
from mesh.transport.received import Received, read_exactly
from mesh.transport.tls import TlsSession

READ_BUFFER = 1 << 20
"""Bytes that came and were not read, above which we take no more from the kernel."""
STRANGER_READ_BUFFER = 16 * 1024
WRITE_BUFFER = 512 * 1024
"""Bytes the kernel has not taken yet, above which a writer waits."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""Who waits for an answer learns in eleven seconds that nobody is there any more. A ring may be idle for hours, too,
and boxes in between forget connections that are."""
_PIECE = 128 * 1024
_CHUNK = 256 * 1024
_of_thread = threading.local()
_LINGER_NONE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class TcpStream(asyncio.BufferedProtocol):
    """See :class:`mesh.transport.lane.Stream`.

    Args:
        on_made: told when the socket is connected; it may abort the stream.
    """

    def __init__(self, tls: TlsSession, *, on_made: Callable[[TcpStream], None] = lambda stream: None) -> None:
        self._tls = tls
        self._room = receive_room()
        self._on_made = on_made
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = Received()
        self._most_unread = STRANGER_READ_BUFFER
        self._paused = False
        self._read_error: str | None = None
        self._write_error: str | None = None
        self._reader: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._full = False
        self._writer: asyncio.Future[None] | None = None
        self.established: asyncio.Future[None] = self._loop.create_future()
        """Done after the handshake; fails with ``TransportError``."""
        self.on_gone: Callable[[], None] = lambda: None
        """Called once the socket is closed, for whatever cause."""
        self.gone = False
        self._handed_over = False

    # -- the stream's face -------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        read_over = self._read_error is not None or (self._tls.peer_ended and not self._received.size)
        return read_over and (self._tls.ended or self._write_error is not None)

    async def read(self, limit: int = 65536) -> bytes:
        received = self._received
        while not received.size:
            if self._read_error is not None:
                raise TransportError(self._read_error, code="stream-reset")
            if self._tls.peer_ended:
                return b""
            if self._reader is not None:
                raise RuntimeError("two tasks read one stream")
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = received.take(limit)
        if self._paused and received.size <= self._most_unread // 2:
            self._resume()
        return data

    async def read_exactly(self, n: int) -> bytes:
        return await read_exactly(self.read, n)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            self._check_writable()
            if self._full:
                await self._room_again()
                continue
            self._tls.write(view[:_PIECE])
            self._flush()
            view = view[_PIECE:]
        self._check_writable()

    def write_now(self, data: bytes) -> bool:
        if self._full or self._writer is not None or self._write_error is not None or self._tls.ended:
            return False
        self._tls.write(data)
        self._flush()
        return True

    def pass_to(self, sink: Sink | None) -> None:
        self._sink = sink

    async def write_eof(self) -> None:
        if self._tls.ended:
            return
        self._check_writable()
        self._tls.end()
        self._flush()
        self._close_when_over()

    def abort(self, code: int = 0) -> None:
        if self._tls.ended and self._tls.peer_ended:
            return
        if not self._tls.peer_ended:
            self._received.clear()
        self.lose("the stream was aborted on this side")

    # -- what the lane and the link do with it -----------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        """Cut the connection now. What arrived before may still be read, a last word above all."""
        self._fail(reason)
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            if sock is not None:
                if self._handed_over:  # closing our descriptor would end nothing
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                # A reset: the other side learns it at once and keeps nothing. uvloop's closed sockets raise ValueError.
                with contextlib.suppress(OSError, ValueError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            self._transport.abort()

    def hand_over(self) -> socket.socket:
        """The socket, for somebody else to read, and to write once :meth:`sent` has returned. Close it when done.

        This stream reads no more. :meth:`lost` returns when somebody cuts it, and :meth:`abort` ends the connection
        whoever else holds the socket.

        Raises:
            TransportError: more came than was read, or the stream is lost.
        """
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        self._check_writable()
        if self._transport is None or sock is None or self._received.size or not self._tls.is_drained:
            raise TransportError("the stream cannot be handed over", code="not-idle")
        self._transport.pause_reading()
        self._paused = self._handed_over = True
        return socket.socket(fileno=os.dup(sock.fileno()))

    async def sent(self) -> None:
        """The kernel has all that was written."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(0)
        if self._full:
            await self._room_again()

    async def lost(self) -> str:
        """Wait until the stream is cut; the reason. Nobody may be reading."""
        while self._read_error is None:
            self._reader = self._loop.create_future()
            await self._reader
        return self._read_error

    @property
    def peer_key(self) -> bytes | None:
        """Raw Ed25519 key of the side that listens, as seen by the side that dialed."""
        return self._tls.peer_key

    @property
    def connected(self) -> bool:
        """There was a socket, so that ``on_gone`` is called once it is closed."""
        return self._transport is not None

    @property
    def source(self) -> str:
        """The other side's IP address."""
        name = None if self._transport is None else self._transport.get_extra_info("peername")
        return str(name[0]) if name else ""

    @property
    def home(self) -> tuple[Any, ...]:
        """Our own end of the socket, as ``getsockname`` writes it; empty before there is one."""
        return () if self._transport is None else tuple(self._transport.get_extra_info("sockname") or ())

    def trust(self) -> None:
        """The peer is known: let it have as much on the way as a member may."""
        self._most_unread = READ_BUFFER
        if self._paused and self._received.size <= self._most_unread // 2:
            self._resume()

    # -- what asyncio calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self._transport = transport
        transport.set_write_buffer_limits(WRITE_BUFFER)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if self._write_error is not None:
            transport.abort()
            return
        self._on_made(self)
        if self._write_error is None:
            self._take(b"")

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        if self._read_error is None and not self._tls.peer_ended:  # nothing can follow an end
            self._take(self._room[:nbytes])

    def eof_received(self) -> bool:
        # A half ends with an alert. A bare end of the socket means that nobody is there any more: to write to, either.
        if self._tls.ended and self._tls.peer_ended:
            return False
        self._fail("the peer is gone")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._fail(f"the connection broke: {exc}" if exc else "the connection is closed")
        on_gone, self.on_gone = self.on_gone, lambda: None  # it names us: without it we go when nobody else does
        on_gone()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        _wake(self._writer)

    # -- within ------------------------------------------------------------------------------------------------------

    def _take(self, ciphertext: bytes | memoryview) -> None:
        tls = self._tls
        try:
            if len(ciphertext):
                tls.feed(ciphertext)
            if not tls.established:
                if not tls.handshake():
                    self._flush()
                    return
                self._flush()
                if not self.established.done():
                    self.established.set_result(None)
            unread = self._received.size
            while data := tls.read():
                self._received.put(data)
            if self._sink is not None and not unread and self._received.size:
                self._offer(self._sink)
        except ssl.SSLError as error:
            self._flush()  # an alert that says what we did not like
            self.lose(f"not what a mesh node sends: {error}")
            return
        if self._received.size > self._most_unread and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        if self._received.size or tls.peer_ended:
            _wake(self._reader)
            if tls.peer_ended:
                self._close_when_over()

    def _offer(self, sink: Sink) -> None:
        # All records at once: one of them is 16 KB, and each would be a system call of the taker.
        data = self._received.take(self._received.size)
        if not sink(data):
            self._received.put(data)

    def _flush(self) -> None:
        data = self._tls.to_send()
        if data and self._transport is not None:
            self._transport.write(data)

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    async def _room_again(self) -> None:
        if self._writer is not None:
            raise RuntimeError("two tasks write one stream")
        self._writer = self._loop.create_future()
        try:
            await self._writer
        finally:
            self._writer = None

    def _close_when_over(self) -> None:
        if self._tls.ended and self._tls.peer_ended and self._transport is not None:
            self._transport.close()

    def _check_writable(self) -> None:
        if self._write_error is not None:
            raise TransportError(self._write_error, code="stream-reset")
        if self._tls.ended:
            raise TransportError("our half of the stream has ended", code="stream-ended")

    def _fail(self, reason: str) -> None:
        if self._read_error is None and not self._tls.peer_ended:
            self._read_error = reason
        if self._write_error is None and not self._tls.ended:
            self._write_error = reason
        if not self.established.done():
            self.established.set_exception(TransportError(reason, code="handshake"))
            self.established.exception()  # seen: nobody may be waiting any more
        _wake(self._reader)
        _wake(self._writer)


def receive_room() -> memoryview:
    """Where a connection of this thread's event loop receives.

    Selector loops fill it and hand it over in one go, so that all connections share one: 512 idle ones cost nothing,
    and short ones leave no holes of 256 KB in the heap. A proactor holds on to it while it waits.
    """
    if sys.platform == "win32":
        return memoryview(bytearray(_CHUNK // 4))
    if not hasattr(_of_thread, "room"):
        _of_thread.room = memoryview(bytearray(_CHUNK))
    room: memoryview = _of_thread.room
    return room


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
