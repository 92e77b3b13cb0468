"""HTTP to the engine of one layout, over whatever carries bytes there.

The connections of one epoch are kept for the next request (a lane stream costs a round trip to open), and dropped
with it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpcore

from mesh.errors import MeshError, TransportError
from mesh.proxy.events import Loss
from mesh.transport.lane import Stream
from mesh.wire.facts import Epoch, NodeId

Headers = Sequence[tuple[bytes, bytes]]

IDLE_S = 3.0
"""llama-server closes an idle connection after 5 s; going first spares a request the race."""
MAX_IDLE = 8
OPEN_S = 10.0
_PIECE_BYTES = 64 << 10
_COALESCE_BYTES = 16 << 10
_ORIGIN = httpcore.Origin(b"http", b"engine.mesh", 80)


@dataclass(frozen=True, slots=True)
class Route:
    """The way to the one engine that answers for an epoch.

    Args:
        host: whose machine it is on.
        api_key: opens it for members of the mesh.
        model_name: as ``/v1/models`` shows it.
        open: a fresh stream to its HTTP port; raises :class:`MeshError` when there is none to be had.
        fingerprint: of the model; a stream that began is continued by the very same one only.
    """

    epoch: Epoch
    host: NodeId
    api_key: str
    model_name: str
    open: Callable[[], Awaitable[Stream]]
    fingerprint: str = ""


class UpstreamLost(TransportError):  # noqa: N818 - an outcome the core knows how to meet
    """The engine, or the way to it, will say no more."""

    def __init__(self, loss: Loss, message: str) -> None:
        super().__init__(message)
        self.loss = loss


class Answer:
    """A response whose body is still on its way. Leave the context and the connection is kept, or cut if unfinished."""

    def __init__(self, upstream: Upstream, connection: httpcore.AsyncHTTP11Connection, raw: httpcore.Response) -> None:
        self.status: int = raw.status
        self.headers: Headers = raw.headers
        self._upstream = upstream
        self._connection = connection
        self._raw = raw

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, freed of its transfer coding.

        Raises:
            UpstreamLost: it broke off before its end.
        """
        try:
            async for part in self._raw.aiter_stream():
                yield part
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise UpstreamLost(Loss.BROKEN, f"the engine's answer broke off: {error}") from error

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._raw.aclose()
        finally:
            self._upstream.give_back(self._connection)


class Upstream:
    """Asks the engine behind one :class:`Route`."""

    def __init__(self, route: Route, *, idle_s: float = IDLE_S, open_s: float = OPEN_S) -> None:
        self.route = route
        self._idle_s = idle_s
        self._open_s = open_s
        self._idle: dict[httpcore.AsyncHTTP11Connection, asyncio.TimerHandle] = {}
        self._streams: dict[httpcore.AsyncHTTP11Connection, Stream] = {}
        self._retired = False

    async def ask(self, method: str, target: bytes, headers: Headers, body: Sequence[bytes] = ()) -> Answer:
        """Send one request and await the head of its answer.

        Args:
            headers: without the length of the body.
            body: in pieces of any size; () for a request that has none.

        Raises:
            UpstreamLost: no answer came.
        """
        own = [(b"Host", b"localhost"), *headers, (b"Authorization", b"Bearer " + self.route.api_key.encode())]
        if body:
            own.append((b"Content-Length", str(sum(map(len, body))).encode()))

        def request() -> httpcore.Request:
            url = httpcore.URL(scheme=b"http", host=b"engine.mesh", port=80, target=target)
            return httpcore.Request(method, url, headers=own, content=_pieces(body) if any(body) else None)

        stale: UpstreamLost | None = None
        while (connection := self._take_idle()) is not None:
            try:
                return await self._send(connection, request())
            except UpstreamLost as error:
                # A kept connection may have died unnoticed: what a fresh one meets decides.
                stale = error
        try:
            connection = await self._connect()
        except UpstreamLost as error:
            raise stale or error from error
        return await self._send(connection, request())

    async def _send(self, connection: httpcore.AsyncHTTP11Connection, request: httpcore.Request) -> Answer:
        try:
            raw = await connection.handle_async_request(request)
        except BaseException as error:
            self._forget(connection)
            if isinstance(error, (httpcore.NetworkError, httpcore.ProtocolError)):
                raise UpstreamLost(Loss.BROKEN, f"the engine gave no answer: {error}") from error
            raise
        return Answer(self, connection, raw)

    async def _connect(self) -> httpcore.AsyncHTTP11Connection:
        try:
            async with asyncio.timeout(self._open_s):
                stream = await self.route.open()
        except TimeoutError as error:
            raise UpstreamLost(Loss.UNREACHED, f"no way to the engine within {self._open_s:.0f} s") from error
        except (MeshError, OSError, EOFError) as error:
            message = error.message if isinstance(error, MeshError) else str(error)
            raise UpstreamLost(Loss.UNREACHED, message) from error
        connection = httpcore.AsyncHTTP11Connection(_ORIGIN, _NetworkStream(stream), keepalive_expiry=self._idle_s)
        self._streams[connection] = stream
        return connection

    def give_back(self, connection: httpcore.AsyncHTTP11Connection) -> None:
        """Keep an idle connection for the next request, for a while."""
        if connection.is_idle() and not self._retired and len(self._idle) < MAX_IDLE:
            loop = asyncio.get_running_loop()
            self._idle[connection] = loop.call_later(self._idle_s, self._forget, connection)
        else:
            self._forget(connection)

    def retire(self) -> None:
        """No more requests; those under way may finish."""
        self._retired = True
        for connection in list(self._idle):
            self._forget(connection)

    def _take_idle(self) -> httpcore.AsyncHTTP11Connection | None:
        while self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
            if not connection.has_expired():
                return connection
            self._forget(connection)
        return None

    def _forget(self, connection: httpcore.AsyncHTTP11Connection) -> None:
        timer = self._idle.pop(connection, None)
        if timer is not None:
            timer.cancel()
        stream = self._streams.pop(connection, None)
        if stream is not None:
            stream.abort()


class _NetworkStream(httpcore.AsyncNetworkStream):
    """A mesh stream as httpcore wants it. Head and small body leave together, as one packet."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._unsent = bytearray()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            await self._flush()
            return await self._stream.read(max_bytes)
        except (MeshError, OSError) as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if len(self._unsent) + len(buffer) <= _COALESCE_BYTES:
            self._unsent += buffer
            return
        try:
            await self._flush()
            await self._stream.write(buffer)
        except (MeshError, OSError) as error:
            raise httpcore.WriteError(str(error)) from error

    async def _flush(self) -> None:
        if self._unsent:
            data, self._unsent = self._unsent, bytearray()
            await self._stream.write(data)

    async def aclose(self) -> None:
        self._stream.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise NotImplementedError("the lane is encrypted already")

    def get_extra_info(self, info: str) -> Any:
        return self._stream.closed if info == "is_readable" else None


def _pieces(body: Sequence[bytes]) -> AsyncIterator[bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in _cut(body):
            yield piece

    return pieces()


def _cut(body: Sequence[bytes]) -> Iterator[bytes]:
    for part in body:
        for start in range(0, len(part), _PIECE_BYTES):
            yield part[start : start + _PIECE_BYTES]
