"""Which path flaps when, and how: decided beforehand by a seed, then done to a lab."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

SHORTEST_S, LONGEST_S = 0.2, 8.0
SLOW, LOSSY = "150+-20ms,30MB/s", "20+-10ms,30MB/s,5%"
KINDS = {
    "cut": 5,
    "cut one way": 2,
    "no tcp": 3,
    "no udp": 2,
    "slow": 2,
    "lossy": 2,
    "reboot": 1,
    "renumber": 1,
    "move": 1,
}
"""What may happen to a path, or to a machine's place, and how often beside the others."""
OF_PLACES = ("reboot", "renumber", "move")
"""These are over at once, and befall one machine."""


@dataclass(frozen=True, slots=True)
class Flap:
    """One thing that happens: from ``at_s`` on, for ``for_s`` seconds, to the path from ``a`` to ``b``."""

    at_s: float
    for_s: float
    kind: str
    a: str
    b: str = ""


class Weather(Protocol):
    """What a lab can be told (:class:`bench.lab.Lab`)."""

    def cut(self, a: str, b: str, *, both: bool = True) -> None: ...
    def heal(self, a: str, b: str, *, both: bool = True) -> None: ...
    def block(self, a: str, b: str, protocol: str = "tcp", *, both: bool = True) -> None: ...
    def unblock(self, a: str, b: str, protocol: str = "tcp", *, both: bool = True) -> None: ...
    def set_link(self, a: str, b: str, link: str, *, both: bool = True) -> None: ...
    def reboot_nat(self, name: str) -> None: ...
    def renumber(self, name: str) -> str: ...
    def move(self, node: str, to: str | None = None) -> str: ...


def forecast(
    seed: int, seconds: float, machines: Sequence[str], *, homes: Sequence[str], movers: Sequence[str], every_s: float
) -> list[Flap]:
    """What will happen, in order of time; no path is visited by two flaps at once.

    Args:
        homes: machines behind a NAT, which may be switched off and on, or get another address.
        movers: machines that may get another address themselves.
        every_s: from one flap to the next, on average.
    """
    chance = random.Random(seed)
    kinds = {kind: weight for kind, weight in KINDS.items() if homes or kind not in ("reboot", "renumber")}
    pairs = list(itertools.permutations(machines, 2))
    taken: dict[frozenset[str], float] = {}
    flaps: list[Flap] = []
    at = chance.uniform(0, every_s)
    while at < seconds:
        [kind] = chance.choices(list(kinds), list(kinds.values()))
        for_s = round(chance.uniform(SHORTEST_S, LONGEST_S), 2)
        a, b = chance.choice(pairs)
        if kind in OF_PLACES:
            flaps.append(Flap(round(at, 2), 0.0, kind, chance.choice(movers if kind == "move" else homes)))
        elif taken.get(frozenset((a, b)), 0.0) <= at:
            taken[frozenset((a, b))] = at + for_s
            flaps.append(Flap(round(at, 2), for_s, kind, a, b))
        at += chance.uniform(0.2, 1.8) * every_s
    return flaps


def begin(lab: Weather, flap: Flap) -> None:
    """Let it happen."""
    a, b = flap.a, flap.b
    match flap.kind:
        case "cut" | "cut one way":
            lab.cut(a, b, both=flap.kind == "cut")
        case "no tcp" | "no udp":
            lab.block(a, b, flap.kind.removeprefix("no "))
        case "slow" | "lossy":
            lab.set_link(a, b, SLOW if flap.kind == "slow" else LOSSY)
        case "reboot":
            lab.reboot_nat(a)
        case "renumber":
            lab.renumber(a)
        case "move":
            lab.move(a)
        case _:
            raise ValueError(f"{flap.kind!r} is no flap")


def end(lab: Weather, flap: Flap, link: str) -> None:
    """Make it good again; ``link`` is what lies between any two machines otherwise."""
    a, b = flap.a, flap.b
    match flap.kind:
        case "cut" | "cut one way":
            lab.heal(a, b, both=flap.kind == "cut")
        case "no tcp" | "no udp":
            lab.unblock(a, b, flap.kind.removeprefix("no "))
        case "slow" | "lossy":
            lab.set_link(a, b, link)


def play(lab: Weather, flaps: Sequence[Flap], link: str, say: Callable[[Flap], None]) -> None:
    """Do it all in its time; in the end every path is whole."""
    began = time.monotonic()
    deeds: list[tuple[float, int, bool, Flap]] = []
    for number, flap in enumerate(flaps):
        heapq.heappush(deeds, (flap.at_s, number, True, flap))
        heapq.heappush(deeds, (flap.at_s + flap.for_s, number, False, flap))
    while deeds:
        at, number, begins, flap = heapq.heappop(deeds)
        if (wait := at - (time.monotonic() - began)) > 0:
            time.sleep(wait)
        if begins:
            say(flap)
            begin(lab, flap)
        else:
            end(lab, flap, link)
