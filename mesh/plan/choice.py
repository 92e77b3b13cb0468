"""Which model a mesh serves, when its members may want different ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.plan.costs import sound
from mesh.wire.facts import Layout, ModelCost, NodeFacts, NodeId


@dataclass(frozen=True, slots=True)
class Choice:
    """The model, or None; ``unmet`` says to each node whose wish is not followed why not."""

    model: ModelCost | None
    reason: str
    unmet: dict[NodeId, str] = field(default_factory=dict)


def choose_model(members: Sequence[NodeFacts], current: Layout | None) -> Choice:
    """The running model while anyone wants it, or nobody wants another; else the most wanted that somebody has.

    Only workers that stay have a say. Of equally wanted models that of the lowest node id wins.
    """
    workers = sorted((m for m in members if m.role == "worker" and not m.draining), key=lambda m: m.id)
    held = {m.fingerprint: m for w in reversed(workers) for m in w.models if sound(m)}
    wishes = Counter(w.wants for w in workers if w.wants)
    running = current.model.fingerprint if current is not None else None
    if running in held and (running in wishes or not any(wish in held for wish in wishes)):
        chosen, reason = held[running], "is being served"
    else:
        # Counter keeps insertion order among equals: the lowest id comes first.
        wanted = [fingerprint for fingerprint, _ in wishes.most_common() if fingerprint in held]
        if not wanted:
            return Choice(None, _nothing(wishes), {w.id: "wants a model that nobody has" for w in workers if w.wants})
        chosen = held[wanted[0]]
        count = wishes[wanted[0]]
        reason = f"is wanted by {count} machine{'s' if count > 1 else ''}"
    unmet = {
        w.id: f"wants {_name(w, held)}; this mesh serves {chosen.name}"
        for w in workers
        if w.wants and w.wants != chosen.fingerprint
    }
    return Choice(chosen, f"{chosen.name} {reason}", unmet)


def _nothing(wishes: Counter[str]) -> str:
    if wishes:
        return "the model that is wanted is on no machine of this mesh; start one with  mesh up --model FILE"
    return "no machine names a model; start one with  mesh up --model FILE  or  mesh up --demo"


def _name(node: NodeFacts, held: dict[str, ModelCost]) -> str:
    model = held.get(node.wants)
    return model.name if model is not None else "a model that nobody has"
