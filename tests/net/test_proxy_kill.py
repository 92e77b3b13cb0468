"""Answers through an ingress while real engines die: what arrives is what an engine that lived would have said.

The engine's own tests cut answers between any two groups; here the bytes of its HTTP are cut, and processes killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mesh.engine.cache import Engine
from mesh.errors import TransportError
from mesh.proxy.dialect import COMMENT
from mesh.proxy.tcp import TcpStream, open_tcp
from mesh.transport.lane import Sink, Stream
from tests.eventually import eventually
from tests.net.engine_kit import Process, serving, write_model
from tests.net.proxy_ingress import KEY, Ingress, an_ingress
from tests.net.push_kit import push_ring
from tests.net.resume_kit import Group
from tests.net.test_engine_resume import CASES, CONTEXT, LAYERS, TALK, TEMPLATE, Case

pytestmark = pytest.mark.engine

CUTS = 5
"""Places at which each case is cut; a seed says where. Not at the very end: times are not always written as long."""
LONG: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True}
DIALECTS = {
    "/v1/chat/completions": TALK | LONG | {"max_tokens": 400, "stream_options": {"include_usage": True}},
    "/v1/completions": LONG | {"prompt": "Once upon", "max_tokens": 400},
    "/completion": LONG | {"prompt": "Once upon", "n_predict": 400},
    "/v1/messages": TALK | LONG | {"max_tokens": 400},
    "/v1/responses": LONG | {"input": "Tell me", "max_output_tokens": 400},
}
WHOLE_CUTS = 3
WHOLE = {path: Case(path, body) for path, body in DIALECTS.items()} | {
    name: CASES[name]
    for name in (
        "completion, several prompts",
        "completions, two choices",
        "a stop word",
        "characters of several tokens",
        "a grammar and dice",
        "chat, two choices",
        "chat with calls",
        "chat by a schema",
        "responses with calls",
        "messages with calls",
    )
}
"""Asked for without a stream."""


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "words.gguf"
    write_model(path, engine, layers=LAYERS, context=CONTEXT, q8=True, template=TEMPLATE)
    return path


@pytest.fixture(autouse=True)
def one_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests come out alike when they have the same name and seed."""
    monkeypatch.setattr("mesh.proxy.http.secrets.token_hex", lambda n: "ab" * n)
    monkeypatch.setattr("mesh.proxy.http.secrets.randbelow", lambda n: 7)


@contextlib.asynccontextmanager
async def server(engine: Engine, model: Path, *, parallel: int = 2) -> AsyncIterator[tuple[Process, int]]:
    options = ("--no-repack", "--api-key", KEY)
    async with push_ring(engine, model, [LAYERS], parallel=parallel, context=CONTEXT, options=options) as solo:
        await serving(solo.host, solo.port)
        yield solo.host, solo.port


class Cut:
    """A connection to an engine that is reset once it has brought ``after`` bytes."""

    def __init__(self, stream: TcpStream, after: int | None) -> None:
        self._stream = stream
        self._after = after
        self.brought = 0
        self.asked = b""

    @property
    def closed(self) -> bool:
        return self._stream.closed

    async def read(self, limit: int = 65536) -> bytes:
        if self._after is not None:
            limit = min(limit, self._after - self.brought)
            if not limit:
                self._stream.abort()
                raise TransportError("cut, as asked")
        data = await self._stream.read(limit)
        if self._after is not None:
            data = data[: self._after - self.brought]
        self.brought += len(data)
        return data

    def write_now(self, data: bytes) -> bool:
        return False

    def pass_to(self, sink: Sink | None) -> None:
        def counted(data: bytes) -> bool:
            fits = self._after is None or self.brought + len(data) <= self._after
            if sink is None or not fits or not sink(data):
                return False
            self.brought += len(data)
            return True

        self._stream.pass_to(None if sink is None else counted)

    async def read_exactly(self, n: int) -> bytes:
        raise NotImplementedError

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        self.asked += data
        await self._stream.write(data)

    async def write_eof(self) -> None:
        await self._stream.write_eof()

    def abort(self, code: int = 0) -> None:
        self._stream.abort(code)


class Cutting:
    """Serves an ingress, cutting its first connection; those after it lead to the other engine."""

    def __init__(self, ingress: Ingress, first: int, second: int) -> None:
        self._ingress, self._ports = ingress, (first, second)
        self._numbers = itertools.count(1)
        self.streams: list[Cut] = []

    def serve(self, after: int | None) -> None:
        streams: list[Cut] = []
        self.streams = streams

        async def open_stream() -> Stream:
            stream = await open_tcp("127.0.0.1", self._ports[bool(streams)])
            streams.append(Cut(stream, None if streams else after))
            return streams[-1]

        self._ingress.serve_by(open_stream, next(self._numbers))


def plain(block: str) -> str:
    """Without times, and what was in a cache."""
    return Group(0, (block,), (), False).plain[0]


def told(answer: bytes) -> dict[Any, list[str]]:
    """Blocks in order, by choice where there are several: choices take turns as they like. Times left out."""
    assert not answer.count(b": mesh"), "a trace got through"
    found = defaultdict(list)
    for block in answer.decode().replace(COMMENT.decode(), "").split("\n\n"):
        found[_choice(block)].append(plain(block))
    return found


def _choice(block: str) -> Any:
    data = block.split("data: ", 1)[-1]
    if not data.startswith("{"):
        return None
    value = json.loads(data)
    choices = value.get("choices") or [value]
    return choices[0].get("index")


@pytest.mark.parametrize("name", CASES)
async def test_an_answer_cut_anywhere_arrives_whole(engine: Engine, model: Path, name: str) -> None:
    case: Case = CASES[name]
    async with server(engine, model) as (_, first), server(engine, model) as (_, second), an_ingress() as ingress:
        cutting = Cutting(ingress, first, second)
        cutting.serve(None)
        whole = told(await ingress.events(case.path, **case.body))
        length = cutting.streams[0].brought
        for cut in sorted(random.Random(name).sample(range(200, length * 19 // 20), CUTS)):
            cutting.serve(cut)
            assert told(await ingress.events(case.path, **case.body)) == whole, cut
            assert len(cutting.streams) == 2, "it was not cut"
        assert ingress.proxy.counters.resumed == CUTS and ingress.proxy.counters.failed == 0


async def test_a_killed_engine_is_not_noticed_by_who_reads_the_stream(engine: Engine, model: Path) -> None:
    async with contextlib.AsyncExitStack() as stack, an_ingress() as ingress:
        process, port = await stack.enter_async_context(server(engine, model))
        number = 1
        ingress.serve_tcp(port, number)
        for path, body in DIALECTS.items():
            whole = await ingress.events(path, **body)
            asking = asyncio.create_task(ingress.events(path, **body))
            before = ingress.tokens()
            await eventually(lambda before=before: ingress.tokens() > before + 20, every=0.001)  # type: ignore[misc]
            process.handle.kill()
            await process.ended()
            ingress.proxy.unserve("the host died")
            process, port = await stack.enter_async_context(server(engine, model))
            number += 1
            ingress.serve_tcp(port, number)
            assert told(await asking) == told(whole), path
        counters = ingress.proxy.counters
        assert (counters.completed, counters.resumed, counters.failed) == (10, 5, 0)


class Whole:
    """A case asked for without a stream: uninterrupted once, then cut."""

    def __init__(self, cutting: Cutting, ingress: Ingress, case: Case) -> None:
        self._cutting, self._ingress = cutting, ingress
        self._path, self._body = case.path, {**case.body, "stream": False}

    async def said(self) -> tuple[str, int, int]:
        """The answer, its bytes, and those that came before it."""
        self._cutting.serve(None)
        answer = await self._ingress.client.post(self._path, json=self._body)
        assert answer.headers["content-type"].startswith("application/json")
        size = len(answer.content)
        return plain("data: " + answer.text), size, self._cutting.streams[0].brought - size

    async def cut(self, after: int) -> tuple[str, bool]:
        """The answer, and whether the second engine was asked to go on with it."""
        self._cutting.serve(after)
        answer = await self._ingress.client.post(self._path, json=self._body)
        assert len(self._cutting.streams) == 2, "it was not cut"
        return plain("data: " + answer.text), b"X-Mesh-Resume" in self._cutting.streams[1].asked


@contextlib.asynccontextmanager
async def asked_whole(engine: Engine, model: Path, case: Case) -> AsyncIterator[tuple[Whole, Ingress]]:
    async with server(engine, model) as (_, first), server(engine, model) as (_, second), an_ingress() as ingress:
        yield Whole(Cutting(ingress, first, second), ingress, case), ingress


@pytest.mark.parametrize("name", WHOLE)
async def test_an_answer_that_is_not_streamed_goes_on_wherever_it_was_cut(
    engine: Engine, model: Path, name: str
) -> None:
    async with asked_whole(engine, model, WHOLE[name]) as (whole, ingress):
        said, _, before_it = await whole.said()
        went_on = 0
        for cut in random.Random(name).sample(range(before_it // 2, before_it), WHOLE_CUTS):
            answer, resumed = await whole.cut(cut)
            assert answer == said, cut
            went_on += resumed
        assert went_on or WHOLE[name].choices > 1, "each began anew"
        assert ingress.proxy.counters.resumed == WHOLE_CUTS and ingress.proxy.counters.failed == 0


@pytest.mark.parametrize("name", ["completions", "completion with tokens and probabilities"])
async def test_an_answer_with_probabilities_that_is_not_streamed_begins_anew(
    engine: Engine, model: Path, name: str
) -> None:
    # Of the words that another engine has said nobody knows any more what else they could have been.
    async with asked_whole(engine, model, CASES[name]) as (whole, _):
        said, size, before_it = await whole.said()
        assert await whole.cut(before_it + size - size // 2) == (said, False)


async def test_a_wrong_request_that_is_not_streamed_gets_the_engines_own_error(engine: Engine, model: Path) -> None:
    async with server(engine, model) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        too_long = await ingress.client.post("/v1/completions", json={"prompt": "word " * 3 * CONTEXT})
        assert too_long.status_code == 400 and too_long.json()["error"]["type"] == "exceed_context_size_error"
        wrong = await ingress.client.post("/completion", json={"prompt": "a", "grammar": "root ::= ("})
        assert wrong.status_code == 400 and "error" in wrong.json()
        assert int(wrong.headers["content-length"]) == len(wrong.content)
