"""The other ends: what a member does with a stream that asks for its rpc-server or its llama-server."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from mesh.errors import MeshError, TransportError
from mesh.supervise.priority import priority
from mesh.transport.lane import Stream
from mesh.transport.tcpstream import TcpStream
from mesh.tunnel.handover import KEY_BYTES, KEYS_BYTES, Line, hand_over
from mesh.tunnel.pump import Traffic, connect_local, pump
from mesh.wire.codec import encode
from mesh.wire.facts import Epoch, NodeId
from mesh.wire.messages import Opened, OpenFailed, OpenHttp, OpenPush, OpenRpc

MAX_RPC_STREAMS = 16
"""Of one host to our rpc-server. It opens one, and a few short ones while it starts."""
MAX_HTTP_STREAMS = 512
"""Of all members to our llama-server: requests in flight, of all ingresses together."""
MAX_HTTP_STREAMS_EACH = 256
"""Of one ingress: however much its clients ask for, the others' have room. It holds the rest, and tries again."""


class Endpoint(Protocol):
    """Where our rpc-server is, and what it wants to hear first."""

    @property
    def port(self) -> int: ...
    @property
    def secret(self) -> bytes: ...


class _Carrier:
    """Streams being carried to a local port, until they end or all are closed at once."""

    def __init__(self, limit: int, limit_each: int) -> None:
        self._limit = limit
        self._limit_each = limit_each
        self._carrying: dict[asyncio.Task[None], NodeId] = {}
        self._traffic: dict[NodeId, Traffic] = {}

    @property
    def traffic(self) -> Mapping[NodeId, Traffic]:
        """Bytes and connections per peer. ``up``: from our engine to the peer."""
        return self._traffic

    @property
    def is_idle(self) -> bool:
        return not self._carrying

    async def idle(self) -> None:
        """Return once nothing is carried."""
        while self._carrying:
            await asyncio.wait([*self._carrying])

    def close(self) -> None:
        """Reset every stream and close every local connection now."""
        for task in self._carrying:
            task.cancel()

    def drop(self, peer: NodeId) -> None:
        """``peer`` is dead: close what comes from it now, before its connection has noticed."""
        for task, source in self._carrying.items():
            if source == peer:
                task.cancel()

    async def _carry(self, peer: NodeId, stream: Stream, carried: Callable[[Traffic], Awaitable[None]]) -> None:
        """Let ``carried`` have ``stream``, if there is room for one more of ``peer``."""
        own = sum(source == peer for source in self._carrying.values())
        if len(self._carrying) >= self._limit or own >= self._limit_each:
            await _refuse(stream, "busy", f"{len(self._carrying)} streams are open already, {own} of them yours")
            return

        async def carry() -> None:
            # The peer goes, or the engine does; each end of a tunnel reports its own.
            with contextlib.suppress(TransportError, OSError):
                await carried(self._traffic.setdefault(peer, Traffic()))

        task = asyncio.ensure_future(carry())
        self._carrying[task] = peer
        task.add_done_callback(lambda task: self._carrying.pop(task, None))
        # A task cancelled before its first step runs no finally of its own.
        task.add_done_callback(lambda task: stream.abort() if task.cancelled() else None)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()


class WorkerTunnel(_Carrier):
    """Carries RPC streams to our own rpc-server, while its epoch is current.

    Args:
        endpoint: our rpc-server of an epoch; None when that epoch is not, or no longer, the one we run.
        may_carry: the peer may reach it in this epoch, and the epoch is the newest we know (fencing).
        on_connected: told the epoch each time a peer has reached our rpc-server.
        door: where our rpc-server is given connections that it carries on by itself; None: all go through its port.
    """

    def __init__(
        self,
        endpoint: Callable[[Epoch], Endpoint | None],
        may_carry: Callable[[NodeId, Epoch], bool],
        *,
        on_connected: Callable[[Epoch], None] = lambda epoch: None,
        door: Path | None = None,
    ) -> None:
        super().__init__(MAX_RPC_STREAMS, MAX_RPC_STREAMS)
        self._door = door
        self.on_connected = on_connected
        self._endpoint = endpoint
        self._may_carry = may_carry

    async def serve(self, peer: NodeId, request: OpenRpc | OpenPush, stream: Stream) -> None:
        """Answer ``request``, then carry until either side ends. Never raises for what the peer or the engine does."""
        if not self._may_carry(peer, request.epoch):
            await _refuse(stream, "fenced", f"this node follows another layout than epoch {request.epoch.number}")
            return
        endpoint = self._endpoint(request.epoch)
        if endpoint is None:
            await _refuse(stream, "not-ready", f"no rpc-server of epoch {request.epoch.number} runs here")
            return
        connected = partial(self.on_connected, request.epoch)

        async def carried(traffic: Traffic) -> None:
            line = self._line() if request.sealed and isinstance(stream, TcpStream) else None
            if line is not None and isinstance(stream, TcpStream):
                traffic.connections += 1
                await _give(line, stream, endpoint.secret, connected)
            else:
                with priority.urgent():
                    await _through_port(stream, endpoint.port, endpoint.secret, traffic, connected)

        await self._carry(peer, stream, carried)

    def _line(self) -> Line | None:
        try:
            return None if self._door is None else Line.to(self._door)
        except OSError:
            return None


class HttpTunnel(_Carrier):
    """Carries members' HTTP streams to our own llama-server, while we are the serving host.

    Args:
        port: of our llama-server for an epoch; None when it does not serve that epoch.
    """

    def __init__(self, port: Callable[[Epoch], int | None]) -> None:
        super().__init__(MAX_HTTP_STREAMS, MAX_HTTP_STREAMS_EACH)
        self._port = port

    async def serve(self, peer: NodeId, request: OpenHttp, stream: Stream) -> None:
        """Answer ``request``, then carry until either side ends. Never raises for what the peer or the engine does."""
        port = self._port(request.epoch)
        if port is None:
            await _refuse(stream, "not-serving", f"this node does not serve epoch {request.epoch.number}")
            return
        await self._carry(peer, stream, lambda traffic: _through_port(stream, port, b"", traffic, lambda: None))


async def _through_port(
    stream: Stream, port: int, greeting: bytes, traffic: Traffic, on_connected: Callable[[], None]
) -> None:
    try:
        local = await connect_local(port)
    except TransportError as error:
        await _refuse(stream, "not-listening", error.message)
        return
    try:
        if greeting:
            await local.write(greeting)
        await stream.write(encode(Opened()))
        on_connected()
        traffic.connections += 1
        await pump(local, stream, traffic)
    finally:
        # However this ends, also by cancellation before the pump had them: neither end is left open.
        local.close()
        if not stream.closed:
            stream.abort()


async def _give(line: Line, stream: TcpStream, secret: bytes, on_connected: Callable[[], None]) -> None:
    """Let our engine have ``stream``, and the peer's the keys to it, until either ends it."""
    keys = secrets.token_bytes(KEYS_BYTES)

    async def answer() -> None:
        # Not before our own reading has ended: what the peer's engine sends first is for ours.
        await stream.write(encode(Opened(seal=keys)))
        await stream.sent()

    said = secret + keys[KEY_BYTES:] + keys[:KEY_BYTES]
    await hand_over(line, stream, said, before=answer, given=on_connected)


async def _refuse(stream: Stream, code: str, message: str) -> None:
    try:
        await stream.write(encode(OpenFailed(code, message)))
        await stream.write_eof()
    except (MeshError, EOFError):
        stream.abort()
