"""What a lane gives: connections to a peer whose key is known, and streams of bytes with flow control.

The QUIC lane (:mod:`mesh.transport.endpoint`) is one; a TCP/TLS lane has the same face. Rooms further right know these
protocols only, and tests put an in-memory pair in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

from mesh.wire.facts import NodeId

Path = Literal["quic", "tcp", "relay"]
"""How a connection reaches its peer; shown in status."""
Sink = Callable[[bytes], bool]
"""Takes all of some bytes, or says False and has taken none of them. Never waits, never raises."""


class Stream(Protocol):
    """Bytes in order in both directions, each with a bounded amount in flight. Either side may end its half first."""

    @property
    def closed(self) -> bool:
        """Both halves are over, or the stream was reset, or its connection is gone."""
        ...

    async def read(self, limit: int = 65536) -> bytes:
        """Some bytes, at most ``limit``; ``b""`` once the peer has ended its half.

        Raises:
            TransportError: the stream was reset, or the connection is lost.
        """
        ...

    async def read_exactly(self, n: int) -> bytes:
        """``n`` bytes.

        Raises:
            EOFError: the peer's half ended first.
            TransportError: the stream was reset, or the connection is lost.
        """
        ...

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hand over ``data``; returns when all of it is on its way, waiting for the reader's credit if need be.

        One task writes at a time. A cancelled write may have sent a part: abort the stream then.

        Raises:
            TransportError: the stream was reset, our half has ended, or the connection is lost.
        """
        ...

    def write_now(self, data: bytes) -> bool:
        """Hand over all of ``data``, or nothing and return False, where :meth:`write` would wait or raise."""
        ...

    def pass_to(self, sink: Sink | None) -> None:
        """Offer what comes to ``sink`` first, at once and in order. What it does not take is there to be read."""
        ...

    async def write_eof(self) -> None:
        """End our half; the peer reads ``b""`` after what was written. Idempotent."""
        ...

    def abort(self, code: int = 0) -> None:
        """Reset both halves now: pending reads and writes on either side raise. Harmless when already closed."""
        ...


class Connection(Protocol):
    """One lane to one peer. The peer proved its key in the handshake before anybody sees this object."""

    on_stream: Callable[[Stream], None]
    """Called for each stream the peer opens. Set it before the first ``await`` after receiving the connection."""
    on_close: Callable[[str], None]
    """Called once, with the reason, when the connection is over for whatever cause (``close`` included)."""
    on_datagram: Callable[[bytes], None]
    """Called for each datagram of the peer. They are dropped until it is set."""
    on_path: Callable[[], None]
    """Called when the peer is reached in another way than before: ``address`` or ``path`` changed."""

    @property
    def peer(self) -> NodeId: ...
    @property
    def peer_key(self) -> bytes:
        """Raw Ed25519 public key, 32 bytes."""
        ...

    @property
    def address(self) -> str:
        """Where the peer is now, ``host:port``; ``relay:ID`` when it is reached through the member with that id."""
        ...

    @property
    def path(self) -> Path: ...
    @property
    def dialed(self) -> bool:
        """True on the side that called ``dial``."""
        ...

    @property
    def rtt_ms(self) -> float | None:
        """Smoothed round trip, or None before the first measurement."""
        ...

    @property
    def last_heard(self) -> float:
        """``clock.now()`` of the last authenticated packet."""
        ...

    @property
    def closed(self) -> bool: ...

    async def open_stream(self) -> Stream:
        """A new stream; waits while the peer allows no more of them at once (128 on the QUIC lane).

        Raises:
            TransportError: the connection is closed.
        """
        ...

    def send_datagram(self, data: bytes) -> bool:
        """Send ``data``, at most 1202 bytes, once, unordered. False: it was dropped, as others may be on their way."""
        ...

    def move(self, onto: Connection) -> None:
        """Go on over the path of ``onto``, another connection to the same peer; streams do not notice."""
        ...

    def widen(self) -> None:
        """The peer was admitted: let it have as much on the way as a member may. Strangers get little."""
        ...

    def close(self, code: int = 0, reason: str = "") -> None:
        """End the connection and all its streams. Idempotent, never blocks."""
        ...


class Detour(Protocol):
    """A way to one peer through a member, for the datagrams of a connection from end to end."""

    @property
    def address(self) -> str:
        """``relay:`` and the member's id."""
        ...

    def send(self, datagrams: Iterable[tuple[bytes, Any]]) -> None:
        """Send each once, at most 1200 bytes long; what cannot be sent is lost."""
        ...


class Lane(Protocol):
    """A way to listen and dial."""

    is_known: Callable[[str], bool]
    """Does a member live at this host, by its literal address? Such are let in however many strangers knock."""

    async def start(self, bind: Sequence[tuple[str, int]]) -> list[str]:
        """Listen on each ``(host, port)``; port 0 asks for any. Returns the addresses really bound.

        Raises:
            TransportError: a port is taken or an address is not ours; nothing is left open then.
        """
        ...

    async def dial(self, address: str, *, expect: NodeId | None, timeout: float = 5.0) -> Connection:
        """Reach ``address`` and check that the key of ``expect`` answers, before anything else is sent.

        Raises:
            TransportError: no answer, or not a mesh node.
            AdmissionError: another key than expected answered (code ``wrong-key``).
        """
        ...

    async def dial_over(self, detour: Detour, *, expect: NodeId, timeout: float = 5.0) -> Connection:
        """As :meth:`dial`, through a member."""
        ...

    def receive_over(self, detour: Detour, data: bytes) -> None:
        """A datagram came through a member: it is dealt with as if it had come to a socket."""
        ...

    async def close(self) -> None:
        """Close every connection, tell the peers, and free the sockets."""
        ...
