"""One admitted connection: control messages out through a bounded queue and in one by one, bulk streams beside them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from mesh.errors import AdmissionError, MeshError, TransportError, WireError
from mesh.transport.lane import Connection, Path, Stream
from mesh.wire.codec import MAX_OPEN_FRAME, control_decoder, encode, open_decoder, open_reply_decoder, read_frame
from mesh.wire.facts import NodeFacts, NodeId, Role
from mesh.wire.messages import Control, Open, OpenControl, Opened, OpenFailed

log = logging.getLogger(__name__)

MAX_QUEUED = 8 * 1024 * 1024
"""Bytes of control messages that wait for one peer; a peer that lets more pile up is as good as gone."""
OPEN_WITHIN_S = 5.0
FLUSH_WITHIN_S = 0.5
MAX_OPENING = 64
"""Streams whose first frame has not come yet."""


class Link:
    """A member we are connected to."""

    def __init__(
        self,
        connection: Connection,
        control: Stream,
        facts: NodeFacts,
        role: Role,
        *,
        since: float,
        on_message: Callable[[Link, Control], None],
        on_bulk: Callable[[NodeId, Open, Stream], None],
        on_broken: Callable[[Link, str], None],
    ) -> None:
        self.connection = connection
        self.peer: NodeId = connection.peer
        self.facts = facts
        """As they were in the Hello; changes travel as ``Facts``."""
        self.role = role
        self.since = since
        self.path: Path = connection.path
        """How bulk streams that are opened now reach the peer."""
        self._control = control
        self._on_message = on_message
        self._on_bulk = on_bulk
        self._on_broken = on_broken
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening = 0
        self._over = False
        self._lost: str | None = None
        self._heard_all = False

    def __repr__(self) -> str:
        return f"<link to {self.peer}>"

    @property
    def address(self) -> str:
        return self.connection.address

    @property
    def rtt_ms(self) -> float | None:
        return self.connection.rtt_ms

    @property
    def last_heard(self) -> float:
        """``clock.now()`` of the last packet that can only be the peer's."""
        return self.connection.last_heard

    def start(self) -> None:
        """Begin to carry messages."""
        self.connection.on_stream = self.take_stream
        self._spawn(self._read())
        self._spawn(self._write())

    def send(self, message: Control) -> None:
        """Queue ``message``; never blocks."""
        if self._over:
            return
        frame = encode(message)
        self._queued += len(frame)
        if self._queued > MAX_QUEUED:
            self._break(f"{self._queued} bytes of control messages are waiting: the peer takes none")
            return
        self._queue.append(frame)
        self._idle.clear()
        self._more.set()

    async def flushed(self) -> None:
        """Everything queued so far was handed to the transport."""
        await self._idle.wait()

    async def open_bulk(
        self,
        request: Open,
        timeout: float,
        *,
        begun: Stream | None = None,
        heard: Callable[[Opened], None] = lambda opened: None,
    ) -> Stream:
        """Open a stream for ``request``.

        Args:
            begun: one over another lane, on which ``request`` has been said; None: open one on the connection.
            heard: told the answer.

        Raises:
            AdmissionError: the peer refused, with its code and message.
            TransportError: the connection broke, or no answer came in time.
        """
        stream = begun
        try:
            async with asyncio.timeout(timeout):
                if stream is None:
                    stream = await self.connection.open_stream()
                    await stream.write(encode(request))
                reply = await read_frame(stream, open_reply_decoder, MAX_OPEN_FRAME)
        except (TimeoutError, EOFError, MeshError, asyncio.CancelledError) as error:
            if stream is not None:
                stream.abort()
            if isinstance(error, TimeoutError):
                raise TransportError(
                    f"node {self.peer} did not answer within {timeout:g} s", code="no-answer"
                ) from error
            if isinstance(error, EOFError):
                raise TransportError(f"node {self.peer} closed the stream without an answer") from error
            raise
        if isinstance(reply, OpenFailed):
            stream.abort()
            raise AdmissionError(reply.message, code=reply.code)
        heard(reply)
        return stream

    def take_stream(self, stream: Stream) -> None:
        """The peer opened ``stream``: hear what for."""
        if self._over or self._opening >= MAX_OPENING:
            stream.abort()
            return
        self._opening += 1
        self._spawn(self._receive_bulk(stream))

    def connection_closed(self, reason: str) -> None:
        """Nothing more will come. What has come is still heard: the last of it may be a good-bye."""
        self._lost = reason
        self._end_when_heard()

    def stop(self) -> None:
        """Carry nothing more. Does not close the connection."""
        self._over = True
        for task in self._tasks:
            task.cancel()

    # -- within ------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _break(self, reason: str) -> None:
        if not self._over:
            self.stop()
            self._on_broken(self, reason)

    def _end_when_heard(self) -> None:
        if self._heard_all and self._lost is not None:
            self._break(self._lost)

    async def _read(self) -> None:
        try:
            while not self._over:
                message = await read_frame(self._control, control_decoder)
                self._on_message(self, message)
        except EOFError:
            self._break("the peer ended the control stream")
        except MeshError as error:
            if not self.connection.closed:
                self._break(error.message)
            self._heard_all = True
            self._end_when_heard()
        except Exception:
            log.exception("a message of %s could not be dealt with", self.peer)
            self._break("internal error")

    async def _write(self) -> None:
        try:
            while not self._over:
                if not self._queue:
                    self._idle.set()
                    self._more.clear()
                    await self._more.wait()
                frames = b"".join(self._queue)
                self._queue.clear()
                await self._control.write(frames)
                self._queued -= len(frames)
        except MeshError as error:
            if not self.connection.closed:  # else the reader says so, once it has heard everything
                self._break(error.message)

    async def _receive_bulk(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                request = await read_frame(stream, open_decoder, MAX_OPEN_FRAME)
            if isinstance(request, OpenControl):
                raise WireError("there is a control stream already")
        except (TimeoutError, EOFError, MeshError):
            stream.abort()
            return
        except asyncio.CancelledError:
            stream.abort()
            raise
        finally:
            self._opening -= 1
        self._on_bulk(self.peer, request, stream)


async def flush(*links: Link) -> None:
    """Wait a moment for last words to leave, before the links are closed on purpose."""
    try:
        async with asyncio.timeout(FLUSH_WITHIN_S):
            await asyncio.gather(*(link.flushed() for link in links))
    except TimeoutError:
        pass
