"""The layout of a mesh: who carries which layers. A pure function of what members know of each other.

Of all machines alone and all rings that hold the model, the one with the lowest predicted ms per token
(:mod:`mesh.plan.pace`); one machine alone unless a ring is faster by more than :data:`SIMPLER`. Up to
:data:`~mesh.plan.ring.EXACT` machines all hosts and subsets are weighed, best bound first (all orders too up to
:data:`~mesh.plan.ring.ALL_ORDERS`, the shortest and its reverse above); beyond that rings are grown
(:mod:`mesh.plan.grow`). Machines on battery come in only where the others cannot do it. ``--split always`` takes as
many machines as can carry a layer, ``never`` takes one. Where wishes differ, the largest context and the most slots
win, and ``always`` against ``never`` is ``auto``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from mesh.plan.costs import Costs, sound
from mesh.plan.divide import divide
from mesh.plan.eligible import Seat, candidates, seats_of, too_small
from mesh.plan.grow import Grower
from mesh.plan.pace import Parts, Rates, Rtts, compute_ms, ring_parts, with_rates
from mesh.plan.reasons import left_out, shortage, why
from mesh.plan.ring import EXACT, MAX_RING, ring_ms, worthwhile_orders
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
SIMPLER = 0.98
"""A ring must take at most this share of the time of one machine alone: what it risks is not in its milliseconds."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A layout, or None; why; and for each member without a share, why not."""

    layout: Layout | None
    reason: str
    excluded: dict[NodeId, str]
    parts: Parts | None = None
    """What the layout's predicted time is made of."""


@dataclass(frozen=True, slots=True)
class Ring:
    """A way to serve: seats in data-flow order, the host first, and the layers (first, end) of each."""

    seats: tuple[Seat, ...]
    ranges: tuple[tuple[int, int], ...]
    parts: Parts

    @property
    def ms(self) -> float:
        return self.parts.total

    def rank(self) -> tuple[float, int, tuple[NodeId, ...]]:
        return (round(self.ms, 6), len(self.seats), tuple(s.id for s in self.seats))


def plan(
    members: Sequence[NodeFacts], model: ModelCost, *, rtt_ms: Rtts, current: Layout | None, rates: Rates | None = None
) -> Planned:
    """Find the layout that serves ``model``.

    Args:
        members: all that are alive, in any order; lite clients too.
        rtt_ms: round trips between pairs; either direction will do, and a missing one counts as a slow one.
        current: the running layout, kept unless it no longer fits or another is a tenth faster.
        rates: bytes per second between pairs, as far as known.
    """
    if not sound(model):
        return Planned(None, f"the facts about {model.name} contradict each other", {})
    able, excluded = candidates(members, model, current)
    split, conflict = split_wish(members)
    ctx_size, parallel, capped = size_wishes(members, model)
    costs = Costs(model, ctx_size, parallel)
    small = {node.id: lack for node in able if (lack := too_small(node, costs)) is not None}
    search = Search(able, costs, rtt_ms, rates or {})
    found = search.best(split)
    if found is None:
        reason = shortage(able, costs, split) if able else f"no machine can serve {model.name}"
        return Planned(None, reason[:MAX_TEXT], excluded | small)
    kept = search.again(current, ctx_size, parallel)
    stays = kept is not None and _still_good(kept, found, split)
    ring = kept if kept is not None and stays else found
    layout = layout_of(ring, costs, ctx_size, parallel)
    used = {s.id for s in ring.seats}
    for node in able:
        if node.id not in used:
            excluded[node.id] = small.get(node.id) or search.why_not(node, ring, split)
    notes = [why(ring.seats, costs, split, alone_ms=search.alone_ms())]
    if stays and current is not None and ring.rank() != found.rank():
        notes.append(f"kept: the best other layout would gain less than {1 - GAIN:.0%}")
    return Planned(layout, "; ".join([*notes, *conflict, *capped])[:MAX_TEXT], excluded, ring.parts)


@dataclass(slots=True)
class Search:
    """Over ``able``, at the sizes of ``costs``."""

    able: Sequence[NodeFacts]
    costs: Costs
    rtt_ms: Rtts
    rates: Rates
    exact: int = EXACT
    """Machines up to which all subsets are weighed."""
    legs: Rtts = field(init=False)
    """Round trips with the time of an activation both ways."""
    _all: list[list[Seat]] = field(init=False)

    def __post_init__(self) -> None:
        self.legs = with_rates(self.rtt_ms, self.rates, self.costs.model.n_embd)
        self._all = [seats for node in self.able if (seats := seats_of(node, self.costs.model))]

    def best(self, split: str) -> Ring | None:
        """The layout to have, or None where nothing holds the model."""
        plugged = [seats for seats in self._all if not seats[0].node.battery]
        return (self._best(plugged, split) if len(plugged) < len(self._all) else None) or self._best(self._all, split)

    def _best(self, options: list[list[Seat]], split: str) -> Ring | None:
        solo = self._alone(options)
        if split == "never":
            return solo
        fastest = [seats[0] for seats in options]
        largest = [max(seats, key=lambda s: s.usable) for seats in options]
        # One device for each machine: the fastest of all, or the largest of all.
        tables = [fastest] if fastest == largest else [fastest, largest]
        if split == "auto":
            rings = [ring for table in tables if (ring := self.fastest(self.orders(table, 2, MAX_RING), spread=False))]
            ring = min(rings, key=Ring.rank, default=None)
            return ring if ring is not None and (solo is None or ring.ms < SIMPLER * solo.ms) else solo
        for size in range(min(MAX_RING, max(map(len, tables), default=0)), 1, -1):
            rings = [ring for table in tables if (ring := self.fastest(self.orders(table, size, size), spread=True))]
            if rings:
                return min(rings, key=Ring.rank)
        return solo

    def _alone(self, options: list[list[Seat]]) -> Ring | None:
        alone = [ring for seats in options for seat in seats if (ring := self.solo(seat)) is not None]
        return min(alone, key=Ring.rank, default=None)

    def hosted(self) -> Iterator[Ring]:
        """For each machine the best ring that it would host, and what it would do alone."""
        for options in self._all:
            yield from (ring for seat in options if (ring := self.solo(seat)) is not None)
        fastest = [seats[0] for seats in self._all]
        rings: dict[NodeId, list[tuple[Seat, ...]]] = {}
        for order in self.orders(fastest, 2, MAX_RING):
            rings.setdefault(order[0].id, []).append(order)
        for orders in rings.values():
            if (ring := self.fastest(iter(orders), spread=False)) is not None:
                yield ring

    def alone_ms(self) -> float | None:
        """The best that one machine alone would do."""
        solo = self._alone(self._all)
        return None if solo is None else solo.ms

    def solo(self, seat: Seat) -> Ring | None:
        """Everything on one device, if it fits."""
        n = self.costs.n_layers
        needed = self.costs.fixed(host=True, device=seat.device.kind) + self.costs.layers(0, n)
        return None if needed > seat.usable else self._ring((seat,), [(0, n)])

    def orders(self, table: Sequence[Seat], fewest: int, most: int) -> Iterator[tuple[Seat, ...]]:
        """Rings worth a look, host first."""
        if len(table) > self.exact:
            yield from Grower(table, self.costs, self.legs).orders(fewest, most)
            return
        least = min(self.costs.each)
        by_id = {s.id: s for s in table}
        workers = [s.id for s in table if s.usable >= self.costs.fixed(host=False) + least]
        for host in table:
            if host.usable < self.costs.fixed(host=True, device=host.device.kind):
                continue
            others = [n for n in workers if n != host.id]
            for order in worthwhile_orders(host.id, others, self.legs):
                if fewest <= len(order) + 1 <= most:
                    yield (host, *(by_id[n] for n in order))

    def fastest(self, orders: Iterator[tuple[Seat, ...]], *, spread: bool) -> Ring | None:
        """The best ring of all; those whose bound is already worse are never divided."""
        bounded = []
        for order in orders:
            bound = self.bound(order)
            if bound is not None:
                bounded.append((bound, len(order), tuple(s.id for s in order), order))
        best: Ring | None = None
        divided = 0
        for bound, _, _, order in sorted(bounded, key=lambda b: b[:3]):
            if best is not None and (bound > best.ms + 1e-6 or (spread and divided >= ENOUGH)):
                break
            ring = self.ring(order, spread=spread)
            if ring is None:
                continue
            divided += 1
            if best is None or ring.rank() < best.rank():
                best = ring
        return best

    def bound(self, order: Sequence[Seat]) -> float | None:
        """No division of the layers is faster than this; None if none fits. Layers count as divisible here."""
        costs = self.costs
        rooms = [
            (seat.pace.bytes_per_second, seat.usable - costs.fixed(host=i == 0, device=seat.device.kind))
            for i, seat in enumerate(order)
        ]
        if sum(room for _, room in rooms) < costs.needs[-1] or min(room for _, room in rooms) < 0:
            return None
        ms = ring_ms([s.id for s in order], self.legs) + compute_ms(costs, 0, 0, order[0].pace, host=True)
        ms += costs.n_layers * min(s.pace.layer_ms for s in order)
        left = float(costs.reads[-1])
        for speed, room in sorted(rooms, reverse=True):
            part = min(left, room * costs.density)
            ms += part / speed * 1000
            left -= part
        return ms

    def ring(self, order: tuple[Seat, ...], *, spread: bool) -> Ring | None:
        """``order`` with its layers dealt, or None when they do not fit."""
        ranges = divide(order, self.costs, spread=spread)
        return None if ranges is None else self._ring(order, ranges)

    def _ring(self, order: tuple[Seat, ...], ranges: Sequence[tuple[int, int]]) -> Ring:
        compute = sum(
            compute_ms(self.costs, first, end, seat.pace if len(order) > 1 else seat.alone, host=i == 0)
            for i, (seat, (first, end)) in enumerate(zip(order, ranges, strict=True))
        )
        ids = [s.id for s in order]
        parts = ring_parts(ids, compute, self.rtt_ms, self.rates, self.costs.model.n_embd)
        return Ring(order, tuple(ranges), parts)

    def why_not(self, node: NodeFacts, ring: Ring, split: str) -> str:
        """Why a machine that could carry something does not."""
        with_it = None if split == "never" or len(ring.seats) >= MAX_RING else self._with(node, ring)
        return left_out(ring.seats, self.costs.model, self.legs, node, ring.ms, with_it)

    def _with(self, node: NodeFacts, ring: Ring) -> float | None:
        """What a token would take, about, with ``node`` where it lengthens the ring least."""
        alone, now = self.bound(ring.seats), ring.ms
        orders = [
            (*ring.seats[:at], seat, *ring.seats[at:])
            for seat in seats_of(node, self.costs.model)
            for at in range(1, len(ring.seats) + 1)
        ]
        bounds = [bound for order in orders if (bound := self.bound(order)) is not None]
        return now + min(bounds) - alone if bounds and alone is not None else None

    def again(self, current: Layout | None, ctx_size: int, parallel: int) -> Ring | None:
        """The running layout by today's facts, or None if it can no longer run as it is."""
        if current is None or (current.ctx_size, current.parallel) != (ctx_size, parallel):
            return None
        if current.model.fingerprint != self.costs.model.fingerprint:
            return None
        by_place = {(s.id, s.device.name): s for seats in self._all for s in seats}
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
        return self._ring(tuple(seats), ranges)


def _still_good(kept: Ring, found: Ring, split: str) -> bool:
    if split == "never" and len(kept.seats) > 1:
        return False
    if split == "always" and len(kept.seats) < len(found.seats):
        return False
    return found.ms > kept.ms * GAIN or found.rank() == kept.rank()


def layout_of(ring: Ring, costs: Costs, ctx_size: int, parallel: int) -> Layout:
    """What the members are told: bytes of each, and what of conversations is kept."""
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


def split_wish(members: Sequence[NodeFacts]) -> tuple[str, list[str]]:
    """``--split`` as all together want it, and what to say of it."""
    wishes = {m.split for m in _workers(members)} - {"auto"}
    if len(wishes) == 2:
        return "auto", ["--split always and --split never contradict each other: neither is followed"]
    return (wishes.pop() if wishes else "auto"), []


def size_wishes(members: Sequence[NodeFacts], model: ModelCost) -> tuple[int, int, list[str]]:
    """Context and slots: the largest wish of a worker, or the default. A context no longer than the model knows."""
    wished = max((m.ctx_size for m in _workers(members)), default=0)
    parallel = max((m.parallel for m in _workers(members)), default=0) or DEFAULT_PARALLEL
    limit = model.n_ctx_train or DEFAULT_CTX
    if wished > limit and model.n_ctx_train:
        return limit, parallel, [f"a context of {wished} tokens was asked for; {model.name} knows {limit}"]
    return wished or min(DEFAULT_CTX, limit), parallel, []
