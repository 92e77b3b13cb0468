"""From what the election knows to what the planner takes, and back. Pure."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, to_builtins
from msgspec.structs import replace

from mesh.election.events import NeedPlan, Planned
from mesh.plan.choice import choose_model
from mesh.plan.costs import headroom
from mesh.plan.explain import Explanation, explain
from mesh.plan.pace import Pair
from mesh.plan.search import plan
from mesh.wire.facts import Bytes64, Device, Layout, LinkFact, ModelCost, Name, NodeFacts, NodeId


class Imagined(Struct, frozen=True, forbid_unknown_fields=True):
    """A machine that one does not have yet, or another size of one that one has (by its name)."""

    name: Name
    memory_bytes: Bytes64
    bytes_per_second: Annotated[float, Meta(ge=0, le=1e18)] = 0.0
    """0: as fast as this machine, or as the member of that name is."""
    rtt_ms: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    """To every other machine."""


class Trial(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one node that differ from those it runs with. Nought or None: as they are."""

    model: ModelCost | None = None
    ctx_size: Annotated[int, Meta(ge=0, le=2**24)] = 0
    parallel: Annotated[int, Meta(ge=0, le=256)] = 0
    split: Literal["auto", "always", "never"] | None = None
    max_memory: Bytes64 = 0
    what_if: Annotated[tuple[Imagined, ...], Meta(max_length=16)] = ()


def tried(members: Sequence[NodeFacts], me: NodeId, trial: Trial) -> tuple[NodeFacts, ...]:
    """The members as they would be, had this node been started with ``trial``."""
    found = [_tried(facts, trial) if facts.id == me else _asked(facts, trial) for facts in members]
    for imagined in trial.what_if:
        named = [facts for facts in found if facts.name == imagined.name]
        own = next(facts for facts in found if facts.id == me)
        if named:
            found = [_resized(facts, imagined) if facts in named else facts for facts in found]
        else:
            found.append(_newcomer(own, imagined, [facts.id for facts in found]))
    return tuple(found)


def _tried(facts: NodeFacts, trial: Trial) -> NodeFacts:
    facts = replace(
        facts,
        ctx_size=trial.ctx_size or facts.ctx_size,
        parallel=trial.parallel or facts.parallel,
        split=trial.split or facts.split,
        budget_bytes=trial.max_memory or facts.budget_bytes,
    )
    model = trial.model
    if model is None:
        return facts
    others = (known for known in facts.models if known.fingerprint != model.fingerprint)
    return replace(facts, models=(model, *others), wants=model.fingerprint)


def _resized(facts: NodeFacts, imagined: Imagined) -> NodeFacts:
    device = max(facts.devices, key=lambda d: d.free_bytes, default=None)
    if device is None:
        return facts
    kept = tuple(other for other in facts.devices if other is not device)
    return replace(facts, devices=(_sized(device, imagined), *kept), budget_bytes=0)


def _newcomer(like: NodeFacts, imagined: Imagined, others: Sequence[NodeId]) -> NodeFacts:
    """A worker with the engine and the models of ``like``, equally far from everybody."""
    digest = hashlib.sha256(b"imagined " + imagined.name.encode()).digest()
    cpu = next((device for device in like.devices if device.kind == "cpu"), None) or Device("CPU", "cpu", "", 0, 0)
    return replace(
        like,
        id=base64.b32encode(digest[:16]).decode().lower().rstrip("="),
        name=imagined.name,
        role="worker",
        devices=(_sized(cpu, imagined),),
        backend="cpu",
        budget_bytes=0,
        wants="",
        draining=False,
        battery=False,
        relay_only=False,
        links=tuple(LinkFact(other, imagined.rtt_ms) for other in others[:64]),
    )


def _sized(device: Device, imagined: Imagined) -> Device:
    # What stays free whatever the plan comes on top: it is the mesh's part that is imagined.
    total = imagined.memory_bytes + imagined.memory_bytes // 19
    sized = replace(
        device, total_bytes=total, free_bytes=imagined.memory_bytes + headroom(replace(device, total_bytes=total))
    )
    if imagined.bytes_per_second:
        sized = replace(sized, bytes_per_second=imagined.bytes_per_second, speeds=())
    return sized


def _asked(facts: NodeFacts, trial: Trial) -> NodeFacts:
    # One mesh serves one model: what the others were started for would win by their number.
    return facts if trial.model is None else replace(facts, wants="")


@dataclass(frozen=True, slots=True)
class Ways:
    """What is known of the ways between members.

    Args:
        trips: round trips, milliseconds.
        rates: bytes per second.
    """

    trips: Mapping[Pair, float]
    rates: Mapping[Pair, float]


def ways(members: Sequence[NodeFacts], me: NodeId, links: Iterable[LinkFact]) -> Ways:
    """Between all pairs that anybody measured; of others at most the way through us, and that is what is taken.

    Args:
        links: what this node itself measured; the members tell theirs with their facts.
    """
    own = {link.peer: link for link in links}
    told = {(facts.id, link.peer): link for facts in members if facts.id != me for link in facts.links}
    told |= {(me, peer): link for peer, link in own.items()}
    trips = {pair: link.rtt_ms for pair, link in told.items()}
    for a, b in combinations(sorted(own), 2):
        if (a, b) not in trips and (b, a) not in trips:
            trips[a, b] = own[a].rtt_ms + own[b].rtt_ms
    return Ways(trips, {pair: link.bytes_per_second for pair, link in told.items() if link.bytes_per_second})


def answer_plan(request: NeedPlan, me: NodeId, links: Iterable[LinkFact]) -> Planned:
    """The layout for ``request``; ``links`` are what this node itself measured."""
    members = [facts for facts in request.members if facts.id not in request.excluded]
    choice = choose_model(members, request.current)
    if choice.model is None:
        return Planned(request.request_id, None, choice.reason, {**choice.unmet, **request.excluded})
    known = ways(members, me, links)
    unreached: dict[NodeId, str] = {}
    while True:
        usable = [facts for facts in members if facts.id not in unreached]
        planned = plan(usable, choice.model, rtt_ms=known.trips, rates=known.rates, current=request.current)
        cut = _cut_off(planned.layout, request.cuts)
        if cut is None:
            # Of two reasons the more particular one is shown.
            excluded = {**choice.unmet, **planned.excluded, **unreached, **request.excluded}
            return Planned(request.request_id, planned.layout, planned.reason, excluded)
        host, worker = cut
        unreached[worker] = f"{host} and this machine cannot reach each other"


def _cut_off(layout: Layout | None, cuts: frozenset[tuple[NodeId, NodeId]]) -> tuple[str, NodeId] | None:
    """A worker that its host does not reach, with the host's name."""
    if layout is None:
        return None
    for worker in layout.workers:
        if (min(layout.host, worker.id), max(layout.host, worker.id)) in cuts:
            return layout.ring[0].name, worker.id
    return None


def describe_plan(request: NeedPlan, me: NodeId, links: Sequence[LinkFact]) -> dict[str, Any]:
    """The layout for ``request`` as ``mesh plan --json`` shows it: what it is made of, and what else there was."""
    planned = answer_plan(request, me, links)
    names = {facts.id: facts.name for facts in request.members}
    answer: dict[str, Any] = {
        "layout": None if planned.layout is None else to_builtins(planned.layout),
        "reason": planned.reason,
        "excluded": planned.excluded,
        "names": {node: names.get(node, node[:8]) for node in planned.excluded},
        "parts": None,
        "shares": [],
        "alternatives": [],
        "more": [],
    }
    if planned.layout is not None:
        members = [facts for facts in request.members if facts.id not in request.excluded]
        known = ways(members, me, links)
        said = explain(planned.layout, members, rtt_ms=known.trips, rates=known.rates, current=request.current)
        answer |= _explained(said)
    return answer


def _explained(said: Explanation) -> dict[str, Any]:
    parts = said.parts
    return {
        "parts": {
            "compute_ms": round(parts.compute, 2),
            "hops_ms": round(parts.hops, 2),
            "bytes_ms": round(parts.bytes, 2),
            "members_ms": round(parts.members, 2),
        },
        "shares": [
            {
                "id": share.member.id,
                "usable_bytes": share.usable_bytes,
                "compute_ms": round(share.compute_ms, 2),
                "bytes_per_second": share.bytes_per_second,
                "measured": share.measured,
            }
            for share in said.shares
        ],
        "alternatives": [
            {"ring": list(other.names), "ms_per_token": round(other.ms, 2), "why": other.why}
            for other in said.alternatives
        ],
        "more": list(said.more),
    }
