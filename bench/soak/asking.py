"""One request after another at a node's own localhost, each with what became of it."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import httpx

PROMPTS = (
    "Hello",
    "Four machines under two roofs agreed",
    "The weather over the network was bad, and",
    "Nobody had asked the router what it thought of",
)
TOKENS = (8, 24, 64)
SILENCE_S = 45.0
"""A stream that says nothing for so long hangs: one that is held says so every five seconds."""
WHOLE_S = 200.0
"""An answer in one piece may be held for thirty seconds after each of five losses."""
CANCELLED_SHARE = 0.15


class Fate(Enum):
    """What a request came to."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """Or cut short with an error that says so."""
    CANCELLED = "cancelled"
    """By us."""
    LOST = "LOST"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked.

    Args:
        chat: of ``/v1/chat/completions``.
        gives_up_after: events after which the client goes away; for answers in one piece, tenths of a second.
    """

    prompt: str
    tokens: int
    chat: bool = False
    streams: bool = False
    gives_up_after: int | None = None

    @property
    def key(self) -> str:
        """What the answer depends on."""
        return f"{'chat' if self.chat else 'text'}/{self.tokens}/{self.prompt}"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self) -> dict[str, Any]:
        said = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {**said, "max_tokens": self.tokens, "temperature": 0, "stream": self.streams}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request.

    Args:
        why: the error's code, or how the request was lost.
        at_s: when it was made, in seconds of the run.
        silence_s: the longest time without a byte.
    """

    node: str
    request: Request
    fate: Fate
    why: str
    at_s: float
    took_s: float
    silence_s: float


class Lost(Exception):  # noqa: N818 - an outcome
    """Neither an answer nor an error."""


def every_request() -> Iterator[Request]:
    """One of each kind, in one piece."""
    for prompt in PROMPTS:
        for tokens in TOKENS:
            yield Request(prompt, tokens)
            yield Request(prompt, tokens, chat=True)


def any_request(chance: random.Random) -> Request:
    gives_up = chance.randint(1, 30) if chance.random() < CANCELLED_SHARE else None
    streams = chance.random() < 0.6
    return Request(chance.choice(PROMPTS), chance.choice(TOKENS), chance.random() < 0.5, streams, gives_up)


def text_of(answer: Mapping[str, Any]) -> str:
    """What a whole answer, or one event of a stream, says."""
    for choice in answer.get("choices") or ():
        said = choice.get("message") or choice.get("delta")
        return (said.get("content") if said else choice.get("text")) or ""
    return ""


def error_code(answer: Any) -> str | None:
    """The code of an error that says what is wrong; None: no such thing."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or not error.get("message"):
        return None
    return str(error.get("code") or error.get("type") or "error")


def read_events(lines: Iterable[str], expected: str, gives_up_after: int | None = None) -> tuple[Fate, str]:
    """What a stream comes to.

    Raises:
        Lost: it stops without an end or an error, or says something else than ``expected``.
    """
    text, events = "", 0
    for line in lines:
        if line == "data: [DONE]":
            if text != expected:
                raise Lost(f"wrong text: {text!r} is not {expected!r}")
            return Fate.ANSWERED, ""
        if not line.startswith(("data: ", "error: ")):
            continue
        event = json.loads(line.split(": ", 1)[1])
        if (code := error_code(event)) is not None:
            return Fate.REFUSED, code
        text += text_of(event)
        if not expected.startswith(text):
            raise Lost(f"wrong text: {expected!r} does not begin with {text!r}")
        events += 1
        if gives_up_after is not None and events >= gives_up_after:
            return Fate.CANCELLED, ""
    raise Lost(f"the stream stopped after {events} events")


def read_whole(status: int, body: bytes, expected: str) -> tuple[Fate, str]:
    """What an answer in one piece comes to.

    Raises:
        Lost: it is neither the expected one nor an error that says what is wrong.
    """
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise Lost(f"HTTP {status}, no JSON: {body[:200]!r}") from error
    if (code := error_code(answer)) is not None:
        return Fate.REFUSED, code
    if status != 200 or text_of(answer) != expected:
        raise Lost(f"wrong text: HTTP {status}, {body[:300]!r} is not {expected!r}")
    return Fate.ANSWERED, ""


class Ear:
    """Lines of a response, and the longest silence between them."""

    def __init__(self, response: httpx.Response, began: float) -> None:
        self._response, self._began, self._last = response, began, began
        self.silence_s = 0.0

    def heard(self) -> None:
        now = time.monotonic()
        self.silence_s, self._last = max(self.silence_s, now - self._last), now

    def __iter__(self) -> Iterator[str]:
        for line in self._response.iter_lines():
            self.heard()
            if self._last - self._began > WHOLE_S:
                raise Lost(f"no end after {WHOLE_S:g} s, however much was said")
            yield line


def ask(client: httpx.Client, node: str, url: str, request: Request, expected: str, run_began: float) -> Outcome:
    """Make one request and see what becomes of it. It never raises for what the mesh does."""
    began = time.monotonic()
    silence_s = 0.0
    patience = SILENCE_S if request.streams else WHOLE_S
    if request.gives_up_after is not None and not request.streams:
        patience = request.gives_up_after / 10
    try:
        # A connection of its own: one that the server closes while it idles says nothing about requests.
        asked = client.stream(
            "POST", url + request.path, json=request.body(), timeout=patience, headers={"Connection": "close"}
        )
        with asked as response:
            ear = Ear(response, began)
            try:
                if "event-stream" in response.headers.get("content-type", ""):
                    fate, why = read_events(ear, expected, request.gives_up_after)
                else:
                    body = response.read()
                    fate, why = read_whole(response.status_code, body, expected)
            finally:
                ear.heard()
                silence_s = ear.silence_s
    except httpx.ReadTimeout:
        gave_up = request.gives_up_after is not None and not request.streams
        fate, why = (Fate.CANCELLED, "") if gave_up else (Fate.LOST, f"silence for {patience:g} s")
        silence_s = max(silence_s, patience)
    except Lost as lost:
        fate, why = Fate.LOST, str(lost)
    except (httpx.HTTPError, ValueError) as error:
        fate, why = Fate.LOST, f"{type(error).__name__}: {error}"
    return Outcome(node, request, fate, why, began - run_began, time.monotonic() - began, silence_s)


class Asker(threading.Thread):
    """Somebody at a machine who asks, waits for what comes, thinks a little, and asks again, until told to stop."""

    def __init__(
        self,
        client: httpx.Client,
        node: str,
        url: str,
        answers: Mapping[str, str],
        seed: str,
        run_began: float,
        pauses_s: Sequence[float] = (0.1, 0.8),
    ) -> None:
        super().__init__(name=f"asker on {node}", daemon=True)
        self.outcomes: list[Outcome] = []
        self.under_way: Request | None = None
        self._client, self._node, self._url, self._answers = client, node, url, answers
        self._chance, self._run_began, self._pauses_s = random.Random(seed), run_began, tuple(pauses_s)
        self._enough = threading.Event()

    def stop(self) -> None:
        """Ask nothing more; what is under way goes on."""
        self._enough.set()

    def run(self) -> None:
        while not self._enough.is_set():
            request = self.under_way = any_request(self._chance)
            expected = self._answers[request.key]
            self.outcomes.append(ask(self._client, self._node, self._url, request, expected, self._run_began))
            self.under_way = None
            self._enough.wait(self._chance.uniform(*self._pauses_s))
