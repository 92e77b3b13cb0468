"""From what the election knows to what the planner takes, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from mesh.election.events import NeedPlan, Planned
from mesh.plan.choice import choose_model
from mesh.plan.search import plan
from mesh.wire.facts import Bytes64, Layout, ModelCost, NodeFacts, NodeId


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
