"""The client's side of one request, over ASGI: what was promised so far decides how the rest can be said."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import Enum

from starlette.types import Send

from mesh.proxy.dialect import COMMENT, Dialect
from mesh.proxy.failure import Failure
from mesh.proxy.http11 import Headers
from mesh.proxy.patience import within
from mesh.proxy.straight import Straight, straight

STALL_S = 60.0
"""A client that moves nothing for this long is gone: it would keep a slot of the engine from the others."""
_PIECE_BYTES = 256 << 10

# Connection-wide headers end with their connection. No CORS: pages of other origins are not to read answers. The
# engine's own name for itself and its length of the body are kept.
_NOT_PASSED_ON = frozenset(
    {
        b"connection",
        b"date",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"set-cookie",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):  # noqa: N818 - an outcome, not an error
    """Nobody reads the answer any more."""


class _Said(Enum):
    NOTHING = "nothing"
    EVENTS = "events"
    """An event stream was promised."""
    BYTES = "bytes"
    """A body of the engine's own kind and length was promised."""
    ALL = "all"


class Reply:
    """Says each thing once, in the only form that is still possible."""

    def __init__(self, send: Send, dialect: Dialect, *, stall_s: float) -> None:
        self._send = send
        self._dialect = dialect
        self._stall_s = stall_s
        self._said = _Said.NOTHING
        self._straight: Straight | None = None

    async def comfort(self) -> None:
        """A comment in the event stream, which begins with it if need be."""
        await self.begin_events(200, _STREAM_HEADERS)
        await self.write(COMMENT)

    async def begin_events(self, status: int, headers: Headers) -> None:
        """The head of an event stream, unless it was sent already."""
        if self._said is _Said.NOTHING:
            self._said = _Said.EVENTS
            head = without(headers, _NOT_PASSED_ON)
            await self._head(status, head)
            if not any(name.lower() == b"content-length" for name, _ in head):
                self._straight = straight(self._send)

    async def begin_bytes(self, status: int, headers: Headers) -> None:
        """The head of an answer too large to be held back until it is whole."""
        assert self._said is _Said.NOTHING
        self._said = _Said.BYTES
        await self._head(status, without(headers, _NOT_PASSED_ON))

    @property
    def is_free(self) -> bool:
        """A part of the event stream can be written at once, by :meth:`write_now`."""
        return self._straight is not None and self._said is _Said.EVENTS and self._straight.is_free

    def write_now(self, data: bytes) -> None:
        """Part of the event stream, while it :attr:`is_free`."""
        assert self._straight is not None
        self._straight.write(data)

    async def write(self, data: bytes) -> None:
        """Part of the body; returns when the client has room for more.

        Raises:
            ClientGone: it has had none for too long.
        """
        try:
            message = {"type": "http.response.body", "body": data, "more_body": True}
            await within(self._stall_s, self._send(message))
        except TimeoutError as error:
            raise ClientGone from error

    async def end(self, data: bytes = b"") -> None:
        if self._said is not _Said.ALL:
            self._said = _Said.ALL
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete answer."""
        if self._said is _Said.EVENTS:
            await self.end(self._dialect.answer_event(status, body))
        elif self._said is _Said.NOTHING:
            await self._head(status, without(headers, _NOT_PASSED_ON))
            for start in range(0, len(body), _PIECE_BYTES):
                await self.write(body[start : start + _PIECE_BYTES])
            await self.end()

    async def fail(self, failure: Failure, *, inside: bool = False) -> None:
        """End in an error. Half a body of the engine's own kind is left without its end, so that it looks cut.

        Args:
            inside: part of an event has gone out, which the error must not become part of.
        """
        if self._said is _Said.EVENTS:
            await self.end((b"\n\n" if inside else b"") + self._dialect.error_event(failure))
        elif self._said is _Said.NOTHING:
            body = json.dumps(self._dialect.error_body(failure), ensure_ascii=False).encode()
            await self._head(failure.status, failure_headers(failure, body))
            await self.end(body)

    async def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def failure_headers(failure: Failure, body: bytes) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    if failure.retry_after_s is not None:
        headers.append((b"retry-after", str(failure.retry_after_s).encode()))
    if failure.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def without(headers: Headers, names: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """``headers`` less ``names`` and everything of CORS."""
    refused = frozenset(names)
    kept = [(name, value) for name, value in headers if name.lower() not in refused]
    return [(name, value) for name, value in kept if not name.lower().startswith(b"access-control-")]
