"""One HTTP/1.1 connection to an engine, as its client, over a stream of the mesh.

Between an engine's token and its client lies one call of a parser in C and one join: a host with one core takes what
that costs from the engine itself.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import httptools

from mesh.errors import MeshError
from mesh.transport.lane import Sink, Stream

Headers = Sequence[tuple[bytes, bytes]]

MAX_HEAD_BYTES = 64 << 10
"""Of an answer; whoever hosts may say anything."""
_READ_BYTES = 256 << 10
_PIECE_BYTES = 64 << 10
_COALESCE_BYTES = 16 << 10
_BREAKS = re.compile(rb"[\r\n\0]")
_TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_NO_BODY = frozenset({204, 304})


class Http11Error(Exception):
    """The connection is of no more use: it broke, or what came was not an answer."""


class Http11:
    """Asks one thing at a time: :meth:`ask`, then :meth:`read` to the end; as often as :attr:`is_idle` is true again.

    Attributes:
        status, headers: of the newest answer.
    """

    def __init__(self, stream: Stream) -> None:
        self.status = 0
        self.headers: Headers = ()
        self._stream = stream
        self._parser = httptools.HttpResponseParser(self)
        self._fields: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._has_head = self._is_whole = False
        self._is_idle, self._may_go_on, self._ends_with_stream = True, True, False
        self._bare = False
        """Headers are all that comes: the answer to HEAD."""
        self._taker: Sink | None = None
        self._waits = False
        """Somebody is waiting for more of the stream."""
        self._ahead = 0
        """Bytes at the front of the stream that the parser has had."""
        self._broken: Http11Error | None = None

    @property
    def is_idle(self) -> bool:
        """The last answer is whole, and the engine is ready for another question."""
        return self._is_idle and not self._stream.closed

    async def ask(self, method: str, target: bytes, headers: Headers, body: Sequence[bytes] = ()) -> None:
        """Send a request and wait for the head of its answer.

        Args:
            body: in pieces of any size. What ``headers`` say of its length must be true.

        Raises:
            Http11Error: none came.
        """
        self._is_idle = self._has_head = self._is_whole = False
        self._bare, self._head_bytes = method == "HEAD", 0
        head = _head(method.encode("ascii"), target, headers)
        try:
            with contextlib.suppress(MeshError, OSError):  # it may have been refused half-way, and the answer says why
                await self._write(head, body)
            while not self._has_head:
                await self._more()
        except (MeshError, OSError) as error:
            raise Http11Error(str(error)) from error

    async def read(self) -> bytes:
        """More of the body, freed of its transfer coding; ``b""`` at its end.

        Raises:
            Http11Error: it broke off before its end.
        """
        try:
            while not self._body and not self._is_whole:
                await self._more()
        except (MeshError, OSError) as error:
            raise Http11Error(str(error)) from error
        if not self._body:
            self._is_idle = self._may_go_on
            return b""
        part = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        return part

    def pass_to(self, taker: Sink | None) -> None:
        """Offer parts of the body to ``taker`` first, at once and in order, while somebody waits in :meth:`read`.

        What it does not take is there to be read. A token then needs no task to be woken on its way to its client.
        """
        self._taker = taker
        self._stream.pass_to(None if taker is None else self._came)

    def abort(self) -> None:
        """Cut the connection."""
        self.pass_to(None)
        self._is_idle = False
        self._stream.abort()

    # -- within ------------------------------------------------------------------------------------------------------

    async def _write(self, head: bytes, body: Sequence[bytes]) -> None:
        """Head and small body leave together, as one packet."""
        if len(head) + sum(map(len, body)) <= _COALESCE_BYTES:
            await self._stream.write(b"".join((head, *body)))
            return
        await self._stream.write(head)
        for piece in _cut(body):
            await self._stream.write(piece)

    async def _more(self) -> None:
        self._waits = True
        try:
            data = await self._stream.read(_READ_BYTES)
        finally:
            self._waits = False
        if self._broken is not None:
            raise self._broken
        if not data:
            if self._has_head and self._ends_with_stream:
                self._is_whole = True
                return
            raise Http11Error("the engine closed the connection")
        parsed = min(self._ahead, len(data))
        self._ahead -= parsed
        if parsed < len(data):
            self._parse(data[parsed:])

    def _parse(self, data: bytes) -> None:
        if not self._has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise Http11Error(f"what came is no answer: {error}") from error
        if not self._has_head and self._head_bytes > MAX_HEAD_BYTES:
            raise Http11Error(f"the answer's head is over {MAX_HEAD_BYTES} bytes")

    def _came(self, data: bytes) -> bool:
        """The stream's sink. Once it has left something, it is not asked again before that was read."""
        taker = self._taker
        if taker is None or not self._waits or self._body or self._is_whole:
            return False
        try:
            self._parse(data)
        except Http11Error as error:
            self._broken = error
            return False
        if not self._is_whole:
            part = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            if not part or taker(part):
                self._body.clear()
                return True
        self._ahead = len(data)
        return False

    # what the parser calls

    def on_message_begin(self) -> None:
        if self._is_whole:  # nobody asked for a second answer
            self._may_go_on = False
        self._fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._is_whole or status < 200:
            return
        self.status, self.headers, self._has_head = status, self._fields, True
        named = {name.lower() for name, _ in self._fields}
        framed = bool(named & {b"content-length", b"transfer-encoding"}) or status in _NO_BODY
        self._ends_with_stream = not framed
        self._may_go_on = framed and not self._bare and self._parser.should_keep_alive()
        self._is_whole = self._bare

    def on_body(self, body: bytes) -> None:
        if not self._is_whole:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._has_head:
            self._is_whole = True


def _head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """Raises Http11Error: it would be read as something else."""
    if _TARGET.fullmatch(target) is None or any(_BREAKS.search(part) for header in headers for part in header):
        raise Http11Error("the request's head holds what no head may")
    lines = [b"%s %s HTTP/1.1" % (method, target), *(b"%s: %s" % header for header in headers), b"", b""]
    return b"\r\n".join(lines)


def _cut(body: Sequence[bytes]) -> Iterator[bytes]:
    for part in body:
        for start in range(0, len(part), _PIECE_BYTES):
            yield part[start : start + _PIECE_BYTES]
