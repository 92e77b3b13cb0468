"""One connection over several paths: through a member, on to a direct path, and after a peer that moved."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from mesh.clock import SystemClock
from mesh.errors import TransportError
from mesh.identity.key import NodeKey
from mesh.transport.connection import PeerConnection
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Stream
from mesh.transport.pathmtu import SIZES
from mesh.transport.quic import BASE_DATAGRAM, MAX_FRAME_DATA, MAX_WAITING, MIN_DATAGRAM
from tests.eventually import eventually

A, B = NodeKey.from_seed(b"a" * 32), NodeKey.from_seed(b"b" * 32)


class Side:
    """An endpoint on loopback and what was connected to it."""

    def __init__(self, key: NodeKey) -> None:
        self.key = key
        self.taken: list[PeerConnection] = []
        self.endpoint = Endpoint(key, SystemClock(), on_connection=self.taken.append)
        self.address = ""

    async def start(self) -> Side:
        [self.address] = await self.endpoint.start([("127.0.0.1", 0)])
        return self

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@pytest.fixture
async def sides() -> AsyncIterator[tuple[Side, Side]]:
    a, b = await Side(A).start(), await Side(B).start()
    yield a, b
    await a.endpoint.close()
    await b.endpoint.close()


async def connected(a: Side, b: Side) -> tuple[PeerConnection, PeerConnection]:
    ours = await a.endpoint.dial(b.address, expect=B.id)
    await eventually(lambda: b.taken)
    return ours, b.taken[-1]


class Wire:
    """Stands for a member that carries: what one end sends comes out at the other."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.other: Wire | None = None
        self.address = "relay:somebody"
        self.carried = 0
        self.longest = 0

    def send(self, datagrams: Iterable[tuple[bytes, Any]]) -> None:
        assert self.other is not None
        for data, _ in datagrams:
            self.carried += 1
            self.longest = max(self.longest, len(data))
            asyncio.get_running_loop().call_soon(self.other.endpoint.receive_over, self.other, data)


def wires(a: Side, b: Side) -> tuple[Wire, Wire]:
    here, there = Wire(a.endpoint), Wire(b.endpoint)
    here.other, there.other = there, here
    return here, there


async def echo(stream: Stream) -> None:
    try:
        while data := await stream.read():
            await stream.write(data)
    except TransportError:
        pass


def answer_streams(connection: PeerConnection, tasks: set[asyncio.Task[None]]) -> None:
    connection.on_stream = lambda stream: tasks.add(asyncio.ensure_future(echo(stream)))


async def test_datagrams_arrive_whole_up_to_the_limit_and_no_longer(sides: tuple[Side, Side]) -> None:
    ours, theirs = await connected(*sides)
    heard: list[bytes] = []
    theirs.on_datagram = heard.append
    largest = bytes(range(256)) * 4 + bytes(MAX_FRAME_DATA - 1024)
    assert MAX_FRAME_DATA == MIN_DATAGRAM + 2
    assert ours.send_datagram(b"small") and ours.send_datagram(largest)
    assert not ours.send_datagram(bytes(MAX_FRAME_DATA + 1))
    await eventually(lambda: heard == [b"small", largest])


async def test_datagrams_that_find_no_window_are_dropped_and_not_hoarded(sides: tuple[Side, Side]) -> None:
    ours, _ = await connected(*sides)
    sent = sum(ours.send_datagram(bytes(1000)) for _ in range(10 * MAX_WAITING))
    assert sent == MAX_WAITING
    await eventually(lambda: ours.send_datagram(b"room again"))


async def echoed(sides: tuple[Side, Side], *, widened: bool) -> tuple[PeerConnection, Stream, set[asyncio.Task[None]]]:
    """A connection, a stream of it whose bytes come back, and who sends them; the path's largest datagram is known."""
    ours, theirs = await connected(*sides)
    if widened:
        ours.widen()
        theirs.widen()
    tasks: set[asyncio.Task[None]] = set()
    answer_streams(theirs, tasks)
    stream = await ours.open_stream()
    await stream.write(b"!")
    await stream.read_exactly(1)
    await eventually(lambda: not widened or ours.quic._max_datagram_size == SIZES[0])
    return ours, stream, tasks


async def through(sides: tuple[Side, Side], widened: bool) -> set[int]:
    """The lengths of datagrams that 300 KB take to a peer and back."""
    ours, stream, _tasks = await echoed(sides, widened=widened)
    lengths: set[int] = set()
    send = ours.socket.send

    def noted(datagrams: Any) -> None:
        lengths.update(len(data) for data, _ in datagrams)
        send(datagrams)

    ours.socket.send = noted  # type: ignore[method-assign]
    await stream.write(bytes(300_000))
    assert await stream.read_exactly(300_000) == bytes(300_000)
    return lengths


async def test_datagrams_to_a_member_grow_to_what_the_path_takes(sides: tuple[Side, Side]) -> None:
    assert max(await through(sides, widened=True)) == SIZES[0]


async def test_strangers_are_sent_no_probes(sides: tuple[Side, Side]) -> None:
    assert max(await through(sides, widened=False)) == BASE_DATAGRAM


async def test_when_large_datagrams_begin_to_vanish_short_ones_are_sent(sides: tuple[Side, Side]) -> None:
    """The route changed to one that takes less, and nobody says so."""
    ours, stream, _tasks = await echoed(sides, widened=True)
    send = ours.socket.send
    ours.socket.send = lambda datagrams: send([d for d in datagrams if len(d[0]) <= BASE_DATAGRAM])  # type: ignore
    await stream.write(bytes(100_000))
    assert await stream.read_exactly(100_000) == bytes(100_000)
    assert ours.quic._max_datagram_size == BASE_DATAGRAM


async def test_a_connection_through_a_member_is_one_from_end_to_end(sides: tuple[Side, Side]) -> None:
    a, b = sides
    here, there = wires(a, b)
    ours = await a.endpoint.dial_over(here, expect=B.id)
    await eventually(lambda: b.taken)
    theirs = b.taken[0]
    assert ours.path == theirs.path == "relay"
    assert ours.address == "relay:somebody"
    assert (ours.peer_key, theirs.peer_key) == (B.public, A.public)
    tasks: set[asyncio.Task[None]] = set()
    answer_streams(theirs, tasks)
    stream = await ours.open_stream()
    await stream.write(bytes(300_000))
    assert await stream.read_exactly(300_000) == bytes(300_000)
    assert max(here.longest, there.longest) == MIN_DATAGRAM


async def test_a_member_that_carries_to_somebody_else_is_found_out(sides: tuple[Side, Side]) -> None:
    a, b = sides
    here, _ = wires(a, b)
    with pytest.raises(Exception, match="not " + A.id):
        await a.endpoint.dial_over(here, expect=A.id)


@pytest.mark.parametrize("dialer_moves_first", [True, False])
async def test_a_connection_moves_from_a_member_to_a_direct_path_with_its_streams(
    sides: tuple[Side, Side], dialer_moves_first: bool
) -> None:
    a, b = sides
    here, there = wires(a, b)
    ours = await a.endpoint.dial_over(here, expect=B.id)
    await eventually(lambda: b.taken)
    theirs = b.taken[0]
    tasks: set[asyncio.Task[None]] = set()
    answer_streams(theirs, tasks)
    stream = await ours.open_stream()
    await stream.write(b"before")
    assert await stream.read_exactly(6) == b"before"
    changed: list[str] = []
    ours.on_path = lambda: changed.append(ours.path)
    probe = await b.endpoint.dial(a.address, expect=A.id)  # the other way round than the connection was dialed
    await eventually(lambda: a.taken)
    for connection, onto in [(ours, a.taken[0]), (theirs, probe)][:: 1 if dialer_moves_first else -1]:
        connection.move(onto)
        await stream.write(b"during")
        assert await stream.read_exactly(6) == b"during"
    probe.close(0, "it has shown the way")
    await stream.write(bytes(100_000))
    await stream.read_exactly(100_000)
    carried = here.carried + there.carried
    await stream.write(bytes(100_000))
    await stream.read_exactly(100_000)
    assert ours.path == theirs.path == "quic"
    assert here.carried + there.carried == carried
    assert (ours.address, theirs.address) == (b.address, a.address)
    await eventually(lambda: changed and changed[-1] == "quic")


async def test_a_connection_moves_only_to_the_same_peer(sides: tuple[Side, Side]) -> None:
    a, b = sides
    ours, _ = await connected(a, b)
    other = await Side(NodeKey.from_seed(b"c" * 32)).start()
    try:
        elsewhere = await a.endpoint.dial(other.address, expect=other.key.id)
        ours.move(elsewhere)
        assert ours.address == b.address
    finally:
        await other.endpoint.close()


class Nat(asyncio.DatagramProtocol):
    """Rewrites the source of what passes, with an outer socket that can be swapped for another."""

    def __init__(self, target: int) -> None:
        self.target = ("127.0.0.1", target)
        self.inside: Any = None
        self.outer: asyncio.DatagramTransport | None = None

    async def start(self) -> Nat:
        loop = asyncio.get_running_loop()
        self.inner, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        await self.reboot()
        return self

    async def reboot(self) -> None:
        """A new mapping: the peer sees another port from now on."""
        if self.outer is not None:
            self.outer.close()
        nat = self

        class Outside(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                if nat.inside is not None:
                    nat.inner.sendto(data, nat.inside)

        self.outer, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Outside, local_addr=("127.0.0.1", 0), family=socket.AF_INET
        )

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.inside = addr
        self.outer.sendto(data, self.target)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.inner.get_extra_info('sockname')[1]}"

    def close(self) -> None:
        self.inner.close()
        self.outer.close()


async def test_a_dialer_that_moves_to_another_address_keeps_its_streams(sides: tuple[Side, Side]) -> None:
    a, b = sides
    nat = await Nat(b.port).start()
    try:
        ours = await a.endpoint.dial(nat.address, expect=B.id)
        await eventually(lambda: b.taken)
        theirs = b.taken[0]
        tasks: set[asyncio.Task[None]] = set()
        answer_streams(theirs, tasks)
        stream = await ours.open_stream()
        before = theirs.address
        await nat.reboot()
        await stream.write(bytes(50_000))
        assert await stream.read_exactly(50_000) == bytes(50_000)
        assert theirs.address != before
    finally:
        nat.close()


async def test_a_listener_that_moves_to_another_address_keeps_its_streams(sides: tuple[Side, Side]) -> None:
    a, b = sides
    ours, theirs = await connected(a, b)
    tasks: set[asyncio.Task[None]] = set()
    answer_streams(ours, tasks)
    stream = await theirs.open_stream()
    await stream.write(b"here")
    assert await stream.read_exactly(4) == b"here"
    # From now on all that the listener sends leaves by another socket, as after a change of network; it hears both.
    moved = await Side(B).start()
    for udp in b.endpoint._sockets:
        udp.send = moved.endpoint._sockets[0].send  # type: ignore[method-assign]
    moved.endpoint._received = b.endpoint._received  # type: ignore[method-assign]
    moved.endpoint._sockets[0]._receiver = b.endpoint._received
    try:
        await stream.write(bytes(50_000))
        assert await stream.read_exactly(50_000) == bytes(50_000)
        await eventually(lambda: ours.address == moved.address)
    finally:
        await moved.endpoint.close()


async def test_an_address_that_never_answers_is_given_up_for_the_one_before(sides: tuple[Side, Side]) -> None:
    """Somebody on the path sends a copy of a packet from elsewhere, faster than the packet itself."""
    a, b = sides
    ours, theirs = await connected(a, b)
    dead = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    dead.bind(("127.0.0.1", 0))
    try:
        caught: list[bytes] = []
        udp = b.endpoint._sockets[0]
        send = udp.send
        udp.send = lambda datagrams: caught.extend(data for data, _ in datagrams)  # type: ignore[method-assign]
        stream = await theirs.open_stream()
        await stream.write(b"a packet that is caught")
        await eventually(lambda: caught)
        udp.send = send  # type: ignore[method-assign]
        a.endpoint._received(a.endpoint._sockets[0], [(caught[0], dead.getsockname())])
        assert ours.address == f"127.0.0.1:{dead.getsockname()[1]}"
        await eventually(lambda: ours.address == b.address, within=10)
        dead.settimeout(0.1)
        received = 0
        try:
            while True:
                received += len(dead.recv(2000))
        except TimeoutError:
            pass
        assert received <= 3 * len(caught[0])
    finally:
        dead.close()
