"""What is asked, decided by a seed, and what llama-server alone says to it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from bench.endure.forms import ENDPOINTS, Endpoint, Said, Stream
from bench.measure import BenchError

PROMPTS = (
    "Hello",
    "Four machines under one roof agreed",
    "Somebody pulled a plug while they spoke, and",
    "Nobody who had asked the model anything",
)
LENGTHS = {16: 3, 64: 3, 200: 2, 600: 1, 1200: 1}
"""Tokens of an answer, and how often beside the others: the long ones take longer than from one kill to the next."""
QUICK_LENGTHS = {16: 2, 64: 2, 300: 1}


@dataclass(frozen=True, slots=True)
class Request:
    """One question."""

    endpoint: Endpoint
    prompt: str
    tokens: int
    streams: bool

    @property
    def words(self) -> str:
        return f"{self.endpoint.name} {self.tokens} {'streamed' if self.streams else 'whole'}"


def draw(seed: int, count: int, lengths: Mapping[int, int], prompts: Sequence[str] = PROMPTS) -> list[Request]:
    """So many questions."""
    chance = random.Random(f"{seed}/questions")
    return [
        Request(
            chance.choice(ENDPOINTS),
            chance.choice(prompts),
            chance.choices(list(lengths), list(lengths.values()))[0],
            chance.random() < 0.6,
        )
        for _ in range(count)
    ]


class Reference:
    """What an uninterrupted server says. The text depends on the prompt, the rest on the way it is asked for."""

    def __init__(self, texts: Mapping[tuple[bool, str, int], Said], forms: Mapping[tuple[str, bool], Said]) -> None:
        self._texts, self._forms = texts, forms

    def expected(self, request: Request) -> Said:
        text = self._texts[request.endpoint.chats, request.prompt, request.tokens]
        form = self._forms[request.endpoint.name, request.streams]
        return Said(text.text, form.finish, text.prompt_tokens, text.tokens, form.shape)


def learn(client: httpx.Client, url: str, requests: Iterable[Request], parallel: int) -> Reference:
    """Ask an uninterrupted server: each text once, and each form of an answer once.

    Raises:
        BenchError: it does not answer, or differs from itself.
    """
    wanted = {(r.endpoint.chats, r.prompt, r.tokens) for r in requests}
    by_chats = {endpoint.chats: endpoint for endpoint in ENDPOINTS}
    with ThreadPoolExecutor(parallel) as pool:

        def text(key: tuple[bool, str, int]) -> Said:
            chats, prompt, tokens = key
            return answer(client, url, Request(by_chats[chats], prompt, tokens, False))

        texts = dict(zip(wanted, pool.map(text, wanted), strict=True))
    # Two tokens, so that a stream's shape has a delta; the same prompt, so that texts can be compared.
    asked = [Request(endpoint, PROMPTS[0], 2, streams) for endpoint in ENDPOINTS for streams in (False, True)]
    forms = {(request.endpoint.name, request.streams): answer(client, url, request) for request in asked}
    for chats in (False, True):
        said = {forms[r.endpoint.name, r.streams].text for r in asked if r.endpoint.chats == chats}
        if len(said) != 1:
            raise BenchError(f"llama-server says different things at its endpoints: {said}")
    return Reference(texts, forms)


def answer(client: httpx.Client, url: str, request: Request) -> Said:
    """One answer, with nothing in its way.

    Raises:
        Refused, Wrong, httpx.HTTPError: there is something.
    """
    body = request.endpoint.body(request.prompt, request.tokens, request.streams)
    response = client.post(url + request.endpoint.path, json=body, timeout=300, headers={"Connection": "close"})
    if not request.streams:
        return request.endpoint.read_whole(response.content)
    stream = Stream(request.endpoint)
    for line in response.text.split("\n"):
        stream.line(line)
    if not stream.ended:
        raise BenchError(f"llama-server does not end its stream at {request.endpoint.path}")
    return stream.said()
