"""What one running server does, seen by a client on its machine: the same questions for every configuration."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.lab import Counter

GENERATION_PROMPT = "The machines in this house are each too small for the model that their owners want to run, so"
_WORDS = "river stone winter letter engine garden number window silver morning paper valley doctor music bread harbour"


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every configuration, the same in all of them.

    Args:
        tokens: generated per run.
        prompt_words: length of the long prompt that prompt processing is timed with.
        runs: figures are medians over so many.
    """

    tokens: int = 64
    prompt_words: int = 400
    runs: int = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed completion, timed by the client. ``prompt_tokens`` and ``tokens`` are the engine's own counts."""

    text: str
    prompt_tokens: int
    tokens: int
    first_s: float
    generation_s: float
    timed_tokens: int
    """Tokens that came within ``generation_s``: all but those of the first chunk."""
    cached_tokens: int = 0
    """Of the prompt, those that were not computed again; ``prompt_tokens`` are the others."""

    @property
    def ms_per_token(self) -> float:
        return 1e3 * self.generation_s / max(1, self.timed_tokens)


@dataclass(slots=True)
class Figures:
    """Medians of what one configuration did. Times in seconds, rates in tokens per second, wire in IP bytes."""

    name: str
    link: str
    workers: int
    ready_s: float
    """From starting the last process to the first answer being possible."""
    load_s: float
    """The part of it in which the engine loads."""
    first_token_s: float = 0.0
    generation_tokens_per_s: float = 0.0
    ms_per_token: float = 0.0
    prompt_tokens_per_s: float = 0.0
    prompt_tokens: int = 0
    load_bytes: dict[str, int] = field(default_factory=dict)
    """Per worker, both directions."""
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    prompt_bytes: dict[str, int] = field(default_factory=dict)
    text_sha256: str = ""
    layers: list[Any] = field(default_factory=list)
    late_packets: float = 0.0
    """Share of packets the lab delivered over 2 ms late: above some percent, trust nothing here."""
    runs: list[dict[str, float]] = field(default_factory=list)


def long_prompt(words: int, salt: int) -> str:
    """A text of ``words`` words; another ``salt`` shares no beginning with it, so that no cache helps."""
    stock = _WORDS.split()
    state = salt * 2654435761 % 2**32
    chosen = []
    for _ in range(words):
        state = (state * 1664525 + 1013904223) % 2**32
        chosen.append(stock[state >> 28])
    return " ".join(chosen)


def complete(
    client: httpx.Client, base_url: str, model: str | None, prompt: str, tokens: int, *, cached: bool = False
) -> Answer:
    """Stream one greedy completion.

    Args:
        cached: go on from what the server still has of a prompt with the same beginning.

    Raises:
        BenchError: the server refused, or the stream ended early.
    """
    body: dict[str, Any] = {} if model is None else {"model": model}
    body |= {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_prompt": cached,
        "timings_per_token": True,
    }
    pieces: list[str] = []
    timings: Mapping[str, Any] = {}
    first_at = last_at = 0.0
    first_count = last_count = 0
    began = time.monotonic()
    with client.stream("POST", f"{base_url}/v1/completions", json=body, timeout=600) as response:
        if response.status_code != 200:
            response.read()
            raise BenchError(f"{base_url} answered {response.status_code}: {response.text[:300]}")
        ended = False
        for line in response.iter_lines():
            now = time.monotonic()
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise BenchError(f"{base_url} sent an error: {event['error']}")
            timings = event.get("timings", timings)
            count = int(timings.get("predicted_n", len(pieces) + 1))
            choices = event.get("choices") or [{}]
            pieces.append(choices[0].get("text") or "")
            if not first_at:
                first_at, first_count = now, count
            if count > last_count:
                last_at, last_count = now, count
    if not ended or not last_count:
        raise BenchError(f"{base_url}: the stream ended after {last_count} tokens")
    return Answer(
        "".join(pieces),
        int(timings.get("prompt_n", 0)),
        last_count,
        first_at - began,
        last_at - first_at,
        last_count - first_count,
        int(timings.get("cache_n", 0)),
    )


def count_tokens(client: httpx.Client, base_url: str, text: str) -> int:
    """How many tokens the server makes of a prompt.

    Raises:
        BenchError: it refused.
    """
    response = client.post(f"{base_url}/tokenize", json={"content": text, "add_special": True}, timeout=60)
    if response.status_code != 200:
        raise BenchError(f"{base_url} answered {response.status_code}: {response.text[:300]}")
    return len(response.json()["tokens"])


def per_worker(counters: Mapping[tuple[str, str], Counter], workers: Sequence[str]) -> dict[str, int]:
    """IP bytes to and from each worker."""
    return {worker: sum(counter.bytes for pair, counter in counters.items() if worker in pair) for worker in workers}


def ask(setting: Any, figures: Figures, question: Question) -> None:
    """Fill ``figures`` by asking a started ``setting`` (:class:`bench.settings.Setting`), after a warm-up."""
    lab, workers = setting.lab, setting.workers
    with lab.client(setting.client_node) as client:
        model = client.get(f"{setting.base_url}/v1/models", timeout=60).json()["data"][0]["id"]

        def once(prompt: str, tokens: int) -> tuple[Answer, dict[str, int]]:
            lab.reset_counters()
            answer = complete(client, setting.base_url, model, prompt, tokens)
            timing = lab.timing()
            late.append(timing.late / max(1, timing.delivered))
            return answer, per_worker(lab.counters(), workers)

        late: list[float] = []
        once(GENERATION_PROMPT, 4)
        once(long_prompt(question.prompt_words, 999), 1)
        rows, texts = [], set()
        wires: list[tuple[dict[str, int], dict[str, int], int]] = []
        for run in range(question.runs):
            answer, wire = once(GENERATION_PROMPT, question.tokens)
            texts.add(answer.text)
            prompt, prompt_wire = once(long_prompt(question.prompt_words, run), 1)
            rows.append(
                {
                    "first_token_s": answer.first_s,
                    "ms_per_token": answer.ms_per_token,
                    "prompt_tokens_per_s": prompt.prompt_tokens / prompt.first_s,
                    "prompt_first_token_s": prompt.first_s,
                }
            )
            wires.append((wire, prompt_wire, answer.tokens))
            figures.prompt_tokens = prompt.prompt_tokens
    if len(texts) != 1:
        raise BenchError(f"{figures.name}: greedy text differs between runs: {sorted(text[:60] for text in texts)}")
    figures.text_sha256 = hashlib.sha256(texts.pop().encode()).hexdigest()
    figures.first_token_s = statistics.median(row["first_token_s"] for row in rows)
    figures.ms_per_token = statistics.median(row["ms_per_token"] for row in rows)
    figures.generation_tokens_per_s = 1e3 / figures.ms_per_token
    figures.prompt_tokens_per_s = statistics.median(row["prompt_tokens_per_s"] for row in rows)
    for worker in workers:
        figures.bytes_per_token[worker] = statistics.median(wire[worker] / count for wire, _, count in wires)
        figures.prompt_bytes[worker] = int(statistics.median(wire[worker] for _, wire, _ in wires))
    figures.late_packets = max(late)
    figures.runs = rows
