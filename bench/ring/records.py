"""What a run of the ring's bench writes down: raw figures, which verdicts and tables are made of."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

Pair = tuple[str, str]
Wire = dict[Pair, int]
"""IP bytes from one machine to another."""


@dataclass(slots=True)
class Model:
    """What the bars are reckoned from."""

    name: str
    bytes: int
    n_layers: int
    n_embd: int
    share_read_s: dict[int, float] = field(default_factory=dict)
    """Seconds that a plain read of the largest worker's share takes, by number of workers."""


@dataclass(slots=True)
class Loads:
    """Starts: seconds until healthy, and bytes both ways of the busiest worker."""

    seconds: list[float] = field(default_factory=list)
    wire: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Token:
    """Generating at a short context."""

    ms: list[float]
    over_solo_ms: list[float]
    """Each beside the runs of the single process right before and after it."""
    solo_ms: list[float]
    links: dict[str, float]
    """Bytes per token of each link, ``a>w1``."""
    to_worker: float
    """All that one worker is sent per token, by whomever: the most of any."""
    from_worker: float
    late_packets: float = 0.0
    """Of these answers: the largest share the lab delivered over 2 ms late."""


@dataclass(slots=True)
class Prompt:
    """Prompts of one length."""

    wanted: int
    tokens: int
    seconds: list[float]
    """To the first token."""
    solo_seconds: list[float]
    to_worker: int
    """Bytes the busiest worker was sent."""


@dataclass(slots=True)
class Contexts:
    """Bytes per generated token of the busiest worker, both ways, behind 4,000 tokens and behind few."""

    far: float
    near: float


@dataclass(slots=True)
class Visit:
    """One question to a conversation, in turns with another one on the same slot."""

    conversation: str
    again: bool
    new_tokens: int
    """Those that a reader of the conversation has not seen."""
    computed: int
    to_worker: int
    """Bytes of the busiest worker."""
    from_worker: int
    first_s: float


@dataclass(slots=True)
class Turns:
    """Blocking round trips of the busiest worker."""

    to_healthy: int
    to_first_token: int
    per_token: float
    per_new_shape: float
    """Of a prompt whose length did not occur before, generating one token."""


@dataclass(slots=True)
class Run:
    """All that one configuration did over one link."""

    model: str
    name: str
    workers: int
    link: str
    limit_ms: float = 0.0
    """The one-way delays host -> worker -> ... -> host."""
    layers: list[int] = field(default_factory=list)
    loads: Loads = field(default_factory=Loads)
    token: Token | None = None
    prompts: list[Prompt] = field(default_factory=list)
    contexts: Contexts | None = None
    visits: list[Visit] = field(default_factory=list)
    turns: Turns | None = None
    pushes: list[str] = field(default_factory=list)
    push_faults: list[str] = field(default_factory=list)
    """Pairs of neighbours that go through the host, and why."""
    texts: dict[str, str] = field(default_factory=dict)
    """What was said, as a hash, by what was asked."""
    late_packets: float = 0.0
    """Largest share the lab delivered over 2 ms late."""


def to_worker(wire: Mapping[Pair, float]) -> float:
    """What the worker that is sent most is sent by all others."""
    return _most(wire, 1)


def from_worker(wire: Mapping[Pair, float]) -> float:
    return _most(wire, 0)


def _most(wire: Mapping[Pair, float], end: int) -> float:
    sums: dict[str, float] = {}
    for pair, count in wire.items():
        if pair[end].startswith("w"):
            sums[pair[end]] = sums.get(pair[end], 0.0) + count
    return max(sums.values(), default=0.0)


def per_token(short: Wire, long: Wire, tokens: int) -> dict[Pair, float]:
    """Of each link, what ``tokens`` more tokens of an answer cost."""
    return {pair: (long.get(pair, 0) - short.get(pair, 0)) / tokens for pair in short.keys() | long.keys()}


def median_wire(wires: Iterable[Mapping[Pair, float]]) -> dict[Pair, float]:
    """The median of each link."""
    rows = list(wires)
    pairs = {pair for row in rows for pair in row}
    return {pair: statistics.median(row.get(pair, 0.0) for row in rows) for pair in sorted(pairs)}


def beside(solo: list[float], ring: list[float]) -> list[float]:
    """Differences to the mean of the two neighbours: ``solo`` was measured before, between and after ``ring``."""
    return [each - statistics.fmean(both) for each, both in zip(ring, pairwise(solo), strict=True)]


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
