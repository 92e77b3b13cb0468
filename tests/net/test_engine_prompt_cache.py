"""Conversations that lost their slot are kept where their layers are: to come back costs next to nothing.

The witness for the text is one process with the engine's own cache in host memory; what crosses the network is counted
by relays. ``--no-repack`` as in the tests of architectures: a process would round differently from itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from mesh.engine.cache import Engine
from mesh.engine.commands import Launch, llama_server_command, rpc_server_command
from mesh.wire.facts import Layout
from tests.fakes.architectures import KINDS, LAYERS, VOCAB, WIDTH, write_architecture
from tests.net.cli_kit import a_place
from tests.net.engine_kit import Process, Relay, ask, relayed, running, serving
from tests.net.push_kit import Memory, rpc_server, tensor
from tests.net.rpc_client import DEVICE_COUNT, SET_TENSOR
from tests.net.test_engine_door import IDENTITY, SECRET, closed
from tests.ports import free_port
from tests.unit.test_engine_commands import IDS, layout

pytestmark = pytest.mark.engine

MIB = 1 << 20
KV = 512
"""Bytes of one layer's cache for one token."""
ACTIVATION = 4 * WIDTH
LONG, WORDS = 1000, 8
COPY_BYTES = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            write_architecture(path, name, KINDS["F16"])
        return path

    return model


@dataclass
class Conversation:
    """Tokens so far. Two of them have nothing in common."""

    tokens: list[int]

    @classmethod
    def of(cls, seed: int, n: int = LONG) -> Conversation:
        return cls([1, *np.random.default_rng(seed).integers(300, VOCAB, n).tolist()])

    def goes_on(self, seed: int) -> None:
        self.tokens += np.random.default_rng(1000 + seed).integers(300, VOCAB, 12).tolist()


@dataclass(frozen=True)
class Turn:
    """An answer; how many tokens of the prompt were computed for it, and what crossed each worker's link."""

    said: list[int]
    computed: int
    up: list[int]
    down: list[int]
    turns: list[int]


@dataclass
class Ring:
    port: int
    host: Process
    workers: list[Process]
    relays: list[Relay]
    seed: int = field(default=0)

    async def say(self, conversation: Conversation) -> Turn:
        """One more turn: something is asked, and answered."""
        self.seed += 1
        conversation.goes_on(self.seed)
        before = [(relay.up, relay.down, relay.turns) for relay in self.relays]
        body = {"prompt": conversation.tokens, "n_predict": WORDS, "temperature": 0, "ignore_eos": True}
        answer = await asyncio.to_thread(ask, self.port, "/completion", {**body, "return_tokens": True})
        conversation.tokens += answer["tokens"]
        spent = [(r.up - a, r.down - b, r.turns - c) for r, (a, b, c) in zip(self.relays, before, strict=True)]
        up, down, turns = map(list, zip(*spent, strict=True)) if spent else ([], [], [])
        return Turn(answer["tokens"], answer["timings"]["prompt_n"], up, down, turns)

    def memory_taken(self) -> int:
        """MiB that were set aside for conversations, over all devices."""
        return round(sum(float(mib) for mib in re.findall(r"grow: ([\d.]+) MiB on", self.host.text)))


@contextlib.asynccontextmanager
async def ring(
    engine: Engine,
    file: Path,
    counts: Sequence[int],
    *,
    kept: int = 64 * MIB,
    parallel: int = 1,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Ring]:
    """A host and its workers, serving.

    Args:
        kept: bytes for conversations over the ring.
        environment: of the workers.
    """
    ports = [free_port() for _ in counts[1:]]
    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for n, port in enumerate(ports):
            launch = rpc_server_command(
                engine,
                port,
                threads=1,
                model_files=[file],
                fingerprint=IDENTITY,
                rpc_secret=SECRET,
                peers={IDS[n + 2]: f"127.0.0.1:{ports[n + 1]}"} if n + 1 < len(ports) else {},
            )
            launch = Launch(launch.argv, {**launch.env, **(environment or {})})
            workers.append(await stack.enter_async_context(running(launch)))
        for worker in workers:
            await worker.says("mesh-listening")
        relays = await stack.enter_async_context(relayed(ports))
        plan = planned(counts, kept, parallel)
        port = free_port()
        endpoints = [f"127.0.0.1:{relay.port}" for relay in relays]
        launch = llama_server_command(engine, plan, file, port, endpoints, threads=1, rpc_secret=SECRET)
        launch = Launch((*launch.argv, "--no-repack", *options), launch.env)
        host = await stack.enter_async_context(running(launch))
        await serving(host, port)
        yield Ring(port, host, workers, relays)


def planned(counts: Sequence[int], kept: int, parallel: int) -> Layout:
    mode = "split" if counts[1:] else "solo"
    return layout(list(counts), mode=mode, ctx_size=2048, parallel=parallel, prompt_cache_bytes=kept)


async def alternating(server: Ring, turns: int = 6) -> list[Turn]:
    """Two conversations that take turns on one slot."""
    two = [Conversation.of(1), Conversation.of(2)]
    return [await server.say(two[n % 2]) for n in range(turns)]


@contextlib.asynccontextmanager
async def witness(engine: Engine, file: Path, parallel: int = 1, options: Sequence[str] = ()) -> AsyncIterator[Ring]:
    """One process with the engine's own cache in host memory."""
    own = ("-cram", "8192", "-ctxcp", "0", "--no-cache-idle-slots", *options)
    async with ring(engine, file, [LAYERS], kept=0, parallel=parallel, options=own) as server:
        yield server


@pytest.mark.parametrize("counts", [(6,), (0, 6), (2, 4), (2, 1, 3)])
async def test_who_comes_back_is_neither_computed_nor_sent_again(
    engine: Engine, models: Callable[[str], Path], counts: tuple[int, ...]
) -> None:
    file = models("llama")
    async with witness(engine, file) as alone:
        expected = await alternating(alone)
    async with ring(engine, file, counts) as server:
        turns = await alternating(server)
    assert [turn.said for turn in turns] == [turn.said for turn in expected]
    assert len({tuple(turn.said) for turn in turns}) == len(turns)
    first, back = turns[:2], turns[2:]
    assert all(turn.computed >= LONG for turn in first)
    for turn in back:
        assert turn.computed <= 12 + 1
        # A conversation of a thousand tokens takes 512 KB of every layer's cache; what crosses is what is computed.
        computed = (turn.computed + WORDS) * ACTIVATION
        assert max([0, *turn.up]) <= computed + 8 * 1024
        assert max([0, *turn.down]) <= computed + 2 * 1024
        # One round trip per word, and at most one more to take memory.
        assert max([0, *turn.turns]) <= WORDS + 2


async def test_a_model_with_a_sliding_window_comes_back_too(engine: Engine, models: Callable[[str], Path]) -> None:
    file = models("gemma3")
    async with ring(engine, file, [2, 4], kept=0) as never_left:
        one = Conversation.of(1)
        expected = [(await never_left.say(one)).said for _ in range(3)]
    async with ring(engine, file, [2, 4]) as server:
        one, other = Conversation.of(1), Conversation.of(2)
        said: list[list[int]] = []
        for _ in range(3):
            server.seed = len(said)
            turn = await server.say(one)
            said.append(turn.said)
            await server.say(other)
        assert turn.computed <= 12 + 1
    assert said == expected


async def test_values_that_lie_transposed_come_back_too(engine: Engine, models: Callable[[str], Path]) -> None:
    file = models("llama")
    async with witness(engine, file, options=("-fa", "off")) as alone:
        expected = await alternating(alone, 4)
    async with ring(engine, file, [2, 4], options=("-fa", "off")) as server:
        turns = await alternating(server, 4)
    assert [turn.said for turn in turns] == [turn.said for turn in expected]
    assert all(turn.computed <= 12 + 1 for turn in turns[2:])


async def test_the_oldest_makes_room_and_is_computed_again(engine: Engine, models: Callable[[str], Path]) -> None:
    file = models("llama")

    async def three(server: Ring) -> list[Turn]:
        a, b, c = (Conversation.of(seed) for seed in (1, 2, 3))
        return [await server.say(one) for one in (a, b, c, b, c, a)]

    async with witness(engine, file, options=("-cram", "7")) as alone:
        expected = await three(alone)
    # Room for two conversations of 1,020 tokens (3 MiB each): whoever comes back has to meet whoever goes.
    async with ring(engine, file, [2, 1, 3], kept=7 * MIB, options=("-lv", "4")) as server:
        turns = await three(server)
        taken = server.memory_taken()
    assert [turn.said for turn in turns] == [turn.said for turn in expected]
    a_again, b_again, c_again = turns[5], turns[3], turns[4]
    assert a_again.computed >= LONG
    assert b_again.computed <= 13
    assert c_again.computed <= 13
    assert 0 < taken <= 7


async def test_many_conversations_take_no_more_memory_than_was_set_aside(
    engine: Engine, models: Callable[[str], Path]
) -> None:
    async with ring(engine, models("llama"), [0, 6], kept=8 * MIB, options=("-lv", "4")) as server:
        worker = psutil.Process(server.workers[0].handle.pid)

        async def many(seed: int) -> int:
            for n in range(8):
                await server.say(Conversation.of(seed + n, 1100 - 97 * n))
            return worker.memory_info().rss

        before = await many(0)
        assert await many(8) - before <= 4 * MIB  # eight more would be 20
        assert 6 <= server.memory_taken() <= 8


@pytest.mark.skipif(sys.platform != "linux", reason="only here another process's memory can be limited")
async def test_a_worker_without_memory_keeps_nothing_and_serves_on(
    engine: Engine, models: Callable[[str], Path]
) -> None:
    file = models("llama")

    async def two(server: Ring) -> list[Turn]:
        a, b = Conversation.of(1, 1900), Conversation.of(2, 1900)
        found = [await server.say(a)]
        for worker in server.workers:
            # What the prompt needs it has had. A conversation of 1,900 tokens takes 6 MiB more.
            process = psutil.Process(worker.handle.pid)
            most = process.memory_info().vms + 4 * MIB
            process.rlimit(psutil.RLIMIT_AS, (most, most))
        return [*found, *[await server.say(one) for one in (b, a)]]

    async with witness(engine, file, options=("-cram", "0")) as alone:
        expected = await two(alone)
    # What is freed goes back to the system, so that the limit is one.
    exact = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    async with ring(engine, file, [0, 6], kept=1 << 30, environment=exact) as server:
        turns = await two(server)
        assert "has no memory for" in server.host.text
    assert all(turn.computed >= 1900 for turn in turns)
    assert [turn.said for turn in turns] == [turn.said for turn in expected]


async def test_three_conversations_on_two_slots(engine: Engine, models: Callable[[str], Path]) -> None:
    file = models("llama")

    async def turns(server: Ring) -> list[Turn]:
        three = [Conversation.of(seed) for seed in (1, 2, 3)]
        return [await server.say(three[n]) for n in (0, 1, 2, 0, 1, 2, 1, 0)]

    async with witness(engine, file, parallel=2) as alone:
        expected = await turns(alone)
    async with ring(engine, file, [1, 2, 3], parallel=2) as server:
        found = await turns(server)
    assert [turn.said for turn in found] == [turn.said for turn in expected]
    assert all(turn.computed <= 13 for turn in found[3:])


def test_a_mesh_sets_memory_aside_and_uses_it(tmp_path: Path) -> None:
    with contextlib.contextmanager(a_place)(tmp_path) as place:
        kitchen = place.start("up", "--demo", "--split", "always")
        kitchen.wait_for("ready ")
        attic = place.start("up", "--join", kitchen.invite(), name="attic")
        kitchen.wait_serving(ring=2)
        attic.wait_serving(ring=2)
        assert kitchen.status()["layout"]["prompt_cache_bytes"] >= MIB
        assert " for earlier conversations" in kitchen.run("status").out

        def cached(name: str) -> int:
            body = {"model": "mesh-demo", "prompt": f"{name} " * 200, "max_tokens": 4, "temperature": 0}
            usage = httpx.post(f"{attic.api}/v1/completions", json=body, timeout=60).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        # Two slots, and three who take turns.
        first = [cached(name) for name in ("river", "stone", "winter")]
        again = [cached(name) for name in ("river", "stone", "winter")]
        assert max(first) < 10
        assert min(again) >= 200 - 2


async def test_bytes_are_copied_in_the_order_of_commands(engine: Engine, models: Callable[[str], Path]) -> None:
    async with rpc_server(engine, models("llama")) as server:
        client = await server.client()
        here, there = await Memory.of(client, 4096), await Memory.of(client, 4096)
        for value in (b"a", b"b"):
            here.write(value * 4096)
            client.tell(COPY_BYTES, copy(here, 0, there, 1024, 1024))
        client.tell(COPY_BYTES, copy(there, 1024, there, 3072, 512))
        here.write(b"c" * 4096)
        assert await there.read(1024, 1024) == b"b" * 1024
        assert await there.read(512, 3072) == b"b" * 512


def copy(source: Memory, at: int, target: Memory, to: int, size: int) -> bytes:
    return struct.pack("<QQQQQ", source.handle, source.base + at, target.handle, target.base + to, size)


@pytest.mark.parametrize(
    ("at", "to", "size"),
    [
        (0, 0, 0),
        (0, 0, 4097),
        (1, 0, 4096),
        (0, 1, 4096),
        (-1, 0, 16),
        (0, -1, 16),
        (0, 0, 1 << 62),
        (0, 0, (1 << 64) - 1),
        (1 << 40, 0, 16),
        (0, 1 << 40, 16),
    ],
)
async def test_a_copy_outside_of_a_buffer_is_refused(
    engine: Engine, models: Callable[[str], Path], at: int, to: int, size: int
) -> None:
    async with rpc_server(engine, models("llama")) as server:
        client = await server.client()
        here, there = await Memory.of(client, 4096), await Memory.of(client, 4096)
        client.tell(COPY_BYTES, copy(here, at, there, to, size))
        assert await closed(client.reader, 3) == b""
        client = await server.client()
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)


@pytest.mark.parametrize("kind", ["unknown source", "unknown target", "onto itself", "short", "long"])
async def test_a_copy_that_makes_no_sense_is_refused(engine: Engine, models: Callable[[str], Path], kind: str) -> None:
    async with rpc_server(engine, models("llama")) as server:
        client = await server.client()
        here, there = await Memory.of(client, 4096), await Memory.of(client, 4096)
        client.tell(SET_TENSOR, tensor(here.handle, here.base, 8) + struct.pack("<BQ", 0, 0) + bytes(8))
        nowhere = Memory(client, 4242, here.base)
        body = {
            "unknown source": copy(nowhere, 0, there, 0, 16),
            "unknown target": copy(here, 0, nowhere, 0, 16),
            "onto itself": copy(here, 0, here, 8, 16),
            "short": copy(here, 0, there, 0, 16)[:-1],
            "long": copy(here, 0, there, 0, 16) + b"\0",
        }[kind]
        client.tell(COPY_BYTES, body)
        assert await closed(client.reader, 3) == b""
        client = await server.client()
        assert await client.ask(DEVICE_COUNT, b"") == struct.pack("<I", 1)
