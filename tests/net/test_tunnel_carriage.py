"""Bytes from a local client through a tunnel to a worker's local server, and how tunnels end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mesh.errors import TransportError
from mesh.tunnel import HostTunnels, HttpTunnel, WorkerTunnel
from mesh.tunnel import host as host_module
from mesh.tunnel.pump import HIGH_WATER, LocalEnd, Traffic, connect_local, pump
from mesh.wire.codec import open_reply_decoder, read_frame
from mesh.wire.facts import Epoch
from mesh.wire.messages import Opened, OpenFailed, OpenHttp, OpenRpc
from tests.eventually import eventually
from tests.fakes.processes import node_id
from tests.fakes.transport import FakeStream, stream_pair

HOST, B, C, OTHER = (node_id(letter) for letter in "abcz")
ONE, TWO = Epoch(1, HOST), Epoch(2, HOST)
HOST_SECRET, WORKER_SECRET = b"h" * 32, b"w" * 32


@dataclass(frozen=True)
class At:
    port: int
    secret: bytes = WORKER_SECRET


class Server:
    """A TCP server that keeps what each connection said; ``behaviour`` answers."""

    def __init__(self, behaviour: Callable[..., Any]) -> None:
        self.behaviour = behaviour
        self.heard: list[bytearray] = []
        self.open = 0
        self.port = 0

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.heard.append(bytearray())
        with contextlib.suppress(OSError):
            await self.behaviour(reader, writer, self.heard[-1])
        self.open -= 1
        writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
    """Echo what follows the 32 bytes of the secret."""
    heard += await reader.readexactly(32)
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


class Wire:
    """Streams between the host and its workers, in memory."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerTunnel] = {}
        self.streams: list[FakeStream] = []
        self.asked: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open_bulk(
        self, worker: str, request: Any, /, *, heard: Callable[[Opened], None] = lambda opened: None
    ) -> FakeStream:
        self.asked.append(worker)
        ours, theirs = stream_pair()
        self.streams.append(ours)
        task = asyncio.ensure_future(self.workers[worker].serve(HOST, request, theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        reply = await read_frame(ours, open_reply_decoder)
        if isinstance(reply, OpenFailed):
            ours.abort()
            raise TransportError(f"{worker} refused: {reply.message}")
        heard(reply)
        return ours


class Ring:
    """A host and one worker, b, whose rpc-server echoes."""

    def __init__(self, server: Server) -> None:
        self.wire = Wire()
        self.failures: list[tuple[Epoch, str, str]] = []
        self.connected: list[Epoch] = []
        self.current = ONE
        self.tunnels = HostTunnels(self.wire.open_bulk, on_failure=lambda *what: self.failures.append(what))
        self.worker = WorkerTunnel(
            lambda epoch: At(server.port) if epoch == self.current else None,
            lambda peer, epoch: peer == HOST and epoch >= self.current,
            on_connected=self.connected.append,
        )
        self.wire.workers[B] = self.worker

    async def connect(self, said: bytes = HOST_SECRET) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        (endpoint,) = await self.tunnels.open(ONE, [B], HOST_SECRET)
        return await self.reconnect(endpoint, said)

    async def reconnect(
        self, endpoint: str, said: bytes = HOST_SECRET
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.rpartition(":")[2]))
        writer.write(said)
        return reader, writer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server(echo) as server:
        yield server


@pytest.fixture
async def ring(server: Server) -> AsyncIterator[Ring]:
    ring = Ring(server)
    yield ring
    await ring.tunnels.close()
    ring.worker.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    """The other side closed or reset, and said nothing more."""
    try:
        return await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionError:
        return True


async def test_bytes_cross_both_ways_and_each_side_hears_its_own_secret(ring: Ring, server: Server) -> None:
    reader, writer = await ring.connect()
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    assert server.heard == [WORKER_SECRET]
    assert ring.connected == [ONE]
    traffic = ring.tunnels.traffic[B]
    assert (traffic.up_bytes, traffic.down_bytes, traffic.connections) == (5, 5, 1)
    writer.close()


async def test_a_large_transfer_arrives_whole_through_small_windows(ring: Ring) -> None:
    reader, writer = await ring.connect()
    sent = os.urandom(12 << 20)

    async def send() -> None:
        for start in range(0, len(sent), 1 << 16):
            writer.write(sent[start : start + (1 << 16)])
            await writer.drain()
        writer.write_eof()

    sending = asyncio.ensure_future(send())
    received = await reader.read()
    while data := await reader.read():
        received += data
    await sending
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()


async def test_the_clients_end_leaves_the_answer_to_come(ring: Ring, server: Server) -> None:
    async def answer_after_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        heard += await reader.read(-1)
        writer.write(b"got %d" % len(heard))

    server.behaviour = answer_after_end
    reader, writer = await ring.connect()
    writer.write(b"x" * 100)
    writer.write_eof()
    assert await reader.read() == b"got 132"
    await eventually(lambda: all(stream.closed for stream in ring.wire.streams))
    assert ring.failures == []


@pytest.mark.parametrize("said", [b"g" * 32, b"h" * 31 + b"x" + b"RPC bytes", WORKER_SECRET])
async def test_a_local_program_without_the_secret_reaches_no_worker(ring: Ring, said: bytes) -> None:
    reader, _ = await ring.connect(said)
    assert await ended(reader)
    assert ring.wire.asked == []
    assert ring.failures == []


async def test_a_local_program_that_says_nothing_is_not_waited_for(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "SECRET_WITHIN_S", 0.05)
    reader, _ = await ring.connect(b"hhh")
    assert await ended(reader)
    assert ring.wire.asked == []


async def test_connecting_and_closing_at_once_is_harmless(ring: Ring) -> None:
    reader, writer = await ring.connect(b"")
    writer.close()
    assert await ended(reader)
    reader, writer = await ring.connect()
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.close()


async def test_the_end_of_an_epoch_closes_its_listeners_and_connections(ring: Ring, server: Server) -> None:
    (endpoint,) = await ring.tunnels.open(ONE, [B], HOST_SECRET)
    reader, writer = await ring.reconnect(endpoint)
    writer.write(b"hello")
    await reader.readexactly(5)
    await ring.tunnels.close()
    assert await ended(reader)
    with pytest.raises(ConnectionRefusedError):
        await ring.reconnect(endpoint)
    await eventually(lambda: server.open == 0)
    assert ring.failures == []


async def test_a_new_epoch_takes_the_place_of_the_old(ring: Ring) -> None:
    reader, writer = await ring.connect()
    writer.write(b"hello")
    await reader.readexactly(5)
    ring.current = TWO
    (endpoint,) = await ring.tunnels.open(TWO, [B], b"n" * 32)
    assert await ended(reader)
    reader, writer = await ring.reconnect(endpoint, b"n" * 32)
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"
    writer.close()


async def test_a_lost_worker_closes_the_local_socket_at_once_and_is_named(ring: Ring) -> None:
    reader, writer = await ring.connect()
    writer.write(b"hello")
    await reader.readexactly(5)
    ring.wire.streams[0].breaks("no answer for 5 s")
    assert await ended(reader)
    await eventually(lambda: ring.failures == [(ONE, B, "no answer for 5 s")])


async def test_a_worker_declared_dead_is_dropped_before_its_connection_notices(ring: Ring) -> None:
    reader, writer = await ring.connect()
    writer.write(b"hello")
    await reader.readexactly(5)
    ring.tunnels.drop(C)
    ring.tunnels.drop(B)
    assert await ended(reader)


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_the_death_of_the_rpc_server_closes_the_hosts_socket_and_is_named(
    ring: Ring, server: Server, how: str
) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        await reader.readexactly(32 + 5)
        getattr(writer.transport, how)()

    server.behaviour = die
    reader, writer = await ring.connect()
    writer.write(b"hello")
    assert await ended(reader)
    await eventually(lambda: [worker for _, worker, _ in ring.failures] == [B])


async def test_a_connection_given_up_for_a_newer_one_is_no_loss(ring: Ring, server: Server) -> None:
    drop = asyncio.Event()

    async def wait_for_the_next(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        if server.open == 1:
            await drop.wait()
        else:
            await echo(reader, writer, heard)

    server.behaviour = wait_for_the_next
    (endpoint,) = await ring.tunnels.open(ONE, [B], HOST_SECRET)
    first, _ = await ring.reconnect(endpoint)
    await eventually(lambda: server.open == 1)
    second, writer = await ring.reconnect(endpoint)
    writer.write(b"hello")
    assert await second.readexactly(5) == b"hello"
    drop.set()
    assert await ended(first)
    assert ring.failures == []
    writer.close()


async def test_a_killed_engine_lets_the_rpc_server_have_the_next_client(ring: Ring, server: Server) -> None:
    _, writer = await ring.connect()
    await eventually(lambda: server.open == 1)
    writer.transport.abort()
    await eventually(lambda: server.open == 0)
    assert ring.failures == []


async def test_an_older_host_is_fenced_off(ring: Ring, server: Server) -> None:
    ring.current = TWO
    reader, _ = await ring.connect()
    assert await ended(reader)
    ((epoch, worker, why),) = ring.failures
    assert (epoch, worker) == (ONE, B)
    assert "another layout than epoch 1" in why
    assert server.heard == []


@pytest.mark.parametrize(
    ("peer", "epoch", "code"), [(OTHER, ONE, "fenced"), (HOST, Epoch(0, HOST), "fenced"), (HOST, TWO, "not-ready")]
)
async def test_a_worker_serves_only_the_host_of_the_epoch_it_runs(
    ring: Ring, server: Server, peer: str, epoch: Epoch, code: str
) -> None:
    ours, theirs = stream_pair()
    await ring.worker.serve(peer, OpenRpc(epoch), theirs)
    reply = await read_frame(ours, open_reply_decoder)
    assert isinstance(reply, OpenFailed)
    assert reply.code == code
    assert server.heard == []


async def test_an_rpc_server_that_does_not_listen_is_an_answer_not_a_silence(ring: Ring, server: Server) -> None:
    await server.__aexit__()
    ours, theirs = stream_pair()
    await ring.worker.serve(HOST, OpenRpc(ONE), theirs)
    reply = await read_frame(ours, open_reply_decoder)
    assert isinstance(reply, OpenFailed)
    assert reply.code == "not-listening"
    await server.__aenter__()


async def test_closing_the_workers_side_ends_streams_in_every_stage(ring: Ring, server: Server) -> None:
    carried, theirs = stream_pair()
    serving = asyncio.ensure_future(ring.worker.serve(HOST, OpenRpc(ONE), theirs))
    reply = await read_frame(carried, open_reply_decoder)
    assert isinstance(reply, Opened)
    fresh, its_end = stream_pair()
    beginning = asyncio.ensure_future(ring.worker.serve(HOST, OpenRpc(ONE), its_end))
    await asyncio.sleep(0)
    ring.worker.close()
    await asyncio.wait_for(asyncio.gather(serving, beginning), 5)
    for stream in (carried, fresh):
        with pytest.raises(TransportError):
            await stream.read()
    await eventually(lambda: server.open == 0)


async def test_two_workers_are_never_confused(server: Server) -> None:
    async def name(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        writer.write(b"c")

    async with Server(name) as second:
        ring = Ring(server)
        ring.wire.workers[C] = WorkerTunnel(lambda epoch: At(second.port), lambda peer, epoch: True)
        to_b, to_c = await ring.tunnels.open(ONE, [B, C], HOST_SECRET)
        reader, writer = await ring.reconnect(to_c)
        assert await reader.readexactly(1) == b"c"
        other, to_other = await ring.reconnect(to_b)
        to_other.write(b"b")
        assert await other.readexactly(1) == b"b"
        assert ring.wire.asked == [C, B]
        writer.close()
        to_other.close()
        await ring.tunnels.close()


async def test_http_is_carried_to_the_server_that_serves_and_to_no_other() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        heard += await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with Server(answer) as server:
        tunnel = HttpTunnel(lambda epoch: server.port if epoch == ONE else None)
        ours, theirs = stream_pair()
        carried = asyncio.ensure_future(tunnel.serve(OTHER, OpenHttp(ONE), theirs))
        reply = await read_frame(ours, open_reply_decoder)
        assert isinstance(reply, Opened)
        await ours.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await ours.read()).endswith(b"ok")
        await ours.write_eof()
        await asyncio.wait_for(carried, 5)
        assert bytes(server.heard[0]) == b"GET / HTTP/1.1\r\n\r\n"
        ours, theirs = stream_pair()
        await tunnel.serve(OTHER, OpenHttp(TWO), theirs)
        refusal = await read_frame(ours, open_reply_decoder)
        assert isinstance(refusal, OpenFailed)
        assert refusal.code == "not-serving"


async def test_one_members_requests_leave_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.tunnel.member.MAX_HTTP_STREAMS", 4)
    monkeypatch.setattr("mesh.tunnel.member.MAX_HTTP_STREAMS_EACH", 3)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        await reader.read()

    async with Server(answer) as server:
        tunnel = HttpTunnel(lambda epoch: server.port)
        carried = []

        async def opens(peer: str) -> str:
            ours, theirs = stream_pair()
            carried.append(asyncio.ensure_future(tunnel.serve(peer, OpenHttp(ONE), theirs)))
            reply = await read_frame(ours, open_reply_decoder)
            return "carried" if isinstance(reply, Opened) else getattr(reply, "code", "")

        assert [await opens("m" * 26) for _ in range(4)] == ["carried"] * 3 + ["busy"]
        assert [await opens("n" * 26) for _ in range(2)] == ["carried", "busy"]
        tunnel.close()
        await asyncio.gather(*carried, return_exceptions=True)


async def local_pair() -> tuple[LocalEnd, asyncio.StreamReader, asyncio.StreamWriter]:
    accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *ends: accepted.set_result(ends), "127.0.0.1", 0)
    local = await connect_local(server.sockets[0].getsockname()[1])
    reader, writer = await accepted
    server.close()
    return local, reader, writer


async def test_a_stream_that_stands_still_stops_the_local_sender() -> None:
    local, _, writer = await local_pair()
    ours, theirs = stream_pair(window=1 << 16)
    pumping = asyncio.ensure_future(pump(local, ours, Traffic()))
    total = 32 << 20
    writer.write(b"x" * total)
    await eventually(lambda: local._reading_paused)
    assert local._received.size <= HIGH_WATER + (1 << 18)
    received = 0
    writer.write_eof()
    while data := await theirs.read():
        received += len(data)
    assert received == total
    await theirs.write_eof()
    await asyncio.wait_for(pumping, 5)
    writer.close()


async def test_a_local_reader_that_stands_still_stops_the_stream() -> None:
    local, reader, writer = await local_pair()
    ours, theirs = stream_pair(window=1 << 16)
    pumping = asyncio.ensure_future(pump(local, ours, Traffic()))
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(64):
            await theirs.write(b"y" * (1 << 20))
            sent += 1 << 20
        await theirs.write_eof()

    sending = asyncio.ensure_future(send())
    await eventually(lambda: local._writable is not None)
    assert sent < 64 << 20
    received = 0
    while data := await reader.read(1 << 20):
        received += len(data)
    await sending
    assert received == 64 << 20
    writer.close()
    await asyncio.wait_for(pumping, 5)


async def test_cancelling_a_pump_closes_both_sides() -> None:
    local, reader, writer = await local_pair()
    ours, theirs = stream_pair()
    pumping = asyncio.ensure_future(pump(local, ours, Traffic()))
    await asyncio.sleep(0)
    pumping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pumping
    assert await ended(reader)
    with pytest.raises(TransportError):
        await theirs.read()
    writer.close()


async def test_a_connection_that_is_gone_keeps_no_room() -> None:
    """After five minutes of broken rings, 37 of them kept a quarter of a megabyte each."""
    local, _reader, writer = await local_pair()
    assert len(local.get_buffer(-1))
    local.abort()
    await eventually(lambda: local.lost.done())
    assert not len(local.get_buffer(-1))
    writer.close()


async def test_a_worker_that_does_not_answer_is_given_up_and_named(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(worker: str, request: Any, /, **_: Any) -> FakeStream:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(host_module, "OPEN_WITHIN_S", 0.05)
    tunnels = HostTunnels(never, on_failure=lambda *what: ring.failures.append(what))
    (endpoint,) = await tunnels.open(ONE, [B], HOST_SECRET)
    reader, _ = await ring.reconnect(endpoint)
    assert await ended(reader)
    assert ring.failures == [(ONE, B, "no answer within 0 s")]
    await tunnels.close()
