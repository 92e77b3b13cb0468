"""Workers read their weights from their own disks, and only the very same ones.

Real servers on loopback; what crosses between them goes through counting relays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mesh.engine.cache import Engine
from mesh.engine.commands import llama_server_command, rpc_server_command
from tests.net.engine_kit import (
    Process,
    Relay,
    ask,
    free_port,
    greedy,
    relayed,
    running,
    serving,
    write_model,
)
from tests.unit.test_engine_commands import layout

pytestmark = pytest.mark.engine

LAYERS = 6
IDENTITY = "f" * 64
"""What ``layout`` in the unit tests names as the model's fingerprint."""
SECRET = b"thirty-two bytes of some secret."


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", engine, layers=LAYERS)[0]


@pytest.fixture(scope="module")
def shards(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = write_model(tmp_path_factory.mktemp("shards") / "m.gguf", engine, layers=LAYERS, tensors_per_shard=20)
    assert len(files) == 3
    return files


def damaged_copy(model: Path, directory: Path, damage: Callable[[bytes], bytes]) -> Path:
    copy = directory / "m.gguf"
    copy.write_bytes(damage(model.read_bytes()))
    return copy


async def solo_text(engine: Engine, file: Path) -> str:
    port = free_port()
    solo = layout([LAYERS], mode="solo")
    launch = llama_server_command(engine, solo, file, port, threads=1, embeddings=False)
    async with running(launch) as server:
        await serving(server, port)
        return await greedy(port)


@pytest.fixture(scope="module")
def expected(engine: Engine, model: Path) -> str:
    """What a plain server says, without embeddings."""
    return asyncio.run(solo_text(engine, model))


@dataclass
class Ring:
    port: int
    host: Process
    workers: list[Process]
    relays: list[Relay]

    async def refused(self, reason: str) -> None:
        """The host ended without ever serving, and says that a worker refused, and why."""
        assert await self.host.ended() not in (0, 75)
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(ask, self.port, "/health")
        said = [line for line in self.host.lines if line.startswith("mesh-refused 127.0.0.1:")]
        assert any(reason in line for line in said), self.host.text


@contextlib.asynccontextmanager
async def ring(
    engine: Engine,
    files: Sequence[Path],
    counts: Sequence[int] = (2, 4),
    *,
    worker_files: Sequence[Path] | None = None,
    worker_identity: str = IDENTITY,
) -> AsyncIterator[Ring]:
    """A host and its workers, started; whether they come to serve is up to the test."""
    ports = [free_port() for _ in counts[1:]]
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for worker_port in ports:
            launch = rpc_server_command(
                engine,
                worker_port,
                threads=1,
                model_files=worker_files or files,
                fingerprint=worker_identity,
                rpc_secret=SECRET,
            )
            workers.append(await stack.enter_async_context(running(launch)))
        for worker in workers:
            await worker.says("mesh-listening")
        relays = await stack.enter_async_context(relayed(ports))
        endpoints = [f"127.0.0.1:{relay.port}" for relay in relays]
        launch = llama_server_command(
            engine, layout(list(counts)), files[0], port, endpoints, threads=1, rpc_secret=SECRET
        )
        host = await stack.enter_async_context(running(launch))
        yield Ring(port, host, workers, relays)


@pytest.mark.parametrize("counts", [(2, 4), (0, 3, 3), (1, 2, 2, 1)])
async def test_a_ring_of_local_files_says_what_one_machine_says(
    engine: Engine, model: Path, expected: str, counts: tuple[int, ...]
) -> None:
    async with ring(engine, [model], counts) as r:
        await serving(r.host, r.port)
        assert all(relay.up + relay.down < 300_000 for relay in r.relays), r.relays
        assert await greedy(r.port) == expected
        for worker in r.workers:
            done, total = worker.lines[-1].removeprefix("mesh-load ").split()
            assert done == total != "0"


async def test_a_sharded_model_is_read_shard_by_shard(engine: Engine, shards: list[Path], expected: str) -> None:
    async with ring(engine, shards, (1, 3, 2)) as r:
        await serving(r.host, r.port)
        assert await greedy(r.port) == expected


async def test_one_server_answers_chat_text_and_embeddings_alike(engine: Engine, model: Path, expected: str) -> None:
    async with ring(engine, [model]) as r:
        await serving(r.host, r.port)
        question = {"input": "what is this", "model": "m"}
        first = await asyncio.to_thread(ask, r.port, "/v1/embeddings", question)
        vector = np.array(first["data"][0]["embedding"])
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-3)
        assert await greedy(r.port) == expected
        again = await asyncio.to_thread(ask, r.port, "/v1/embeddings", question)
        assert np.dot(vector, again["data"][0]["embedding"]) == pytest.approx(1.0, abs=1e-3)
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
        answer = await asyncio.to_thread(ask, r.port, "/v1/chat/completions", chat)
        assert answer["usage"]["completion_tokens"] > 0


async def test_another_identity_is_refused(engine: Engine, model: Path) -> None:
    async with ring(engine, [model], worker_identity="e" * 64) as r:
        await r.refused("its model is eeeeeeeeeeee, not ffffffffffff")


async def test_other_weights_under_the_same_names_are_refused_though_the_identity_lies(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "m.gguf", engine, layers=LAYERS, change="blk.4.ffn_down.weight")
    async with ring(engine, [model], worker_files=other) as r:
        await r.refused("tensor 'blk.4.ffn_down.weight' has other contents in its file")


async def test_another_shape_is_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "m.gguf", engine, layers=LAYERS, width=64)
    async with ring(engine, [model], worker_files=other) as r:
        await r.refused("has shape [64 64 1 1] in its file, not [128 128 1 1]")


async def test_another_type_is_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "m.gguf", engine, layers=LAYERS, dtype=np.float32)
    async with ring(engine, [model], worker_files=other) as r:
        await r.refused("is of type f32 in its file, not f16")


async def test_a_missing_layer_is_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "m.gguf", engine, layers=LAYERS - 1)
    async with ring(engine, [model], worker_files=other) as r:
        await r.refused("is not in its file 1")


async def test_shards_in_another_order_are_refused(engine: Engine, shards: list[Path]) -> None:
    async with ring(engine, shards, worker_files=[shards[0], shards[2], shards[1]]) as r:
        await r.refused("is not in its file 2")


async def test_a_file_that_changed_since_the_worker_started_is_refused(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    copy = damaged_copy(model, tmp_path, lambda data: data)
    launch = rpc_server_command(
        engine, port := free_port(), threads=1, model_files=[copy], fingerprint=IDENTITY, rpc_secret=SECRET
    )
    async with running(launch) as worker:
        await worker.says("mesh-listening")
        os.utime(copy, (1, 1))
        launch = llama_server_command(
            engine,
            layout([2, 4]),
            model,
            free_port(),
            [f"127.0.0.1:{port}"],
            threads=1,
            rpc_secret=SECRET,
        )
        async with running(launch) as host:
            assert await host.ended() not in (0, 75)
            assert f"{copy} has changed since it was opened" in host.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(lambda data: data[:-100_000], "is truncated"), (lambda data: b"GGXX" + data[4:], "is not a GGUF file")],
)
async def test_a_worker_with_a_damaged_file_says_so_and_does_not_start(
    engine: Engine, model: Path, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    copy = damaged_copy(model, tmp_path, damage)
    launch = rpc_server_command(
        engine, free_port(), threads=1, model_files=[copy], fingerprint=IDENTITY, rpc_secret=SECRET
    )
    async with running(launch) as worker:
        assert await worker.ended() == 1
        assert f"error: {copy}" in worker.text
        assert reason in worker.text
