"""Parts of a chunked body straight to the client's socket: what is done for every token.

Through ASGI each part is a coroutine, two dictionaries and a state machine; a host with one core takes what that costs
from the engine itself. Where the server is not the uvicorn we know there is no such way, and ASGI's is taken.
"""

from __future__ import annotations

from starlette.types import Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle


class Straight:
    """Of one response. What it relies on in uvicorn is pinned by ``tests/net/test_proxy_straight.py``."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_free(self) -> bool:
        """The head is out, the body is chunked and has not ended, and the client takes what comes."""
        cycle = self._cycle
        begun = cycle.response_started and not cycle.response_complete
        return begun and not cycle.disconnected and not cycle.flow.write_paused and not cycle.transport.is_closing()

    def write(self, data: bytes) -> None:
        """Some bytes, while :attr:`is_free`."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def straight(send: Send) -> Straight | None:
    """The way past ``send``, for a body whose head says no length; None where there is none."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.scope["method"] == "HEAD":
        return None
    # To an older client h11 writes a body without chunks.
    return Straight(cycle) if cycle.conn.their_http_version == b"1.1" else None
