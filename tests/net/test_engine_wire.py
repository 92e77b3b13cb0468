"""What the engine says over the network: little, rarely, nothing twice, and nonsense does no harm.

Real servers on loopback; what crosses between them goes through counting relays.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh.engine.cache import Engine
from mesh.engine.commands import llama_server_command, rpc_server_command
from mesh.models.demo import PRESETS, write_demo
from tests.net.engine_kit import Process, Relay, ask, relayed, running, serving, write_model
from tests.net.rpc_client import (
    ALLOC_BUFFER,
    DEVICE_COUNT,
    GET_TENSOR,
    GRAPH_COMPUTE,
    GRAPH_RECOMPUTE,
    HELLO,
    SET_TENSOR,
    Client,
    sequence,
)
from tests.ports import free_port
from tests.unit.test_engine_commands import layout

pytestmark = pytest.mark.engine

IDENTITY = "f" * 64
SECRET = b"thirty-two bytes of some secret."
CONTEXT = PRESETS["tiny"].n_ctx
WORDS = ("river", "stone", "winter", "letter", "engine", "garden", "number", "window", "silver", "morning", "paper")


@pytest.fixture(scope="module")
def tiny(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers; every one of them decides what it says."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_demo(path, engine.vocab("llama-spm"), preset="tiny")
    return path


@pytest.fixture(scope="module")
def noise(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: its activations do not compress."""
    return write_model(tmp_path_factory.mktemp("noise") / "m.gguf", engine, layers=4, width=256)[0]


@dataclass
class Server:
    """A llama-server that answers, with or without workers."""

    port: int
    host: Process
    relays: list[Relay]

    async def say(self, prompt: str, words: int = 8, **options: Any) -> str:
        body = {"prompt": prompt, "n_predict": words, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return str((await asyncio.to_thread(ask, self.port, "/completion", body | options))["content"])

    def count(self) -> list[tuple[int, int, int]]:
        """Bytes up, bytes down and turns of each worker so far."""
        return [(relay.up, relay.down, relay.turns) for relay in self.relays]

    async def cost(self, prompt: str, words: int) -> list[tuple[int, int, int]]:
        """What an answer takes of each worker's link."""
        before = self.count()
        await self.say(prompt, words)
        return [(a - x, b - y, c - z) for (a, b, c), (x, y, z) in zip(self.count(), before, strict=True)]


async def listening(worker: Process) -> None:
    await worker.says("mesh-listening")


@contextlib.asynccontextmanager
async def ring(
    engine: Engine, file: Path, counts: Sequence[int], parallel: int = 1, wire_dtype: str = "f32"
) -> AsyncIterator[Server]:
    """A host and its workers, which push to each other, serving; a host alone for one count."""
    ports = [free_port() for _ in counts[1:]]
    mode = "split" if ports else "solo"
    plan = layout(list(counts), mode=mode, ctx_size=CONTEXT, parallel=parallel)
    async with contextlib.AsyncExitStack() as stack:
        for n, port in enumerate(ports):
            peers = {plan.workers[n + 1].id: f"127.0.0.1:{ports[n + 1]}"} if n + 1 < len(ports) else {}
            launch = rpc_server_command(
                engine, port, threads=1, model_files=[file], fingerprint=IDENTITY, rpc_secret=SECRET, peers=peers
            )
            await listening(await stack.enter_async_context(running(launch)))
        relays = await stack.enter_async_context(relayed(ports))
        endpoints = [f"127.0.0.1:{relay.port}" for relay in relays]
        port = free_port()
        launch = llama_server_command(
            engine, plan, file, port, endpoints, threads=1, rpc_secret=SECRET, wire_dtype=wire_dtype
        )
        host = await stack.enter_async_context(running(launch))
        await serving(host, port)
        yield Server(port, host, relays)


def text(words: int, salt: int = 0) -> str:
    chance = random.Random(salt)
    return " ".join(chance.choice(WORDS) for _ in range(words))


async def conversation(server: Server) -> list[str]:
    """Prompts of every size, taking turns, on one slot and on several, some with what the slot remembers."""
    said = [await server.say(text(5), 12), await server.say(text(700), 6), await server.say(text(40, 1), 6)]
    for turn in range(3):  # two conversations on one slot, each going on
        said += [await server.say(text(60 + 9 * turn, salt), 6, cache_prompt=True, id_slot=0) for salt in (2, 3)]
    said += await asyncio.gather(*(server.say(text(20 + 13 * n, n), 16) for n in range(4)))
    body = {"input": [text(30, 7), text(3, 8)]}
    vectors = (await asyncio.to_thread(ask, server.port, "/v1/embeddings", body))["data"]
    return [*said, *(repr([round(x, 5) for x in vector["embedding"]]) for vector in vectors)]


@pytest.fixture(scope="module")
def expected(engine: Engine, tiny: Path) -> list[str]:
    async def alone() -> list[str]:
        async with ring(engine, tiny, [4], parallel=2) as server:
            return await conversation(server)

    return asyncio.run(alone())


@pytest.mark.parametrize("counts", [(0, 4), (2, 1, 1), (1, 1, 1, 1), (0, 3, 1)])
async def test_a_ring_says_what_one_machine_says(
    engine: Engine, tiny: Path, expected: list[str], counts: tuple[int, ...]
) -> None:
    async with ring(engine, tiny, counts, parallel=2) as server:
        assert await conversation(server) == expected


async def test_a_worker_is_asked_seldom_and_while_serving_for_results_only(engine: Engine, tiny: Path) -> None:
    async with ring(engine, tiny, (1, 1, 2)) as server:
        await server.say(text(9), 1)
        assert [relay.connections for relay in server.relays] == [1, 1]
        assert all(turns <= 12 for _, _, turns in server.count()), server.count()
        for words in (4, 17, 33, 90, 301):  # batch shapes that did not occur before
            for _, _, turns in await server.cost(text(words, words), 1):
                assert turns <= 1
        for _, _, turns in await server.cost(text(9), 12):
            assert turns <= 12


async def test_a_token_costs_its_activation_and_little_more(engine: Engine, noise: Path) -> None:
    activation = 256 * 4
    async with ring(engine, noise, (2, 1, 1)) as server:
        await server.say(text(9), 20)  # whatever graphs there are, they are known now
        few, many = await server.cost(text(9), 4), await server.cost(text(9), 20)
        for (up4, down4, _), (up20, down20, _) in zip(few, many, strict=True):
            assert (up20 - up4) / 16 <= activation + 1024
            assert (down20 - down4) / 16 <= activation + 1024


async def test_a_long_context_costs_no_more_per_token(engine: Engine, tiny: Path) -> None:
    async with ring(engine, tiny, (2, 2)) as server:
        per_token = []
        for prompt in (text(30), text(850)):
            await server.say(prompt, 20)
            few, many = await server.cost(prompt, 4), await server.cost(prompt, 20)
            per_token.append((many[0][0] - few[0][0]) / 16)
        assert per_token[1] - per_token[0] <= 200, per_token


async def test_a_long_prompt_sends_its_activations_and_little_more(engine: Engine, noise: Path) -> None:
    async with ring(engine, noise, (2, 1, 1)) as server:
        prompt = text(400)
        tokens = len((await asyncio.to_thread(ask, server.port, "/tokenize", {"content": prompt}))["tokens"])
        for up, _, _ in await server.cost(prompt, 1):
            assert up <= 1.1 * tokens * 256 * 4 + 20_000


async def test_shapes_that_come_again_are_not_sent_again(engine: Engine, tiny: Path) -> None:
    prompts = [text(words, words) for words in (3, 70, 31, 12)]
    async with ring(engine, tiny, (1, 3)) as server:
        first = [await server.cost(prompt, 3) for prompt in prompts]
        said = [await server.say(prompt, 3) for prompt in prompts]
        again = [await server.cost(prompt, 3) for prompt in prompts]
        for (costs,), (later,) in zip(first, again, strict=True):
            assert later[0] <= costs[0] - 250, (first, again)
        # Far more shapes than either side remembers, twice: what was forgotten is sent, and right.
        for _ in range(2):
            for words in range(4, 64, 2):
                await server.say(text(words, words), 1)
            assert [await server.say(prompt, 3) for prompt in prompts] == said


TENSOR = struct.Struct("<QIQ4I4II64xi80xQQQ64xi")
"""A tensor as it is sent, without parameters, sources and name."""
F32 = 0


def tensor(handle: int, base: int, n: int) -> bytes:
    return TENSOR.pack(1, F32, handle, n, 1, 1, 1, 4, 4 * n, 4 * n, 4 * n, 0, 0, 0, 0, base, 0)


@dataclass
class Worker:
    port: int
    process: Process

    async def client(self) -> Client:
        """A client past the door; the server must be there, and well."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(SECRET)
        client = Client(reader, writer)
        await client.ask(HELLO, bytes(24))
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)
        assert self.process.handle.returncode is None, self.process.text
        return client


@pytest.fixture
async def worker(engine: Engine, tiny: Path) -> AsyncIterator[Worker]:
    port = free_port()
    launch = rpc_server_command(engine, port, threads=1, model_files=[tiny], fingerprint=IDENTITY, rpc_secret=SECRET)
    async with running(launch) as process:
        await listening(process)
        yield Worker(port, process)


async def hung_up(client: Client) -> bool:
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(client.reader.read(), 5) == b""
    return True


async def test_what_is_sent_coded_arrives(worker: Worker) -> None:
    client = await worker.client()
    handle, base = await client.buffer(4096)
    place = tensor(handle, base, 1024)
    head = place + struct.pack("<BQ", 0, 0)
    coded = sequence(head + b"\1\2\3\4", 4000, 4) + sequence(b"end.", 88, 92 + 0) + sequence(b"")
    client.tell_coded(SET_TENSOR, coded, len(head) + 4096)
    data = await client.ask(GET_TENSOR, place + struct.pack("<QQB", 0, 4096, 0))
    assert data == b"\1\2\3\4" * 1001 + b"end." + (b"\1\2\3\4" * 1001 + b"end.")[-92:][:88]


# Whatever a coding says, it is written nowhere but into the message it announced: the server hangs up, or obeys.
async def test_malformed_codings_do_no_harm(worker: Worker) -> None:
    chance = random.Random(11)
    client = await worker.client()
    handle, base = await client.buffer(8192)
    head = tensor(handle, base, 512) + struct.pack("<BQ", 0, 0)
    good = sequence(head + bytes(4), 1000, 1) + sequence(b"abcdefgh", 1036, 8) + sequence(b"")
    size = len(head) + 4 + 1000 + 8 + 1036
    for n in range(150):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            # past the tensor: a wrong one is upstream's business
            bad[chance.randrange(len(head) + 3, len(bad))] = chance.choice([0, 1, 15, 0x7F, 0x80, 0xF0, 0xFF])
        cut = chance.choice([len(bad), len(bad), chance.randrange(len(head) + 8, len(bad))])
        claimed = size if n % 3 else chance.choice([size - 1, size + 1, 2 * size])
        client.tell_coded(SET_TENSOR, bytes(bad[:cut]), claimed)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await client.ask(DEVICE_COUNT, b"")
            continue
        client = await worker.client()
        handle, base = await client.buffer(8192)
        head = tensor(handle, base, 512) + struct.pack("<BQ", 0, 0)
        good = sequence(head + bytes(4), 1000, 1) + sequence(b"abcdefgh", 1036, 8) + sequence(b"")
    for length, size in [(2**62, 2**63), (1000, 2**62), (2**40, 10), (100, 10)]:
        client = await worker.client()
        client.tell_coded(SET_TENSOR, b"", size)
        client.writer.write(struct.pack("<BQQ", SET_TENSOR, length | 1 << 63, size))
        assert await hung_up(client)
    await worker.client()


# Wherever a tensor claims to lie and however large it claims to be, nothing outside of the buffer is read or written.
async def test_malformed_tensors_do_no_harm(worker: Worker) -> None:
    chance = random.Random(5)
    client = await worker.client()
    for n in range(300):
        handle, base = await client.buffer(4096)
        shape = [chance.choice([0, 1, 16, 1024, 2**31, 2**32 - 1]) for _ in range(4)]
        strides = [chance.choice([0, 4, 64, 4096, 2**32 - 1]) for _ in range(4)]
        data = chance.choice([base, base, base + 4000, base - 1, base + 4097, 0, 2**64 - 1])
        kind = chance.choice([F32, F32, 8, 1000, 2**32 - 1])
        op = chance.choice([0, 0, 0, 2**32 - 1])
        place = TENSOR.pack(1, kind, handle, *shape, *strides, op, 0, 0, 0, data, 0)
        offset, size = (chance.choice([0, 4, 4096, 4097, 2**40, 2**64 - 4]) for _ in range(2))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            if n % 2:
                client.tell(SET_TENSOR, place + struct.pack("<BQ", 0, offset) + bytes(min(size, 5000)))
                await client.ask(DEVICE_COUNT, b"")
            else:
                await client.ask(GET_TENSOR, place + struct.pack("<QQB", offset, size, 0))
            continue
        client = await worker.client()
    assert await client.ask(ALLOC_BUFFER, struct.pack("<IQ", 0, 2**64 - 1)) == bytes(24)
    await worker.client()


GRAPH = struct.Struct("<IIIIIQ")
"""device, place, base, nodes, tensors, digest."""
NO_BASE = 2**32 - 1


# A graph that is not the one the host means is never computed: the server hangs up.
@pytest.mark.parametrize(
    "message",
    [
        b"",
        GRAPH.pack(0, 0, NO_BASE, 0, 0, 0),
        GRAPH.pack(1, 0, NO_BASE, 1, 1, 0) + bytes(304),
        GRAPH.pack(0, 16, NO_BASE, 1, 1, 0) + bytes(304),
        GRAPH.pack(0, 0, 0, 1, 1, 0) + bytes(304),
        GRAPH.pack(0, 0, 99, 1, 1, 0) + bytes(304),
        GRAPH.pack(0, 0, NO_BASE, 1, 1, 7) + bytes(304),
        GRAPH.pack(0, 0, NO_BASE, 1, 1, 0) + bytes(303),
        GRAPH.pack(0, 0, NO_BASE, 2**32 - 1, 2**32 - 1, 0) + bytes(304),
    ],
)
async def test_a_graph_that_is_not_the_hosts_is_not_computed(worker: Worker, message: bytes) -> None:
    client = await worker.client()
    client.tell(GRAPH_COMPUTE, message)
    assert await hung_up(client)
    await worker.client()


@pytest.mark.parametrize("order", [(0, 0), (0, 15), (0, 16), (1, 0), (0, 2**32 - 1)])
async def test_a_graph_that_nobody_sent_is_not_computed(worker: Worker, order: tuple[int, int]) -> None:
    client = await worker.client()
    client.tell(GRAPH_RECOMPUTE, struct.pack("<II", *order))
    assert await hung_up(client)
    await worker.client()
