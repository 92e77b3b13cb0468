"""Who may speak to a worker's server, what nonsense does to it, and how a host ends when a worker is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.engine.cache import Engine
from mesh.engine.commands import llama_server_command, rpc_server_command
from tests.net.engine_kit import Process, ask, greedy, running, serving, write_model
from tests.net.rpc_client import DEVICE_COUNT, HELLO, HELLO_ANSWER, Client
from tests.ports import free_port
from tests.unit.test_engine_commands import layout

pytestmark = pytest.mark.engine

IDENTITY = "f" * 64
SECRET = os.urandom(32)
LOAD_LOCAL = 18
ITEM = struct.Struct("<64sII4QQQQQ")
"""name, type, shard, shape, size, sample, buffer, data"""


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", engine, layers=3)[0]


@dataclass
class Worker:
    port: int
    process: Process

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def admitted(self) -> Client:
        reader, writer = await self.connect()
        client = Client(reader, writer)
        writer.write(SECRET)
        assert len(await client.ask(HELLO, bytes(24))) == HELLO_ANSWER
        return client


async def load(client: Client, body: bytes) -> str:
    """What the server says to an order to load; nothing when it obeyed."""
    return (await client.ask(LOAD_LOCAL, body))[8:].rstrip(b"\0").decode()


@contextlib.asynccontextmanager
async def guarded(engine: Engine, model: Path) -> AsyncIterator[Worker]:
    port = free_port()
    launch = rpc_server_command(engine, port, threads=1, model_files=[model], fingerprint=IDENTITY, rpc_secret=SECRET)
    async with running(launch) as process:
        await process.says("mesh-listening")
        yield Worker(port, process)


async def closed(reader: asyncio.StreamReader, within: float) -> bytes:
    """What came before the other side closed."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), within)
    return b""


OPENINGS = {"zeros": bytes(32), "almost": SECRET[:-1] + b"\0", "a greeting": struct.pack("<BQ", HELLO, 24) + bytes(24)}


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
async def test_without_the_secret_nothing_is_answered(engine: Engine, model: Path, opening: bytes) -> None:
    async with guarded(engine, model) as worker:
        reader, writer = await worker.connect()
        writer.write(opening + struct.pack("<BQ", HELLO, 24) + bytes(24))
        assert await closed(reader, 3) == b""
        await worker.admitted()


async def test_a_silent_connection_blocks_nobody_and_is_let_go(engine: Engine, model: Path) -> None:
    async with guarded(engine, model) as worker:
        silent = [await worker.connect() for _ in range(40)]
        client = await asyncio.wait_for(worker.admitted(), 2)
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)
        for reader, _ in silent:
            assert await closed(reader, 8) == b""


async def test_a_new_client_displaces_a_half_open_one(engine: Engine, model: Path) -> None:
    async with guarded(engine, model) as worker:
        first = await worker.admitted()
        second = await asyncio.wait_for(worker.admitted(), 2)
        assert await closed(first.reader, 2) == b""
        assert await second.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)


async def test_a_secret_that_is_none_is_an_error_and_not_an_open_door(engine: Engine, model: Path) -> None:
    launch = rpc_server_command(
        engine, free_port(), threads=1, model_files=[model], fingerprint=IDENTITY, rpc_secret=SECRET
    )
    for bad in ("00", "zz" * 16, "0" * 33):
        async with running(type(launch)(launch.argv, {"MESH_RPC_SECRET": bad})) as process:
            assert await process.ended() == 1
            assert "MESH_RPC_SECRET must be" in process.text


async def test_a_load_stays_inside_its_buffer(engine: Engine, model: Path) -> None:
    async with guarded(engine, model) as worker:
        client = await worker.admitted()
        handle, base = await client.buffer(512)
        shape = (128, 1, 1, 1)
        good = (b"blk.0.attn_norm.weight", 0, 0, *shape, 512, 0)

        async def load_to(*item: int) -> str:
            return await load(client, IDENTITY.encode() + ITEM.pack(*good, *item))

        assert "has other contents" in await load_to(handle, base)  # all is well but the sample
        for item in [(handle, base + 1), (handle, base - 1), (handle, 2**64 - 1), (handle, 0)]:
            assert "outside of its buffer" in await load_to(*item)
        for item in [(0, base), (handle + 8, base)]:
            assert "buffer that does not exist" in await load_to(*item)
        huge = (b"blk.0.attn_norm.weight", 0, 0, *shape, 2**64 - 1, 0, handle, base)
        assert "outside of its buffer" in await load(client, IDENTITY.encode() + ITEM.pack(*huge))


# Whatever bytes follow the command, the server refuses in words or hangs up, and serves the next client.
async def test_malformed_loads_do_not_harm_the_server(engine: Engine, model: Path) -> None:
    chance = random.Random(7)
    async with guarded(engine, model) as worker:
        client = await worker.admitted()
        handle, base = await client.buffer(4096)
        for _ in range(300):
            fields = [
                chance.choice([b"blk.0.attn_norm.weight", b"output.weight", b"A" * 64, chance.randbytes(64), b""]),
                chance.choice([0, 1, 2, 39, 2**31, 2**32 - 1]),
                chance.choice([0, 1, 2**32 - 1]),
                *(chance.choice([0, 1, 128, 2**32, 2**63, 2**64 - 1]) for _ in range(4)),
                chance.choice([0, 512, 4096, 2**40, 2**64 - 1]),
                chance.getrandbits(64),
                chance.choice([handle, handle, handle + 8, 0, chance.getrandbits(64)]),
                chance.choice([base, base + 4000, base - 1, 0, 2**64 - 1]),
            ]
            body = chance.choice([IDENTITY.encode(), IDENTITY.encode(), b"\xff" * 64]) + ITEM.pack(*fields)
            cut = chance.choice([len(body), len(body), len(body) - 1, 63, 65, 0])
            assert await load(client, body[:cut]) != ""
        for length in (2**25 + 1, 2**40, 2**64 - 1):  # nothing is allocated on a client's word
            client = await worker.admitted()
            client.tell(LOAD_LOCAL, b"", length)
            assert await closed(client.reader, 3) == b""
        client = await worker.admitted()
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)
        assert worker.process.handle.returncode is None


async def test_a_host_whose_worker_is_killed_ends_at_once_and_names_it(engine: Engine, model: Path) -> None:
    async with guarded(engine, model) as worker:
        port = free_port()
        endpoint = f"127.0.0.1:{worker.port}"
        launch = llama_server_command(engine, layout([1, 2]), model, port, [endpoint], threads=1, rpc_secret=SECRET)
        async with running(launch) as host:
            await serving(host, port)
            worker.process.handle.kill()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(ask, port, "/completion", {"prompt": "hi", "n_predict": 4})
            assert await host.ended(within=5) == 75
            assert any(line.startswith(f"mesh-rpc-lost {endpoint} ") for line in host.lines), host.text


async def test_a_host_that_finds_nobody_or_is_not_let_in_ends_with_a_line(engine: Engine, model: Path) -> None:
    async with guarded(engine, model) as worker:
        for port, why in ((free_port(), "cannot connect"), (worker.port, "the handshake failed")):
            launch = llama_server_command(
                engine,
                layout([1, 2]),
                model,
                free_port(),
                [f"127.0.0.1:{port}"],
                threads=1,
                rpc_secret=bytes(32),
            )
            async with running(launch) as host:
                assert await host.ended(within=10) == 75
                assert any(line.startswith(f"mesh-rpc-lost 127.0.0.1:{port} {why}") for line in host.lines), host.text


async def test_a_worker_outlives_its_hosts(engine: Engine, model: Path) -> None:
    async with guarded(engine, model) as worker:
        texts = []
        for _ in range(2):
            port = free_port()
            launch = llama_server_command(
                engine, layout([1, 2]), model, port, [f"127.0.0.1:{worker.port}"], threads=1, rpc_secret=SECRET
            )
            async with running(launch) as host:
                await serving(host, port)
                texts.append(await greedy(port))
        assert texts[0] == texts[1]
        assert worker.process.handle.returncode is None
