"""Rings of many machines, where not every subset can be weighed: grown from each likely host, then improved.

A ring is judged by what its members would take if all layers were alike, and while it does not hold the whole model, by
that time for the share it holds. Machines are added where they lengthen the ring least; then one is dropped
or exchanged as long as that helps. The work is bounded by a count of such judgements, not by a clock: all nodes must
come to the same plan. Against an exact search of up to 8 machines it is within 3% (``tests/unit/test_plan_grow.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mesh.plan.costs import Costs
from mesh.plan.eligible import Seat
from mesh.plan.pace import MEMBER_MS, Rtts, compute_ms, rtt

HOSTS = 8
"""Of each kind that are tried: with most room, the fastest, the most central."""
IMPROVED = 4
"""Rings, best first, that are improved and then divided."""
JUDGEMENTS = 8_000
"""In all: some 100 ms on one core of 2020."""
ALIKE = 1.2
"""Layers that differ by less are counted whole."""


class Grower:
    """Grows rings out of ``table``, one seat for each machine."""

    def __init__(self, table: Sequence[Seat], costs: Costs, rtt_ms: Rtts) -> None:
        self._table = sorted(table, key=lambda s: s.id)
        self._left = JUDGEMENTS
        n = costs.n_layers
        least, most = min(costs.each), max(costs.each)
        self._one = costs.reads[-1] / n
        """What one layer reads, on average."""
        whole = most <= ALIKE * least

        def carries(room: int) -> float:
            layers = room * n / costs.needs[-1]
            return self._one * (min(layers // 1 if whole and layers > 0 else layers, n))

        self._rooms = [carries(s.usable - costs.fixed(host=False)) for s in self._table]
        self._host_rooms = [carries(s.usable - costs.fixed(host=True, device=s.device.kind)) for s in self._table]
        self._workers = [i for i, s in enumerate(self._table) if s.usable >= costs.fixed(host=False) + least]
        self._per_byte = [1000 / s.pace.bytes_per_second + s.pace.layer_ms / self._one for s in self._table]
        self._ends = [compute_ms(costs, 0, 0, s.pace, host=True) for s in self._table]
        self._total = costs.reads[-1] - 1e-6 * self._one
        ids = [s.id for s in self._table]
        self._half = [[0.0 if a == b else rtt(rtt_ms, a, b) / 2 for b in ids] for a in ids]

    def orders(self, fewest: int, most: int) -> Iterator[tuple[Seat, ...]]:
        """Good rings of ``fewest`` to ``most`` members, the host first; the best of them first."""
        grown = []
        for host in self._hosts():
            order = self._grow(host, fewest, most)
            if order is not None:
                grown.append((self._score(order), order))
        grown.sort()
        better = sorted((self._improve(list(order), fewest, most) for _, order in grown[:IMPROVED]))
        seen: set[tuple[int, ...]] = set()
        for _, order in [*better, *grown]:
            for way in (order, [order[0], *order[:0:-1]]):
                if tuple(way) not in seen and len(seen) < 2 * IMPROVED:
                    seen.add(tuple(way))
                    yield tuple(self._table[i] for i in way)

    def _hosts(self) -> list[int]:
        able = [i for i, room in enumerate(self._host_rooms) if room >= 0]
        near = {i: sum(sorted(self._half[i])[1:5]) for i in able}
        rankings = (
            sorted(able, key=lambda i: (-self._host_rooms[i], i)),
            sorted(able, key=lambda i: (self._per_byte[i], i)),
            sorted(able, key=lambda i: (near[i], i)),
        )
        return sorted({i for ranking in rankings for i in ranking[:HOSTS]})

    def _grow(self, host: int, fewest: int, most: int) -> list[int] | None:
        order, score = [host], self._score([host])
        while len(order) < most and self._left > 0:
            best = min(self._with_one_more(order), default=None)
            whole = len(order) >= fewest and self._holds(order)
            if best is None or (whole and best[0] >= score):
                break
            score, order = best[0], best[2]
        return order if len(order) >= fewest and self._holds(order) else None

    def _with_one_more(self, order: list[int]) -> Iterator[tuple[float, int, list[int]]]:
        legs = list(pairwise([*order, order[0]]))
        length = self._length(order)
        for new in self._workers:
            if new in order:
                continue
            to = self._half[new]
            longer, at = min((self._half[a][new] + to[b] - self._half[a][b], i) for i, (a, b) in enumerate(legs))
            grown = [*order[: at + 1], new, *order[at + 1 :]]
            yield self._score(grown, length + longer + MEMBER_MS), new, grown

    def _improve(self, order: list[int], fewest: int, most: int) -> tuple[float, list[int]]:
        """Drop, exchange or add one machine, or turn a stretch around, while that helps."""
        score = self._score(order)
        while self._left > 0:
            best = min(self._neighbours(order, fewest, most), default=None)
            if best is None or best[0] >= score - 1e-9:
                break
            score, order = best
        return score, order

    def _neighbours(self, order: list[int], fewest: int, most: int) -> Iterator[tuple[float, list[int]]]:
        size = len(order)
        for i in range(1, size):
            fewer = order[:i] + order[i + 1 :]
            if size > fewest and self._holds(fewer):
                yield self._score(fewer), fewer
            if self._left > 0:
                for score, _, swapped in self._with_one_more(fewer):
                    if self._holds(swapped):
                        yield score, swapped
            for j in range(i + 2, size + 1):
                turned = order[:i] + order[i:j][::-1] + order[j:]
                yield self._score(turned), turned
            headed = [order[i], *order[i + 1 :], *order[:i]]  # the same ring with another host
            if self._host_rooms[order[i]] >= 0 and self._holds(headed):
                yield self._score(headed), headed
        if size < most:
            for score, _, grown in self._with_one_more(order):
                yield score, grown

    def _length(self, order: list[int]) -> float:
        if len(order) < 2:
            return 0.0
        return sum(self._half[a][b] for a, b in pairwise([*order, order[0]])) + MEMBER_MS * (len(order) - 1)

    def _holds(self, order: list[int]) -> bool:
        room = self._host_rooms[order[0]] + sum(self._rooms[i] for i in order[1:])
        return room >= self._total and self._host_rooms[order[0]] >= 0

    def _score(self, order: list[int], length: float | None = None) -> float:
        self._left -= 1
        host = order[0]
        ms = self._ends[host] + (self._length(order) if length is None else length)
        per_byte, one = self._per_byte, self._one
        left = self._total
        for i in order[1:]:  # a worker carries a layer or more
            ms += one * per_byte[i]
            left -= one
        for i in sorted(order, key=per_byte.__getitem__):
            if left <= 0:
                break
            part = min(left, self._host_rooms[i] if i == host else self._rooms[i] - one)
            ms += part * per_byte[i]
            left -= part
        left = max(left, 0.0)
        held = 1 - left / self._total if self._total else 1.0
        return ms / held if held > 0 else math.inf
