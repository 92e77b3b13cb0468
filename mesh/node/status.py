"""The contract's status, from what each room knows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.election.events import Status as Election
from mesh.membership.view import Member, View
from mesh.proxy.metrics import NodeGauges, Peer
from mesh.wire.facts import Device, Layout, NodeFacts, NodeId, RingMember


class Link(Protocol):
    """What is shown of a connection."""

    @property
    def path(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def rtt_ms(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests that came in on this node, by what became of them."""

    active: int
    held: int
    completed: int
    resumed: int
    failed: int


def build_status(
    me: NodeFacts, mesh: str, view: View, election: Election, links: Mapping[NodeId, Link], counts: Counts
) -> dict[str, Any]:
    """The object of ``GET /mesh/status``; see the README for its fields."""
    return {
        "node": {
            "id": me.id,
            "name": me.name,
            "role": role_in(me, election.layout),
            "version": me.mesh_version,
            "engine": {"build": me.engine, "backend": me.backend},
        },
        "mesh": {
            "id": mesh,
            "epoch": election.epoch.number,
            "state": election.state,
            "reason": election.reason,
        },
        "layout": None if election.layout is None else _layout(election.layout, {m.id: m.facts for m in view.members}),
        "peers": [
            *(_peer(member, election, links.get(member.id)) for member in view.members if member.id != me.id),
            *(_gone(gone.facts, gone.reason) for gone in view.departed),
        ],
        "requests": {
            "active": counts.active,
            "held": counts.held,
            "completed": counts.completed,
            "resumed": counts.resumed,
            "failed": counts.failed,
        },
    }


def gauges_in(status: Mapping[str, Any], starts: int) -> NodeGauges:
    """The numbers of :func:`build_status` that are worth a curve.

    Args:
        starts: layouts that this node has begun to carry out.
    """
    node, mesh, peers = status["node"], status["mesh"], status["peers"]
    present = [peer for peer in peers if peer["state"] != "left"]
    build = {"version": node["version"], "engine": node["engine"]["build"], "backend": node["engine"]["backend"]}
    return NodeGauges(
        epoch=mesh["epoch"],
        serving=mesh["state"] == "serving",
        members=1 + sum(peer["state"] == "alive" for peer in present),
        restarts=starts,
        peers=[Peer(peer["id"], peer["name"], peer["rtt_ms"]) for peer in present],
        build={name: str(value) for name, value in build.items()},
    )


def role_in(facts: NodeFacts, layout: Layout | None) -> str:
    """``client``, ``host``, ``worker``, or ``standby`` for a worker that carries nothing now."""
    if facts.role == "client":
        return "client"
    if layout is not None and layout.host == facts.id:
        return "host"
    if layout is not None and any(member.id == facts.id for member in layout.ring):
        return "worker"
    return "standby"


def device_in(member: RingMember, facts: NodeFacts | None) -> str:
    """What carries this share: what the layout says, unless that member's engine says otherwise."""
    really = "" if facts is None else facts.computes_on
    return f"{really}, not {member.device}" if really and really != member.device else member.device


def memory_bytes(facts: NodeFacts) -> int:
    """What a node offers: free memory of its devices, within the bound its owner set."""
    free = sum(device.free_bytes for device in facts.devices)
    return min(free, facts.budget_bytes) if facts.budget_bytes else free


def describe_device(device: Device) -> dict[str, Any]:
    """A device, for people and scripts.

    ``speeds`` are bytes per second by type of weights; empty as long as nobody has measured them.
    """
    return {
        "name": device.name,
        "kind": device.kind,
        "description": device.description,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "speeds": {speed.weights: speed.bytes_per_second for speed in device.speeds},
        "layer_us": device.layer_us,
    }


def _layout(layout: Layout, members: Mapping[NodeId, NodeFacts]) -> dict[str, Any]:
    return {
        "mode": layout.mode,
        "host": layout.host,
        "model": {
            "name": layout.model.name,
            "fingerprint": layout.model.fingerprint,
            "size_bytes": layout.model.size_bytes,
            "n_layers": layout.model.n_layers,
        },
        "ring": [
            {
                "id": member.id,
                "name": member.name,
                "layers": None if member.layers is None else list(member.layers),
                "bytes": member.bytes,
                "device": device_in(member, members.get(member.id)),
            }
            for member in layout.ring
        ],
        "predicted_ms_per_token": round(layout.predicted_ms_per_token, 1),
        "prompt_cache_bytes": layout.prompt_cache_bytes,
    }


def _peer(member: Member, election: Election, link: Link | None) -> dict[str, Any]:
    facts = member.facts
    return {
        "id": facts.id,
        "name": facts.name,
        "role": role_in(facts, election.layout),
        "state": member.state,
        "path": None if link is None else link.path,
        "address": None if link is None else link.address,
        "rtt_ms": None if link is None or link.rtt_ms is None else round(link.rtt_ms, 2),
        "memory_bytes": memory_bytes(facts),
        "excluded": election.excluded.get(facts.id),
    }


def _gone(facts: NodeFacts, reason: str) -> dict[str, Any]:
    return {
        "id": facts.id,
        "name": facts.name,
        "role": "client" if facts.role == "client" else "standby",
        "state": "left",
        "path": None,
        "address": None,
        "rtt_ms": None,
        "memory_bytes": memory_bytes(facts),
        "excluded": reason,
    }
