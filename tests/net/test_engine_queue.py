"""Who gets a slot next, and how soon it is free when its client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.noise import Q8_0
from mesh.engine.cache import Engine
from mesh.models.demo import write_demo
from tests.eventually import eventually
from tests.fakes.architectures import write_architecture
from tests.net.engine_kit import serving
from tests.net.push_kit import push_ring
from tests.net.resume_kit import origin, told_whole

pytestmark = pytest.mark.engine

LAYERS = 6
ENDLESS: dict[str, Any] = {"prompt": [1, 300, 301], "n_predict": -1, "ignore_eos": True}
"""With a context that shifts."""
FEW_WORDS: dict[str, Any] = {"prompt": [1, 400, 401], "n_predict": 64, "ignore_eos": True}
SOON_S = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    write_architecture(path, "llama", Q8_0)
    return path


class Server:
    """A process, asked by clients that can go away."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, client: httpx.AsyncClient) -> None:
        self.process = process
        self.port = port
        self.client = client

    async def count(self, what: str) -> int:
        """Requests that are ``processing``, or ``deferred``."""
        text = (await self.client.get("/metrics")).text
        found = re.search(rf"^llamacpp:requests_{what} (\d+)", text, re.MULTILINE)
        assert found, text
        return int(found[1])

    async def send(
        self, body: dict[str, Any], headers: dict[str, str], path: str = "/completion"
    ) -> asyncio.StreamWriter:
        """A request on a connection of its own, whose answer nobody reads."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body).encode()
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: here",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()
        return writer

    async def busy(self, processing: int, deferred: int = 0, within: float = 10) -> None:
        async def reached() -> bool:
            return (await self.count("processing"), await self.count("deferred")) == (processing, deferred)

        await eventually(reached, within=within)


@contextlib.asynccontextmanager
async def serve(engine: Engine, model: Path, parallel: int, *options: str, context: int = 512) -> AsyncIterator[Server]:
    options = ("--context-shift", *options)
    async with push_ring(engine, model, [LAYERS], parallel=parallel, context=context, options=options) as solo:
        await serving(solo.host, solo.port)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{solo.port}", timeout=60) as client:
            yield Server(solo.host.handle, solo.port, client)


async def order(
    server: Server, requests: list[tuple[str, int, dict[str, Any]]], holder: str, held: int = 1
) -> list[int]:
    """In which order waiting requests are answered.

    Args:
        requests: of each who asks, how long ago in ms, and for what. They arrive here in this order.
        holder: who has the ``held`` slots until all of them wait, and then goes away.
    """
    holding = [await server.send(ENDLESS | {"stream": True}, origin("f0", holder)) for _ in range(held)]
    await server.busy(held)
    done: list[int] = []

    async def one(n: int, who: str, age_ms: int, body: dict[str, Any]) -> None:
        answer = await server.client.post("/completion", json=body, headers=origin(f"{n}", who, age_ms=age_ms))
        assert answer.status_code == 200, answer.text
        done.append(n)

    waiting = []
    for n, (who, age_ms, body) in enumerate(requests):
        waiting.append(asyncio.create_task(one(n, who, age_ms, body)))
        await server.busy(held, n + 1)
    for writer in holding:
        writer.close()
    await asyncio.gather(*waiting)
    return done


async def test_who_came_first_to_any_ingress_goes_first(engine: Engine, model: Path) -> None:
    """Four ingress nodes; what was sent again after a restart has not lost its place."""
    async with serve(engine, model, 1) as server:
        requests = [("c1", 1000, FEW_WORDS), ("c2", 9000, FEW_WORDS), ("c3", 500, FEW_WORDS), ("c4", 5000, FEW_WORDS)]
        assert await order(server, requests, "c0") == [1, 3, 0, 2]


async def test_a_client_with_many_requests_leaves_others_a_slot(engine: Engine, model: Path) -> None:
    async with serve(engine, model, 1) as server:
        many = [("aa", 0, FEW_WORDS)] * 4
        assert (await order(server, [*many, ("bb", 0, FEW_WORDS)], "aa"))[0] == 4
        assert (await order(server, [*many, ("bb", 0, FEW_WORDS)], "cc"))[:2] == [0, 4]


async def test_without_names_it_is_first_come_first_served(engine: Engine, model: Path) -> None:
    async with serve(engine, model, 1) as server:
        holding = await server.send(ENDLESS | {"stream": True}, {})
        await server.busy(1)
        done: list[int] = []

        async def one(n: int) -> None:
            await server.client.post("/completion", json=FEW_WORDS)
            done.append(n)

        waiting = []
        for n in range(5):
            waiting.append(asyncio.create_task(one(n)))
            await server.busy(1, n + 1)
        holding.close()
        await asyncio.gather(*waiting)
        assert done == [0, 1, 2, 3, 4]


async def test_several_choices_get_their_slots_although_others_come(engine: Engine, model: Path) -> None:
    """Two slots at once are never free by themselves while others ask for one at a time."""
    async with serve(engine, model, 2) as server:
        holding = await server.send(ENDLESS | {"stream": True}, origin("f0", "c0"))
        await server.busy(1)
        body = FEW_WORDS | {"n": 2, "n_predict": 1}
        choices = asyncio.create_task(server.client.post("/v1/completions", json=body, headers=origin("f1", "c1")))
        await server.busy(1, 1)
        later = asyncio.create_task(server.client.post("/completion", json=FEW_WORDS, headers=origin("f2", "c2")))
        await server.busy(1, 2)
        assert not later.done()
        holding.close()
        first, _ = await asyncio.wait({choices, later}, return_when=asyncio.FIRST_COMPLETED)
        assert choices in first
        assert len(told_whole(choices.result().text)["choices"]) == 2
        assert (await later).status_code == 200


async def test_whoever_comes_at_once_with_many_others_is_in_the_queue(engine: Engine, model: Path) -> None:
    """Of many connections at once all counted on the few idle threads of the HTTP server: most waited outside."""
    async with serve(engine, model, 1) as server:
        server.process.send_signal(signal.SIGSTOP)  # so that it finds them all together
        crowd = [server.send(ENDLESS | {"stream": True}, origin(f"c{n:02x}", "c1")) for n in range(40)]
        held = await asyncio.gather(*crowd)
        server.process.send_signal(signal.SIGCONT)
        await server.busy(1, 39)
        for one in held:
            one.close()
        await server.busy(0, 0)


async def test_naming_a_slot_is_no_way_to_the_front(engine: Engine, model: Path) -> None:
    async with serve(engine, model, 1) as server:
        requests = [("c1", 0, FEW_WORDS), ("c2", 0, FEW_WORDS | {"id_slot": 0}), ("c3", 0, FEW_WORDS | {"id_slot": 7})]
        assert sorted(await order(server, requests, "c0")) == [0, 1, 2]
        assert (await order(server, requests[:2], "c0")) == [0, 1]


async def test_one_that_gives_up_waiting_lets_the_next_one_in(engine: Engine, model: Path) -> None:
    async with serve(engine, model, 1) as server:
        holding = await server.send(ENDLESS | {"stream": True}, origin("f0", "c0"))
        await server.busy(1)
        waiting = [await server.send(FEW_WORDS, origin(f"a{n}", f"c{n}")) for n in range(1, 4)]
        await server.busy(1, 3)
        last = asyncio.create_task(server.client.post("/completion", json=FEW_WORDS, headers=origin("f9", "c9")))
        await server.busy(1, 4)
        started = time.monotonic()
        for writer in waiting:
            writer.close()
        await server.busy(1, 1)
        assert time.monotonic() - started < SOON_S
        holding.close()
        assert (await last).status_code == 200
        assert time.monotonic() - started < 2 * SOON_S


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "a stream": ("/completion", ENDLESS | {"stream": True}),
    "no stream": ("/completion", ENDLESS),
    "a chat without a stream": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": -1},
    ),
}


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "while others are served"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_slot_is_free_soon_after_its_client_is_gone(engine: Engine, model: Path, way: str, others: int) -> None:
    path, body = WAYS[way]
    body = body | {"ignore_eos": True}
    async with serve(engine, model, 2) as server:
        held = [await server.send(ENDLESS | {"stream": True}, {}) for _ in range(others)]
        for _ in range(3):
            writer = await server.send(body, origin(), path)
            await server.busy(1 + others)
            started = time.monotonic()
            writer.close()
            await server.busy(others)
            assert time.monotonic() - started < SOON_S
        for other in held:
            other.close()


async def test_a_long_prompt_is_given_up_when_its_client_is_gone(engine: Engine, tmp_path: Path) -> None:
    """Of a model that takes seconds for the prompt."""
    path = tmp_path / "mid.gguf"
    write_demo(path, engine.vocab("llama-spm"), preset="mid")
    async with push_ring(engine, path, [16], parallel=1, context=4096) as solo:
        await serving(solo.host, solo.port)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{solo.port}", timeout=60) as client:
            server = Server(solo.host.handle, solo.port, client)
            for _ in range(2):
                body = {"prompt": [1, *range(300, 3800)], "n_predict": 1, "cache_prompt": False}
                writer = await server.send(body, origin())
                await server.busy(1)
                started = time.monotonic()
                writer.close()
                await server.busy(0)
                assert time.monotonic() - started < SOON_S
