"""HTTP to the engine of one layout, over whatever carries bytes there.

The connections of one epoch are kept for the next request (a lane stream costs a round trip to open), and dropped
with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from mesh.errors import MeshError, TransportError
from mesh.proxy.events import Loss
from mesh.proxy.http11 import Headers, Http11, Http11Error
from mesh.transport.lane import Sink, Stream
from mesh.wire.facts import Epoch, NodeId

IDLE_S = 3.0
"""llama-server closes an idle connection after 5 s; going first spares a request the race."""
MAX_IDLE = 8
OPEN_S = 10.0


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

    def __init__(self, upstream: Upstream, connection: Http11) -> None:
        self.status = connection.status
        self.headers = connection.headers
        self._upstream = upstream
        self._connection = connection

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, freed of its transfer coding.

        Raises:
            UpstreamLost: it broke off before its end.
        """
        try:
            while part := await self._connection.read():
                yield part
        except Http11Error as error:
            raise UpstreamLost(Loss.BROKEN, f"the engine's answer broke off: {error}") from error

    def pass_to(self, taker: Sink | None) -> None:
        """See :meth:`Http11.pass_to`: for whoever is in :meth:`parts` now."""
        self._connection.pass_to(taker)

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.pass_to(None)
        self._upstream.give_back(self._connection)


class Upstream:
    """Asks the engine behind one :class:`Route`."""

    def __init__(self, route: Route, *, idle_s: float = IDLE_S, open_s: float = OPEN_S) -> None:
        self.route = route
        self._idle_s = idle_s
        self._open_s = open_s
        self._idle: dict[Http11, asyncio.TimerHandle] = {}
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
        stale: UpstreamLost | None = None
        while (connection := self._take_idle()) is not None:
            try:
                return await self._ask(connection, method, target, own, body)
            except UpstreamLost as error:
                # A kept connection may have died unnoticed: what a fresh one meets decides.
                stale = error
        try:
            connection = await self._connect()
        except UpstreamLost as error:
            raise stale or error from error
        return await self._ask(connection, method, target, own, body)

    async def _ask(
        self, connection: Http11, method: str, target: bytes, headers: Headers, body: Sequence[bytes]
    ) -> Answer:
        try:
            await connection.ask(method, target, headers, body)
        except BaseException as error:
            connection.abort()
            if isinstance(error, Http11Error):
                raise UpstreamLost(Loss.BROKEN, f"the engine gave no answer: {error}") from error
            raise
        return Answer(self, connection)

    async def _connect(self) -> Http11:
        try:
            async with asyncio.timeout(self._open_s):
                return Http11(await self.route.open())
        except TimeoutError as error:
            raise UpstreamLost(Loss.UNREACHED, f"no way to the engine within {self._open_s:.0f} s") from error
        except (MeshError, OSError, EOFError) as error:
            message = error.message if isinstance(error, MeshError) else str(error)
            raise UpstreamLost(Loss.UNREACHED, message) from error

    def give_back(self, connection: Http11) -> None:
        """Keep an idle connection for the next request, for a while."""
        if connection.is_idle and not self._retired and len(self._idle) < MAX_IDLE:
            loop = asyncio.get_running_loop()
            self._idle[connection] = loop.call_later(self._idle_s, self._forget, connection)
        else:
            self._forget(connection)

    def retire(self) -> None:
        """No more requests; those under way may finish."""
        self._retired = True
        for connection in list(self._idle):
            self._forget(connection)

    def _take_idle(self) -> Http11 | None:
        while self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
            if connection.is_idle:
                return connection
            self._forget(connection)
        return None

    def _forget(self, connection: Http11) -> None:
        timer = self._idle.pop(connection, None)
        if timer is not None:
            timer.cancel()
        connection.abort()
