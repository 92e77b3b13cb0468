"""The layout of a mesh: who carries which layers. A pure function of what members know of each other.

Solo when one machine can hold the model. Otherwise the ring with the lowest predicted ms per token: up to
:data:`~mesh.plan.ring.EXACT` machines all hosts and subsets are weighed, best bound first (all orders too up to
:data:`~mesh.plan.ring.ALL_ORDERS`, the shortest and its reverse above); beyond that, for each host, the nearest and
the largest machines that suffice. ``--split always`` takes as many machines as can carry a layer, ``never`` takes one.
Where wishes differ, the largest context and the most slots win, and ``always`` against ``never`` is ``auto``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from msgspec.structs import replace

from mesh.plan.costs import Costs, Rtts, rtt, sound
from mesh.plan.divide import divide
from mesh.plan.eligible import Seat, candidates, seats_of, too_small
from mesh.plan.reasons import not_needed, shortage, why
from mesh.plan.ring import EXACT, MAX_RING, ring_ms, short_ring, worthwhile_orders
from mesh.plan.spare import prompt_cache_bytes
from mesh.wire.facts import Layout, ModelCost, NodeFacts, NodeId, RingMember

DEFAULT_CTX = 4096
DEFAULT_PARALLEL = 2
"""Slots: one request does not have to wait for another, at the price of a second KV cache."""
ENOUGH = 16
"""Rings to divide when everybody carries something: their bounds are far below what they come to, and say little."""
MAX_TEXT = 1024
GAIN = 0.9
"""A running layout gives way to one that takes at most this share of its time."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A layout, or None; why; and for each member without a share, why not."""

    layout: Layout | None
    reason: str
    excluded: dict[NodeId, str]


@dataclass(frozen=True, slots=True)
class _Ring:
    """A way to serve: seats in data-flow order, the host first, and the layers (first, end) of each."""

    seats: tuple[Seat, ...]
    ranges: tuple[tuple[int, int], ...]
    ms: float

    def rank(self) -> tuple[float, int, tuple[NodeId, ...]]:
        return (round(self.ms, 6), len(self.seats), tuple(s.id for s in self.seats))


def plan(members: Sequence[NodeFacts], model: ModelCost, *, rtt_ms: Rtts, current: Layout | None) -> Planned:
    """Find the layout that serves ``model``.

    Args:
        members: all that are alive, in any order; lite clients too.
        rtt_ms: round trips between pairs; either direction will do, and a missing one counts as a slow one.
        current: the running layout, kept unless it no longer fits or another is a tenth faster.
    """
    if not sound(model):
        return Planned(None, f"the facts about {model.name} contradict each other", {})
    able, excluded = candidates(members, model, current)
    split, conflict = _split_wish(members)
    ctx_size, parallel, capped = _size_wishes(members, model)
    costs = Costs(model, ctx_size, parallel)
    small = {node.id: lack for node in able if (lack := too_small(node, costs)) is not None}
    search = _Search(able, costs, rtt_ms)
    found = search.best(split)
    if found is None:
        reason = shortage(able, costs, split) if able else f"no machine can serve {model.name}"
        return Planned(None, reason[:MAX_TEXT], excluded | small)
    kept = search.again(current, ctx_size, parallel)
    stays = kept is not None and _still_good(kept, found, split)
    ring = kept if kept is not None and stays else found
    layout = _layout(ring, costs, ctx_size, parallel)
    used = {s.id for s in ring.seats}
    for node in able:
        if node.id not in used:
            excluded[node.id] = small.get(node.id) or not_needed(ring.seats, model, rtt_ms, node)
    notes = [why(ring.seats, costs, split)]
    if stays and current is not None and ring.rank() != found.rank():
        notes.append(f"kept: the best other layout would gain less than {1 - GAIN:.0%}")
    return Planned(layout, "; ".join([*notes, *conflict, *capped])[:MAX_TEXT], excluded)


class _Search:
    def __init__(self, able: Sequence[NodeFacts], costs: Costs, rtt_ms: Rtts) -> None:
        self.costs = costs
        self.rtt_ms = rtt_ms
        options = [seats for node in able if (seats := seats_of(node))]
        self.all_seats = [seat for seats in options for seat in seats]
        fastest = [seats[0] for seats in options]
        largest = [max(seats, key=lambda s: s.usable) for seats in options]
        self.tables = [fastest] if fastest == largest else [fastest, largest]
        """One device for each machine: the fastest of all, or the largest of all."""

    def best(self, split: str) -> _Ring | None:
        alone = [ring for seat in self.all_seats if (ring := self.solo(seat)) is not None]
        solo = min(alone, key=_Ring.rank, default=None)
        if split == "never" or (split == "auto" and solo is not None):
            return solo
        if split == "auto":
            rings = [ring for table in self.tables if (ring := self.fastest(self.orders(table, 2, MAX_RING), False))]
            return min(rings, key=_Ring.rank, default=None)
        for size in range(min(MAX_RING, max(map(len, self.tables), default=0)), 1, -1):
            rings = [ring for table in self.tables if (ring := self.fastest(self.orders(table, size, size), True))]
            if rings:
                return min(rings, key=_Ring.rank)
        return solo

    def solo(self, seat: Seat) -> _Ring | None:
        n = self.costs.n_layers
        needed = self.costs.fixed(host=True, device=seat.device.kind) + self.costs.layers(0, n)
        if needed > seat.usable:
            return None
        return _Ring((seat,), ((0, n),), self.costs.compute_ms(0, n, seat.speed, host=True))

    def orders(self, table: Sequence[Seat], fewest: int, most: int) -> Iterator[tuple[Seat, ...]]:
        """Rings worth a look, host first."""
        least = min(self.costs.each)
        by_id = {s.id: s for s in table}
        workers = [s.id for s in table if s.usable >= self.costs.fixed(host=False) + least]
        for host in table:
            if host.usable < self.costs.fixed(host=True, device=host.device.kind):
                continue
            others = [n for n in workers if n != host.id]
            if len(others) < EXACT:
                for order in worthwhile_orders(host.id, others, self.rtt_ms):
                    if fewest <= len(order) + 1 <= most:
                        yield (host, *(by_id[n] for n in order))
                continue
            nearest = sorted(others, key=lambda n: (rtt(self.rtt_ms, host.id, n), -by_id[n].usable, n))
            largest = sorted(others, key=lambda n: (-by_id[n].usable, n))
            for ranking in (nearest, largest):
                sizes = range(max(fewest, 2), min(most, len(others) + 1) + 1)
                enough = (n for n in sizes if self.bound([host, *(by_id[i] for i in ranking[: n - 1])]) is not None)
                # One more may pay when it is fast; many more do not: each costs its hops.
                for size in islice(enough, 3):
                    order = short_ring(host.id, ranking[: size - 1], self.rtt_ms)
                    yield (host, *(by_id[n] for n in order))

    def fastest(self, orders: Iterator[tuple[Seat, ...]], spread: bool) -> _Ring | None:
        """The best ring of all; those whose bound is already worse are never divided."""
        bounded = []
        for order in orders:
            bound = self.bound(order)
            if bound is not None:
                bounded.append((bound, len(order), tuple(s.id for s in order), order))
        best: _Ring | None = None
        divided = 0
        for bound, _, _, order in sorted(bounded, key=lambda b: b[:3]):
            if best is not None and (bound > best.ms + 1e-6 or (spread and divided >= ENOUGH)):
                break
            ring = self.ring(order, spread)
            if ring is None:
                continue
            divided += 1
            if best is None or ring.rank() < best.rank():
                best = ring
        return best

    def bound(self, order: Sequence[Seat]) -> float | None:
        """No division of the layers is faster than this; None if none fits. Layers count as divisible here."""
        rooms = [
            (seat.speed, seat.usable - self.costs.fixed(host=i == 0, device=seat.device.kind))
            for i, seat in enumerate(order)
        ]
        if sum(room for _, room in rooms) < self.costs.needs[-1] or min(room for _, room in rooms) < 0:
            return None
        ms = ring_ms([s.id for s in order], self.rtt_ms) + self.costs.compute_ms(0, 0, order[0].speed, host=True)
        left = self.costs.weights[-1]
        for seat_speed, room in sorted(rooms, reverse=True):
            part = min(left, room)
            ms += part / seat_speed * 1000
            left -= part
        return ms

    def ring(self, order: tuple[Seat, ...], spread: bool) -> _Ring | None:
        ranges = divide(order, self.costs, spread=spread)
        return None if ranges is None else _Ring(order, tuple(ranges), self.predict(order, ranges))

    def predict(self, order: Sequence[Seat], ranges: Sequence[tuple[int, int]]) -> float:
        compute = sum(
            self.costs.compute_ms(first, end, seat.speed, host=i == 0)
            for i, (seat, (first, end)) in enumerate(zip(order, ranges, strict=True))
        )
        return compute + ring_ms([s.id for s in order], self.rtt_ms)

    def again(self, current: Layout | None, ctx_size: int, parallel: int) -> _Ring | None:
        """The running layout by today's facts, or None if it can no longer run as it is."""
        if current is None or (current.ctx_size, current.parallel) != (ctx_size, parallel):
            return None
        if current.model.fingerprint != self.costs.model.fingerprint:
            return None
        by_place = {(s.id, s.device.name): s for s in self.all_seats}
        seats, ranges, at = [], [], 0
        for index, member in enumerate(current.ring):
            seat = by_place.get((member.id, member.device))
            first, end = (at, at) if member.layers is None else (member.layers[0], member.layers[1] + 1)
            if seat is None or first != at or not first <= end <= self.costs.n_layers:
                return None
            fixed = self.costs.fixed(host=index == 0, device=seat.device.kind)
            if fixed + self.costs.layers(first, end) > seat.usable:
                return None
            seats.append(seat)
            ranges.append((first, end))
            at = end
        if at != self.costs.n_layers or current.ring[0].id != current.host:
            return None
        return _Ring(tuple(seats), tuple(ranges), self.predict(seats, ranges))


def _still_good(kept: _Ring, found: _Ring, split: str) -> bool:
    if split == "never" and len(kept.seats) > 1:
        return False
    if split == "always" and len(kept.seats) < len(found.seats):
        return False
    return found.ms > kept.ms * GAIN or found.rank() == kept.rank()


def _layout(ring: _Ring, costs: Costs, ctx_size: int, parallel: int) -> Layout:
    members = tuple(
        RingMember(
            id=seat.id,
            name=seat.node.name,
            layers=(first, end - 1) if end > first else None,
            bytes=costs.fixed(host=i == 0, device=seat.device.kind) + costs.layers(first, end),
            device=seat.device.name,
        )
        for i, (seat, (first, end)) in enumerate(zip(ring.seats, ring.ranges, strict=True))
    )
    spares = [seat.usable - member.bytes for seat, member in zip(ring.seats, members, strict=True)]
    layout = Layout(
        mode="solo" if len(members) == 1 else "split",
        host=members[0].id,
        model=costs.model,
        ring=members,
        ctx_size=ctx_size,
        parallel=parallel,
        predicted_ms_per_token=round(ring.ms, 3),
        prompt_cache_bytes=prompt_cache_bytes(ring.ranges, spares, costs),
    )
    return replace(
        layout, ring=tuple(replace(m, bytes=m.bytes + layout.prompt_cache_share(m.layers)) for m in layout.ring)
    )


def _workers(members: Sequence[NodeFacts]) -> list[NodeFacts]:
    return [m for m in members if m.role == "worker" and not m.draining]


def _split_wish(members: Sequence[NodeFacts]) -> tuple[str, list[str]]:
    wishes = {m.split for m in _workers(members)} - {"auto"}
    if len(wishes) == 2:
        return "auto", ["--split always and --split never contradict each other: neither is followed"]
    return (wishes.pop() if wishes else "auto"), []


def _size_wishes(members: Sequence[NodeFacts], model: ModelCost) -> tuple[int, int, list[str]]:
    """Context and slots: the largest wish of a worker, or the default. A context no longer than the model knows."""
    wished = max((m.ctx_size for m in _workers(members)), default=0)
    parallel = max((m.parallel for m in _workers(members)), default=0) or DEFAULT_PARALLEL
    limit = model.n_ctx_train or DEFAULT_CTX
    if wished > limit and model.n_ctx_train:
        return limit, parallel, [f"a context of {wished} tokens was asked for; {model.name} knows {limit}"]
    return wished or min(DEFAULT_CTX, limit), parallel, []
