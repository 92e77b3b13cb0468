"""One QUIC connection to one peer: events in, datagrams and timers out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aioquic.quic import events

from mesh.clock import Clock
from mesh.errors import AdmissionError, MeshError, TransportError
from mesh.identity.key import node_id
from mesh.transport.address import join_address
from mesh.transport.lane import Connection, Detour, Path, Stream
from mesh.transport.quic import MIN_DATAGRAM, PinnedQuic
from mesh.transport.router import Router
from mesh.transport.stream import SEND_BUFFER, QuicStream
from mesh.transport.udp import Addr, UdpSocket
from mesh.wire.facts import NodeId

log = logging.getLogger(__name__)

BAD_PEER = 0x100
"""Application close code: the key the peer showed is not acceptable."""
_MAX_REASON = 256


class PeerConnection:
    """See :class:`mesh.transport.lane.Connection`."""

    def __init__(
        self,
        quic: PinnedQuic,
        socket: UdpSocket | Detour,
        clock: Clock,
        router: Router,
        *,
        dialed: bool,
        expect: NodeId | None,
    ) -> None:
        self.quic = quic
        self.socket = socket
        """Where datagrams to addresses go; those to a :class:`Detour` take that."""
        self.dialed = dialed
        self.peer: NodeId = expect or ""
        self.peer_key = b""
        self.last_heard = clock.now()
        self.closed = False
        self.established = False
        self.failure: MeshError | None = None
        """Why a handshake came to nothing."""
        self.waiting_writers: set[QuicStream] = set()
        self._expect = expect
        self._clock = clock
        self._router = router
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, QuicStream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._transmit_soon: asyncio.Handle | None = None
        self._gone = False
        self._reason = ""
        self._on_stream: Callable[[Stream], None] | None = None
        self._on_close: Callable[[str], None] | None = None
        self._early_streams: list[QuicStream] = []
        self._openers: list[asyncio.Future[None]] = []
        self._close_told = False
        self.on_datagram: Callable[[bytes], None] = lambda data: None
        self.on_path: Callable[[], None] = lambda: None
        if not isinstance(socket, UdpSocket):
            quic.fit(MIN_DATAGRAM)

    def __repr__(self) -> str:
        return f"<connection {'to' if self.dialed else 'from'} {self.peer or '?'} at {self.address}>"

    # -- the lane's face ---------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        addr: Addr | Detour | None = self.quic.get_peer_address()
        if addr is None:
            return ""
        return join_address(addr[0], addr[1]) if isinstance(addr, tuple) else addr.address

    @property
    def path(self) -> Path:
        return "quic" if isinstance(self.quic.get_peer_address(), tuple) else "relay"

    @property
    def rtt_ms(self) -> float | None:
        return self.quic.rtt_ms

    @property
    def on_stream(self) -> Callable[[Stream], None]:
        return self._on_stream or (lambda stream: None)

    @on_stream.setter
    def on_stream(self, handler: Callable[[Stream], None]) -> None:
        self._on_stream = handler
        early, self._early_streams = self._early_streams, []
        for stream in early:
            handler(stream)

    @property
    def on_close(self) -> Callable[[str], None]:
        return self._on_close or (lambda reason: None)

    @on_close.setter
    def on_close(self, handler: Callable[[str], None]) -> None:
        self._on_close = handler
        if self.closed:
            self._loop.call_soon(self._tell_close)

    async def open_stream(self) -> QuicStream:
        while not self.closed and not self.quic.may_open_stream():
            turn = self._loop.create_future()
            self._openers.append(turn)
            await turn
        if self.closed:
            raise TransportError(f"the connection to {self.peer} is closed: {self._reason}", code="closed")
        stream_id = self.quic.reserve_stream()
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        self.consume(stream_id, 0)
        return stream

    def close(self, code: int = 0, reason: str = "") -> None:
        if self.closed:
            return
        # What was written goes first: once closing, QUIC sends no stream data, and a last word would never be heard.
        self.transmit()
        self.quic.close(error_code=code, reason_phrase=reason[:_MAX_REASON])
        self.transmit()
        self._finish(reason or "closed on this side")

    def send_datagram(self, data: bytes) -> bool:
        if self.closed or not self.established or not self.quic.may_send_datagram(len(data)):
            return False
        self.quic.send_datagram_frame(data)
        self._schedule()
        return True

    def move(self, onto: Connection) -> None:
        if not isinstance(onto, PeerConnection) or onto.peer_key != self.peer_key or self.closed:
            return
        self.socket = onto.socket
        self.quic.move(onto.quic.get_peer_address())
        self._path_changed()
        self._schedule()

    def widen(self) -> None:
        """The peer was admitted: let it send as much at once as a member may."""
        self.quic.widen()
        self._measure_path()
        self._schedule()

    # -- called by streams -------------------------------------------------------------------------------------------

    def send(self, stream_id: int, data: bytes | memoryview, *, end: bool = False) -> None:
        self.quic.send_stream_data(stream_id, bytes(data), end_stream=end)
        self._schedule()

    def unsent(self, stream_id: int) -> int:
        return self.quic.unsent(stream_id)

    def consume(self, stream_id: int, count: int) -> None:
        if not self.closed and self.quic.consume(stream_id, count):
            self._schedule()

    def abort_stream(self, stream_id: int, code: int) -> None:
        if not self.closed:
            self.quic.abort_stream(stream_id, code)
            self._schedule()

    def stream_changed(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and stream.done:
            del self._streams[stream_id]

    # -- called by the endpoint --------------------------------------------------------------------------------------

    def receive(self, data: bytes, addr: Addr | Detour, now: float) -> bool:
        """One datagram; call :meth:`process` after a batch of them. Returns whether it was the peer's own."""
        quic = self.quic
        before = quic.get_peer_address()
        quic.receive_from(data, addr, now)
        if not quic.heard:
            return False
        quic.heard = False
        self.last_heard = self._clock.now()
        if before is not None and quic.get_peer_address() != before:
            self._path_changed()
        return True

    @property
    def is_blank(self) -> bool:
        """Not one packet of the peer has passed authentication."""
        return not self.quic.ever_heard

    def process(self) -> None:
        """Act on what was received or timed out, and send what there is to send."""
        quic = self.quic
        for event in quic.happened():
            self._handle(event)
        if not self.closed:
            reason = quic.close_reason
            if reason is not None:
                self._finish(reason)
            else:
                if self.waiting_writers:
                    self._wake_writers()
                if self._openers and self.quic.may_open_stream():
                    self._wake_openers()
        if not self._gone:
            self.transmit()

    def transmit(self) -> None:
        """Send what QUIC wants sent now, and set its next timer."""
        if self._transmit_soon is not None:
            self._transmit_soon.cancel()
            self._transmit_soon = None
        now = self._loop.time()
        datagrams = self.quic.datagrams_to_send(now)
        if datagrams:
            addr = datagrams[0][1]
            (self.socket if isinstance(addr, tuple) else addr).send(datagrams)
        self._arm()

    def abandon(self, failure: MeshError) -> None:
        """Give up a handshake."""
        if self.failure is None:
            self.failure = failure
        self.close(0, failure.message)

    # -- within ------------------------------------------------------------------------------------------------------

    def _path_changed(self) -> None:
        self._measure_path()
        if self.established and not self.closed:
            self._loop.call_soon(self.on_path)

    def _measure_path(self) -> None:
        if self.path == "quic":
            self.quic.find_mtu()
        else:
            self.quic.fit(MIN_DATAGRAM)

    def _schedule(self) -> None:
        if self._transmit_soon is None and not self._gone:
            self._transmit_soon = self._loop.call_soon(self._transmit_now)

    def _transmit_now(self) -> None:
        self._transmit_soon = None
        if not self._gone:
            self.transmit()

    def _arm(self) -> None:
        at = self.quic.get_timer()
        if at is None:
            return
        timer = self._timer
        # A timer that fires too early costs one look; one cancelled and set for each packet costs more.
        # Not ``timer.when()``: other event loops give timers that are due at once no such method.
        if timer is None or self._timer_at > at:
            if timer is not None:
                timer.cancel()
            self._timer, self._timer_at = self._loop.call_at(at, self._timed_out), at

    def _timed_out(self) -> None:
        self._timer = None
        if self._gone:
            return
        at = self.quic.get_timer()
        now = self._loop.time()
        if at is not None and at <= now:
            self.quic.handle_timer(now)
            self.process()
        else:
            self._arm()

    def _wake_writers(self) -> None:
        for stream in list(self.waiting_writers):
            if self.quic.unsent(stream.id) <= SEND_BUFFER // 2:
                stream.room_again()

    def _wake_openers(self) -> None:
        openers, self._openers = self._openers, []
        for turn in openers:  # each looks again whether there is room for it
            if not turn.done():
                turn.set_result(None)

    def _handle(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived):
            stream = self._stream_for(event.stream_id)
            if stream is None:
                self.quic.consume(event.stream_id, len(event.data))
                return
            stream.feed(event.data, end=event.end_stream)
            self._settle(event.stream_id, stream)
        elif isinstance(event, events.StreamReset):
            stream = self._stream_for(event.stream_id)
            if stream is not None:
                stream.reset_by_peer(event.error_code)
                self._settle(event.stream_id, stream)
        elif isinstance(event, events.StopSendingReceived):
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream.stopped_by_peer(event.error_code)
                self._settle(event.stream_id, stream)
        elif isinstance(event, events.DatagramFrameReceived):
            if self.established and not self.closed:
                self.on_datagram(event.data)
        elif isinstance(event, events.HandshakeCompleted):
            self._handshake_done()
        elif isinstance(event, events.ConnectionIdIssued):
            self._router.learn_cid(event.connection_id, self)
        elif isinstance(event, events.ConnectionIdRetired):
            self._router.forget_cid(event.connection_id)
        elif isinstance(event, events.ConnectionTerminated):
            self._finish(event.reason_phrase or f"closed with code {event.error_code:#x}")
            self._depart()

    def _settle(self, stream_id: int, stream: QuicStream) -> None:
        if stream.peer_done:
            self.quic.forget_stream(stream_id, stream.delivered)
            self.stream_changed(stream_id)

    def _stream_for(self, stream_id: int) -> QuicStream | None:
        """The stream, made known to ``on_stream`` when it is the peer's and new."""
        stream = self._streams.get(stream_id)
        ours = (stream_id & 1) == (0 if self.dialed else 1)
        if stream is not None or ours or self.closed or not self.established:
            return stream
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        self.quic.consume(stream_id, 0)
        if self._on_stream is None:
            self._early_streams.append(stream)
        else:
            self._on_stream(stream)
        return stream

    def _handshake_done(self) -> None:
        key = self.quic.peer_public_key()
        if key is None:
            self.failure = AdmissionError(
                f"{self.address} showed no Ed25519 certificate: it is not a mesh node", code="no-key"
            )
        elif self._expect is not None and node_id(key) != self._expect:
            self.failure = AdmissionError(
                f"{self.address} is node {node_id(key)}, not {self._expect}",
                remedy="another machine has this address now, or somebody stands in between: ask for a new invite",
                code="wrong-key",
            )
        if self.failure is not None or key is None:
            # Nothing of ours has left yet but the handshake's first flight.
            self.quic.close(error_code=BAD_PEER, reason_phrase="this key is not expected here")
            return
        self.peer_key, self.peer = key, node_id(key)
        self.established = True
        self._router.ready(self)

    def _finish(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._reason = reason
        if not self.established and self.failure is None:
            self.failure = TransportError(f"{self.address} did not complete the handshake: {reason}", code="handshake")
        for stream in list(self._streams.values()):
            stream.lose(f"the connection to {self.peer} is closed: {reason}")
        self._streams.clear()
        self.waiting_writers.clear()
        self._wake_openers()
        self._loop.call_soon(self._tell_close)
        if not self.established:
            self._router.ready(self)

    def _tell_close(self) -> None:
        if self._on_close is not None and not self._close_told:
            self._close_told = True
            self._on_close(self._reason)

    def _depart(self) -> None:
        if not self._gone:
            self._gone = True
            for handle in (self._timer, self._transmit_soon):
                if handle is not None:
                    handle.cancel()
            self._timer = self._transmit_soon = None
            self._router.gone(self)

    def drop(self) -> None:
        """The endpoint closes its sockets: leave without waiting for the draining period."""
        self._finish("this node is shutting down")
        self._depart()
