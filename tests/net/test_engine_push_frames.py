"""What a server takes from its peers: what its client expects of them, and not a byte more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
import time
from pathlib import Path

import psutil
import pytest

from mesh.engine.cache import Engine
from tests.eventually import eventually
from tests.net.engine_kit import write_model
from tests.net.push_kit import (
    MIB,
    PUSH_CONNECT,
    PUSH_EXPECT,
    PUSH_HELLO,
    PUSH_OPEN,
    PUSH_SEND,
    Memory,
    Server,
    rpc_server,
)
from tests.net.rpc_client import DEVICE_COUNT, Client
from tests.net.test_engine_door import SECRET, closed
from tests.ports import free_port

pytestmark = pytest.mark.engine

OLD, NEW = 11, 12
"""Generations: what a client calls itself."""


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", engine, layers=1, width=64)[0]


async def is_well(server: Server) -> None:
    client = await server.client()
    assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)
    assert server.process.handle.returncode is None


async def is_hung_up(client: Client, within: float = 3) -> None:
    assert await closed(client.reader, within) == b""


async def test_pushes_wait_for_their_turn_and_turns_for_their_pushes(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        early, late = os.urandom(512), os.urandom(1024)
        peer.push(0, early)
        memory.expect(0, 512)
        assert await memory.read(512) == early
        memory.expect(1, 1024, at=512)
        reading = asyncio.create_task(memory.read(1536))
        peer.push(1, late[:100], size=1024)
        await asyncio.sleep(0)
        assert not reading.done()
        peer.writer.write(late[100:])
        assert await reading == early + late


async def test_several_peers_are_kept_apart(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peers = [await server.peer(NEW, channel) for channel in range(3)]
        for n, peer in enumerate(peers):
            assert await peer.accepted()
            peer.push(0, bytes([n]) * 64)
        for n in (2, 0, 1):
            memory.expect(0, 64, channel=n, at=64 * n)
        assert await memory.read(192) == b"".join(bytes([n]) * 64 for n in range(3))


async def test_a_peer_displaces_no_client_and_may_come_before_it(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        peer = await server.peer(NEW)
        client = await server.client()
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)
        client.tell(PUSH_OPEN, struct.pack("<Q", NEW))
        assert await peer.accepted()
        second = await server.peer(NEW, 1)
        assert await second.accepted()
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)


@pytest.mark.parametrize("how", ["same client", "next client"])
async def test_nothing_of_an_older_generation_is_taken(engine: Engine, model: Path, how: str) -> None:
    async with rpc_server(engine, model) as server:
        client = await server.client(OLD)
        old = await server.peer(OLD)
        assert await old.accepted()
        old.push(0, b"o" * 64)
        if how == "same client":
            client.tell(PUSH_OPEN, struct.pack("<Q", NEW))
        else:
            client = await server.client(NEW)
        assert await old.ended()
        memory = await Memory.of(client, 4096)
        memory.write(b"." * 64)
        new = await server.peer(NEW)
        assert await new.accepted()
        memory.expect(0, 64)
        reading = asyncio.create_task(memory.read(64))
        old.push(0, b"o" * 64)
        late = await server.peer(OLD)
        assert not await late.accepted()
        assert not reading.done()
        new.push(0, b"n" * 64)
        assert await reading == b"n" * 64


async def test_a_channel_has_one_source(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        first = await server.peer(NEW)
        assert await first.accepted()
        second = await server.peer(NEW)
        assert await second.ended()
        first.push(0, b"1" * 64)
        memory.expect(0, 64)
        assert await memory.read(64) == b"1" * 64


@pytest.mark.parametrize(
    ("number", "size", "channel"), [(1, 64, 0), (0, 63, 0), (0, 65, 0), (0, 64, 1), (2**64 - 1, 64, 0)]
)
async def test_what_was_not_expected_so_is_not_written(
    engine: Engine, model: Path, number: int, size: int, channel: int
) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        peer.push(0, b"x" * 64)
        memory.expect(number, size, channel)
        await is_hung_up(memory.client)
        assert await peer.ended()
        await is_well(server)


@pytest.mark.parametrize("command", [PUSH_SEND, PUSH_EXPECT])
async def test_a_push_stays_inside_a_buffer(engine: Engine, model: Path, command: int) -> None:
    async with rpc_server(engine, model) as server:
        for handle, at, size in [(0, 4033, 64), (0, -1, 64), (0, 0, 2**64 - 1), (0, 0, 0), (8, 0, 64)]:
            memory = await Memory.of(await server.client(NEW), 4096)
            body = struct.pack("<IQQQQB", 0, 0, memory.handle + handle, memory.base + at, size, 0)
            memory.client.tell(command, body)
            await is_hung_up(memory.client)
        await is_well(server)


async def test_what_comes_early_is_bounded(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        client = await server.client(NEW)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        before = psutil.Process(server.process.handle.pid).memory_info().rss
        for n in range(100):
            peer.push(n, bytes(MIB))
        transport = peer.writer.transport
        held = 0

        def stopped_taking() -> bool:
            nonlocal held
            last, held = held, transport.get_write_buffer_size()
            return held == last and held < 60 * MIB

        await eventually(stopped_taking, within=20)
        assert (
            held > 8 * MIB
        )  # the rest is in the server, up to its bound, and in what the kernel buffers of both ends hold
        assert psutil.Process(server.process.handle.pid).memory_info().rss - before < 80 * MIB
        memory = await Memory.of(client, MIB)
        for n in range(100):
            memory.expect(n, MIB)
        assert await memory.read(64) == bytes(64)


async def test_a_push_beyond_the_bound_is_taken_when_it_is_expected(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 70 * MIB)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        peer.push(0, b"z" * (70 * MIB))
        memory.expect(0, 70 * MIB)
        assert await memory.read(64, at=70 * MIB - 64) == b"z" * 64


async def test_a_dead_peer_ends_the_wait(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        peer.push(0, b"half", size=64)
        memory.expect(0, 64)
        await asyncio.sleep(0.05)
        peer.writer.transport.abort()
        await is_hung_up(memory.client, within=0.5)
        await is_well(server)


async def test_a_dead_client_ends_the_wait(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        memory.expect(0, 64)
        await asyncio.sleep(0.05)
        memory.client.writer.close()
        assert await peer.ended(within=1)
        await is_well(server)


async def test_a_new_client_ends_the_wait_of_a_half_open_one(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        memory = await Memory.of(await server.client(OLD), 4096)
        peer = await server.peer(OLD)
        assert await peer.accepted()
        memory.expect(0, 64)
        started = time.monotonic()
        await is_well(server)
        assert time.monotonic() - started < 1


async def test_a_push_that_never_comes_is_waited_for_until_a_deadline(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model, MESH_RPC_PUSH_WITHIN_S="1") as server:
        memory = await Memory.of(await server.client(NEW), 4096)
        peer = await server.peer(NEW)
        assert await peer.accepted()
        memory.expect(0, 64)
        started = time.monotonic()
        await is_hung_up(memory.client, within=5)
        assert 0.9 < time.monotonic() - started < 3
        await eventually(lambda: "mesh-push-lost 0 0 it did not come in time" in server.process.text)


async def test_a_source_says_its_secret_and_pushes_what_it_was_told_to(engine: Engine, model: Path) -> None:
    heard = bytearray()
    arrived = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.readexactly(32 + 9 + 12))
        writer.write(b"\1")
        heard.extend(await reader.readexactly(16 + 64))
        arrived.set()
        writer.close()

    destination = await asyncio.start_server(peer, "127.0.0.1", 0)
    port = destination.sockets[0].getsockname()[1]
    async with destination, rpc_server(engine, model, MESH_RPC_PEERS=f"next=127.0.0.1:{port}") as server:
        client = await server.client(NEW)

        async def connect(name: bytes, channel: int) -> str:
            answer = await client.ask(PUSH_CONNECT, struct.pack("<QI128s", NEW, channel, name))
            return answer.rstrip(b"\0").decode()

        assert await connect(b"nobody", 0) == "this server was told no way to it"
        assert await connect(b"", 0) == "this server was told no way to it"
        assert await connect(b"n" * 128, 0) == "this server was told no way to it"
        assert await connect(b"next", 7) == ""
        assert "two of one number" in await connect(b"next", 7)
        memory = await Memory.of(client, 4096)
        data = os.urandom(64)
        memory.write(data)
        client.tell(PUSH_SEND, memory.request(5, 64, channel=7))
        await asyncio.wait_for(arrived.wait(), 5)
        hello = struct.pack("<BQQI", PUSH_HELLO, 12, NEW, 7)
        assert bytes(heard) == SECRET + hello + struct.pack("<QQ", 5, 64) + data
        client.tell(PUSH_SEND, memory.request(6, 64, channel=7))  # to one who has gone: not this server's end
        client.tell(PUSH_SEND, memory.request(0, 64, channel=8))  # to nobody
        assert await memory.read(64) == data


async def test_a_destination_that_nobody_listens_at_is_no_channel(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model, MESH_RPC_PEERS=f"next=127.0.0.1:{free_port()}") as server:
        client = await server.client(NEW)
        answer = await client.ask(PUSH_CONNECT, struct.pack("<QI128s", NEW, 0, b"next"))
        assert answer.rstrip(b"\0") == b"it cannot be connected to"


# Whatever a peer or a client says in these words, the server refuses or hangs up, and serves the next client.
async def test_malformed_pushes_do_not_harm_the_server(engine: Engine, model: Path) -> None:
    chance = random.Random(5)
    numbers = [0, 1, 63, 64, 2**31, 2**32, 2**63, 2**64 - 1]
    async with rpc_server(engine, model) as server:
        for _ in range(60):
            memory = await Memory.of(await server.client(NEW), 4096)
            for channel in range(chance.randrange(3)):
                peer = await server.peer(NEW, chance.choice([channel, 0]))
                if chance.random() < 0.8:
                    await peer.accepted()
                for _ in range(chance.randrange(4)):
                    data = chance.randbytes(chance.choice([0, 1, 64, 64, 5000]))
                    peer.push(chance.choice(numbers), data, chance.choice([len(data), len(data), *numbers]))
                if chance.random() < 0.3:
                    peer.writer.write(chance.randbytes(200))
                if chance.random() < 0.5:
                    peer.writer.transport.abort()
            for _ in range(chance.randrange(1, 4)):
                command = chance.choice([PUSH_OPEN, PUSH_CONNECT, PUSH_SEND, PUSH_EXPECT, PUSH_HELLO])
                body = chance.choice([
                    memory.request(chance.choice([0, 1]), chance.choice([64, 1, *numbers]) % 2**64),
                    struct.pack("<IQQQQB", *(chance.choice(numbers) % 2**32 for _ in range(5)), chance.randrange(2)),
                    chance.randbytes(chance.choice([0, 8, 36, 140])),
                ])  # fmt: skip
                length = chance.choice([len(body), len(body), len(body), *numbers])
                with contextlib.suppress(ConnectionError):
                    memory.client.tell(command, body, length)
            assert server.process.handle.returncode is None
        await is_well(server)


async def test_garbage_for_a_hello_is_let_go(engine: Engine, model: Path) -> None:
    async with rpc_server(engine, model) as server:
        await server.client(NEW)
        for hello in (
            struct.pack("<BQQI", PUSH_HELLO, 13, NEW, 0) + b"x",
            struct.pack("<BQQI", PUSH_HELLO, 2**64 - 1, NEW, 0),
            struct.pack("<BQQI", PUSH_HELLO, 12, 0, 0),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(SECRET + hello)
            assert await closed(reader, 3) == b""
            writer.close()
        await is_well(server)
