"""Connections that the engines carry on by themselves: how they come to them, and how they are taken from them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import TransportError
from mesh.transport.lane import Stream
from mesh.tunnel import HostTunnels, WorkerTunnel, handover
from mesh.tunnel.handover import make_doors
from mesh.wire.codec import open_reply_decoder, read_frame
from mesh.wire.facts import Epoch
from mesh.wire.messages import Opened, OpenFailed
from tests.eventually import eventually
from tests.fakes.processes import node_id
from tests.net.lanes_kit import over_quic, over_tcp
from tests.net.sealed_kit import Sealed, Server, ask_for
from tests.net.test_tunnel_carriage import At, echo
from tests.net.test_tunnel_carriage import Server as Port

HOST, WORKER = node_id("a"), node_id("b")
ONE, TWO = Epoch(1, HOST), Epoch(2, HOST)
HOST_SECRET, WORKER_SECRET = b"h" * 32, b"w" * 32


@dataclass
class Pair:
    """A host and a worker, whose engines are these tests."""

    directory: Path
    server: Server
    port: Port
    lane: Callable[[], Any] = over_tcp
    opened: int = 0

    def __post_init__(self) -> None:
        self.failures: list[str] = []
        self.connected: list[Epoch] = []
        self.lanes: list[Any] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.host = HostTunnels(self.open, on_failure=lambda *what: self.failures.append(what[2]), door=self.asks)
        self.worker = WorkerTunnel(
            lambda epoch: At(self.port.port),
            lambda peer, epoch: True,
            on_connected=self.connected.append,
            door=self.gives,
        )

    @property
    def asks(self) -> Path:
        return self.directory / "host"

    @property
    def gives(self) -> Path:
        return self.directory / "given"

    async def open(
        self, worker: str, request: Any, /, *, heard: Callable[[Opened], None] = lambda opened: None
    ) -> Stream:
        self.opened += 1
        lane = self.lane()
        ours, theirs = await lane.__aenter__()
        self.lanes.append(lane)
        self.tasks.append(asyncio.ensure_future(self.worker.serve(HOST, request, theirs)))
        reply = await read_frame(ours, open_reply_decoder)
        if isinstance(reply, OpenFailed):
            ours.abort()
            raise TransportError(reply.message)
        heard(reply)
        return ours  # type: ignore[no-any-return]

    async def listen(self) -> int:
        (endpoint,) = await self.host.open(ONE, [WORKER], HOST_SECRET)
        return int(endpoint.rpartition(":")[2])

    async def connected_engines(self) -> tuple[Sealed, Sealed]:
        """What the host's engine and the worker's have."""
        port = await self.listen()
        client, given = await asyncio.gather(ask_for(self.asks, HOST_SECRET, port), self.server.given(WORKER_SECRET))
        assert client is not None
        return client, given

    async def close(self) -> None:
        await self.host.close()
        self.worker.close()
        for lane in self.lanes:
            await lane.__aexit__(None, None, None)
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    directory = tmp_path_factory.mktemp("h")
    server = Server(directory / "given")
    async with Port(echo) as port:
        pair = Pair(directory, server, port)
        try:
            async with asyncio.timeout(60):
                yield pair
        finally:
            await pair.close()
            server.close()


async def test_what_the_engines_say_is_theirs_alone_and_each_has_the_others_key(pair: Pair) -> None:
    client, server = await pair.connected_engines()
    said = os.urandom(300_000)
    await asyncio.gather(client.write(said), read_all(server, said))
    await asyncio.gather(server.write(said), read_all(client, said))
    assert client.send_key != server.send_key
    assert pair.connected == [ONE]
    assert pair.opened == 1
    assert (pair.host.traffic[WORKER].connections, pair.host.traffic[WORKER].up_bytes) == (1, 0)
    assert not pair.worker.is_idle


async def read_all(end: Sealed, said: bytes) -> None:
    assert await end.read_exactly(len(said)) == said


async def test_a_host_engine_that_ends_is_nobodys_failure(pair: Pair) -> None:
    client, server = await pair.connected_engines()
    client.close()
    assert await server.ended()
    server.close()
    await pair.worker.idle()
    assert pair.failures == []


async def test_a_worker_engine_that_ends_is_the_hosts_loss(pair: Pair) -> None:
    client, server = await pair.connected_engines()
    server.close()
    assert await client.ended()
    client.close()
    await eventually(lambda: pair.failures == ["the server behind it closed the connection"])
    await pair.worker.idle()


async def test_a_host_engine_that_does_not_look_is_told_of_by_the_stream(pair: Pair) -> None:
    client, server = await pair.connected_engines()
    pair.host.drop(WORKER)
    assert await client.ended()
    assert await server.ended()
    server.close()
    await pair.worker.idle()


@pytest.mark.parametrize("cut", ["drop", "close"])
async def test_a_worker_that_is_fenced_takes_the_connection_from_its_engine(pair: Pair, cut: str) -> None:
    client, server = await pair.connected_engines()
    if cut == "drop":
        pair.worker.drop(HOST)
    else:
        pair.worker.close()
    assert await server.ended(), "the engine holds a descriptor of its own"
    assert await client.ended()


async def test_a_lost_lane_ends_it_for_both_engines(pair: Pair) -> None:
    client, server = await pair.connected_engines()
    await pair.lanes[0].__aexit__(None, None, None)
    assert await client.ended()
    assert await server.ended()
    await eventually(lambda: len(pair.failures) == 1)


async def test_the_hosts_end_closes_all(pair: Pair) -> None:
    client, server = await pair.connected_engines()
    await pair.host.close()
    assert await client.ended()
    assert await server.ended()
    assert not pair.asks.exists()
    assert pair.failures == []


async def test_without_the_secret_or_a_port_of_ours_nothing_is_opened(pair: Pair) -> None:
    port = await pair.listen()
    for secret, asked in ((b"g" * 32, port), (HOST_SECRET, 1)):
        with pytest.raises(EOFError):
            await ask_for(pair.asks, secret, asked)
    assert pair.opened == 0


async def test_who_says_nothing_is_not_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.tunnel.host.SECRET_WITHIN_S", 0.05)
    await pair.listen()
    with pytest.raises(EOFError):
        await ask_for(pair.asks, b"h" * 3, 7)


async def over_the_port(pair: Pair) -> None:
    """The engine was sent to the port, and finds what was opened for it there."""
    port = await pair.listen()
    assert await ask_for(pair.asks, HOST_SECRET, port) is None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HOST_SECRET + b"through the port")
    assert await reader.readexactly(16) == b"through the port"
    assert pair.opened == 1
    writer.close()


async def test_a_worker_whose_engine_has_no_door_is_reached_through_its_port(pair: Pair) -> None:
    pair.gives.unlink()
    await over_the_port(pair)


async def test_over_quic_the_bytes_go_through_the_ports(pair: Pair) -> None:
    pair.lane = over_quic
    await over_the_port(pair)


async def test_what_was_opened_for_a_port_that_is_never_used_is_closed(pair: Pair) -> None:
    pair.gives.unlink()
    port = await pair.listen()
    for _ in range(2):
        assert await ask_for(pair.asks, HOST_SECRET, port) is None
    await eventually(lambda: len(pair.worker._carrying) == 1)
    await pair.host.close()
    await pair.worker.idle()


async def test_bytes_that_came_too_early_are_not_lost_to_an_engine() -> None:
    async with over_tcp() as (ours, theirs):
        await ours.write(b"early")
        assert await theirs.read(1) == b"e"
        with pytest.raises(TransportError, match="handed over"):
            theirs.hand_over()  # type: ignore[attr-defined]
        assert await theirs.read_exactly(4) == b"arly"


def test_doors_are_in_a_directory_that_is_ours_alone(tmp_path: Path) -> None:
    doors = make_doors(tmp_path / "state")
    assert doors is not None
    directory = doors.of_host.parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert make_doors(tmp_path / "other").of_host != doors.of_host  # type: ignore[union-attr]
    make_doors(tmp_path / "other").remove()  # type: ignore[union-attr]
    assert doors.env_of_rpc_server.keys() == {"MESH_LIBCRYPTO", "MESH_RPC_HANDOVER", "MESH_RPC_DOOR"}
    doors.remove()
    assert not directory.exists()

    directory.mkdir(mode=0o755)
    assert make_doors(tmp_path / "state") is None, "others could ask there"
    directory.rmdir()


def test_without_a_libcrypto_there_are_no_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_libcrypto", lambda: None)
    assert make_doors(tmp_path) is None
