"""Requests through a node's API while engines come, go and break; over real sockets and over streams in memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from functools import partial

import httpx
import pytest

from mesh.proxy.core import Limits
from tests.eventually import eventually
from tests.fakes.engine_http import FakeEngine, chunk, end, preamble, whole
from tests.net.proxy_ingress import Ingress, an_engine, an_ingress, steps

CHAT = "/v1/chat/completions"
QUICK = Limits(hold_s=0.4, comfort_after_s=0.1, comfort_every_s=0.1)


def whole_stream(path: str = CHAT) -> bytes:
    return whole(path, FakeEngine().words)


async def ask(ingress: Ingress, path: str = CHAT, **body: object) -> httpx.Response:
    return await ingress.client.post(path, json=body)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/completion", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("way", ["tcp", "lane"])
async def test_a_stream_passes_byte_for_byte(path: str, way: str) -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port) if way == "tcp" else ingress.serve_lane(engine)
        assert await ingress.events(path) == whole_stream(path)
        assert engine.seen[0].headers["authorization"] == "Bearer engine-key"


async def test_each_word_arrives_before_the_next_is_made() -> None:
    step = steps()
    async with an_engine(step=step) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        step.release()
        async with ingress.client.stream("POST", CHAT, json={"stream": True}) as answer:
            parts = answer.aiter_raw()
            seen, expected = b"", preamble(CHAT)
            for word in FakeEngine().words[:-1]:
                expected += chunk(CHAT, word)
                while seen != expected:
                    seen += await asyncio.wait_for(anext(parts), 5)
                    assert expected.startswith(seen)
                step.release()
            seen += b"".join([part async for part in parts])
            assert seen == whole_stream(CHAT)


async def test_an_answer_keeps_its_status_headers_and_body() -> None:
    async with an_engine() as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        good, bad = await ask(ingress), await ask(ingress, bad=True)
        assert good.json() == {"choices": [{"text": "one two three "}]}
        assert good.headers["x-engine"] == "fake"
        assert (bad.status_code, bad.json()["error"]["message"]) == (400, "bad\nfield")


async def test_the_engine_never_sees_the_clients_secrets_nor_the_browser_cors_headers() -> None:
    async with an_engine() as (engine, port), an_ingress(api_keys=["mine"]) as ingress:
        ingress.serve_tcp(port)
        headers = {"Authorization": "Bearer mine", "Cookie": "a=b", "Origin": "http://localhost:1", "X-Mine": "yes"}
        answer = await ingress.client.post(CHAT, json={}, headers=headers)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        seen = engine.seen[0].headers
        assert seen["authorization"] == "Bearer engine-key" and seen["x-mine"] == "yes"
        assert not {"cookie", "origin", "x-api-key"} & set(seen)


@pytest.mark.parametrize("way", ["tcp", "lane"])
async def test_large_bodies_pass_both_ways(way: str) -> None:
    body = json.dumps({"input": os.urandom(6 << 20).hex()}).encode()
    async with an_engine(large_answer=8 << 20) as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port) if way == "tcp" else ingress.serve_lane(engine, window=65536)
        answer = (await ingress.client.post("/v1/embeddings", content=body)).json()
        assert answer["sha256"] == hashlib.sha256(body).hexdigest()
        assert len(answer["large"]) == 8 << 20
    assert ingress.proxy.budget.used == 0


async def test_an_answer_too_large_to_hold_back_passes_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.proxy.exchange.MAX_BUFFERED_ANSWER", 100_000)
    async with an_engine(large_answer=3 << 20) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        assert len((await ask(ingress, "/v1/embeddings", input="x")).json()["large"]) == 3 << 20
        assert ingress.proxy.counters.completed == 1


async def test_small_answers_are_not_delayed() -> None:
    # Nagle's delay, met by a client's delayed acknowledgement, costs 40 ms on every answer of two packets.
    async with an_engine() as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        times = [(await ask(ingress)).elapsed.total_seconds() for _ in range(10)]
        assert min(times[1:]) < 0.03


async def test_the_rest_of_llama_servers_api_passes() -> None:
    async with an_engine() as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        for path in ("/tokenize", "/detokenize", "/apply-template", "/infill", "/v1/rerank", "/v1/any/new?a=%20b"):
            assert (await ask(ingress, path)).json()["path"] == path
        for path in ("/props", "/slots"):
            assert (await ingress.client.get(path)).json()["path"] == path
        for path in ("/tools", "/cors-proxy", "/v1/../tools", "/nothing"):
            refused = await ingress.client.get(httpx.URL(f"http://127.0.0.1:{ingress.port}", raw_path=path.encode()))
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_url")


async def test_connections_to_the_engine_are_kept_and_dropped_with_the_layout() -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        for _ in range(3):
            assert (await ask(ingress)).status_code == 200
            assert await ingress.events() == whole_stream()
        assert engine.connections == 1
        ingress.serve_tcp(port, number=2)
        await eventually(lambda: engine.active == 0, within=2)
        assert (await ask(ingress)).status_code == 200
        assert engine.connections == 2


async def test_a_kept_connection_that_died_costs_nothing() -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        await ask(ingress)
        engine.drop_idle()
        assert (await ask(ingress)).status_code == 200
        counters = ingress.proxy.counters
        assert (counters.completed, counters.resumed) == (2, 0)


# -- hold ------------------------------------------------------------------------------------------------------------


async def test_requests_wait_until_a_layout_serves() -> None:
    async with an_engine() as (_, port), an_ingress() as ingress:
        waiting = [asyncio.create_task(ask(ingress)) for _ in range(3)]
        stream = asyncio.create_task(ingress.events())
        await eventually(lambda: ingress.proxy.counters.held == 4)
        ingress.serve_tcp(port)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 3
        assert await stream == whole_stream()


async def test_a_waiting_stream_is_comforted_and_then_served() -> None:
    async with an_engine() as (_, port), an_ingress(Limits(comfort_after_s=0.05, comfort_every_s=0.05)) as ingress:
        async with ingress.client.stream("POST", CHAT, json={"stream": True}) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            parts = answer.aiter_raw()
            assert await anext(parts) == b": waiting for the mesh\n\n"
            assert await anext(parts) == b": waiting for the mesh\n\n"
            ingress.serve_tcp(port)
            rest = b"".join([part async for part in parts])
        assert rest.replace(b": waiting for the mesh\n\n", b"") == whole_stream()


async def test_waiting_in_vain_ends_in_503_with_a_reason_and_a_time_to_come_back() -> None:
    async with an_ingress(QUICK) as ingress:
        ingress.proxy.unserve('"attic" left; nobody else holds the model')
        answer = await ask(ingress)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("service_unavailable", "mesh_not_serving", None)
        assert '"attic" left' in error["message"]
        assert (await ingress.client.get("/props")).status_code == 503


async def test_a_comforted_stream_that_waits_in_vain_ends_in_one_error_event() -> None:
    async with an_ingress(QUICK) as ingress:
        seen = await ingress.events()
        assert seen.startswith(b": waiting for the mesh\n\n")
        last = seen.rstrip(b"\n").split(b"\n\n")[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "mesh_not_serving"
        assert b"[DONE]" not in seen


async def test_an_engines_refusal_reaches_a_comforted_stream_as_an_event() -> None:
    async with an_engine() as (_, port), an_ingress(Limits(comfort_after_s=0.02)) as ingress:
        waiting = asyncio.create_task(ingress.events(bad=True))
        await eventually(lambda: ingress.proxy.counters.held == 1)
        async with ingress.client.stream("POST", CHAT, json={"stream": True, "bad": True}) as answer:
            parts = answer.aiter_raw()
            await anext(parts)
            ingress.serve_tcp(port)
            seen = b"".join([part async for part in parts])
        for text in (seen, await waiting):
            last = text.rstrip(b"\n").split(b"\n\n")[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == "bad\nfield"


async def test_past_the_bound_of_the_queue_it_is_429() -> None:
    async with an_ingress(Limits(max_held=2)) as ingress:
        waiting = [asyncio.create_task(ask(ingress)) for _ in range(2)]
        await eventually(lambda: ingress.proxy.counters.held == 2)
        refused = await ask(ingress)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"]
        await ingress.proxy.close()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {503}


async def test_anthropic_clients_get_errors_of_their_own_shape() -> None:
    async with an_ingress(Limits(hold_s=0.05)) as ingress:
        answer = await ask(ingress, "/v1/messages")
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "overloaded_error"


# -- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["tcp", "lane"])
async def test_an_answer_survives_the_death_of_its_engine(way: str) -> None:
    async with an_engine(hang=True) as (first, port), an_engine() as (second, other), an_ingress() as ingress:
        ingress.serve_tcp(port) if way == "tcp" else ingress.serve_lane(first)
        whole, stream = asyncio.create_task(ask(ingress)), asyncio.create_task(ingress.events())
        await eventually(lambda: len(first.seen) == 2)
        await first.die()
        await eventually(lambda: ingress.proxy.counters.held == 2)
        ingress.serve_tcp(other, number=2) if way == "tcp" else ingress.serve_lane(second, number=2)
        assert (await whole).json()["choices"][0]["text"] == "one two three "
        assert await stream == whole_stream()
        assert ingress.proxy.counters.resumed == 2


@pytest.mark.parametrize("fault", [{"break_after": 0}, {"cut_bodies": True}])
async def test_an_answer_that_breaks_off_is_asked_for_again(fault: dict[str, object]) -> None:
    async with an_engine(large_answer=10_000, **fault) as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        waiting = asyncio.create_task(ask(ingress, "/v1/embeddings", input="x"))
        await eventually(lambda: len(engine.seen) >= 2)
        engine.break_after, engine.cut_bodies = None, False
        answer = await waiting
        assert (answer.status_code, len(answer.json()["large"])) == (200, 10_000)
        assert ingress.proxy.counters.resumed == 1


async def test_an_answer_too_large_to_hold_back_never_looks_complete_when_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.proxy.exchange.MAX_BUFFERED_ANSWER", 100_000)
    async with an_engine(large_answer=3 << 20, cut_bodies=True) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        with pytest.raises(httpx.RemoteProtocolError):
            await ask(ingress, "/v1/embeddings", input="x")
        assert ingress.proxy.counters.failed == 1


async def test_a_layout_that_changes_takes_the_request_along_though_the_old_engine_hangs() -> None:
    async with an_engine(hang=True) as (first, port), an_engine() as (_, other), an_ingress() as ingress:
        ingress.serve_tcp(port)
        waiting = asyncio.create_task(ask(ingress))
        await eventually(lambda: first.seen)
        ingress.proxy.unserve("the host is silent")
        await eventually(lambda: first.seen[0].cancelled and ingress.proxy.counters.held == 1)
        ingress.serve_tcp(other, number=2)
        assert (await waiting).status_code == 200


async def test_an_engine_that_loads_its_model_is_waited_for() -> None:
    async with an_engine(loading=True) as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        waiting = asyncio.create_task(ask(ingress))
        await eventually(lambda: len(engine.seen) >= 2)
        engine.loading = False
        assert (await waiting).status_code == 200


async def test_an_engine_that_nobody_reaches_ends_in_503() -> None:
    async with an_ingress(QUICK) as ingress:
        ingress.serve_nowhere()
        answer = await ask(ingress)
        assert answer.status_code == 503 and "connection refused" in answer.json()["error"]["message"]
        assert ingress.opened >= 3


@pytest.mark.parametrize("path", [CHAT, "/completion", "/v1/messages"])
@pytest.mark.parametrize("fault", ["break_after", "end_after"])
async def test_a_stream_cut_after_its_first_word_ends_in_an_error_and_never_looks_complete(
    path: str, fault: str
) -> None:
    async with an_engine(**{fault: 2}, traces=False) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        seen = await ingress.events(path)
        words = preamble(path) + b"".join(chunk(path, word) for word in FakeEngine().words[:2])
        assert seen.startswith(words)
        (last,) = seen.removeprefix(words).strip().split(b"\n\n")
        assert "error" in json.loads(last.split(b"data: ", 1)[1])
        assert end(path) not in seen
        assert (ingress.proxy.counters.failed, ingress.proxy.counters.completed) == (1, 0)


async def test_answers_under_way_finish_before_a_planned_change() -> None:
    step = steps()
    async with an_engine(step=step) as (engine, port), an_engine() as (_, other), an_ingress() as ingress:
        ingress.serve_tcp(port)
        old = asyncio.create_task(ingress.events())
        await eventually(lambda: engine.seen)
        ingress.proxy.unserve("a worker joins", drain_s=5)
        new = asyncio.create_task(ask(ingress))
        await eventually(lambda: ingress.proxy.counters.held == 1)
        assert not await ingress.proxy.drained(0.01)
        for _ in FakeEngine().words:
            step.release()
        assert await ingress.proxy.drained(5)
        assert await old == whole_stream()
        ingress.serve_tcp(other, number=2)
        assert (await new).status_code == 200


# -- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", ["tcp", "lane"])
async def test_a_client_that_leaves_frees_the_slot_within_a_second(stream: bool, way: str) -> None:
    step = steps()
    async with an_engine(step=step) as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port) if way == "tcp" else ingress.serve_lane(engine)
        step.release()
        asking = asyncio.create_task(ingress.client.post(CHAT, json={"stream": stream}))
        await eventually(lambda: engine.seen)
        asking.cancel()
        await eventually(lambda: engine.seen[0].cancelled, within=1)
        await eventually(lambda: ingress.proxy.counters.active == 0, within=1)
        assert ingress.proxy.counters.failed == 0


async def test_a_client_that_leaves_while_waiting_is_forgotten() -> None:
    async with an_ingress() as ingress:
        asking = asyncio.create_task(ask(ingress))
        await eventually(lambda: ingress.proxy.counters.held == 1)
        asking.cancel()
        await eventually(lambda: ingress.proxy.counters.held == 0, within=1)


async def test_a_client_that_does_not_read_holds_the_engine_back_and_is_cut_off() -> None:
    words = ["x" * 100_000] * 400
    async with an_engine(words=words) as (engine, port), an_ingress(stall_s=0.3) as ingress:
        ingress.serve_tcp(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", ingress.port, limit=1024)
        body = b'{"stream":true}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await eventually(lambda: engine.seen and engine.seen[0].cancelled)
        await eventually(lambda: ingress.proxy.counters.active == 0)
        writer.close()
        del reader


async def test_a_body_over_the_limit_is_refused_with_413() -> None:
    async with an_engine() as (engine, port), an_ingress(max_body=1000) as ingress:
        ingress.serve_tcp(port)
        refused = await ask(ingress, CHAT, text="x" * 2000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b"x" * 100

        assert (await ingress.client.post(CHAT, content=pieces())).status_code == 413
        assert not engine.seen


async def test_all_bodies_together_are_bounded() -> None:
    async with an_ingress(budget_bytes=5000) as ingress:
        first = asyncio.create_task(ask(ingress, CHAT, text="x" * 4000))
        await eventually(lambda: ingress.proxy.counters.held == 1)
        assert (await ask(ingress, CHAT, text="x" * 4000)).json()["error"]["code"] == "memory_full"
        first.cancel()
        await eventually(lambda: ingress.proxy.budget.used == 0)


async def test_another_model_gets_openais_404() -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        refused = await ask(ingress, model="gpt-3.5-turbo")
        assert refused.status_code == 404
        assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("model_not_found", "model")
        assert not engine.seen
        for name in ("tiny", "tiny.gguf", "default", ""):
            assert (await ask(ingress, model=name)).status_code == 200


async def test_many_requests_while_engines_die_all_get_their_whole_answer() -> None:
    # Every engine dies with requests inside; what was not begun is asked again, and nothing comes out altered.
    async with an_ingress() as ingress:
        engines: list[FakeEngine] = []

        async def next_engine() -> None:
            engine = FakeEngine()
            ingress.serve_tcp(await engine.listen(), number=len(engines) + 1)
            engines.append(engine)

        await next_engine()
        answers: list[httpx.Response] = []

        async def client() -> None:
            for _ in range(25):
                answers.append(await ask(ingress))

        clients = asyncio.gather(*(client() for _ in range(8)))
        while not clients.done():
            seen = len(engines[-1].seen)
            await eventually(partial(lambda seen: len(engines[-1].seen) > seen + 20 or clients.done(), seen))
            await engines[-1].die()
            await next_engine()
        await clients
        await engines[-1].die()
        assert len(answers) == 200 and len(engines) > 5
        assert {answer.text for answer in answers} == {'{"choices": [{"text": "one two three "}]}'}
        assert ingress.proxy.counters.failed == 0
