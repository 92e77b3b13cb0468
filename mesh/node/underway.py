"""Who uses this node's llama-server: connections from its own ingress, and those that members' ingresses opened."""

from __future__ import annotations

import asyncio

from mesh.proxy.tcp import TcpStream, open_tcp
from mesh.tunnel.member import HttpTunnel


class UnderWay:
    """Knows when the last request has gone: an ingress closes its connection once it has the whole answer.

    Args:
        tunnel: what carries the members' connections.
    """

    def __init__(self, tunnel: HttpTunnel) -> None:
        self._tunnel = tunnel
        self._own: set[asyncio.Task[None]] = set()

    async def open(self, port: int) -> TcpStream:
        """A connection of our own ingress to the llama-server at loopback ``port``.

        Raises:
            TransportError: nothing listens there.
        """
        stream = await open_tcp("127.0.0.1", port)
        watch = asyncio.ensure_future(stream.wait_closed())
        self._own.add(watch)
        watch.add_done_callback(self._own.discard)
        return stream

    async def none(self) -> None:
        """Return once no connection is left."""
        while self._own or not self._tunnel.is_idle:
            if self._own:
                await asyncio.wait([*self._own])
            await self._tunnel.idle()
