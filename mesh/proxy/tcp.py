"""A plain TCP connection with the face of a mesh stream: the host's own way to its llama-server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from mesh.errors import TransportError
from mesh.transport.lane import Sink


class TcpStream:
    """Satisfies :class:`mesh.transport.lane.Stream`. Waits when the peer does not read (64 KiB are buffered)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def closed(self) -> bool:
        """Gone, or ended by the peer: an HTTP server that ended its half answers nothing more."""
        return self._writer.transport.is_closing() or self._reader.at_eof()

    async def read(self, limit: int = 65536) -> bytes:
        try:
            return await self._reader.read(limit)
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from error

    async def read_exactly(self, n: int) -> bytes:
        try:
            return await self._reader.readexactly(n)
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from error

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (OSError, RuntimeError) as error:
            raise TransportError(f"the connection broke: {error}") from error

    def write_now(self, data: bytes) -> bool:
        return False

    def pass_to(self, sink: Sink | None) -> None:
        """HTTP is read by its parser alone."""

    async def write_eof(self) -> None:
        if self._writer.can_write_eof() and not self._writer.transport.is_closing():
            self._writer.write_eof()

    async def wait_closed(self) -> None:
        """Return once the connection is gone, for whatever cause."""
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self, code: int = 0) -> None:
        self._writer.transport.abort()


async def open_tcp(host: str, port: int) -> TcpStream:
    """Connect to an engine on this machine.

    Raises:
        TransportError: nothing listens there.
    """
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        raise TransportError(f"the engine at {host}:{port} cannot be reached: {error.strerror or error}") from error
    raw = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return TcpStream(reader, writer)
