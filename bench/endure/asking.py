"""Clients that ask at a node's own localhost as the SDKs do, and compare every answer with what it should be."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import httpx

from bench.endure.forms import Refused, Said, Stream, Wrong
from bench.endure.questions import Reference, Request
from bench.endure.roster import Absence, Roster

SILENCE_S = 60.0
"""A stream without a byte for so long hangs: one that is held says so every five seconds."""
WHOLE_S = 200.0
"""An answer in one piece may be held for thirty seconds after each of five losses."""
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0
"""Between an SDK's tries: doubled each time (OpenAI's and Anthropic's alike)."""
DRAIN_S = 15.0
"""The nodes' ``drain_s``: in which what is under way may finish before a planned change. What comes meanwhile is held,
for thirty seconds in all, so a longer one would leave too little of them for the start that follows."""
TRIES, SDK_TRIES = 8, 3
"""The SDKs' own default is the lower; a machine that restarts takes a few seconds before its node answers."""


class Fate(Enum):
    """What a try, or a request with all its tries, came to."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """With an error that says so, before or within the answer."""
    CUT = "cut"
    """No end, and no error either."""
    ALTERED = "altered"


@dataclass(frozen=True, slots=True)
class Try:
    """One HTTP request.

    Args:
        began_s, ended_s: in seconds of the run.
        pause_s: the longest time in which nothing of the answer came.
        retry_after_s: told with a refusal.
        gone: the node asked was killed, or was leaving, while the request was under way.
    """

    node: str
    fate: Fate
    why: str
    began_s: float
    ended_s: float
    pause_s: float
    retry_after_s: float | None = None
    gone: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request with all its tries."""

    request: Request
    tries: tuple[Try, ...]

    @property
    def fate(self) -> Fate:
        return self.tries[-1].fate

    @property
    def faults(self) -> list[Try]:
        """Tries that should have been answered, and were not."""
        return [one for one in self.tries if one.fate is not Fate.ANSWERED and not one.gone]

    @property
    def lost_its_ingress(self) -> bool:
        return any(one.gone and one.fate is not Fate.ANSWERED for one in self.tries)


class Clients:
    """Everybody who asks: one thread each, sharing the questions."""

    def __init__(
        self,
        clients: Sequence[tuple[str, Mapping[str, httpx.Client]]],
        urls: Mapping[str, str],
        questions: Sequence[Request],
        reference: Reference,
        roster: Roster,
        seed: int,
        say: Callable[[Outcome], None],
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._say = say
        self._urls, self._reference, self._roster = urls, reference, roster
        self._questions: Iterator[Request] = iter(questions)
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask_all, args=(home, at, f"{seed}/{number}"), daemon=True)
            for number, (home, at) in enumerate(clients)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether every question has its answer, after waiting so long for it; for ever, if need be."""
        deadline = time.monotonic() + min(seconds, 1e6)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _ask_all(self, home: str, at: Mapping[str, httpx.Client], seed: str) -> None:
        chance = random.Random(seed)
        while True:
            with self._lock:
                request = next(self._questions, None)
            if request is None:
                return
            outcome = self._ask(request, home, at, chance)
            with self._lock:
                self.outcomes.append(outcome)
            self._say(outcome)

    def _ask(self, request: Request, home: str, at: Mapping[str, httpx.Client], chance: random.Random) -> Outcome:
        # Whoever sits at a machine that is off does not ask there.
        node = home if self._roster.is_up(home) else self._elsewhere(home, at, chance)
        tries: list[Try] = []
        expected = self._reference.expected(request)
        while True:
            tries.append(self._try(request, node, at[node], expected))
            last = tries[-1]
            if last.fate is Fate.ANSWERED or not last.gone or len(tries) == TRIES:
                return Outcome(request, tuple(tries))
            backoff = min(BACKOFF_S * 2 ** (len(tries) - 1), LONGEST_BACKOFF_S)
            time.sleep(last.retry_after_s or backoff)
            if chance.random() < 0.5:
                node = self._elsewhere(node, at, chance)

    def _elsewhere(self, node: str, at: Mapping[str, httpx.Client], chance: random.Random) -> str:
        return chance.choice([n for n in at if n != node and self._roster.is_up(n)] or [n for n in at if n != node])

    def _try(self, request: Request, node: str, client: httpx.Client, expected: Said) -> Try:
        began = self._roster.now()
        hearing = Hearing()
        try:
            _hear(client, self._urls[node], request, expected, hearing)
            fate, why = Fate.ANSWERED, ""
        except Refused as refused:
            fate, why = Fate.REFUSED, str(refused)
        except Wrong as wrong:
            fate, why = Fate.ALTERED, str(wrong)
        except (httpx.HTTPError, OSError) as error:
            fate, why = Fate.CUT, f"{type(error).__name__}: {error}"
        hearing.heard()
        ended = self._roster.now()
        gone = excuses(self._roster.absence(node, began, ended), fate, began, ended, hearing.heard_any)
        return Try(node, fate, why, began, ended, hearing.pause_s, hearing.retry_after_s, gone)


def excuses(absence: Absence | None, fate: Fate, began_s: float, ended_s: float, heard_any: bool) -> bool:
    """Whether a try that was not answered is the fault of its own node's being away.

    A node that was killed takes its clients' answers with it. One that leaves on purpose finishes what it has begun,
    unless that takes longer than :data:`DRAIN_S`, and refuses what comes later.
    """
    if absence is None or fate not in (Fate.CUT, Fate.REFUSED):
        return False
    too_late = began_s >= absence.since_s and not heard_any
    too_long = ended_s - max(began_s, absence.since_s) >= DRAIN_S
    return not absence.planned or too_late or too_long


class Hearing:
    """When something of the answer came."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.heard_any = False
        self.retry_after_s: float | None = None
        self._last = time.monotonic()

    def heard(self) -> None:
        now = time.monotonic()
        self.pause_s, self._last = max(self.pause_s, now - self._last), now


def _hear(client: httpx.Client, url: str, request: Request, expected: Said, hearing: Hearing) -> None:
    """Ask, and compare while it comes.

    Raises:
        Refused, Wrong, httpx.HTTPError: it is not the expected answer.
    """
    endpoint = request.endpoint
    body = endpoint.body(request.prompt, request.tokens, request.streams)
    patience = SILENCE_S if request.streams else WHOLE_S
    # A connection of its own: one that the server closes while it idles says nothing about requests.
    headers = {"Connection": "close"}
    with client.stream("POST", url + endpoint.path, json=body, timeout=patience, headers=headers) as response:
        if "retry-after" in response.headers:
            hearing.retry_after_s = float(response.headers["retry-after"])
        if "event-stream" not in response.headers.get("content-type", ""):
            said = endpoint.read_whole(response.read())
        else:
            said = _listen(response, Stream(endpoint), expected, hearing)
    if (difference := said.unlike(expected)) is not None:
        raise Wrong(difference)


def _listen(response: httpx.Response, stream: Stream, expected: Said, hearing: Hearing) -> Said:
    began = time.monotonic()
    for line in response.iter_lines():
        if stream.line(line):
            hearing.heard_any = True
            hearing.heard()
        if not expected.text.startswith(stream.text):
            raise Wrong(f"after {len(stream.text)} characters: {stream.text[-80:]!r}")
        if time.monotonic() - began > WHOLE_S:
            raise Wrong(f"no end after {WHOLE_S:g} s, however much was said")
    if not stream.ended:
        raise httpx.RemoteProtocolError(f"the stream stops after {stream.shape}, {len(stream.text)} characters")
    return stream.said()
