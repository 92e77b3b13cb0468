"""An answer goes on in another process where the first one left off, and nobody who reads the stream can tell.

Each case is told once without interruption. Then it is cut between any two groups of blocks, and a fresh process is
given the request and the tokens of the groups before the cut. What it says must be the groups behind the cut, block for
block, but for ``TIMES`` and ``CACHES``.

Words that are computed several at a time have to come out as they did one by one, to the last bit, or random weights
say something else soon. With Q8_0 and one thread they do; what else there is, is measured in docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from mesh.engine.cache import Engine
from tests.fakes.architectures import FIRST_WORD, KINDS, VOCAB, write_architecture
from tests.net.engine_kit import ask, serving, write_model
from tests.net.push_kit import push_ring
from tests.net.resume_kit import Group, Stream, origin, resume, tell

pytestmark = pytest.mark.engine

LAYERS, CONTEXT = 6, 2048
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nYou may call: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{%- if m.tool_calls %}{% for c in m.tool_calls %}"
    '→{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}←'
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    '{% if enable_thinking is not defined or enable_thinking %}{{ "<think>\\n" }}{% endif %}{% endif %}'
)
"""Conversations with thoughts and calls."""
PARAMETERS = {
    "type": "object",
    "properties": {"where": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["where", "n"],
}
LOOK = {"name": "look", "description": "Look at something", "parameters": PARAMETERS}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 10},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["a", "b"],
}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me of the attic"}], "temperature": 0}
TEXT: dict[str, Any] = {"prompt": "Once upon a time", "n_predict": 24, "temperature": 0}
DICE: dict[str, Any] = {**TEXT, "temperature": 1.2, "seed": 11}
FACES = "root ::= [😀-😏]{7}"
"""Each of them takes four tokens."""
CALL = {"logit_bias": [["→", 60]]}
"""Makes random weights call: what follows the mark is up to the grammar."""


@dataclass(frozen=True)
class Case:
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    choices: int = 1


CASES = {
    "completion": Case("/completion", TEXT),
    "completion with tokens and probabilities": Case("/completion", TEXT | {"return_tokens": True, "n_probs": 3}),
    "completion, probabilities after sampling": Case("/completion", DICE | {"n_probs": 3, "post_sampling_probs": True}),
    "completion, several prompts": Case("/completion", TEXT | {"prompt": ["Once upon", "A man"], "n_predict": 8}, 2),
    "completions": Case("/v1/completions", {"prompt": "Once upon", "max_tokens": 24, "temperature": 0, "logprobs": 2}),
    "completions, two choices": Case(
        "/v1/completions", {"prompt": "Once upon", "max_tokens": 12, "n": 2, "temperature": 1.0, "seed": 5}, 2
    ),
    "a stop word": Case("/completion", TEXT | {"stop": ["no such word", "\n"]}),
    "characters of several tokens": Case("/completion", TEXT | {"grammar": FACES, "n_predict": 30}),
    "seeded": Case("/completion", DICE | {"top_k": 100}),
    "no seed": Case("/completion", TEXT | {"temperature": 1.2}),
    "mirostat": Case("/completion", DICE | {"mirostat": 2}),
    "adaptive sampling": Case(
        "/completion", DICE | {"samplers": ["top_k", "min_p", "adaptive_p"], "adaptive_target": 0.5}
    ),
    "penalties and choices left out": Case(
        "/completion",
        DICE
        | {
            "xtc_probability": 0.5,
            "xtc_threshold": 0.01,
            "repeat_penalty": 1.3,
            "dry_multiplier": 0.8,
            "n_predict": 60,
        },
    ),
    "a grammar and dice": Case("/completion", DICE | {"grammar": "root ::= ([😀-😏] [a-z]+)+"}),
    "chat": Case("/v1/chat/completions", TALK | {"max_tokens": 24, "stream_options": {"include_usage": True}}),
    "chat with thoughts": Case(
        "/v1/chat/completions",
        TALK | {"max_tokens": 24, "thinking_budget_tokens": 8, "logprobs": True, "top_logprobs": 2},
    ),
    "chat, two choices": Case(
        "/v1/chat/completions", TALK | {"max_tokens": 12, "n": 2, "temperature": 1, "thinking_budget_tokens": 4}, 2
    ),
    "chat with calls": Case(
        "/v1/chat/completions",
        TALK
        | {"max_tokens": 120, "thinking_budget_tokens": 6, "tool_choice": "required"}
        | {"tools": [{"type": "function", "function": LOOK}]}
        | CALL,
    ),
    "chat with several calls, sampled": Case(
        "/v1/chat/completions",
        TALK
        | {"max_tokens": 120, "thinking_budget_tokens": 4, "tool_choice": "required", "parallel_tool_calls": True}
        | {"temperature": 1, "tools": [{"type": "function", "function": LOOK}]}
        | CALL,
    ),
    "chat by a schema": Case(
        "/v1/chat/completions",
        TALK
        | {"max_tokens": 120, "thinking_budget_tokens": 4}
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    "responses": Case(
        "/v1/responses",
        {"input": "Tell me", "max_output_tokens": 24, "temperature": 0, "thinking_budget_tokens": 6},
    ),
    "responses with calls": Case(
        "/v1/responses",
        {"input": "Tell me", "max_output_tokens": 120, "temperature": 0, "thinking_budget_tokens": 6}
        | {"tool_choice": "required", "tools": [{"type": "function", **LOOK}]}
        | CALL,
    ),
    "messages": Case("/v1/messages", TALK | {"max_tokens": 24, "thinking_budget_tokens": 6}),
    "messages with calls": Case(
        "/v1/messages",
        TALK
        | {"max_tokens": 120, "thinking_budget_tokens": 6, "tool_choice": {"type": "any"}}
        | {"tools": [{"name": "look", "description": "Look", "input_schema": PARAMETERS}]}
        | CALL,
    ),
}


@pytest.fixture(scope="module")
def model(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "words.gguf"
    write_model(path, engine, layers=LAYERS, context=CONTEXT, q8=True, template=TEMPLATE)
    return path


@contextlib.asynccontextmanager
async def server(
    engine: Engine, model: Path, *options: str, parallel: int = 2, context: int = CONTEXT
) -> AsyncIterator[int]:
    """One process; its port."""
    options = ("--no-repack", *options)
    async with push_ring(engine, model, [LAYERS], parallel=parallel, context=context, options=options) as solo:
        await serving(solo.host, solo.port)
        yield solo.port


def stream(case: Case) -> dict[str, Any]:
    return case.body | {"stream": True}


async def told(port: int, case: Case) -> Stream:
    answer = await asyncio.to_thread(tell, port, case.path, stream(case), origin())
    assert answer.status == 200, answer.error
    return answer


async def continued(port: int, case: Case, got: tuple[Group, ...]) -> Stream:
    return await asyncio.to_thread(resume, port, case.path, stream(case), origin(), got, case.choices)


def same(case: Case, found: Stream, whole: Stream, cut: int) -> None:
    assert found.status == 200, (cut, found.error)
    for choice in range(case.choices):
        want = [group for group in whole.groups[cut:] if group.choice == choice]
        have = [group for group in found.groups if group.choice == choice]
        assert [group.plain for group in have] == [group.plain for group in want], cut
        assert [group.tokens for group in have] == [group.tokens for group in want], cut
        assert [group.end for group in have] == [group.end for group in want], cut
    assert found.rest == whole.rest, cut


def some_cuts(whole: Stream, most: int = 24) -> list[int]:
    """Every place between two groups, or the first ones, the last ones, and some between."""
    n = len(whole.groups)
    if n < most:
        return list(range(n + 1))
    return sorted({0, 1, 2, n - 2, n - 1, n, *random.Random(n).sample(range(n), most - 6)})


@pytest.mark.parametrize("name", CASES)
async def test_an_answer_goes_on_wherever_it_was_cut(engine: Engine, model: Path, name: str) -> None:
    case = CASES[name]
    async with server(engine, model) as first, server(engine, model) as second:
        whole = await told(first, case)
        assert len(whole.groups) > 3
        for cut in some_cuts(whole):
            same(case, await continued(second, case, whole.groups[:cut]), whole, cut)


async def test_words_of_the_dialects_really_came(engine: Engine, model: Path) -> None:
    """The cases above would mean little if nothing was thought, called or counted in them."""
    async with server(engine, model) as port:
        thoughts = (await told(port, CASES["chat with thoughts"])).data()
        assert any("reasoning_content" in choice["delta"] for data in thoughts for choice in data["choices"])
        assert any(choice["delta"].get("content") for data in thoughts for choice in data["choices"])
        calls = (await told(port, CASES["chat with calls"])).data()
        names = [
            c["function"].get("name") for d in calls for x in d["choices"] for c in x["delta"].get("tool_calls", [])
        ]
        assert "look" in names
        events = {data["type"] for data in (await told(port, CASES["responses with calls"])).data()}
        assert {"response.created", "response.function_call_arguments.delta", "response.completed"} <= events
        events = {data["type"] for data in (await told(port, CASES["messages with calls"])).data()}
        assert {"message_start", "content_block_start", "content_block_delta", "message_stop"} <= events
        usage = (await told(port, CASES["chat"])).data()[-1]["usage"]
        assert usage["completion_tokens"] == 24


async def test_a_ring_goes_on_where_one_process_left_off(engine: Engine, model: Path) -> None:
    options = ("--no-repack",)
    async with (
        server(engine, model) as first,
        push_ring(engine, model, [2, 2, 2], parallel=2, context=CONTEXT, options=options) as ring,
    ):
        await serving(ring.host, ring.port)
        for name in ("completion", "seeded", "a grammar and dice", "chat with calls", "messages"):
            whole = await told(first, CASES[name])
            for cut in some_cuts(whole, 10):
                same(CASES[name], await continued(ring.port, CASES[name], whole.groups[:cut]), whole, cut)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3moe"])
async def test_other_weights_go_on_as_nearly_as_their_kernels_round(
    engine: Engine, tmp_path: Path, architecture: str, kind: str
) -> None:
    """Seven tokens at once are computed by the kernels of one token, unless they are F16. Prints what is off (-s)."""
    file = tmp_path / "small.gguf"
    write_architecture(file, architecture, KINDS[kind])
    prompt = [1, *random.Random(3).choices(range(FIRST_WORD, VOCAB), k=60)]
    body = {"prompt": prompt, "n_predict": 100, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    case = Case("/completion", body)
    async with server(engine, file) as first, server(engine, file) as second:
        whole = await told(first, case)
        off, other = [], 0
        for cut in range(2, 100, 7):
            found = await continued(second, case, whole.groups[:cut])
            off.append(abs(_logprob(found.groups[0]) - _logprob(whole.groups[cut])))
            other += found.tokens() != whole.tokens()[cut:]
    same_bits, n = sum(x == 0 for x in off), len(off)
    print(f"\n{architecture} {kind}: same bits {same_bits}/{n}, at most {max(off):.2g} off, other words {other}/{n}")
    assert max(off) < 1.0
    if kind != "F16" and architecture != "qwen3moe":  # the choice of experts is F32
        assert (same_bits, other) == (n, 0)


def _logprob(group: Group) -> float:
    data = json.loads(group.blocks[0].partition("data: ")[2])
    return float(data["completion_probabilities"][0]["logprob"])


async def test_an_answer_longer_than_a_batch_goes_on(engine: Engine, model: Path) -> None:
    """Tokens that were said are computed in parts, each of which ends where any token may."""
    async with server(engine, model) as first, server(engine, model) as second:
        for body in (TEXT, DICE):
            case = Case("/completion", body | {"n_predict": 700, "ignore_eos": True})
            whole = await told(first, case)
            for cut in (6, 7, 8, 14, 15, 63, 64, 65, 126, 512, 513, 690):
                same(case, await continued(second, case, whole.groups[:cut]), whole, cut)


async def test_a_stop_word_across_the_cut_stops(engine: Engine, model: Path) -> None:
    async with server(engine, model) as first, server(engine, model) as second:
        words = [data["content"] for data in (await told(first, CASES["completion"])).data()]
        for n in range(6, 12):
            seam = words[n][-1] + words[n + 1] + words[n + 2][:1]
            case = Case("/completion", TEXT | {"stop": [seam]})
            whole = await told(first, case)
            assert whole.data()[-1]["stop_type"] == "word"
            for cut in range(len(whole.groups) + 1):
                same(case, await continued(second, case, whole.groups[:cut]), whole, cut)


async def test_a_character_cut_in_the_middle_is_completed(engine: Engine, model: Path) -> None:
    case = CASES["characters of several tokens"]
    async with server(engine, model) as first, server(engine, model) as second:
        whole = await told(first, case)
        tokens = whole.tokens()
        assert any(len(group.tokens) > 2 for group in whole.groups), "no character of several tokens"
        text = "".join(data["content"] for data in whole.data())
        for n in range(len(tokens)):
            said = Group(0, (), tuple(tokens[:n]), False)
            found = await continued(second, case, (said,))
            assert found.tokens() == tokens[n:]
            rest = "".join(data["content"] for data in found.data())
            assert text.endswith(rest)
            assert "�" not in rest


async def test_nothing_is_left_of_a_limit_that_was_reached(engine: Engine, model: Path) -> None:
    case = Case("/v1/chat/completions", TALK | {"max_tokens": 9, "stream_options": {"include_usage": True}})
    async with server(engine, model) as first, server(engine, model) as second:
        whole = await told(first, case)
        found = await continued(second, case, whole.groups[:-1])
        assert found.plain() == whole.plain(len(whole.groups) - 1)
        *_, end, usage = found.data()
        assert end["choices"][0]["finish_reason"] == "length"
        assert usage["usage"]["completion_tokens"] == 9
        done = await continued(second, case, whole.groups)
        assert (done.groups, done.rest) == ((), ("data: [DONE]",))


@pytest.mark.parametrize("options", [(), ("--context-shift",)], ids=["ends", "shifts"])
async def test_the_end_of_the_context_is_where_it_was(engine: Engine, model: Path, options: tuple[str, ...]) -> None:
    prompt = list(range(300, 500))
    case = Case("/completion", {"prompt": prompt, "n_predict": 200, "temperature": 0, "ignore_eos": True})
    async with server(engine, model, *options, context=256, parallel=1) as port:
        whole = await told(port, case)
    assert whole.data()[-1]["truncated"]
    assert len(whole.tokens()) == (200 if options else 56)
    for cut in [1, 30, 52, 53, 54, 55, 56, 57] + ([58, 60, 100, 120, 199, 200] if options else []):
        # Where in the cache a shift leaves what comes after it changes how attention over it rounds.
        async with server(engine, model, *options, context=256, parallel=1) as port:
            same(case, await continued(port, case, whole.groups[:cut]), whole, cut)


async def test_a_choice_that_has_ended_is_not_told_again(engine: Engine, model: Path) -> None:
    case = CASES["chat, two choices"]
    async with server(engine, model) as first, server(engine, model) as second:
        whole = await told(first, case)
        ended = [group for group in whole.groups if group.choice == 1]
        some = [group for group in whole.groups if group.choice == 0][:5]
        found = await continued(second, case, (*ended, *some))
        assert found.status == 200, found.error
        assert {group.choice for group in found.groups} == {0}
        rest = [group.plain for group in whole.groups if group.choice == 0][5:]
        assert found.plain() == rest


async def test_what_cannot_be_continued_is_refused_before_a_block(engine: Engine, model: Path) -> None:
    async with server(engine, model) as port:
        whole = await told(port, CASES["completion"])

        async def refused(body: dict[str, Any], tokens: list[int], path: str = "/completion") -> str:
            found = await asyncio.to_thread(
                tell,
                port,
                path,
                {"body": {"stream": True, **body}, "choices": [{"tokens": tokens}]},
                {**origin(), "X-Mesh-Resume": "1"},
            )
            assert (found.status, found.error.get("type")) == (409, "cannot_resume"), found
            return str(found.error["message"])

        assert "vocabulary" in await refused(TEXT, [32000])
        assert "probabilities" in await refused(TEXT | {"stream": False, "n_probs": 2}, [5])
        assert "context" in await refused(TEXT | {"n_predict": -1}, [500] * CONTEXT)
        assert "grammar" in await refused(TEXT | {"grammar": 'root ::= "no"'}, whole.tokens()[:3])
        assert "grammar" in await refused(TEXT | {"grammar": 'root ::= "no" "yes"'}, [2])
        assert "earlier" in await refused(TEXT, [*whole.tokens(), 500])
        assert "earlier" in await refused(TEXT, [whole.tokens()[0], 2, 500])
        # The server is well, and its slots are free.
        same(CASES["completion"], await told(port, CASES["completion"]), whole, 0)


HEADERS = [
    "",
    "[]",
    "{",
    '"a"',
    '{"id": "xyz", "seed": 1, "age_ms": 1, "client": "c"}',
    '{"id": "", "seed": 1, "age_ms": 1, "client": "c"}',
    '{"id": 5, "seed": 1, "age_ms": 1, "client": "c"}',
    '{"id": "a", "seed": -1, "age_ms": 1, "client": "c"}',
    '{"id": "a", "seed": 4294967296, "age_ms": 1, "client": "c"}',
    '{"id": "a", "seed": 18446744073709551615, "age_ms": 1, "client": "c"}',
    '{"id": "a", "seed": 1.5, "age_ms": 1, "client": "c"}',
    '{"id": "a", "seed": 1, "age_ms": "1", "client": "c"}',
    '{"id": "a", "seed": 1, "age_ms": -1, "client": "c"}',
    '{"id": "a", "seed": 1, "client": "c"}',
    '{"id": "a", "seed": 1, "age_ms": 1, "client": "' + "c" * 129 + '"}',
    '{"id": "a", "seed": 1, "age_ms": 1,' + " " * 500 + '"client": "c"}',
]
BODIES: list[Any] = [
    [],
    {},
    {"body": TEXT},
    {"body": TEXT, "choices": {}},
    {"body": TEXT, "choices": []},
    {"body": TEXT, "choices": [None, None]},
    {"body": TEXT, "choices": [5]},
    {"body": TEXT, "choices": [{}]},
    {"body": TEXT, "choices": [{"tokens": 5}]},
    {"body": TEXT, "choices": [{"tokens": ["5"]}]},
    {"body": TEXT, "choices": [{"tokens": [1.5]}]},
    {"body": TEXT, "choices": [{"tokens": [-1]}]},
    {"body": TEXT, "choices": [{"tokens": [1 << 31]}]},
    {"body": TEXT, "choices": [{"tokens": [1 << 63]}]},
    {"body": TEXT, "choices": [{"tokens": [5], "end": 1}]},
    TEXT,
]


async def test_malformed_headers_and_bodies_are_bad_requests(engine: Engine, model: Path) -> None:
    async with server(engine, model) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for header in HEADERS:
            for path, body in (("/completion", TEXT), ("/v1/embeddings", {"input": "a"})):
                answer = await client.post(path, json=body, headers={"X-Mesh-Request": header})
                assert answer.status_code == 400, (path, header, answer.text)
        for body in BODIES:
            answer = await client.post("/completion", json=body, headers={**origin(), "X-Mesh-Resume": "1"})
            assert answer.status_code == 400, (body, answer.text)
        wrapped = {"body": TEXT | {"stream": True}, "choices": [{"tokens": []}]}
        answer = await client.post("/completion", json=wrapped, headers={"X-Mesh-Resume": "1"})
        assert answer.status_code == 400
        answer = await client.post("/completion", json=wrapped, headers={**origin(), "X-Mesh-Resume": "1"})
        assert answer.status_code == 200


async def test_without_the_header_nothing_changes(engine: Engine, model: Path) -> None:
    async with server(engine, model) as port:
        for name in ("completion", "chat with calls", "responses", "messages"):
            case = CASES[name]
            bare = await asyncio.to_thread(tell, port, case.path, stream(case), {})
            assert bare.groups == ()
            assert not any(line.startswith(":") for block in bare.rest for line in block.split("\n"))
            traced = await told(port, case)
            blocks = [block for group in traced.groups for block in group.blocks] + list(traced.rest)
            assert len(blocks) == len(bare.rest)


async def test_ids_follow_from_the_name_of_the_request(engine: Engine, model: Path) -> None:
    async with server(engine, model) as first, server(engine, model) as second:
        for name in ("chat with calls", "responses with calls", "messages with calls"):
            case = CASES[name]

            def ask_as(port: int, who: str, case: Case = case) -> Stream:
                return tell(port, case.path, stream(case), origin(who))

            one, again = await asyncio.gather(*(asyncio.to_thread(ask_as, port, "aa") for port in (first, second)))
            # Not beside the others: with somebody else in the batch a model may say one call more.
            other = await asyncio.to_thread(ask_as, first, "bb")
            assert ids(one) == ids(again)
            assert not ids(one) & ids(other)
            assert all(len(found) >= 32 for found in ids(one))


def ids(answer: Stream) -> set[str]:
    """Every id in an answer."""
    found: set[str] = set()

    def look(data: Any) -> None:
        if isinstance(data, dict):
            found.update(v for k, v in data.items() if k in ("id", "item_id", "call_id") and isinstance(v, str) and v)
            data = list(data.values())
        if isinstance(data, list):
            for value in data:
                look(value)

    look(answer.data())
    return found


async def test_a_seed_of_the_request_is_not_replaced(engine: Engine, model: Path) -> None:
    case = CASES["seeded"]
    async with server(engine, model) as port:
        bodies = (case.body | {"seed": 11}, case.body | {"seed": -1})
        answers = {}
        for n, body in enumerate(bodies):
            for seed in (1, 2):
                answer = await asyncio.to_thread(tell, port, case.path, body | {"stream": True}, origin(seed=seed))
                answers[n, seed] = answer.tokens()
        plain = await asyncio.to_thread(ask, port, "/completion", bodies[0] | {"return_tokens": True})
        assert answers[0, 1] == answers[0, 2] == plain["tokens"]
        assert answers[1, 1] != answers[1, 2]
        assert json.loads(origin(seed=1)["X-Mesh-Request"])["seed"] == 1
