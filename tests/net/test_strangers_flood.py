"""Crowds of strangers: a node's memory stays bounded, and members come in all the same."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial

import psutil
import pytest

from mesh.clock import SystemClock
from mesh.identity.key import NodeKey
from mesh.membership import greeting
from mesh.transport import strangers, tcp
from mesh.transport.address import split_address
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Stream
from mesh.transport.quic import PinnedQuic, configure
from mesh.transport.tcp import MAX_STRANGERS, MAX_STRANGERS_EACH
from mesh.transport.tls import TlsSession, client_context
from mesh.wire.codec import encode
from mesh.wire.messages import PROTOCOL, Join, OpenControl, Ping
from tests.eventually import eventually
from tests.net.party import Node, Party

MB = 1 << 20
CROWD = 10_000
needs_loopback_net = pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is this machine on Linux")


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Closed after the test."""
    opened: list[socket.socket] = []
    yield opened
    for sock in opened:
        sock.close()


CERTIFICATE, KEY = NodeKey.generate().certificate()
DIALER = configure(CERTIFICATE, KEY, is_client=True)


def first_packet() -> bytes:
    """A true one, of a dialer that will never be heard again."""
    quic = PinnedQuic(DIALER)
    quic.connect(("192.0.2.1", 1), 0.0)
    return quic.datagrams_to_send(0.0)[0][0]


def memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@needs_loopback_net
async def test_ten_thousand_half_open_handshakes_keep_no_member_out(party: Party, sockets: list[socket.socket]) -> None:
    """From two hundred addresses, each with many ports: little memory, links go on, and a member dials in."""
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    downs = len(anna.downs)
    target = split_address(anna.address)
    true_one = first_packet()
    before, worst_connections = memory(), 0
    for number in range(CROWD):
        if number % 50 == 0:
            sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sockets[-1].bind((f"127.3.{number // 5000}.{number // 50 % 100 + 1}", 0))
        # With another connection id it cannot be decrypted: noise, which costs as much to find out.
        noise = true_one[:6] + os.urandom(8) + true_one[14:]
        data = first_packet() if number < 1000 or number % 10 == 0 else noise
        sockets[-1].sendto(data, target)
        if number % 500 == 0:
            ben.links.send(anna.key.id, Ping(number))
        if number % 20 == 0:
            await asyncio.sleep(0)
            worst_connections = max(worst_connections, anna.endpoint.connections)
    await eventually(lambda: [ping.seq for _, ping in anna.messages] == list(range(0, CROWD, 500)), within=3)
    assert anna.endpoint.half_open <= strangers.MAX_HALF_OPEN + strangers.MAX_KNOWN
    assert worst_connections <= strangers.MAX_HALF_OPEN + strangers.MAX_KNOWN + 2
    grown = memory() - before
    print(f"{CROWD} first packets: {grown / MB:.1f} MB more, at most {worst_connections} connections")
    assert grown < 64 * MB
    carl = await party.node("carl", knows=(anna,))
    began = time.monotonic()
    await eventually(lambda: anna.key.id in carl.ups)
    print(f"a member was let in after {time.monotonic() - began:.2f} s")
    assert len(anna.downs) == downs, "those who were connected noticed nothing"


@needs_loopback_net
async def test_a_dialer_that_is_asked_to_come_back_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load a stranger proves its address with one more trip, and both ends know each other's keys as ever."""
    monkeypatch.setattr(strangers, "CALM", 0)
    arrived: list[PeerConnection] = []
    anna = Endpoint(NodeKey.generate(), SystemClock(), on_connection=arrived.append)
    ben = Endpoint(NodeKey.generate(), SystemClock(), on_connection=lambda connection: None)
    [at_anna] = await anna.start([("127.0.0.1", 0)])
    await ben.start([("127.0.0.1", 0)])
    connection = await ben.dial(at_anna, expect=anna.key.id)
    await eventually(lambda: arrived)
    assert connection.quic._retry_count == 1
    assert (connection.peer_key, arrived[0].peer_key) == (anna.key.public, ben.key.public)
    streams: list[Stream] = []
    arrived[0].on_stream = streams.append
    stream = await connection.open_stream()
    await stream.write(b"hello" * 100_000)
    await eventually(lambda: streams)
    assert await streams[0].read_exactly(500_000) == b"hello" * 100_000
    assert anna.half_open == 0
    anna.is_known = lambda host: True
    assert (await ben.dial(at_anna, expect=anna.key.id)).quic._retry_count == 0, "a member's address is known"
    await ben.close()
    await anna.close()


async def test_noise_that_looks_like_a_first_packet_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is; the connection is gone at once, some hundred kilobytes for each packet."""
    monkeypatch.setattr(strangers, "CALM", 10_000)
    monkeypatch.setattr(strangers, "MAX_HALF_OPEN", 10_000)
    monkeypatch.setattr(strangers, "MAX_HALF_OPEN_EACH", 10_000)
    anna = Endpoint(NodeKey.generate(), SystemClock(), on_connection=lambda connection: None)
    [at_anna] = await anna.start([("127.0.0.1", 0)])

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, PeerConnection) for one in gc.get_objects())

    before = alive()
    for _ in range(100):
        noise = b"\xc0\x00\x00\x00\x01\x08" + os.urandom(8) + b"\x08" + os.urandom(8) + b"\x00\x44\x00"
        anna._received(anna._sockets[0], [(noise + os.urandom(1200), ("127.0.0.1", 9))])
    assert anna.connections == 0
    await asyncio.sleep(0.01)
    assert alive() <= before
    assert anna.half_open == 100
    assert at_anna
    await anna.close()


async def drip(send: object, data: bytes, every: float) -> int:
    """Byte by byte, until the other side has had enough; returns how many it took."""
    for at in range(len(data)):
        try:
            await send(data[at : at + 1])  # type: ignore[operator]
        except Exception:
            return at
        await asyncio.sleep(every)
    return len(data)


async def test_a_greeting_that_trickles_in_has_five_seconds_in_whole(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not five for each byte."""
    assert greeting.GREET_WITHIN_S == 5.0
    monkeypatch.setattr(greeting, "GREET_WITHIN_S", 0.6)
    anna = await party.node("anna")
    lane = await party.lane()
    connection = await lane.dial(anna.address, expect=anna.key.id)
    stream = await connection.open_stream()
    words = encode(OpenControl()) + encode(Join(PROTOCOL, b"s" * 16, "slow"))
    began = time.monotonic()
    taken = await drip(stream.write, words, 0.05)
    assert taken < len(words)
    assert time.monotonic() - began < 2.5
    assert connection.closed
    await lane.close()
    assert anna.links._greeter._gate._sources, "it counts as a failed attempt"


async def test_the_silent_are_slowed_down_like_those_who_guess(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREET_WITHIN_S", 0.1)
    bens = party.member_key()
    anna = await party.node("anna")
    lane = await party.lane()
    for _ in range(10):
        connection = await lane.dial(anna.address, expect=anna.key.id)
        await eventually(partial(getattr, connection, "closed"))
    assert not anna.links._greeter._gate.is_open("127.0.0.1", SystemClock().now())
    ben = await party.node("ben", bens, knows=(anna,))
    monkeypatch.setattr(greeting, "GREET_WITHIN_S", 5.0)
    await eventually(lambda: ben.ups), "members do not wait"
    await lane.close()


async def test_a_crowd_at_the_door_leaves_room_for_members(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers that finished the handshake and say nothing fill their own room only."""
    monkeypatch.setattr(greeting, "MAX_STRANGERS", 3)
    bens = party.member_key()
    anna = await party.node("anna")
    lanes = [await party.lane() for _ in range(5)]
    held = [await lane.dial(anna.address, expect=anna.key.id) for lane in lanes]
    await eventually(lambda: sum(connection.closed for connection in held) == 2)
    ben = await party.node("ben", bens, knows=(anna,))
    await eventually(lambda: ben.ups, within=3)
    for lane in lanes:
        await lane.close()


# -- over TCP ----------------------------------------------------------------------------------------------------------


def knock(sockets: list[socket.socket], source: str, port: int) -> None:
    sock = socket.socket()
    sockets.append(sock)
    sock.setblocking(False)
    sock.bind((source, 0))
    with contextlib.suppress(BlockingIOError):
        error = sock.connect_ex(("127.0.0.1", port))
        assert error in (0, errno.EINPROGRESS)


@needs_loopback_net
async def test_ten_thousand_tcp_connections_that_say_nothing_keep_no_member_out(
    party: Party, sockets: list[socket.socket]
) -> None:
    anna = await party.node("anna")
    port = split_address(anna.address)[1]
    before = memory()
    worst = 0
    for number in range(CROWD):
        knock(sockets, f"127.4.{number // 5000}.{number // 50 % 100 + 1}", port)
        if number % 20 == 19:
            await asyncio.sleep(0)
            worst = max(worst, anna.tcp.connections)
        if len(sockets) > 400:  # those that were let go; the node holds what it holds
            for sock in sockets[:200]:
                sock.close()
            del sockets[:200]
    assert worst <= MAX_STRANGERS
    grown = memory() - before
    print(f"{CROWD} connections: {grown / MB:.1f} MB more, at most {worst} held")
    assert grown < 64 * MB
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups)
    link = ben.links.link(anna.key.id)
    assert link is not None
    await eventually(lambda: link.path == "tcp", within=15), "and its bulk goes over TCP"


@needs_loopback_net
async def test_members_reach_the_tcp_port_while_strangers_fill_theirs(
    party: Party, sockets: list[socket.socket]
) -> None:
    anna = await party.node("anna")
    port = split_address(anna.address)[1]
    for number in range(MAX_STRANGERS + 50):
        knock(sockets, f"127.5.0.{number % 100 + 1}", port)
        await asyncio.sleep(0)
    await eventually(lambda: anna.tcp.strangers == MAX_STRANGERS)
    ben = await party.node("ben", knows=(anna,))  # at 127.0.0.1, which no stranger of this test is
    await eventually(lambda: ben.ups)
    link = ben.links.link(anna.key.id)
    assert link is not None
    await eventually(lambda: link.path == "tcp", within=4)


async def test_a_ticket_that_trickles_in_has_its_time_in_whole(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowloris: a TLS handshake, then a ticket, one byte at a time."""
    assert tcp.SHOW_WITHIN_S == 5.0
    monkeypatch.setattr(tcp, "SHOW_WITHIN_S", 0.6)
    anna = await party.node("anna")
    hello = TlsSession(client_context(), server=False)
    hello.handshake()
    for data, by_tls in ((hello.to_send(), False), (bytes(32), True)):
        host, port = split_address(anna.address)
        context = client_context() if by_tls else None
        reader, writer = await asyncio.open_connection(host, port, ssl=context)

        async def send(piece: bytes, writer: asyncio.StreamWriter = writer) -> None:
            writer.write(piece)
            await writer.drain()

        began = time.monotonic()
        dripping = asyncio.create_task(drip(send, data, 0.05))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        assert time.monotonic() - began < 2.5
        dripping.cancel()
        writer.transport.abort()
    await eventually(lambda: anna.tcp.strangers == 0 and anna.tcp.connections == 0)


async def test_one_address_is_no_crowd(party: Party, sockets: list[socket.socket]) -> None:
    anna: Node = await party.node("anna")
    anna.tcp.is_known = lambda host: False
    for _ in range(MAX_STRANGERS_EACH + 10):
        knock(sockets, "127.0.0.1", split_address(anna.address)[1])
    await eventually(lambda: anna.tcp.strangers == MAX_STRANGERS_EACH)
