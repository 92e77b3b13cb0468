"""What a started configuration is asked, the same for all of them, and the figures that come of it."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from bench.lab import Lab
from bench.measure import GENERATION_PROMPT, Answer, complete, count_tokens, long_prompt
from bench.ring.records import (
    Contexts,
    Prompt,
    Run,
    Token,
    Turns,
    Visit,
    Wire,
    beside,
    from_worker,
    hashed,
    median_wire,
    per_token,
    to_worker,
)
from bench.servers import Setting, turns_file

SHORT, NEAR = 4, 36
"""Tokens of a short answer, and of a longer one where a difference is wanted."""
SMALL, LARGE, TALK = 590, 4000, 2000
"""Tokens of the prompts and conversations. Micro-batches and the engine's steps in the KV cache stay whole for NEAR."""
_MAX_WORDS = 6000
_FIRST_CONVERSATION = 900


@dataclass(frozen=True, slots=True)
class Told:
    """An answer, and what it cost on the wire."""

    answer: Answer
    wire: Wire
    late: float
    """Share of packets the lab delivered over 2 ms late."""


@dataclass(slots=True)
class Asker:
    """Asks one setting, and keeps account."""

    setting: Setting
    client: httpx.Client
    run: Run
    """Whose lateness and texts are kept."""

    @property
    def lab(self) -> Lab:
        return self.setting.lab

    def ask(self, prompt: str, tokens: int, *, cached: bool = False, named: str = "") -> Told:
        """One greedy answer; its text counts for comparison under ``named``."""
        self.lab.reset_counters()
        answer = complete(self.client, self.setting.base_url, None, prompt, tokens, cached=cached)
        timing = self.lab.timing()
        late = timing.late / max(1, timing.delivered)
        self.run.late_packets = max(self.run.late_packets, late)
        if named and self.run.texts.setdefault(named, hashed(answer.text)) != hashed(answer.text):
            self.run.texts[named] = "differs between runs"
        return Told(answer, {pair: counter.bytes for pair, counter in self.lab.counters().items()}, late)


@dataclass(slots=True)
class Lengths:
    """Prompts of so many tokens, whatever the model's vocabulary makes of words; made once per model."""

    prompts: dict[tuple[int, int], str] = field(default_factory=dict)

    def prompt(self, asker: Asker, tokens: int, salt: int) -> str:
        """A prompt of about ``tokens`` tokens that shares no beginning with one of another ``salt``."""
        if (tokens, salt) not in self.prompts:
            count = partial(count_tokens, asker.client, asker.setting.base_url)
            words = words_for(lambda words: count(long_prompt(words, salt)), tokens)
            self.prompts[tokens, salt] = long_prompt(words, salt)
        return self.prompts[tokens, salt]


def words_for(count: Callable[[int], int], tokens: int) -> int:
    """The fewest words of which ``count`` makes at least ``tokens`` tokens (more words are more tokens)."""
    return bisect_left(range(_MAX_WORDS), tokens, key=count)


def ask_tokens(ring: Asker, solo: Asker, runs: int, tokens: int) -> Token:
    """Milliseconds and bytes per token, the single process measured before and after every answer."""
    for asker in (solo, ring):
        asker.ask(GENERATION_PROMPT, SHORT)
    alone: list[float] = []
    ms: list[float] = []
    wires = []
    late = 0.0

    def ask_solo() -> None:
        alone.append(solo.ask(GENERATION_PROMPT, tokens, named="short").answer.ms_per_token)

    ask_solo()
    for _ in range(runs):
        short = ring.ask(GENERATION_PROMPT, SHORT)
        long = ring.ask(GENERATION_PROMPT, tokens, named="short")
        ms.append(long.answer.ms_per_token)
        late = max(late, long.late)
        wires.append(per_token(short.wire, long.wire, tokens - SHORT))
        ask_solo()
    wire = median_wire(wires)
    links = {">".join(pair): count for pair, count in wire.items()}
    return Token(ms, beside(alone, ms), alone, links, to_worker(wire), from_worker(wire), late)


def ask_prompts(asker: Asker, lengths: Lengths, wanted: int, runs: int, *, solo: Asker | None = None) -> Prompt:
    """Prompts never seen before, one after the other; those of the single process in turns with them."""
    seconds: list[float] = []
    alone: list[float] = []
    sent: list[float] = []
    n_tokens = []
    for run in reversed(range(runs)):  # the one that all configurations are asked comes last, and stays in the slot
        prompt = lengths.prompt(asker, wanted, wanted + run)
        for who, times in ((solo, alone), (asker, seconds)):
            if who is None:
                continue
            # What was in the slot may have to be saved first; let it be little.
            who.ask(GENERATION_PROMPT, 1)
            told = who.ask(prompt, SHORT, named=f"{wanted} tokens, {run + 1}")
            times.append(told.answer.first_s)
            if who is asker:
                n_tokens.append(told.answer.prompt_tokens)
                sent.append(to_worker(told.wire))
    return Prompt(wanted, int(statistics.median(n_tokens)), seconds, alone, int(statistics.median(sent)))


def ask_contexts(asker: Asker, lengths: Lengths, runs: int) -> Contexts:
    """Bytes per generated token behind a long prompt and a short one, after :func:`ask_prompts` of that length."""

    def cost(prompt: str, named: str) -> float:
        asker.ask(prompt, 1, cached=True)
        wires = []
        for _ in range(runs):
            short = asker.ask(prompt, SHORT, cached=True)
            long = asker.ask(prompt, NEAR, cached=True, named=named)
            wires.append(per_token(short.wire, long.wire, NEAR - SHORT))
        wire = median_wire(wires)
        return to_worker(wire) + from_worker(wire)

    far = cost(lengths.prompt(asker, LARGE, LARGE), f"behind {LARGE} tokens")
    return Contexts(far, cost(GENERATION_PROMPT, "behind few tokens"))


def ask_alternately(asker: Asker, lengths: Lengths, rounds: int) -> list[Visit]:
    """Two conversations on one slot, in turns; each return brings some new words."""
    visits = []
    talks = {name: lengths.prompt(asker, TALK, _FIRST_CONVERSATION + n) for n, name in enumerate("AB")}
    for turn in range(rounds + 1):
        for name, talk in talks.items():
            new = TALK
            if turn:
                added = " " + long_prompt(12, _FIRST_CONVERSATION + 10 * turn)
                count = partial(count_tokens, asker.client, asker.setting.base_url)
                new = count(talk + added) - count(talk)
                talk = talks[name] = talk + added
            told = asker.ask(talk, 8, cached=True, named=f"conversation {name}, visit {turn + 1}")
            sent, received = int(to_worker(told.wire)), int(from_worker(told.wire))
            answer = told.answer
            visits.append(Visit(name, turn > 0, new, answer.prompt_tokens, sent, received, answer.first_s))
    return visits


def count_turns(asker: Asker, directory: Path) -> Turns:
    """Blocking round trips of a configuration that was started with relays, which write into ``directory``."""

    def turns() -> dict[str, int]:
        return {worker: int(turns_file(directory, worker).read_bytes() or 0) for worker in asker.setting.workers}

    def most(later: dict[str, int], earlier: dict[str, int]) -> int:
        return max(later[worker] - earlier[worker] for worker in later)

    to_healthy = max(turns().values())
    asker.ask(GENERATION_PROMPT, 1)
    to_first_token = max(turns().values())
    asker.ask(GENERATION_PROMPT, SHORT)
    first = turns()
    asker.ask(GENERATION_PROMPT, SHORT)
    second = turns()
    asker.ask(GENERATION_PROMPT, SHORT + 16)
    each = (most(turns(), second) - most(second, first)) / 16
    before = turns()
    for words in (7, 31, 33):
        asker.ask(long_prompt(words, words), 1)
    return Turns(to_healthy, to_first_token, each, most(turns(), before) / 3)
