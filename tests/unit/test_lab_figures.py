"""How figures are made of what servers stream, without servers."""

from __future__ import annotations

import json

import httpx
import pytest

from bench.lab import Counter
from bench.measure import BenchError, Figures, complete, long_prompt, per_worker
from bench.settings import even_split
from bench.tables import size, speed_table


def client_of(lines: list[str], status: int = 200) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text="\n\n".join(lines) + "\n\n")

    return httpx.Client(transport=httpx.MockTransport(answer))


def chunk(text: str, count: int) -> str:
    timings = {"prompt_n": 7, "predicted_n": count}
    return "data: " + json.dumps({"choices": [{"text": text}], "timings": timings})


def test_tokens_are_the_engines_count_and_not_the_chunks() -> None:
    # A chunk may hold several tokens: half a character is held back by the engine.
    answer = complete(client_of([chunk("a", 1), ": ping", chunk("bc", 4), "data: [DONE]"]), "http://x", "m", "p", 4)
    assert (answer.text, answer.prompt_tokens, answer.tokens, answer.timed_tokens) == ("abc", 7, 4, 3)


def test_a_stream_that_ends_early_is_no_answer() -> None:
    with pytest.raises(BenchError, match="ended after 1"):
        complete(client_of([chunk("a", 1)]), "http://x", "m", "p", 4)


def test_an_error_in_the_stream_is_no_answer() -> None:
    with pytest.raises(BenchError, match="lost"):
        complete(client_of(['data: {"error": {"message": "lost"}}', "data: [DONE]"]), "http://x", None, "p", 4)


def test_a_refusal_is_no_answer() -> None:
    with pytest.raises(BenchError, match="503"):
        complete(client_of(["no layout"], status=503), "http://x", None, "p", 4)


def test_a_workers_wire_is_everything_to_and_from_it() -> None:
    counters = {("a", "b"): Counter(1), ("b", "a"): Counter(2), ("b", "c"): Counter(4), ("c", "a"): Counter(8)}
    assert per_worker(counters, ["b", "c"]) == {"b": 7, "c": 12}


def test_long_prompts_share_no_beginning() -> None:
    prompts = [long_prompt(50, salt).split() for salt in range(5)]
    assert all(len(prompt) == 50 for prompt in prompts)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 5
    assert long_prompt(50, 3) == long_prompt(50, 3)


@pytest.mark.parametrize(("layers", "members", "split"), [(12, 3, [4, 4, 4]), (16, 3, [5, 5, 6]), (5, 4, [1, 1, 1, 2])])
def test_an_even_split_loses_no_layer(layers: int, members: int, split: list[int]) -> None:
    assert even_split(layers, members) == split


def test_sizes_have_units() -> None:
    assert [size(n) for n in (12, 1100, 22_700_000)] == ["12 B", "1.1 KB", "22.7 MB"]


def test_tables_are_markdown_and_lined_up() -> None:
    figures = Figures("bare", "lan", 1, ready_s=1, load_s=0.5, load_bytes={"w1": 5000}, layers=[6, 6])
    lines = speed_table([figures]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "6+6" in lines[2]
    assert "5 KB" in lines[2]
