"""A node's API on a real port, in front of a fake engine reached by TCP or by streams in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from mesh.clock import SystemClock
from mesh.errors import PlanError, TransportError, UsageError
from mesh.proxy.core import Limits
from mesh.proxy.http import create_app
from mesh.proxy.ingress import Proxy
from mesh.proxy.server import ApiServer
from mesh.proxy.tcp import open_tcp
from mesh.proxy.upstream import Route
from mesh.transport.lane import Stream
from mesh.wire.facts import Epoch
from tests.fakes.engine_http import KEY, FakeEngine
from tests.fakes.transport import FakeStream, stream_pair

HOST = "h" * 26
TOKEN = "control-token"


class FakeControl:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    async def call(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((name, args))
        if name == "plan":
            raise PlanError("4 GB are missing", remedy="add a machine")
        if name != "invite":
            raise UsageError(f'there is no call "{name}"')
        return {"token": "mesh1xyz", **args}


@dataclass
class Ingress:
    """The node under test and its client."""

    proxy: Proxy
    client: httpx.AsyncClient
    port: int
    control: FakeControl
    links: list[FakeStream] = field(default_factory=list)
    opened: int = 0

    def serve_tcp(self, port: int, number: int = 1, fingerprint: str = "") -> None:
        async def open_stream() -> Stream:
            self.opened += 1
            return await open_tcp("127.0.0.1", port)

        self.serve_by(open_stream, number, fingerprint)

    def serve_lane(self, engine: FakeEngine, number: int = 1, *, window: int = 1 << 20) -> None:
        """By streams in memory, as over the mesh."""

        async def open_stream() -> Stream:
            self.opened += 1
            ours, theirs = stream_pair(window)
            self.links.append(ours)
            engine.attach(theirs)
            return ours

        self.serve_by(open_stream, number)

    def serve_nowhere(self, number: int = 1) -> None:
        async def open_stream() -> Stream:
            self.opened += 1
            raise TransportError("connection refused")

        self.serve_by(open_stream, number)

    def serve_by(self, open_stream: Any, number: int, fingerprint: str = "") -> None:
        self.proxy.serve(Route(Epoch(number, HOST), HOST, KEY, "tiny", open_stream, fingerprint))

    def tokens(self) -> float:
        """How many were streamed to clients so far."""
        lines = self.proxy.metrics.render().decode().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("mesh_tokens_streamed_total"))

    async def events(self, path: str = "/v1/chat/completions", **body: Any) -> bytes:
        """The whole stream, however it ends."""
        seen = b""
        async with self.client.stream("POST", path, json={"stream": True, **body}) as answer:
            async for part in answer.aiter_raw():
                seen += part
        return seen


@asynccontextmanager
async def an_ingress(
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    max_body: int = 1 << 26,
    stall_s: float = 60.0,
    **proxy_settings: Any,
) -> AsyncIterator[Ingress]:
    control = FakeControl()
    proxy = Proxy(SystemClock(), limits, **proxy_settings)
    app = create_app(
        proxy,
        lambda: {"mesh": {"epoch": 3}},
        control,
        control_token=TOKEN,
        api_keys=api_keys,
        max_body=max_body,
        stall_s=stall_s,
    )
    server = ApiServer(app, ("127.0.0.1",), 0)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=15, trust_env=False) as client:
            yield Ingress(proxy, client, server.port, control)
    finally:
        await proxy.close(within_s=0.5)
        await server.stop(within_s=0.5)


@asynccontextmanager
async def an_engine(**behaviour: Any) -> AsyncIterator[tuple[FakeEngine, int]]:
    """A fake engine on a port."""
    engine = FakeEngine(**behaviour)
    port = await engine.listen()
    try:
        yield engine, port
    finally:
        await engine.die()


def steps() -> asyncio.Semaphore:
    """For an engine that says one word per ``release()``."""
    return asyncio.Semaphore(0)
