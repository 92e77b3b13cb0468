"""An answer that comes whole, after the engine has told, all along, which tokens it is made of. Pure.

On the way from the engine it is an event stream: traces (see :mod:`mesh.proxy.transcript`) with nothing but comments
behind them, and one event whose name is the status and whose data is the body.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mesh.proxy.transcript import Portion, Transcript

_MARK = b"x-mesh-whole"
_OF_THE_STREAM = frozenset({_MARK, b"content-type", b"content-length", b"cache-control"})
_HEAD = re.compile(rb"[:\n]*event: ([1-5][0-9][0-9])\ndata: ")
_MAX_HEAD_BYTES = 64 << 10
"""Of comments in one piece of the stream; far more than a millisecond's worth of words."""


def is_told(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether an answer with these headers comes this way."""
    return any(name.lower() == _MARK for name, _ in headers)


def headers_of(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Those of the answer itself, but for its length."""
    kept = [(name, value) for name, value in headers if name.lower() not in _OF_THE_STREAM]
    return [*kept, (b"content-type", b"application/json; charset=utf-8")]


class ToldAnswer:
    """Takes such a stream apart: tokens go to the transcript, the body to whoever feeds it.

    Attributes:
        status: of the answer, once its first byte is here.
    """

    def __init__(self, transcript: Transcript) -> None:
        self.status: int | None = None
        self._transcript = transcript
        self._head = b""
        self._tail = b""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """What ``data`` brings of the body, and how many more tokens are on record.

        Raises:
            ValueError: no engine of ours says that.
        """
        portion = self._transcript.feed(data)
        fresh = self._transcript.deliver(Portion(traced=portion.traced))
        return self._body(portion.data), fresh

    def finish(self) -> bytes:
        """What remains of the body when the stream has ended in good order.

        Raises:
            ValueError: it ended before the answer.
        """
        rest = self._body(self._transcript.finish())
        if self.status is None:
            raise ValueError("it ended before the answer")
        return rest

    def _body(self, data: bytes) -> bytes:
        data = self._tail + self._within(data)
        body = data.rstrip(b"\n")  # a body has no line breaks; those at its end are the event's
        self._tail = data[len(body) :]
        return body

    def _within(self, data: bytes) -> bytes:
        if self.status is not None:
            return data
        self._head += data
        if not self._head.strip(b":\n"):
            self._head = b""
            return b""
        found = _HEAD.match(self._head)
        if found is None:
            if len(self._head) > _MAX_HEAD_BYTES:
                raise ValueError("it is no answer")
            return b""
        self.status = int(found[1])
        return self._head[found.end() :]
