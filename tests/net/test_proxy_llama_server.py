"""llama-server's own API through a node's, at each distance: on its machine, and over either lane on another's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mesh.engine.cache import Engine
from mesh.transport.lane import Stream
from mesh.tunnel import HttpTunnel
from mesh.wire.facts import Epoch
from mesh.wire.messages import OpenHttp
from tests.eventually import eventually
from tests.fakes.engine_http import FakeEngine
from tests.net.engine_kit import serving, write_model
from tests.net.party import Party
from tests.net.proxy_ingress import HOST, KEY, Ingress, an_ingress
from tests.net.push_kit import push_ring
from tests.net.test_engine_resume import TEMPLATE

pytestmark = pytest.mark.engine

DISTANCES = ["here", "tcp", "quic"]
LAYERS = 4
EPOCH = Epoch(1, HOST)
AUTH = {"Authorization": f"Bearer {KEY}"}
LONG = {"prompt": "Once upon a time", "n_predict": 100_000, "max_tokens": 100_000, "ignore_eos": True}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
LOOK = {"type": "object", "properties": {"where": {"type": "string", "maxLength": 8}}, "required": ["where"]}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}

ASKED: dict[str, tuple[str, Any]] = {
    "chat": ("/v1/chat/completions", TALK),
    "chat, a picture": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, PICTURE]}]},
    ),
    "chat, tools": (
        "/v1/chat/completions",
        TALK | {"tools": [{"type": "function", "function": {"name": "look", "parameters": LOOK}}]},
    ),
    "chat, a schema": (
        "/v1/chat/completions",
        TALK
        | {"max_tokens": 100, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOK}}},
    ),
    "chat, wrong": ("/v1/chat/completions", {"messages": "none"}),
    "count of a chat": ("/v1/chat/completions/input_tokens", TALK),
    "completions": ("/v1/completions", {"prompt": "Once", "max_tokens": 4, "temperature": 0, "logprobs": 2}),
    "completion": ("/completion", {"prompt": "Once", "n_predict": 4, "temperature": 0, "n_probs": 2}),
    "infill": ("/infill", {"input_prefix": "def f(", "input_suffix": "return", "n_predict": 4, "temperature": 0}),
    "responses": ("/v1/responses", {"input": "hello", "max_output_tokens": 4, "temperature": 0}),
    "messages": ("/v1/messages", TALK),
    "messages, count": ("/v1/messages/count_tokens", TALK),
    "embeddings": ("/v1/embeddings", {"input": ["one", "two"]}),
    "embedding": ("/embedding", {"content": "one"}),
    "rerank": ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    "tokenize": ("/tokenize", {"content": "Once upon a time", "with_pieces": True}),
    "detokenize": ("/detokenize", {"tokens": [9038, 2501, 263, 931]}),
    "apply-template": ("/apply-template", TALK),
    "no such thing": ("/v1/no/such/thing", {}),
}
LOOKED_AT = ["/props", "/slots", "/lora-adapters"]
_MADE_UP = frozenset(
    {"id", "created", "created_at", "completed_at", "timings", "id_task", "call_id", "item_id", "cached_tokens"}
    | {"input_tokens_details", "prompt_tokens_details", "cache_read_input_tokens", "input_tokens", "tokens_cached"}
    | {"tokens_evaluated", "id_slot", "prompt_n", "cache_n", "seed", "score"}
)


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "words.gguf"
    # As slow as a few milliseconds a token: its context must not be full before somebody leaves.
    write_model(path, engine, layers=LAYERS, width=512, template=TEMPLATE)
    return path


@contextlib.asynccontextmanager
async def a_server(engine: Engine, model: Path, *, parallel: int = 1) -> AsyncIterator[int]:
    """The port of a llama-server, started as a host starts it."""
    options = ("--api-key", KEY)
    async with push_ring(engine, model, [LAYERS], parallel=parallel, context=512, options=options) as solo:
        await serving(solo.host, solo.port)
        yield solo.port


class _Served(list[Any]):
    """A member's bulk streams, carried to its llama-server as they come."""

    def __init__(self, tunnel: HttpTunnel) -> None:
        super().__init__()
        self._tunnel = tunnel
        self._tasks: set[asyncio.Task[None]] = set()

    def append(self, arrived: Any) -> None:
        peer, request, stream = arrived
        if isinstance(request, OpenHttp):
            task = asyncio.create_task(self._tunnel.serve(peer, request, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


@contextlib.asynccontextmanager
async def reached(ingress: Ingress, port: int, distance: str) -> AsyncIterator[HttpTunnel | None]:
    """``ingress`` serves the llama-server at ``port``: of its own machine, or of another over a real lane."""
    if distance == "here":
        ingress.serve_tcp(port)
        yield None
        return
    party = Party()
    tunnel = HttpTunnel(lambda epoch: port)
    host = await party.node("host", tcp=distance == "tcp")
    host.bulk = _Served(tunnel)
    client = await party.node("laptop", role="client", knows=(host,))
    try:
        await eventually(lambda: host.ups and client.ups)
        await eventually(lambda: client.links.peers()[host.key.id].path == distance)

        async def open_stream() -> Stream:
            return await client.links.open_bulk(host.key.id, OpenHttp(EPOCH))

        ingress.serve_by(open_stream, 1)
        yield tunnel
    finally:
        tunnel.close()
        await party.over()


async def directly(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=AUTH, timeout=30, trust_env=False)


def fixed(answer: httpx.Response) -> tuple[int, str, Any]:
    """What two answers to one question have in common."""
    kind = answer.headers["content-type"].split(";")[0]
    return answer.status_code, kind, _fixed(answer.json() if kind == "application/json" else answer.text)


def _fixed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fixed(one) for key, one in value.items() if key not in _MADE_UP}
    return [_fixed(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("distance", DISTANCES)
async def test_whatever_llama_server_answers_passes(engine: Engine, model: Path, distance: str) -> None:
    async with (
        a_server(engine, model) as port,
        an_ingress() as ingress,
        reached(ingress, port, distance),
        await directly(port) as direct,
    ):
        answered = {}
        for name, (path, body) in ASKED.items():
            # A prompt that is there already is computed in other parts, and rounds otherwise.
            asked = body | {"cache_prompt": False}
            ours, theirs = await ingress.client.post(path, json=asked), await direct.post(path, json=asked)
            assert fixed(ours) == fixed(theirs), name
            answered[name] = ours.status_code
        for path in LOOKED_AT:
            assert fixed(await ingress.client.get(path)) == fixed(await direct.get(path)), path
        # The model holds no vision, no ranking and no words for infilling: those answers are llama-server's refusals.
        assert {name for name, status in answered.items() if status != 200} == {
            *("chat, a picture", "chat, wrong", "infill", "rerank", "no such thing")
        }
        metrics = (await ingress.client.get("/metrics")).text
        assert "llamacpp:" in metrics and "mesh_requests_completed_total" in metrics
        unknown = await ingress.client.post("/v1/chat/completions", json=TALK | {"model": "gpt-4o"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def busy(direct: httpx.AsyncClient) -> int:
    return sum(slot["is_processing"] for slot in (await direct.get("/slots")).json())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot_within_a_second(
    engine: Engine, model: Path, distance: str, stream: bool
) -> None:
    async with (
        a_server(engine, model) as port,
        an_ingress() as ingress,
        reached(ingress, port, distance),
        await directly(port) as direct,
    ):
        for path in ("/v1/chat/completions", "/completion", "/v1/messages"):
            asking = asyncio.create_task(ingress.client.post(path, json=LONG | TALK | LONG | {"stream": stream}))
            await eventually(lambda: busy(direct))
            asking.cancel()
            left = asyncio.get_running_loop().time()
            await eventually(lambda: _none_busy(direct))
            took = asyncio.get_running_loop().time() - left
            assert took < 1.0, (path, took)


async def _none_busy(direct: httpx.AsyncClient) -> bool:
    return await busy(direct) == 0


@pytest.mark.parametrize("distance", DISTANCES)
async def test_one_client_with_many_requests_does_not_keep_another_waiting(
    engine: Engine, model: Path, distance: str
) -> None:
    async with (
        a_server(engine, model) as port,
        an_ingress(api_keys=["many", "one"]) as ingress,
        reached(ingress, port, distance),
    ):
        order: list[str] = []

        async def ask(key: str) -> None:
            body = {"prompt": "Once", "n_predict": 120, "ignore_eos": True, "temperature": 0}
            headers = {"Authorization": f"Bearer {key}"}
            answer = await ingress.client.post("/completion", json=body, headers=headers, timeout=120)
            assert answer.status_code == 200
            order.append(key)

        crowd = [asyncio.create_task(ask("many")) for _ in range(20)]
        await eventually(lambda: order, within=30)
        before = len(order)
        await ask("one")
        # One of theirs is being answered, and goes first; another may have gone while this one was on its way.
        assert len(order) < 20 and order.index("one") <= before + 2, order
        await asyncio.gather(*crowd)


@pytest.mark.parametrize("distance", DISTANCES)
async def test_a_reader_that_stalls_stops_the_engine_and_not_our_memory(distance: str) -> None:
    made = 0

    class Endless(FakeEngine):
        async def _generate(self, start: int = 0) -> AsyncIterator[str]:
            nonlocal made
            while True:
                made += 1
                yield "x" * 65536

    fake = Endless(api_key=KEY)
    async with an_ingress() as ingress, reached(ingress, await fake.listen(), distance):
        reader, writer = await asyncio.open_connection("127.0.0.1", ingress.port, limit=1024)
        body = b'{"stream":true}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        seen = -1

        def stands_still() -> bool:
            nonlocal seen
            before, seen = seen, made
            return 0 < made == before

        await eventually(stands_still, within=20, every=0.5)
        assert made * 65536 < 32 << 20  # kernels keep some megabytes for each socket on the way
        writer.transport.abort()
        del reader
        await eventually(lambda: not fake.active, within=5)
    await fake.die()
