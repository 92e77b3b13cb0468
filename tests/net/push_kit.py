"""A ring of real engine processes that push to each other, and the frames they do it with."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mesh.engine.cache import Engine
from mesh.engine.commands import Launch, llama_server_command, rpc_server_command
from tests.fakes.delay import DelayedLink, delayed
from tests.net.engine_kit import Process, ask, running
from tests.net.rpc_client import GET_TENSOR, HELLO, HELLO_ANSWER, SET_TENSOR, Client
from tests.net.test_engine_door import IDENTITY, SECRET
from tests.ports import free_port
from tests.unit.test_engine_commands import IDS, layout

PUSH_HELLO, PUSH_OPEN, PUSH_CONNECT, PUSH_SEND, PUSH_EXPECT = 19, 20, 21, 22, 23
MIB = 1 << 20


@dataclass
class PushRing:
    """``peers[i]`` is the way from worker i to the next, ``links[i]`` the host's to worker i."""

    port: int
    host: Process
    workers: list[Process]
    links: list[DelayedLink]
    peers: list[DelayedLink]
    launch: Launch
    """Of the host, to be started once more."""

    def said(self, mark: str) -> list[str]:
        return [line for line in self.host.lines if line.startswith(f"{mark} ")]


@contextlib.asynccontextmanager
async def push_ring(
    engine: Engine,
    file: Path,
    counts: Sequence[int],
    *,
    delay_s: float = 0.0,
    parallel: int = 4,
    context: int = 2048,
    strangers: Sequence[int] = (),
    threads: int = 1,
    options: Sequence[str] = (),
) -> AsyncIterator[PushRing]:
    """A host and its workers, started.

    Args:
        strangers: workers (from 0) that know no way to the next one.
        options: what the host's server is told besides what a mesh tells it.
    """
    ports = [free_port() for _ in counts[1:]]
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(delayed(port, delay_s)) for port in ports[1:]]
        workers = []
        for n, worker_port in enumerate(ports):
            reachable = n + 1 < len(ports) and n not in strangers
            launch = rpc_server_command(
                engine,
                worker_port,
                threads=threads,
                model_files=[file],
                fingerprint=IDENTITY,
                rpc_secret=SECRET,
                peers={IDS[n + 2]: f"127.0.0.1:{peers[n].port}"} if reachable else {},
            )
            workers.append(await stack.enter_async_context(running(launch)))
        for worker in workers:
            await worker.says("mesh-listening")
        links = [await stack.enter_async_context(delayed(port, delay_s)) for port in ports]
        port = free_port()
        launch = llama_server_command(
            engine,
            layout(list(counts), parallel=parallel, ctx_size=context, mode="split" if ports else "solo"),
            file,
            port,
            [f"127.0.0.1:{link.port}" for link in links],
            threads=threads,
            rpc_secret=SECRET,
        )
        launch = Launch((*launch.argv, *options), launch.env)
        host = await stack.enter_async_context(running(launch))
        yield PushRing(port, host, workers, links, peers, launch)


@dataclass
class Text:
    """What a server said, and how long it took."""

    content: str
    ms_per_token: float
    prompt_tokens: int


async def told(port: int, prompt: str, words: int = 24) -> Text:
    """A greedy continuation."""
    body = {"prompt": prompt, "n_predict": words, "temperature": 0, "cache_prompt": False}
    answer = await asyncio.to_thread(ask, port, "/completion", body)
    timings = answer["timings"]
    return Text(answer["content"], timings["predicted_per_token_ms"], timings["prompt_n"])


def tensor(buffer: int, data: int, size: int) -> bytes:
    """A one-dimensional tensor of bytes, as the engine writes it on the wire."""
    i8 = 24
    head = struct.pack("<QIQ4I4I", 0, i8, buffer, size, 1, 1, 1, 1, size, size, size)
    return head + bytes(4 + 64 + 4 + 80 + 8 + 8) + struct.pack("<Q", data) + bytes(64 + 4)


@dataclass
class Server:
    """One rpc-server, to be spoken to as its client and as its peers."""

    port: int
    process: Process
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(SECRET)
        return reader, writer

    async def client(self, generation: int = 0) -> Client:
        """The one client, admitted; it has opened ``generation`` unless that is 0."""
        client = Client(*await self._connect())
        assert len(await client.ask(HELLO, bytes(24))) == HELLO_ANSWER
        if generation:
            client.tell(PUSH_OPEN, struct.pack("<Q", generation))
        return client

    async def peer(self, generation: int, channel: int = 0) -> Peer:
        """Another server, which has said who it is."""
        peer = Peer(*await self._connect())
        peer.writer.write(struct.pack("<BQQI", PUSH_HELLO, 12, generation, channel))
        return peer


@dataclass
class Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def accepted(self, within: float = 8) -> bool:
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(1), within) == b"\1"
        return False

    def push(self, number: int, data: bytes, size: int | None = None) -> None:
        self.writer.write(struct.pack("<QQ", number, len(data) if size is None else size) + data)

    async def ended(self, within: float = 3) -> bool:
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(1), within) == b""
        return True


@dataclass
class Memory:
    """A buffer on a server."""

    client: Client
    handle: int
    base: int

    @classmethod
    async def of(cls, client: Client, size: int) -> Memory:
        return cls(client, *await client.buffer(size))

    def request(self, number: int, size: int, channel: int = 0, at: int = 0, half: int = 0) -> bytes:
        return struct.pack("<IQQQQB", channel, number, self.handle, self.base + at, size, half)

    def expect(self, number: int, size: int, channel: int = 0, at: int = 0) -> None:
        self.client.tell(PUSH_EXPECT, self.request(number, size, channel, at))

    async def read(self, size: int, at: int = 0) -> bytes:
        body = tensor(self.handle, self.base + at, size) + struct.pack("<QQB", 0, size, 0)
        return await self.client.ask(GET_TENSOR, body)

    def write(self, data: bytes) -> None:
        self.client.tell(SET_TENSOR, tensor(self.handle, self.base, len(data)) + struct.pack("<BQ", 0, 0) + data)


@contextlib.asynccontextmanager
async def rpc_server(engine: Engine, file: Path, **environment: str) -> AsyncIterator[Server]:
    port = free_port()
    launch = rpc_server_command(engine, port, threads=1, model_files=[file], fingerprint=IDENTITY, rpc_secret=SECRET)
    async with running(Launch(launch.argv, {**launch.env, **environment})) as process:
        await process.says("mesh-listening")
        server = Server(port, process)
        try:
            yield server
        finally:
            for writer in server.writers:
                writer.close()
