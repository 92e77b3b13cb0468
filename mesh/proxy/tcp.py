"""A plain TCP connection with the face of a mesh stream: the host's own way to its llama-server on loopback."""

from __future__ import annotations

import asyncio
import contextlib

from mesh.errors import TransportError
from mesh.transport.lane import Sink
from mesh.transport.received import read_exactly
from mesh.tunnel.pump import LocalEnd

_HIGH_WATER = 64 << 10
"""Bytes of an answer whose client is slow; one of hundreds."""


class TcpStream:
    """Satisfies :class:`mesh.transport.lane.Stream`."""

    def __init__(self, end: LocalEnd) -> None:
        self._end = end
        self._ended = False

    @property
    def closed(self) -> bool:
        """Gone, or ended by the peer: an HTTP server that ended its half answers nothing more."""
        return self._end.is_over

    async def read(self, limit: int = 65536) -> bytes:
        try:
            return await self._end.read(limit)
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from error

    async def read_exactly(self, n: int) -> bytes:
        return await read_exactly(self.read, n)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._end.write(data)
        except OSError as error:
            raise TransportError(f"the connection broke: {error}") from error

    def write_now(self, data: bytes) -> bool:
        return self._end.write_now(data)

    def pass_to(self, sink: Sink | None) -> None:
        self._end.sink = sink

    async def write_eof(self) -> None:
        if not self._ended:
            self._ended = True
            self._end.write_eof()

    async def wait_closed(self) -> None:
        """Return once the connection is gone, for whatever cause."""
        with contextlib.suppress(OSError):
            await asyncio.shield(self._end.lost)

    def abort(self, code: int = 0) -> None:
        self._end.abort()


async def open_tcp(host: str, port: int) -> TcpStream:
    """Connect to an engine on this machine.

    Raises:
        TransportError: nothing listens there.
    """
    try:
        _, end = await asyncio.get_running_loop().create_connection(lambda: LocalEnd(_HIGH_WATER), host, port)
    except OSError as error:
        raise TransportError(f"the engine at {host}:{port} cannot be reached: {error.strerror or error}") from error
    return TcpStream(end)
