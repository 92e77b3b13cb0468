"""QUIC with pinned keys: the only place that touches what aioquic does not promise.

aioquic's state machine is used as it is, with seven changes, each guarded by
``tests/net/test_transport_contract.py`` or ``test_transport_paths.py``:

- The server asks for a client certificate. aioquic verifies that the client holds the certificate's key, but accepts
  that there is none: :meth:`PinnedQuic.peer_public_key` is then None, and the caller must refuse.
- Ed25519 and X25519 only; no session tickets, so every connection proves its keys afresh.
- Receive windows follow what was *consumed*. aioquic's own grow with what was received, without end, so a peer could
  fill our memory while nobody reads.
- Congestion control of ours (:mod:`mesh.transport.congestion`).
- We learn at once that the peer closed; aioquic tells only after the draining period.
- Datagrams grow to what the path takes (:mod:`mesh.transport.pathmtu`).
- Either side may move: a client of aioquic takes nothing from an address it did not dial, but our listeners are laptops
  too (:meth:`PinnedQuic.receive_from`), and a connection goes on over a better path when there is one
  (:meth:`PinnedQuic.move`).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from typing import Any

from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import Limit, QuicConnection, QuicNetworkPath, QuicReceiveContext
from aioquic.quic.events import QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicFrameType, QuicPacketType, QuicProtocolVersion
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mesh.transport.congestion import NAME as CONGESTION
from mesh.transport.congestion import Pacer
from mesh.transport.pathmtu import PathMtu

# It warns about every malformed packet: any stranger could fill our log.
logging.getLogger("quic").setLevel(logging.ERROR)

ALPN = "mesh/1"
IDLE_TIMEOUT_S = 30.0
BASE_DATAGRAM = 1232
"""Bytes that any path between us takes: IPv6 in the 1280-byte MTU that tunnels and VPNs leave at worst. Where a path
takes more, that is found out (:mod:`mesh.transport.pathmtu`)."""
MIN_DATAGRAM = 1200
"""Bytes of the largest datagram inside another connection's: what QUIC asks of every path."""
BLACK_HOLE_TIMEOUTS = 3
"""Probe timeouts in a row after which large datagrams are taken to vanish: a route may have changed."""
ACK_DELAY = 0.1
"""Of a round trip: a bulk transfer is acknowledged ten times in each. aioquic does it every millisecond, which wakes
the other side as often, to send a packet or two."""
ACK_DELAYS_S = (0.001, 0.005)
CID_LENGTH = 8
MAX_FRAME_DATA = BASE_DATAGRAM - 16 - (1 + CID_LENGTH + 2) - 3
"""Bytes one DATAGRAM frame takes in a packet of its own: what is left by the tag, the packet's and the frame's header.
It is two more than :data:`MIN_DATAGRAM`, so a whole datagram and a channel number cross a relay in one piece."""
MAX_WAITING = 256
"""DATAGRAM frames that wait for the congestion window; what comes then is lost, as datagrams may be."""
STRANGER_WINDOW = 256 * 1024
"""Bytes a peer may have sent us unread, over all streams, before it is admitted."""
STREAM_WINDOW = 2 * 1024 * 1024
"""Bytes a member may have sent unread on one stream. 25 MB/s at 40 ms fill half of it."""
CONNECTION_WINDOW = 128 * STREAM_WINDOW
"""As many bytes as all streams may hold: readers that stall can never starve the control stream."""


def configure(certificate: x509.Certificate, key: Ed25519PrivateKey, *, is_client: bool) -> QuicConfiguration:
    """What both roles have in common. ``verify_mode`` is off because nobody signs our certificates: keys are pinned."""
    configuration = QuicConfiguration(
        alpn_protocols=[ALPN],
        is_client=is_client,
        idle_timeout=IDLE_TIMEOUT_S,
        max_data=STRANGER_WINDOW,
        max_stream_data=STRANGER_WINDOW,
        max_datagram_size=BASE_DATAGRAM,
        max_datagram_frame_size=BASE_DATAGRAM,
        connection_id_length=CID_LENGTH,
        congestion_control_algorithm=CONGESTION,
        verify_mode=ssl.CERT_NONE,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        cipher_suites=[tls.CipherSuite.AES_128_GCM_SHA256, tls.CipherSuite.CHACHA20_POLY1305_SHA256],
    )
    configuration.certificate = certificate
    configuration.private_key = key
    return configuration


class PinnedQuic(QuicConnection):
    """One QUIC connection, sans IO."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        *,
        original_destination_cid: bytes | None = None,
        retry_cid: bytes | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_cid,
            retry_source_connection_id=retry_cid,
        )
        self.heard = False
        """Set when a packet passed authentication; the reader clears it."""
        self.ever_heard = False
        self._consumed = 0
        self._window = STRANGER_WINDOW
        self._stream_window = STRANGER_WINDOW
        self._stream_consumed: dict[int, int] = {}
        self._no_limit = Limit(QuicFrameType.MAX_DATA, "none", 1)
        self._local_max_streams_uni = Limit(QuicFrameType.MAX_STREAMS_UNI, "max_streams_uni", 0)
        self._mtu = PathMtu(BASE_DATAGRAM)
        self._loss._pacer = Pacer(max_datagram_size=BASE_DATAGRAM)

    # -- what the lane asks ------------------------------------------------------------------------------------------

    @property
    def close_reason(self) -> str | None:
        """Why the connection is ending, as soon as that is known; None while it lives."""
        event = self._close_event
        if event is None:
            return None
        return event.reason_phrase or f"closed with code {event.error_code:#x}"

    @property
    def close_code(self) -> int:
        """The peer's or our own code; meaningless while ``close_reason`` is None."""
        return 0 if self._close_event is None else int(self._close_event.error_code)

    @property
    def rtt_ms(self) -> float | None:
        return self._loss._rtt_smoothed * 1000 if self._loss._rtt_initialized else None

    def peer_public_key(self) -> bytes | None:
        """Raw Ed25519 key of the peer's certificate; None when it showed none, or one of another kind.

        Valid once the handshake is complete: only then is it known that the peer holds the key.
        """
        certificate = self.tls._peer_certificate
        if certificate is None:
            return None
        try:
            public = certificate.public_key()
        except (UnsupportedAlgorithm, ValueError):
            return None
        return public.public_bytes(Encoding.Raw, PublicFormat.Raw) if isinstance(public, Ed25519PublicKey) else None

    def happened(self) -> Iterator[QuicEvent]:
        """What happened; bytes of one stream that came in a row are one: whoever takes them writes each piece on."""
        event = self.next_event()
        while event is not None:
            following = self.next_event()
            if isinstance(event, StreamDataReceived):
                pieces = [event.data]
                while (
                    isinstance(following, StreamDataReceived)
                    and following.stream_id == event.stream_id
                    and not event.end_stream
                ):
                    pieces.append(following.data)
                    event, following = following, self.next_event()
                if len(pieces) > 1:
                    event = StreamDataReceived(b"".join(pieces), event.end_stream, event.stream_id)
            yield event
            event = following

    # -- paths -------------------------------------------------------------------------------------------------------

    def fit(self, largest: int) -> None:
        """Datagrams to the peer shall be at most so long from now on."""
        self._mtu.settle(largest)
        self._max_datagram_size = self._mtu.largest

    def find_mtu(self) -> None:
        """The path is another one, or new: see how long datagrams may be."""
        self._mtu.search()
        self._max_datagram_size = self._mtu.largest

    def move(self, addr: Any) -> None:
        """The peer is at ``addr``, and was proven to be: send everything there from now on."""
        paths = [path for path in self._network_paths if path.addr != addr]
        del paths[1:]  # what was before the last path is history
        self._network_paths = [QuicNetworkPath(addr, is_validated=True), *paths]

    def receive_from(self, data: bytes, addr: Any, now: float) -> None:
        """Take one datagram, also from where the peer was not before."""
        if not self._is_client or self._network_paths[0].addr == addr:
            self.receive_datagram(data, addr, now)
            return
        space = self._spaces.get(tls.Epoch.ONE_RTT)
        before = -1 if space is None else space.largest_received_packet
        self.receive_datagram(data, self._network_paths[0].addr, now)
        if self._handshake_confirmed and space is not None and space.largest_received_packet > before:
            self._follow(addr, len(data))

    def _follow(self, addr: Any, received: int) -> None:
        """The newest packet came from ``addr``: answer there, a little until it is proven that the peer hears it.

        As a server does whose client moved (RFC 9000, section 9.3). Without proof the last path is taken up again.
        """
        path = next((path for path in self._network_paths if path.addr == addr), None) or QuicNetworkPath(addr)
        path.bytes_received += received
        others = [other for other in self._network_paths if other is not path]
        self._network_paths = [path, *others[:2]]

    def may_send_datagram(self, size: int) -> bool:
        """Does the peer take DATAGRAM frames, and is there room for one more of ``size`` bytes?"""
        return (
            size <= MAX_FRAME_DATA
            and (self._remote_max_datagram_frame_size or 0) > size + 3
            and len(self._datagrams_pending) < MAX_WAITING
        )

    # -- streams -----------------------------------------------------------------------------------------------------

    def may_open_stream(self) -> bool:
        """Does the peer allow one more stream now? Touching one it does not allow ends the connection."""
        return self._local_next_stream_id_bidi // 4 < self._remote_max_streams_bidi

    def reserve_stream(self) -> int:
        """The id of a new bidirectional stream of ours; only while :meth:`may_open_stream`."""
        stream_id = self.get_next_available_stream_id()
        self.send_stream_data(stream_id, b"")
        return stream_id

    def unsent(self, stream_id: int) -> int:
        """Bytes written to the stream that the peer has not acknowledged."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.sender._buffer_stop - stream.sender._buffer_start

    def abort_stream(self, stream_id: int, code: int) -> None:
        """Reset our half and ask the peer to stop its own."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.sender.reset(code)
        if not stream.receiver.is_finished:
            stream.receiver.stop(code)

    def widen(self) -> None:
        """Give the peer a member's windows."""
        self._window, self._stream_window = CONNECTION_WINDOW, STREAM_WINDOW
        for stream_id in list(self._streams):
            self.consume(stream_id, 0)

    def consume(self, stream_id: int, count: int) -> bool:
        """``count`` bytes of the stream were read. Returns whether there is news to send to the peer."""
        self._consumed += count
        stream = self._streams.get(stream_id)
        news = False
        if stream is not None and not stream.receiver.is_finished:
            consumed = self._stream_consumed.get(stream_id, 0) + count
            self._stream_consumed[stream_id] = consumed
            limit = consumed + self._stream_window
            if limit - stream.max_stream_data_local >= self._stream_window // 2:
                stream.max_stream_data_local = limit
                news = True
        limit = self._consumed + self._window
        if limit - self._local_max_data.value >= self._window // 2:
            self._local_max_data.value = limit
            news = True
        return news

    def forget_stream(self, stream_id: int, delivered: int) -> None:
        """The peer's half is over after ``delivered`` bytes reached us; what was lost with a reset is read, too."""
        self._stream_consumed.pop(stream_id, None)
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._consumed += max(0, stream.receiver.highest_offset - delivered)

    # -- what is changed in aioquic ----------------------------------------------------------------------------------

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        self._ack_delay = min(max(self._loss._rtt_smoothed * ACK_DELAY, ACK_DELAYS_S[0]), ACK_DELAYS_S[1])
        datagrams = super().datagrams_to_send(now)
        path = self._network_paths[0]
        if self._handshake_confirmed and self._close_event is None and path.is_validated:
            size = self._mtu.next_probe()
            if size is not None:
                datagrams += self._probe(size, path, now)
        return datagrams

    def handle_timer(self, now: float) -> None:
        super().handle_timer(now)
        if self._loss._pto_count >= BLACK_HOLE_TIMEOUTS and self._max_datagram_size > BASE_DATAGRAM:
            self.fit(BASE_DATAGRAM)

    def _probe(self, size: int, path: QuicNetworkPath, now: float) -> list[tuple[bytes, Any]]:
        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            peer_token=b"",
            spin_bit=self._spin_bit,
            version=self._version or QuicProtocolVersion.VERSION_1,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[tls.Epoch.ONE_RTT])
        builder.start_frame(QuicFrameType.PING, handler=self._probe_ended, handler_args=(size,))
        builder._datagram_needs_padding = True
        datagrams, packets = builder.flush()
        self._packet_number = builder.packet_number
        for packet in packets:
            packet.sent_time = now
            packet.in_flight = False  # what becomes of it says nothing of congestion (RFC 9000, section 14.4)
            self._loss.on_packet_sent(packet=packet, space=self._spaces[tls.Epoch.ONE_RTT])
        return [(datagram, path.addr) for datagram in datagrams]

    def _probe_ended(self, delivery: QuicDeliveryState, size: int) -> None:
        if delivery == QuicDeliveryState.ACKED:
            self._mtu.delivered(size)
            self._max_datagram_size = self._mtu.largest
        else:
            self._mtu.lost()

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        context: Any = self.tls
        context._request_client_certificate = not self._is_client
        context._signature_algorithms = [tls.SignatureAlgorithm.ED25519]
        context._supported_groups = [tls.Group.X25519]

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        self.heard = self.ever_heard = True
        return super()._payload_received(context, plain, crypto_frame_required)

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        data = self._local_max_data
        self._local_max_data = self._no_limit  # what aioquic would double; MAX_STREAMS is left to it
        try:
            super()._write_connection_limits(builder, space)
        finally:
            self._local_max_data = data
        if data.value != data.sent:
            frame = builder.start_frame(
                data.frame_type, capacity=9, handler=self._on_connection_limit_delivery, handler_args=(data,)
            )
            frame.push_uint_var(data.value)
            data.sent = data.value

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        if stream.max_stream_data_local_sent == stream.max_stream_data_local or stream.receiver.is_finished:
            return
        frame = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=17,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        frame.push_uint_var(stream.stream_id or 0)
        frame.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local
