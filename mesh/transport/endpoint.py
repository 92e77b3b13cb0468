"""The QUIC lane: one UDP socket per bound address, listening and dialing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as sockets
from collections.abc import Callable, Sequence

from mesh.clock import Clock
from mesh.errors import MeshError, TransportError
from mesh.identity.key import NodeKey
from mesh.transport.address import join_address, split_address
from mesh.transport.connection import PeerConnection
from mesh.transport.lane import Detour
from mesh.transport.quic import CID_LENGTH, PinnedQuic, configure
from mesh.transport.router import Router
from mesh.transport.strangers import Admitted, Place, Porter, read_first_packet
from mesh.transport.udp import Addr, UdpSocket, bind
from mesh.wire.facts import NodeId

log = logging.getLogger(__name__)

_MIN_INITIAL = 1200
_STUN_BELOW = 4
"""First bytes of STUN; QUIC's are 64 and above (RFC 9443)."""
_VERSION_1 = b"\x00\x00\x00\x01"


class Endpoint(Router):
    """Listens and dials on the same sockets. See :class:`mesh.transport.lane.Lane`.

    Args:
        on_connection: told of every connection that somebody else dialed, its key known, before any of its streams.
    """

    def __init__(self, key: NodeKey, clock: Clock, *, on_connection: Callable[[PeerConnection], None]) -> None:
        self.key = key
        self._clock = clock
        self._on_connection = on_connection
        certificate, secret = key.certificate()
        self._as_client = configure(certificate, secret, is_client=True)
        self._as_server = configure(certificate, secret, is_client=False)
        self._sockets: list[UdpSocket] = []
        self._routes: dict[bytes, PeerConnection] = {}
        self._dials: dict[PeerConnection, asyncio.Future[None]] = {}
        self._half_open: dict[PeerConnection, tuple[Place, asyncio.TimerHandle]] = {}
        self._connections: dict[PeerConnection, None] = {}
        self._closed = False
        self.is_known: Callable[[str], bool] = lambda host: False
        self._porter = Porter(lambda host: self.is_known(host))
        self.on_stun: Callable[[bytes, str, int], None] = lambda data, host, port: None
        """Told of each datagram that is STUN by its first byte (RFC 9443), with who sent it; it is anybody's."""

    # -- the lane's face ---------------------------------------------------------------------------------------------

    async def start(self, bind_to: Sequence[tuple[str, int]]) -> list[str]:
        """Listen on each ``(host, port)`` and return ``host:port`` of each.

        Hosts are literal addresses. With port 0 the first socket takes any port and the others try to take the same.
        ``::`` is left out silently on a machine without IPv6 when something else could be bound.
        """
        opened: list[sockets.socket] = []
        try:
            chosen = 0
            for host, port in bind_to:
                try:
                    opened.append(_bind_near(host, port, chosen))
                except TransportError as error:
                    if host == "::" and opened and error.code == "no-address":
                        continue
                    raise
                chosen = opened[-1].getsockname()[1]
        except TransportError:
            for sock in opened:
                sock.close()
            raise
        for sock in opened:
            udp = UdpSocket(sock, self._received)
            self._sockets.append(udp)
            await udp.open()
        return [join_address(udp.address[0], udp.address[1]) for udp in self._sockets]

    async def dial(self, address: str, *, expect: NodeId | None, timeout: float = 5.0) -> PeerConnection:
        try:
            async with asyncio.timeout(timeout):
                udp, target = await self._resolve(address)
                return await self._dial(udp, target, expect)
        except TimeoutError as error:
            raise TransportError(
                f"no answer from {address} within {timeout:g} s",
                remedy="is the other machine's mesh up, and does its firewall let UDP through?",
                code="no-answer",
            ) from error

    async def dial_over(self, detour: Detour, *, expect: NodeId, timeout: float = 5.0) -> PeerConnection:
        try:
            async with asyncio.timeout(timeout):
                return await self._dial(detour, detour, expect)
        except TimeoutError as error:
            raise TransportError(
                f"no answer through {detour.address} within {timeout:g} s", code="no-answer"
            ) from error

    def receive_over(self, detour: Detour, data: bytes) -> None:
        if not self._closed:
            self._received(detour, [(data, detour)])

    def send_stun(self, data: bytes, host: str, port: int) -> None:
        """Send ``data`` from a socket that also listens, to a literal address; lost when there is none fit for it."""
        family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
        for udp in self._sockets:
            if udp.family == family and _can_reach(udp, (host, port)):
                udp.send([(data, (host, port))])
                return

    async def close(self) -> None:
        self._closed = True
        for connection in list(self._connections):
            connection.close(0, "the node is shutting down")
        for connection in list(self._connections):
            connection.drop()
        for udp in self._sockets:
            udp.close()
        self._sockets.clear()
        await asyncio.sleep(0)  # let ``on_close`` be told before we return

    @property
    def connections(self) -> int:
        """How many connections live, half-open ones included."""
        return len(self._connections)

    @property
    def half_open(self) -> int:
        """How many places of handshakes under way are taken."""
        return self._porter.half_open

    # -- dialing -----------------------------------------------------------------------------------------------------

    async def _dial(self, carrier: UdpSocket | Detour, target: Addr | Detour, expect: NodeId | None) -> PeerConnection:
        quic = PinnedQuic(self._as_client)
        connection = PeerConnection(quic, carrier, self._clock, self, dialed=True, expect=expect)
        done = self._dials[connection] = asyncio.get_running_loop().create_future()
        self._connections[connection] = None
        self._routes[quic.host_cid] = connection
        quic.connect(target, asyncio.get_running_loop().time())
        connection.transmit()
        try:
            await done
        except asyncio.CancelledError:
            connection.close(0, "the dialer gave up")
            raise
        finally:
            self._dials.pop(connection, None)
        if connection.failure is not None:
            raise connection.failure
        return connection

    async def _resolve(self, address: str) -> tuple[UdpSocket, Addr]:
        if self._closed or not self._sockets:
            raise TransportError("this endpoint is closed", code="closed")
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=sockets.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            raise TransportError(f"cannot resolve {host}: {error}", code="unresolved") from error
        for family, _, _, _, target in found:
            for udp in self._sockets:
                if udp.family == family and _can_reach(udp, target):
                    return udp, target
        raise TransportError(f"none of this node's sockets can reach {address}", code="no-route")

    # -- the router's face -------------------------------------------------------------------------------------------

    def learn_cid(self, cid: bytes, connection: PeerConnection) -> None:
        self._routes[cid] = connection

    def forget_cid(self, cid: bytes) -> None:
        self._routes.pop(cid, None)

    def ready(self, connection: PeerConnection) -> None:
        waiting = self._half_open.pop(connection, None)
        if waiting is not None:
            place, deadline = waiting
            deadline.cancel()
            if connection.established:
                self._porter.leave(place)
        if connection.dialed:
            done = self._dials.get(connection)
            if done is not None and not done.done():
                done.set_result(None)
        elif connection.established and not connection.closed:
            self._on_connection(connection)

    def gone(self, connection: PeerConnection) -> None:
        self._connections.pop(connection, None)
        for cid in [cid for cid, owner in self._routes.items() if owner is connection]:
            del self._routes[cid]

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _received(self, carrier: UdpSocket | Detour, batch: Sequence[tuple[bytes, Addr | Detour]]) -> None:
        now = asyncio.get_running_loop().time()
        touched: dict[PeerConnection, None] = {}
        for data, addr in batch:
            connection = self._route(carrier, data, addr, now)
            if connection is None:
                if data and data[0] < _STUN_BELOW and isinstance(addr, tuple):
                    self.on_stun(data, str(addr[0]), int(addr[1]))
                continue
            try:
                if connection.receive(data, addr, now):
                    if isinstance(carrier, UdpSocket):
                        connection.socket = carrier
                elif connection in self._half_open and connection.is_blank:
                    connection.drop()  # noise that looked like a first packet
                    continue
                touched[connection] = None
            except Exception:
                # Whatever a peer can provoke costs that peer its connection, and nobody else theirs.
                log.exception("a datagram from %s broke its connection", connection.address)
                self._discard(connection)
                touched.pop(connection, None)
        for connection in touched:
            try:
                connection.process()
            except Exception:
                log.exception("the connection to %s broke", connection.peer or connection.address)
                self._discard(connection)

    def _discard(self, connection: PeerConnection) -> None:
        with contextlib.suppress(Exception):
            connection.close(1, "internal error")
        connection.drop()

    def _route(
        self, carrier: UdpSocket | Detour, data: bytes, addr: Addr | Detour, now: float
    ) -> PeerConnection | None:
        if len(data) < 1 + CID_LENGTH or not data[0] & 0x40:  # not QUIC
            return None
        if not data[0] & 0x80:
            return self._routes.get(data[1 : 1 + CID_LENGTH])
        length = data[5]
        if length > 20 or len(data) < 7 + length:
            return None
        cid = data[6 : 6 + length]
        connection = self._routes.get(cid)
        if connection is not None:
            return connection
        is_initial = not data[0] & 0x30 and data[1:5] == _VERSION_1
        if not is_initial or len(data) < _MIN_INITIAL or length < 8 or self._closed:
            return None
        return self._admit_stranger(carrier, data, addr, now)

    def _admit_stranger(
        self, carrier: UdpSocket | Detour, data: bytes, addr: Addr | Detour, now: float
    ) -> PeerConnection | None:
        packet = read_first_packet(data)
        if packet is None:
            return None
        host, port = (addr[0], addr[1]) if isinstance(addr, tuple) else (addr.address, None)
        verdict = self._porter.weigh(packet, host, port, now)
        if isinstance(verdict, bytes) and isinstance(addr, tuple) and isinstance(carrier, UdpSocket):
            carrier.send([(verdict, addr)])
        if not isinstance(verdict, Admitted):
            return None
        cid = packet.cid
        quic = PinnedQuic(self._as_server, original_destination_cid=verdict.original_cid, retry_cid=verdict.retry_cid)
        connection = PeerConnection(quic, carrier, self._clock, self, dialed=False, expect=None)
        self._connections[connection] = None
        self._routes[cid] = self._routes[quic.host_cid] = connection
        deadline = asyncio.get_running_loop().call_at(verdict.place.until, self._handshake_overdue, connection)
        self._half_open[connection] = (verdict.place, deadline)
        return connection

    def _handshake_overdue(self, connection: PeerConnection) -> None:
        self._half_open.pop(connection, None)
        connection.abandon(TransportError("the handshake took too long", code="handshake"))
        connection.drop()


def _bind_near(host: str, port: int, chosen: int) -> sockets.socket:
    """Bind ``port``; when any will do, the one chosen for the sockets before if it is free here too."""
    if port == 0 and chosen:
        with contextlib.suppress(MeshError):
            return bind(host, chosen)
    return bind(host, port)


def _can_reach(udp: UdpSocket, target: Addr) -> bool:
    """A socket bound to loopback reaches loopback only; others are left to the routing table."""
    bound = str(udp.address[0])
    if bound in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return True
    loopback = ("127.", "::1")
    return bound.startswith(loopback) == str(target[0]).startswith(loopback)
