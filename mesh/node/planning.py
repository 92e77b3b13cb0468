"""From what the election knows to what the planner takes, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from mesh.election.events import NeedPlan, Planned
from mesh.plan.choice import choose_model
from mesh.plan.pace import Pair
from mesh.plan.search import plan
from mesh.wire.facts import Bytes64, Layout, LinkFact, ModelCost, NodeFacts, NodeId


class Trial(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one node that differ from those it runs with. Nought or None: as they are."""

    model: ModelCost | None = None
    ctx_size: Annotated[int, Meta(ge=0, le=2**24)] = 0
    parallel: Annotated[int, Meta(ge=0, le=256)] = 0
    split: Literal["auto", "always", "never"] | None = None
    max_memory: Bytes64 = 0


def tried(members: Sequence[NodeFacts], me: NodeId, trial: Trial) -> tuple[NodeFacts, ...]:
    """The members as they would be, had this node been started with ``trial``."""
    return tuple(_tried(facts, trial) if facts.id == me else _asked(facts, trial) for facts in members)


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
