"""From what the election knows to what the planner takes, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from mesh.election.events import NeedPlan, Planned
from mesh.plan.choice import choose_model
from mesh.plan.search import plan
from mesh.wire.facts import Layout, NodeId


def answer_plan(request: NeedPlan, me: NodeId, rtt_ms: Mapping[NodeId, float]) -> Planned:
    """The layout for ``request``.

    Args:
        rtt_ms: round trips this node measured, milliseconds. Between two others nobody told us: at most the way
            through us, and that is what is taken.
    """
    members = [facts for facts in request.members if facts.id not in request.excluded]
    choice = choose_model(members, request.current)
    if choice.model is None:
        return Planned(request.request_id, None, choice.reason, {**choice.unmet, **request.excluded})
    trips = {(me, peer): trip for peer, trip in rtt_ms.items()}
    trips |= {(a, b): rtt_ms[a] + rtt_ms[b] for a, b in combinations(sorted(rtt_ms), 2)}
    unreached: dict[NodeId, str] = {}
    while True:
        usable = [facts for facts in members if facts.id not in unreached]
        planned = plan(usable, choice.model, rtt_ms=trips, current=request.current)
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
