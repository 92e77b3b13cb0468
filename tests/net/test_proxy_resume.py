"""Streams that go on where their engine was lost, in front of fakes that trace and continue as the patched one does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mesh.proxy.core import Limits
from mesh.proxy.dialect import COMMENT
from mesh.proxy.origin import HEADER
from tests.eventually import eventually
from tests.fakes.engine_http import FakeEngine, Seen, token_of, whole
from tests.net.proxy_ingress import Ingress, an_engine, an_ingress, steps

CHAT = "/v1/chat/completions"
PATHS = [
    CHAT,
    "/chat/completions",
    "/v1/completions",
    "/completions",
    "/completion",
    "/infill",
    "/v1/messages",
    "/v1/responses",
    "/responses",
]
WORDS = ["one ", "two ", "three ", "four "]
AT_ONCE = Limits(retry_delays_s=(0.0,))


def origin(seen: Seen) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(seen.headers[HEADER.decode().lower()])
    return said


def answered(ingress: Ingress) -> tuple[int, int, int]:
    counters = ingress.proxy.counters
    return counters.completed, counters.resumed, counters.failed


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("blocks", "choices"), [(1, 1), (3, 1), (2, 3)])
async def test_a_stream_cut_at_any_word_goes_on_in_another_engine(path: str, blocks: int, choices: int) -> None:
    like = {"words": WORDS, "blocks": blocks, "choices": choices}
    async with an_ingress() as ingress:
        for cut in range(len(WORDS)):
            async with an_engine(**like, break_after=cut) as (first, port), an_engine(**like) as (second, other):
                ingress.serve_tcp(port, number=2 * cut + 1)
                asking = asyncio.create_task(ingress.events(path, prompt="Say"))
                await eventually(lambda first=first: first.seen and not first.active)  # type: ignore[misc]
                ingress.serve_tcp(other, number=2 * cut + 2)
                assert await asking == whole(path, WORDS, blocks=blocks, choices=choices)
                before, after = first.seen[-1], second.seen[-1]
                assert {**origin(before), "age_ms": 0} == {**origin(after), "age_ms": 0}
                told = json.loads(after.body)
                if "x-mesh-resume" in after.headers:
                    assert told["body"] == json.loads(before.body)
                    said = {"tokens": [token_of(n) for n in range(cut)], "end": False}
                    assert told["choices"] == [said] * choices
                else:
                    assert after.body == before.body and cut == 0
        assert answered(ingress) == (len(WORDS), len(WORDS), 0)


@pytest.mark.parametrize("path", [CHAT, "/completion", "/v1/responses"])
async def test_a_stream_cut_at_any_byte_is_delivered_whole_and_once(path: str) -> None:
    like = {"words": WORDS, "blocks": 2}
    full = whole(path, WORDS, blocks=2)
    async with an_engine(**like) as (engine, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        length = len(full) + 16 * (len(WORDS) + 2)  # and the traces
        for cut in range(1, length, 3):
            engine.break_at = cut
            assert await ingress.events(path) == full, cut


async def test_an_engine_lost_again_and_again_is_followed_as_long_as_there_is_progress() -> None:
    # Each engine says one word more than the client has, and dies.
    words = [f"{n} " for n in range(12)]
    async with an_engine(words=words, dies_after=1) as (engine, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        assert await ingress.events() == whole(CHAT, words)
        assert len(engine.seen) == len(words)
        assert answered(ingress) == (1, 1, 0)


async def test_a_request_that_kills_every_engine_at_the_same_word_ends_in_an_error() -> None:
    limits = Limits(retry_delays_s=(0.0,), max_losses=2)
    async with an_engine(break_after=1) as (engine, port), an_ingress(limits) as ingress:
        ingress.serve_tcp(port)
        seen = await ingress.events()
        assert b'"engine_lost"' in seen and b"[DONE]" not in seen
        assert seen.count(b"one ") == 1
        assert len(engine.seen) == 3


async def test_a_stream_that_stands_still_is_comforted_between_blocks() -> None:
    limits = Limits(comfort_after_s=0.02, comfort_every_s=0.02)
    async with an_engine(break_after=2) as (first, port), an_engine() as (_, other), an_ingress(limits) as ingress:
        ingress.serve_tcp(port)
        async with ingress.client.stream("POST", CHAT, json={"stream": True}) as answer:
            parts = answer.aiter_raw()
            seen = b""
            await eventually(lambda: first.seen and not first.active)
            ingress.proxy.unserve("the host died")
            while seen.count(COMMENT) < 2:
                seen += await anext(parts)
            ingress.serve_tcp(other, number=2)
            seen += b"".join([part async for part in parts])
        assert seen.split(COMMENT)[0].endswith(b"\n\n")
        assert seen.replace(COMMENT, b"") == whole(CHAT, first.words)


async def test_a_layout_change_takes_a_stream_along_from_where_it_is() -> None:
    step = steps()
    async with an_engine(step=step) as (first, port), an_engine() as (_, other), an_ingress() as ingress:
        ingress.serve_tcp(port)
        step.release()
        asking = asyncio.create_task(ingress.events())
        await eventually(lambda: ingress.tokens() == 1)
        ingress.proxy.unserve("a worker joined")
        await eventually(lambda: first.seen[0].cancelled)
        ingress.serve_tcp(other, number=2)
        assert await asking == whole(CHAT, first.words)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/completion"])
async def test_what_the_engine_will_not_continue_ends_in_one_typed_error(path: str) -> None:
    async with an_engine(break_after=2, refuses=True) as (engine, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        seen = await ingress.events(path)
        *_, last = seen.strip().split(b"\n\n")
        error = json.loads(last.split(b"data: ", 1)[1])
        assert "not this one" in error["error"]["message"]
        if path == "/v1/messages":
            assert last.startswith(b"event: error") and error["type"] == "error"
        else:
            assert error["error"]["code"] == "cannot_resume"
        assert b"[DONE]" not in seen and b"message_stop" not in seen
        assert answered(ingress) == (0, 0, 1)
        assert len(engine.seen) == 2


async def test_another_model_never_continues_a_stream() -> None:
    async with an_engine(break_after=2) as (first, port), an_engine() as (second, other), an_ingress() as ingress:
        ingress.serve_tcp(port)
        asking = asyncio.create_task(ingress.events())
        await eventually(lambda: first.seen and not first.active)
        ingress.serve_tcp(other, number=2, fingerprint="another")
        seen = await asking
        assert b'"cannot_resume"' in seen and b"[DONE]" not in seen
        assert not second.seen


async def test_an_engine_lost_after_the_end_mark_owes_nothing() -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        full = whole(CHAT, engine.words)
        engine.break_at = len(full) + len(": mesh 0 1\n: mesh 0 2 end\n") + 3 * len(": mesh 0 1 1000\n")
        assert await ingress.events() == full
        assert len(engine.seen) == 1
        assert answered(ingress) == (1, 0, 0)


async def test_an_engines_own_error_in_a_stream_is_the_answer() -> None:
    async with an_engine(error_after=2) as (engine, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        assert (await ingress.events()).endswith(b'data: {"error":{"message":"Compute error.","code":500}}\n\n')
        assert len(engine.seen) == 1


async def test_a_request_that_is_no_json_is_not_continued() -> None:
    # There is nothing to wrap; a form with a file in it is another such case.
    async with an_engine(break_after=1) as (_, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        body = b'\xef\xbb\xbf{"stream":true}'
        answer = await ingress.client.post(CHAT, content=body)
        assert b'"stream_interrupted"' in answer.content


async def test_a_stream_longer_than_can_be_recorded_is_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.proxy.transcript.MAX_TOKENS", 1)
    async with an_engine(break_after=2) as (_, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        seen = await ingress.events()
        assert seen.count(b"two ") == 1 and b'"stream_interrupted"' in seen


async def test_the_record_is_counted_in_what_a_node_may_hold_and_given_back() -> None:
    step = steps()
    async with an_engine(step=step) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        asking = asyncio.create_task(ingress.events())
        await eventually(lambda: ingress.proxy.budget.used)
        before = ingress.proxy.budget.used
        step.release()
        await eventually(lambda: ingress.proxy.budget.used > before)
        for _ in FakeEngine().words:
            step.release()
        await asking
        await eventually(lambda: ingress.proxy.budget.used == 0)


async def test_a_reader_that_was_slow_when_the_engine_died_gets_each_word_once() -> None:
    # What fits nowhere on its way to the client is not delivered, and so said by the next engine.
    words = [f"{n:06} " + "x" * 50_000 for n in range(200)]
    like = {"words": words}
    async with an_engine(**like) as (first, port), an_engine(**like) as (second, other), an_ingress() as ingress:
        ingress.serve_tcp(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", ingress.port, limit=1024)
        body = b'{"stream":true}'
        writer.write(b"POST %s HTTP/1.0\r\nHost: localhost\r\n" % CHAT.encode())
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        held = -1.0

        def stalled() -> bool:
            nonlocal held
            before, held = held, ingress.tokens()
            return 0 < held == before

        await eventually(stalled, within=10)
        await first.die()
        ingress.serve_tcp(other, number=2)
        seen = bytearray()
        while data := await reader.read(1 << 20):
            seen += data
        writer.close()
        assert second.seen and "x-mesh-resume" in second.seen[0].headers
        assert seen.split(b"\r\n\r\n", 1)[1] == whole(CHAT, words)


async def test_clients_cannot_say_what_the_ingress_says() -> None:
    async with an_engine() as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        forged = {"X-Mesh-Request": '{"id":"mine"}', "x-mesh-resume": "1", "X-Mesh-Anything": "x", "X-Mine": "kept"}
        answer = await ingress.client.post(CHAT, json={}, headers=forged)
        assert answer.status_code == 200
        (seen,) = engine.seen
        assert origin(seen)["id"] != "mine" and seen.headers["x-mine"] == "kept"
        assert [name for name in seen.headers if name.startswith("x-mesh-")] == ["x-mesh-request"]


async def test_each_request_has_an_id_and_a_seed_of_its_own_and_clients_tags_that_stay() -> None:
    async with an_engine() as (engine, port), an_ingress(api_keys=["mine", "yours"]) as ingress:
        ingress.serve_tcp(port)
        for key in ("mine", "mine", "yours"):
            await ingress.client.post(CHAT, json={}, headers={"Authorization": f"Bearer {key}"})
        first, second, third = map(origin, engine.seen)
        assert len({first["id"], second["id"], third["id"]}) == 3
        assert len({first["seed"], second["seed"], third["seed"]}) == 3
        assert first["client"] == second["client"] != third["client"]


async def test_a_replayed_answer_is_asked_for_under_the_same_id_and_seed_and_its_age() -> None:
    async with an_engine(break_after=0) as (engine, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        asking = asyncio.create_task(ingress.client.post(CHAT, json={"prompt": "x"}))
        await eventually(lambda: len(engine.seen) >= 2)
        engine.break_after = None
        assert (await asking).status_code == 200
        first, *_, last = map(origin, engine.seen)
        assert (first["id"], first["seed"]) == (last["id"], last["seed"])
        assert last["age_ms"] >= first["age_ms"] + 50
        assert "x-mesh-resume" not in engine.seen[-1].headers


# -- answers that come whole -----------------------------------------------------------------------------------------


async def asked(ingress: Ingress) -> Any:
    answer = await ingress.client.post(CHAT, json={"prompt": "Say"})
    assert answer.headers["content-type"].startswith("application/json") and "x-mesh-whole" not in answer.headers
    return answer.status_code, answer.json()


async def test_an_answer_that_comes_whole_goes_on_in_another_engine() -> None:
    like = {"words": WORDS}
    said = (200, {"choices": [{"text": "".join(WORDS)}]})
    async with an_ingress() as ingress:
        for cut in range(len(WORDS)):
            async with an_engine(**like, break_after=cut) as (first, port), an_engine(**like) as (second, other):
                ingress.serve_tcp(port, number=2 * cut + 1)
                asking = asyncio.create_task(asked(ingress))
                await eventually(lambda first=first: first.seen and not first.active)  # type: ignore[misc]
                ingress.serve_tcp(other, number=2 * cut + 2)
                assert await asking == said
                after = second.seen[-1]
                assert ("x-mesh-resume" in after.headers) is (cut > 0)
                if cut:
                    tokens = [token_of(n) for n in range(cut)]
                    assert json.loads(after.body)["choices"] == [{"tokens": tokens, "end": False}]
        assert answered(ingress) == (len(WORDS), len(WORDS), 0)


async def test_an_answer_that_comes_whole_outlives_engines_as_long_as_there_is_progress() -> None:
    words = [f"{n} " for n in range(12)]
    async with an_engine(words=words, dies_after=1) as (engine, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        assert await asked(ingress) == (200, {"choices": [{"text": "".join(words)}]})
        assert len(engine.seen) == len(words) + 1
        assert answered(ingress) == (1, 1, 0)


async def test_an_answer_that_comes_whole_begins_anew_where_it_is_not_continued() -> None:
    refuses = {"break_after": 2, "refuses": True}
    async with an_engine(**refuses) as (first, port), an_engine() as (second, other), an_ingress() as ingress:
        ingress.serve_tcp(port)
        asking = asyncio.create_task(asked(ingress))
        await eventually(lambda: len(first.seen) > 1 and "x-mesh-resume" in first.seen[1].headers)
        ingress.serve_tcp(other, number=2)
        assert (await asking)[0] == 200
        assert "x-mesh-resume" not in second.seen[-1].headers


async def test_an_engines_own_error_is_the_answer_also_after_it_was_told_of() -> None:
    async with an_engine(whole_status=500) as (engine, port), an_ingress(AT_ONCE) as ingress:
        ingress.serve_tcp(port)
        assert (await asked(ingress))[0] == 500
        assert len(engine.seen) == 1


async def test_an_answer_that_was_told_of_and_is_too_large_to_hold_is_passed_on_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesh.proxy.exchange.MAX_BUFFERED_ANSWER", 1 << 20)
    async with an_engine(large_answer=3 << 20) as (_, port), an_ingress() as ingress:
        ingress.serve_tcp(port)
        status, answer = await asked(ingress)
        assert status == 200 and len(answer["large"]) == 3 << 20
        assert ingress.proxy.budget.used == 0
