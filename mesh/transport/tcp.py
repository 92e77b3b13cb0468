"""The TCP lane: bulk streams over TLS 1.3, each over a connection of its own, on the port number of the QUIC lane.

Who listens is known by the key in its certificate before the dialer says a word. Who dials is known by a ticket: a
random number, shown once, that it announced over the QUIC link, where it is known already.

    dialer                                          listener
    digest of a ticket      -- QUIC link -->        expects it for some seconds
    TCP, TLS, looks at the key
    ticket, first bytes     -- TLS -->              looks the digest up, and burns it
                            <-- TLS --              WELCOME, then the stream is the peer's
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mesh.errors import AdmissionError, MeshError, TransportError
from mesh.identity.key import NodeKey, node_id
from mesh.transport.address import join_address, split_address
from mesh.transport.strangers import Room, neighbourhood
from mesh.transport.tcpstream import TcpStream
from mesh.transport.tls import TlsSession, client_context, server_context
from mesh.wire.facts import NodeId

log = logging.getLogger(__name__)

TICKET_BYTES = 32
WELCOME = b"\x01"
SHOW_WITHIN_S = 5.0
"""From an accepted connection to its ticket."""
MAX_STRANGERS = 64
"""Connections that have not shown a ticket yet; more are cut at once, and their dialers take QUIC."""
MAX_STRANGERS_EACH = 24
"""Of them from one address: somebody who fills that leaves the others room."""
MAX_KNOWN = 128
"""Connections without a ticket yet from where members live, 24 each: above those of strangers."""
_BACKLOG = 128


def new_ticket() -> tuple[bytes, bytes]:
    """A ticket, and the digest of it to announce."""
    ticket = secrets.token_bytes(TICKET_BYTES)
    return ticket, digest_of(ticket)


def digest_of(ticket: bytes) -> bytes:
    """What the listener keeps of a ticket: looking it up tells nothing about tickets, however long it takes."""
    return hashlib.sha256(ticket).digest()


async def nobody(ticket: bytes) -> NodeId | None:
    """Knows no ticket."""
    return None


class TcpLane:
    """Listens and dials. Its owner sets :attr:`recognise` and :attr:`on_stream`."""

    def __init__(self, key: NodeKey) -> None:
        self.recognise: Callable[[bytes], Awaitable[NodeId | None]] = nobody
        """Whose ticket is this? It is worth nothing after."""
        self.on_stream: Callable[[NodeId, TcpStream], None] = lambda peer, stream: stream.abort()
        """A member opened a stream."""
        self.is_known: Callable[[str], bool] = lambda host: False
        """Does a member live at this host?"""
        self._as_server = server_context(key)
        self._as_client = client_context()
        self._servers: list[asyncio.Server] = []
        self._streams: dict[TcpStream, NodeId] = {}  # "": who it is was not shown yet
        self._strangers: dict[TcpStream, asyncio.Task[None]] = {}
        self._room_of_strangers = Room(MAX_STRANGERS, MAX_STRANGERS_EACH)
        self._room_of_known = Room(MAX_KNOWN, MAX_STRANGERS_EACH)
        self._closed = False

    @property
    def listening(self) -> bool:
        return bool(self._servers)

    @property
    def strangers(self) -> int:
        """Accepted connections that have shown no ticket yet."""
        return len(self._strangers)

    @property
    def connections(self) -> int:
        """Sockets open, listeners aside."""
        return len(self._streams)

    async def start(self, bind_to: Sequence[tuple[str, int]]) -> list[str]:
        """Listen on each ``(host, port)``; returns the addresses really bound.

        Raises:
            TransportError: a port is taken (code ``port-in-use``); nothing is left open then.
        """
        opened: list[socket.socket] = []
        try:
            for host, port in bind_to:
                opened.append(listen(host, port))
        except TransportError:
            for sock in opened:
                sock.close()
            raise
        loop = asyncio.get_running_loop()
        for sock in opened:
            self._servers.append(await loop.create_server(self._accept, sock=sock, backlog=_BACKLOG))
        return [join_address(*sock.getsockname()[:2]) for sock in opened]

    async def dial(self, address: str, *, expect: NodeId, ticket: bytes, opening: bytes, timeout: float) -> TcpStream:
        """A stream to ``expect``, with ``ticket`` shown, ``opening`` said, and the peer's welcome heard.

        Raises:
            TransportError: nobody answers there over TCP within ``timeout`` seconds, or knows the ticket.
            AdmissionError: another key than expected answered (code ``wrong-key``); it got nothing of this.
        """
        stream = TcpStream(TlsSession(self._as_client, server=False))
        self._watch(stream, expect)
        try:
            async with asyncio.timeout(timeout):
                await self._connect(stream, address)
                await stream.established
                _check_key(stream, address, expect)
                await stream.write(ticket + opening)
                if await stream.read_exactly(1) != WELCOME:
                    raise TransportError(f"{address} (TCP) does not speak our protocol", code="no-welcome")
        except BaseException as error:
            stream.abort()
            if not stream.connected:
                self._forget(stream)
            if isinstance(error, TimeoutError):
                raise TransportError(
                    f"no answer from {address} (TCP) within {timeout:g} s", code="no-answer"
                ) from error
            if isinstance(error, EOFError):
                raise TransportError(f"{address} (TCP) did not let us in", code="no-welcome") from error
            raise
        stream.trust()
        return stream

    def cut(self, peer: NodeId, reason: str) -> None:
        """Cut every stream from and to ``peer`` now."""
        for stream in [stream for stream, owner in self._streams.items() if owner == peer]:
            stream.lose(reason)

    def cut_homeless(self) -> None:
        """Cut every stream that began at an address which is not this machine's any more.

        Its packets cannot come back, and what is unsent keeps it waiting for a quarter of an hour.
        """
        for stream in list(self._streams):
            if stream.home and not _is_ours(stream.home):
                stream.lose(f"{stream.home[0]} is not an address of this machine any more")

    async def close(self) -> None:
        """Stop listening and cut every connection."""
        self._closed = True
        await self.stop_listening()
        for stream in list(self._streams):
            stream.lose("this node is shutting down")
        greetings = list(self._strangers.values())
        for greeting in greetings:
            greeting.cancel()
        await asyncio.gather(*greetings, return_exceptions=True)
        await asyncio.sleep(0)  # sockets close in the loop's next turn

    async def stop_listening(self) -> None:
        """Take no new connections; those there are stay."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    # -- dialing -----------------------------------------------------------------------------------------------------

    async def _connect(self, stream: TcpStream, address: str) -> None:
        if self._closed:
            raise TransportError("this lane is closed", code="closed")
        host, port = split_address(address)
        try:
            await asyncio.get_running_loop().create_connection(lambda: stream, host, port)
        except (OSError, UnicodeError) as error:
            raise TransportError(f"{address} (TCP) cannot be reached: {error}", code="unreachable") from error

    def _watch(self, stream: TcpStream, peer: NodeId) -> None:
        self._streams[stream] = peer
        stream.on_gone = lambda: self._forget(stream)

    def _forget(self, stream: TcpStream) -> None:
        self._streams.pop(stream, None)

    # -- listening ---------------------------------------------------------------------------------------------------

    def _accept(self) -> TcpStream:
        return TcpStream(TlsSession(self._as_server, server=True), on_made=self._made)

    def _made(self, stream: TcpStream) -> None:
        room = self._room_of_known if self.is_known(stream.source) else self._room_of_strangers
        source = neighbourhood(stream.source)
        if self._closed or not room.enter(source):
            stream.abort()
            return
        self._watch(stream, "")
        greeting = asyncio.get_running_loop().create_task(self._greet(stream))
        self._strangers[stream] = greeting
        greeting.add_done_callback(lambda task: self._greeted(stream, room, source))

    def _greeted(self, stream: TcpStream, room: Room, source: str) -> None:
        del self._strangers[stream]
        room.leave(source)

    async def _greet(self, stream: TcpStream) -> None:
        peer: NodeId | None = None
        try:
            async with asyncio.timeout(SHOW_WITHIN_S):
                await stream.established
                peer = await self.recognise(await stream.read_exactly(TICKET_BYTES))
            if peer is not None:
                self._streams[stream] = peer
                await stream.write(WELCOME)
                stream.trust()
        except (TimeoutError, EOFError, MeshError):
            peer = None
        finally:
            if peer is None:
                stream.abort()
        if peer is not None:
            self.on_stream(peer, stream)


def _check_key(stream: TcpStream, address: str, expect: NodeId) -> None:
    key = stream.peer_key
    if key is None:
        raise AdmissionError(f"{address} (TCP) showed no Ed25519 certificate: it is not a mesh node", code="no-key")
    if node_id(key) != expect:
        raise AdmissionError(f"{address} (TCP) is node {node_id(key)}, not {expect}", code="wrong-key")


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket on a literal address.

    Raises:
        TransportError: the port is taken (code ``port-in-use``), or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # The protocol by name: without it asyncio leaves Nagle's algorithm on.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise TransportError(f"this machine has no {family.name}: {error}", code="no-address") from error
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise TransportError(
                f"TCP port {port} on {host} is taken by another program, or may not be used",
                remedy="stop that program, or choose another port:  --bind-port N",
                code="port-in-use",
            ) from error
        raise TransportError(
            f"cannot listen on {host}, TCP port {port}: {error.strerror or error}",
            remedy="--bind-host takes an address of this machine",
            code="no-address",
        ) from error
    return sock


def _is_ours(home: tuple[Any, ...]) -> bool:
    """Whether an address can be bound here: the system's own word, temporary and link-local ones included."""
    family = socket.AF_INET6 if ":" in home[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((home[0], 0, *home[2:]))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
