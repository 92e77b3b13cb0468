"""What a plan is made of, what nearly was the plan, and what would change it. Pure: only ``mesh plan`` asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from mesh.plan.costs import Costs, usable_bytes
from mesh.plan.eligible import candidates
from mesh.plan.pace import Parts, Rates, Rtts, compute_ms, pace, ring_parts
from mesh.plan.ring import MAX_RING
from mesh.plan.search import Ring, Search, plan, split_wish
from mesh.wire.facts import Device, Layout, ModelCost, NodeFacts, NodeId, RingMember

RUNNERS_UP = 3
MORE_BYTES = 10**9
LARGE = 16
"""Members from which on nobody wants to read what each of them would change."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one member carries, of what it could, and how long that takes it for a token."""

    member: RingMember
    usable_bytes: int
    bytes_per_second: float
    measured: bool
    compute_ms: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A layout that was not taken: names in ring order, its time, and why it lost."""

    names: tuple[str, ...]
    ms: float
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one layout. ``more`` are sentences."""

    parts: Parts
    shares: tuple[Share, ...]
    alternatives: tuple[Alternative, ...]
    more: tuple[str, ...]


def explain(
    layout: Layout, members: Sequence[NodeFacts], *, rtt_ms: Rtts, rates: Rates, current: Layout | None
) -> Explanation:
    """Why ``layout``, which was planned over ``members``, and not another."""
    model = layout.model
    costs = Costs(model, layout.ctx_size, layout.parallel)
    by_id = {node.id: node for node in members}
    shares = tuple(
        _share(member, by_id[member.id], costs, layout.host, solo=len(layout.ring) == 1) for member in layout.ring
    )
    ids = [member.id for member in layout.ring]
    parts = ring_parts(ids, sum(share.compute_ms for share in shares), rtt_ms, rates, model.n_embd)
    able, _ = candidates(members, model, current)
    search = Search(able, costs, rtt_ms, rates)
    more = _more(layout, members, model, rtt_ms, rates) if len(able) <= LARGE else ()
    return Explanation(parts, shares, tuple(_runners_up(search, layout, parts.total, members)), more)


def _share(member: RingMember, node: NodeFacts, costs: Costs, host: NodeId, *, solo: bool) -> Share:
    device = next(device for device in node.devices if device.name == member.device)
    of = pace(device, costs.model, solo=solo)
    first, end = (0, 0) if member.layers is None else (member.layers[0], member.layers[1] + 1)
    ms = compute_ms(costs, first, end, of, host=member.id == host)
    return Share(member, usable_bytes(node, device), of.bytes_per_second, bool(device.bytes_per_second), ms)


def _runners_up(search: Search, layout: Layout, ms: float, members: Sequence[NodeFacts]) -> list[Alternative]:
    """For each machine the best that it would host, and the best alone; those that came nearest."""
    taken = tuple((member.id, member.layers) for member in layout.ring)
    split, _ = split_wish(members)
    rings: dict[tuple[object, ...], Ring] = {}
    for ring in search.hosted():
        ids = tuple(seat.id for seat in ring.seats)
        ranges = tuple(None if a == b else (a, b - 1) for a, b in ring.ranges)
        if tuple(zip(ids, ranges, strict=True)) != taken:
            rings[ids] = ring
    found = []
    for ring in sorted(rings.values(), key=Ring.rank)[:RUNNERS_UP]:
        found.append(Alternative(tuple(s.node.name for s in ring.seats), ring.ms, _lost(ring, ms, len(taken), split)))
    return found


def _lost(ring: Ring, ms: float, members: int, split: str) -> str:
    if split == "never" and len(ring.seats) > 1:
        return "--split never asks for one machine"
    if split == "always" and len(ring.seats) < members:
        return "--split always asks for all machines"
    if any(seat.node.battery for seat in ring.seats):
        return "a machine in it runs on battery"
    if ring.ms <= ms:
        return "hardly faster than what runs" if members > 1 else "hardly faster, and one machine alone risks less"
    parts = ring.parts
    network = parts.hops + parts.bytes + parts.members
    return f"{ring.ms - ms:.1f} ms slower ({parts.compute:.1f} compute, {network:.1f} network)"


def _more(
    layout: Layout, members: Sequence[NodeFacts], model: ModelCost, rtt_ms: Rtts, rates: Rates
) -> tuple[str, ...]:
    """What a gigabyte more on one machine, or another machine like the best of them, would do."""
    now = layout.predicted_ms_per_token

    def ms_of(others: Sequence[NodeFacts], trips: Rtts = rtt_ms) -> float | None:
        planned = plan(others, model, rtt_ms=trips, current=None, rates=rates).layout
        return None if planned is None else planned.predicted_ms_per_token

    gained = []
    for node in members:
        richer = [_richer(other) if other.id == node.id else other for other in members]
        if (ms := ms_of(richer)) is not None:
            gained.append((ms, node.name))
    said = []
    if gained:
        ms, name = min(gained)
        change = f"{ms:.1f} ms/token instead of {now:.1f}" if ms < 0.98 * now else "nothing"
        said.append(f"1 GB more on {name}: {change}" if ms < 0.98 * now else "1 GB more on any machine: nothing")
    best = max(members, key=lambda n: (sum(d.free_bytes for d in n.devices), n.id))
    twin = replace(best, id=_other_id(members), name="another", links=())
    near = min((ms for pair, ms in rtt_ms.items() if best.id in pair), default=1.0)
    trips = {**rtt_ms, **{(twin.id, node.id): near for node in members}}
    if len(members) < MAX_RING and (ms := ms_of([*members, twin], trips)) is not None:
        change = f"{ms:.1f} ms/token instead of {now:.1f}" if ms < 0.98 * now else "nothing"
        said.append(f"one more machine like {best.name}, {near:.1f} ms away: {change}")
    return tuple(said)


def _richer(node: NodeFacts) -> NodeFacts:
    devices = tuple(_grown(device) for device in node.devices)
    return replace(node, devices=devices, budget_bytes=node.budget_bytes + MORE_BYTES if node.budget_bytes else 0)


def _grown(device: Device) -> Device:
    return replace(device, total_bytes=device.total_bytes + MORE_BYTES, free_bytes=device.free_bytes + MORE_BYTES)


def _other_id(members: Sequence[NodeFacts]) -> NodeId:
    taken = {node.id for node in members}
    return next(c * 26 for c in "zyxwvutsrqponmlkjihgfedcba" if c * 26 not in taken)
