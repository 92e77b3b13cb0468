"""A planner and facts simple enough to be right at a glance."""

from __future__ import annotations

from mesh.wire.facts import Device, Layout, ModelCost, NodeFacts, NodeId, RingMember

LAYERS = 12
MODEL = ModelCost(
    fingerprint="0" * 64,
    name="sim",
    architecture="llama",
    size_bytes=LAYERS,
    n_layers=LAYERS,
    n_embd=1,
    n_vocab=1,
    n_ctx_train=1,
    layer_bytes=(1,) * LAYERS,
    input_bytes=0,
    output_bytes=0,
    kv_bytes_per_token=(0,) * LAYERS,
)


def node_id(index: int) -> NodeId:
    return chr(ord("a") + index) * 26


def facts_of(
    index: int, *, role: str = "worker", layers: int = 6, version: int = 1, draining: bool = False, id: NodeId = ""
) -> NodeFacts:
    """A node that can carry ``layers`` layers."""
    return NodeFacts(
        id=id or node_id(index),
        version=version,
        name=f"n{index}",
        role=role,  # type: ignore[arg-type]
        mesh_version="0",
        engine="e" if role == "worker" else "",
        backend="cpu",
        devices=(Device("CPU", "cpu", "", layers, layers),) if role == "worker" else (),
        budget_bytes=0,
        threads=1,
        models=(MODEL,) if role == "worker" else (),
        wants="",
        addresses=(),
        draining=draining,
    )


def plan(
    members: tuple[NodeFacts, ...],
    current: Layout | None,
    excluded: dict[NodeId, str],
    cuts: frozenset[tuple[NodeId, NodeId]],
) -> tuple[Layout | None, str]:
    """The fewest, largest nodes that hold the model; what runs stays unless fewer would do."""
    able = {f.id: f for f in members if f.role == "worker" and not f.draining and f.id not in excluded}
    room = {node: f.devices[0].total_bytes for node, f in able.items()}

    def cut(a: NodeId, b: NodeId) -> bool:
        return (min(a, b), max(a, b)) in cuts

    best: list[NodeId] | None = None
    for host in sorted(able, key=lambda n: (-room[n], n)):
        ring, free = [host], room[host]
        for other in sorted((n for n in able if n != host and not cut(host, n)), key=lambda n: (-room[n], n)):
            if free >= LAYERS:
                break
            ring.append(other)
            free += room[other]
        if free >= LAYERS and (best is None or len(ring) < len(best)):
            best = ring
    if best is None:
        return None, f"{LAYERS - sum(room.values())} layers do not fit"
    if current is not None and len(current.ring) <= len(best):
        ids = [m.id for m in current.ring]
        if all(n in able and not cut(current.host, n) for n in ids):
            return current, "as it is"
    members_of, first = [], 0
    for node in best:
        share = min(room[node], LAYERS - first)
        members_of.append(RingMember(node, able[node].name, (first, first + share - 1), share, "CPU"))
        first += share
    mode = "solo" if len(best) == 1 else "split"
    return Layout(mode, best[0], MODEL, tuple(members_of), 1, 1), "fewest machines"  # type: ignore[arg-type]
