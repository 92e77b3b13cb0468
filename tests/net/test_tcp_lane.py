"""Streams over TCP: who is let in, each half's end, resets, and memory that stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import AdmissionError, TransportError
from mesh.identity.key import NodeKey
from mesh.transport import tcp
from mesh.transport.tcp import MAX_STRANGERS_EACH, TICKET_BYTES, WELCOME, TcpLane
from mesh.transport.tcpstream import READ_BUFFER, WRITE_BUFFER, TcpStream
from mesh.transport.tls import TlsSession, client_context, server_context
from tests.eventually import eventually

PEER = "a" * 26
TICKET = bytes(range(TICKET_BYTES))


@dataclass
class Listener:
    """A lane that knows the tickets in :attr:`tickets`, once each."""

    key: NodeKey
    lane: TcpLane
    address: str = ""
    tickets: dict[bytes, str] = field(default_factory=dict)
    shown: list[bytes] = field(default_factory=list)
    streams: list[TcpStream] = field(default_factory=list)

    async def start(self) -> Listener:
        async def recognise(ticket: bytes) -> str | None:
            self.shown.append(ticket)
            return self.tickets.pop(ticket, None)

        def arrived(peer: str, stream: TcpStream) -> None:
            assert peer == PEER
            self.streams.append(stream)

        self.lane.recognise, self.lane.on_stream = recognise, arrived
        [self.address] = await self.lane.start([("127.0.0.1", 0)])
        return self

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def pair(self, dialer: TcpLane, ticket: bytes = TICKET) -> tuple[TcpStream, TcpStream]:
        """Both ends of a stream."""
        self.tickets[ticket] = PEER
        ours = await dialer.dial(self.address, expect=self.key.id, ticket=ticket, opening=b"!", timeout=5)
        await eventually(lambda: self.streams, every=0)
        theirs = self.streams.pop()
        assert await theirs.read_exactly(1) == b"!"
        return ours, theirs


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    key = NodeKey.generate()
    listener = await Listener(key, TcpLane(key)).start()
    yield listener
    await listener.lane.close()
    assert listener.lane.connections == 0


@pytest.fixture
async def dialer() -> AsyncIterator[TcpLane]:
    lane = TcpLane(NodeKey.generate())
    yield lane
    await lane.close()
    assert lane.connections == 0


@pytest.fixture
def stranger() -> Iterator[list[socket.socket]]:
    """Plain sockets, closed after the test."""
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


async def tls_by_hand(
    port: int, context: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, ssl=context or client_context())


def address_of(sock: Any) -> str:
    return f"127.0.0.1:{sock.getsockname()[1]}"


async def refused(reader: asyncio.StreamReader) -> bool:
    """The connection was ended without a byte for us."""
    try:
        return await asyncio.wait_for(reader.read(1), 5) == b""
    except ConnectionError:
        return True


# -- who is let in -----------------------------------------------------------------------------------------------------


async def test_a_listener_with_another_key_gets_nothing_of_ours(listener: Listener, dialer: TcpLane) -> None:
    listener.tickets[TICKET] = PEER
    with pytest.raises(AdmissionError, match="not " + NodeKey.from_seed(bytes(32)).id) as caught:
        await dialer.dial(
            listener.address, expect=NodeKey.from_seed(bytes(32)).id, ticket=TICKET, opening=b"secret", timeout=5
        )
    assert caught.value.code == "wrong-key"
    await eventually(lambda: listener.lane.connections == 0)
    assert listener.shown == []
    assert listener.streams == []


async def test_what_is_no_mesh_node_gets_nothing_of_ours(dialer: TcpLane) -> None:
    """A TLS server of another protocol, and one that does not speak TLS at all."""
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer.get_extra_info("ssl_object") is None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with contextlib.suppress(OSError):
            heard.append(await reader.read())
        writer.close()

    key = NodeKey.generate()
    other = server_context(key)
    other.set_alpn_protocols(["h2"])
    for context in (other, None):
        heard.clear()
        server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
        address = address_of(server.sockets[0])
        with pytest.raises(TransportError):
            await dialer.dial(address, expect=key.id, ticket=TICKET, opening=b"secret", timeout=5)
        server.close()
        await eventually(lambda: dialer.connections == 0)
        assert not any(TICKET in said or b"secret" in said for said in heard)


async def test_a_wrong_ticket_opens_nothing(listener: Listener, dialer: TcpLane) -> None:
    listener.tickets[TICKET] = PEER
    with pytest.raises(TransportError):
        await dialer.dial(listener.address, expect=listener.key.id, ticket=bytes(32), opening=b"!", timeout=5)
    assert listener.streams == []
    assert listener.tickets, "the right one is still good"


async def test_a_ticket_shown_again_opens_nothing(listener: Listener, dialer: TcpLane) -> None:
    await listener.pair(dialer)
    with pytest.raises(TransportError):
        await dialer.dial(listener.address, expect=listener.key.id, ticket=TICKET, opening=b"!", timeout=5)
    assert listener.streams == []


async def test_a_stranger_hears_nothing_before_or_after_a_wrong_ticket(listener: Listener) -> None:
    reader, writer = await tls_by_hand(listener.port)
    writer.write(bytes(TICKET_BYTES))
    assert await refused(reader)
    writer.close()
    await eventually(lambda: listener.lane.strangers == 0 and listener.lane.connections == 0)


async def test_another_protocol_or_an_older_tls_is_not_spoken_to(listener: Listener) -> None:
    other = client_context()
    other.set_alpn_protocols(["h2"])
    older = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    older.check_hostname, older.verify_mode = False, ssl.CERT_NONE
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (other, older):
        with pytest.raises(OSError):
            reader, writer = await tls_by_hand(listener.port, context)
            writer.write(TICKET)
            assert await refused(reader)
            raise ConnectionResetError("let go")
    await eventually(lambda: listener.lane.connections == 0)
    assert listener.shown == []


async def test_the_silent_are_few_and_do_not_stay(
    listener: Listener, dialer: TcpLane, stranger: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that say nothing fill only their own address's share, and are let go after the deadline."""
    monkeypatch.setattr(tcp, "SHOW_WITHIN_S", 0.5)
    for _ in range(MAX_STRANGERS_EACH + 20):
        stranger.append(socket.create_connection(("127.0.0.1", listener.port), timeout=5))
    await eventually(lambda: listener.lane.strangers == MAX_STRANGERS_EACH)
    assert listener.lane.connections == MAX_STRANGERS_EACH
    await eventually(lambda: listener.lane.strangers == 0 and listener.lane.connections == 0)
    ours, _ = await listener.pair(dialer)
    ours.abort()


async def test_garbage_costs_only_its_own_connection(
    listener: Listener, dialer: TcpLane, stranger: list[socket.socket]
) -> None:
    chance = random.Random(4)
    for size in (1, 5, 600, 70_000):
        sock = socket.create_connection(("127.0.0.1", listener.port), timeout=5)
        stranger.append(sock)
        with contextlib.suppress(OSError):  # refused already
            sock.sendall(chance.randbytes(size))
            if size < 100:
                sock.shutdown(socket.SHUT_WR)
    ours, theirs = await listener.pair(dialer)
    await ours.write(b"fine")
    assert await theirs.read_exactly(4) == b"fine"


async def test_a_taken_port_is_named(listener: Listener, dialer: TcpLane) -> None:
    with pytest.raises(TransportError, match=f"TCP port {listener.port}") as caught:
        await dialer.start([("127.0.0.1", listener.port)])
    assert caught.value.code == "port-in-use"
    assert not dialer.listening


async def test_nobody_there_is_said_at_once(dialer: TcpLane) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError) as caught:
            await dialer.dial(address_of(free), expect=PEER, ticket=TICKET, opening=b"", timeout=5)
    assert caught.value.code == "unreachable"
    assert dialer.connections == 0


async def test_a_listener_that_never_answers_costs_the_time_given(
    dialer: TcpLane, stranger: list[socket.socket]
) -> None:
    mute = socket.create_server(("127.0.0.1", 0))
    stranger.append(mute)
    with pytest.raises(TransportError) as caught:
        await dialer.dial(address_of(mute), expect=PEER, ticket=TICKET, opening=b"", timeout=0.2)
    assert caught.value.code == "no-answer"
    await eventually(lambda: dialer.connections == 0)


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_each_half_ends_on_its_own(listener: Listener, dialer: TcpLane) -> None:
    ours, theirs = await listener.pair(dialer)
    await ours.write(b"question")
    await ours.write_eof()
    await ours.write_eof()
    assert await theirs.read_exactly(8) == b"question"
    assert await theirs.read() == b""
    for _ in range(3):
        await theirs.write(b"answer" * 50_000)
        assert await ours.read_exactly(300_000) == b"answer" * 50_000
    with pytest.raises(TransportError):
        await ours.write(b"more")
    await theirs.write_eof()
    with pytest.raises(EOFError):
        await ours.read_exactly(1)
    assert ours.closed
    assert theirs.closed
    await eventually(lambda: not dialer.connections and not listener.lane.connections)


async def test_a_half_that_ends_loses_nothing_that_is_on_its_way_to_it(listener: Listener, dialer: TcpLane) -> None:
    """The other side's bytes lie unread, whole records and a torn one, when our half ends."""
    ours, theirs = await listener.pair(dialer)
    body = random.Random(1).randbytes(8 << 20)
    writing = asyncio.create_task(theirs.write(body))
    await eventually(lambda: ours._received.size)
    await ours.write_eof()
    assert await ours.read_exactly(len(body)) == body
    await writing
    assert await theirs.read() == b""


async def test_a_socket_that_just_ends_is_no_end_of_a_stream(listener: Listener, dialer: TcpLane) -> None:
    """Whoever is on the path can end a TCP connection; that must not look like the end of what was said."""
    ours, theirs = await listener.pair(dialer)
    await ours.write(b"half of it")
    assert await theirs.read_exactly(4) == b"half"
    assert ours._transport
    ours._transport.close()
    assert await theirs.read_exactly(6) == b" of it"
    with pytest.raises(TransportError):
        await theirs.read()
    with pytest.raises(TransportError):
        await theirs.write(b"x")
    assert theirs.closed


async def test_a_reset_reaches_both_sides_at_once(listener: Listener, dialer: TcpLane) -> None:
    for which in (0, 1):
        both = await listener.pair(dialer)
        one, other = both[which], both[1 - which]
        reading = asyncio.create_task(other.read())
        writing = asyncio.create_task(other.write(bytes(64 << 20)))
        await asyncio.sleep(0)
        one.abort(7)
        one.abort(7)
        with pytest.raises(TransportError):
            await reading
        with pytest.raises(TransportError):
            await writing
        with pytest.raises(TransportError):
            await one.read()
        assert one.closed
        assert other.closed
    await eventually(lambda: not dialer.connections and not listener.lane.connections)


async def test_a_tampered_record_breaks_the_stream() -> None:
    key = NodeKey.generate()
    client = TlsSession(client_context(), server=False)
    server = TlsSession(server_context(key), server=True)
    while not (client.established and server.established):
        for one, other in ((client, server), (server, client)):
            if not one.established:
                one.handshake()
            other.feed(one.to_send())
    assert client.peer_key == key.public
    assert server.peer_key is None
    client.write(b"true words")
    record = bytearray(client.to_send())
    record[-1] ^= 1
    server.feed(bytes(record))
    with pytest.raises(ssl.SSLError):
        server.read()


async def test_a_stalled_reader_costs_a_bounded_amount(listener: Listener, dialer: TcpLane) -> None:
    ours, theirs = await listener.pair(dialer)
    piece = bytes(1 << 20)
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while True:
            await ours.write(piece)
            sent += len(piece)

    flooding = asyncio.create_task(flood())
    before = -1
    while before != sent:  # until nothing moves any more
        before = sent
        await asyncio.sleep(0.3)
    assert 0 < sent < 32 << 20
    assert theirs._received.size <= READ_BUFFER + 512 * 1024
    assert ours._transport
    assert ours._transport.get_write_buffer_size() <= WRITE_BUFFER + 256 * 1024
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)
    got = 0
    while got < sent:
        got += len(await theirs.read(1 << 20))


async def test_a_stranger_with_a_ticket_to_come_may_send_little(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is known, a peer has a small window: bytes behind its ticket wait in its own kernel."""
    known = asyncio.get_running_loop().create_future()

    async def slowly(ticket: bytes) -> str | None:
        await known
        return PEER

    listener.lane.recognise = slowly
    reader, writer = await tls_by_hand(listener.port)
    writer.write(TICKET + bytes(4 << 20))
    await eventually(lambda: listener.lane.strangers)
    [stream] = listener.lane._strangers
    await eventually(lambda: stream._paused)
    assert stream._received.size < 1 << 19
    known.set_result(None)
    assert await reader.readexactly(1) == WELCOME
    await eventually(lambda: listener.streams)
    assert len(await listener.streams[0].read_exactly(4 << 20)) == 4 << 20
    writer.transport.abort()
    await eventually(lambda: listener.streams[0].closed)


async def test_a_hundred_streams_at_once_keep_their_bytes_apart(listener: Listener, dialer: TcpLane) -> None:
    gate = asyncio.Semaphore(8)

    async def echo(stream: TcpStream) -> None:
        while data := await stream.read():
            await stream.write(data)
        await stream.write_eof()

    async def talk(number: int) -> None:
        ticket = number.to_bytes(TICKET_BYTES, "big")
        listener.tickets[ticket] = PEER
        async with gate:
            stream = await dialer.dial(listener.address, expect=listener.key.id, ticket=ticket, opening=b"", timeout=10)
        body = random.Random(number).randbytes(200_000 + number)
        writing = asyncio.create_task(stream.write(body))
        back = await stream.read_exactly(len(body))
        await writing
        await stream.write_eof()
        assert await stream.read() == b""
        assert hashlib.sha256(back).digest() == hashlib.sha256(body).digest()

    listener.lane.on_stream = lambda peer, stream: echoes.append(asyncio.create_task(echo(stream)))
    echoes: list[asyncio.Task[None]] = []
    await asyncio.gather(*(talk(number) for number in range(100)))
    await asyncio.gather(*echoes)
    await eventually(lambda: not dialer.connections and not listener.lane.connections)


async def test_small_packets_are_not_held_back(listener: Listener, dialer: TcpLane) -> None:
    for stream in await listener.pair(dialer):
        assert stream._transport
        sock = stream._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_who_waits_at_a_dead_path_learns_it_in_seconds(listener: Listener, dialer: TcpLane) -> None:
    ours, theirs = await listener.pair(dialer)
    for stream in (ours, theirs):
        assert stream._transport is not None
        sock = stream._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            idle, every, times = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + every * times <= 12


async def test_what_is_cut_says_why(listener: Listener, dialer: TcpLane) -> None:
    ours, theirs = await listener.pair(dialer)
    await theirs.write(b"last words")
    await eventually(lambda: ours._received.size)
    reading = asyncio.create_task(theirs.read())
    await asyncio.sleep(0)
    dialer.cut(listener.key.id, "the link is down")
    assert await ours.read() == b"last words"
    with pytest.raises(TransportError, match="link is down"):
        await ours.read()
    with pytest.raises(TransportError):
        await reading


def test_no_key_is_left_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server_context(NodeKey.generate())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("address", "ours"), [("127.0.0.1", True), ("192.0.2.1", False), ("2001:db8::1", False)])
def test_the_system_says_which_addresses_are_this_machines(address: str, ours: bool) -> None:
    assert tcp._is_ours((address, 4242)) is ours


async def test_streams_that_began_at_an_address_this_machine_has_left_end_and_others_do_not(
    listener: Listener, dialer: TcpLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, _ = await listener.pair(dialer)
    goes, _ = await listener.pair(dialer, bytes(range(32)))
    left = goes.home
    monkeypatch.setattr(tcp, "_is_ours", lambda home: home != left)
    dialer.cut_homeless()
    with pytest.raises(TransportError, match="not an address of this machine"):
        await goes.read()
    await stays.write(b"still here")
