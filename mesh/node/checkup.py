"""What ``mesh doctor`` asks of a running node: where it is, what its members are, and a test of every link."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from mesh.errors import MeshError
from mesh.node.node import Node
from mesh.wire.facts import NodeFacts, NodeId

AT_ONCE = 4
"""Links tested at a time: they share our own uplink, and would measure each other."""


async def checkup(node: Node) -> dict[str, Any]:
    """The node as it is now; takes as long as the slowest link."""
    turns = asyncio.Semaphore(AT_ONCE)
    linked = list(node.links.peers())
    names = {facts.id: facts.name for facts in node.members}
    return {
        "settings": _settings(node),
        "bound": list(node.whereabouts.bound),
        "addresses": list(node.whereabouts.addresses),
        "nat": node.whereabouts.seen.kind,
        "stun": node.whereabouts.stun_state,
        "placed": node.placed,
        "members": [_member(facts) for facts in node.members],
        "links": await asyncio.gather(*(_test(node, peer, names.get(peer, peer[:8]), turns) for peer in linked)),
    }


def _settings(node: Node) -> dict[str, Any]:
    settings = node.settings
    return {
        "id": node.key.id,
        "name": settings.name,
        "role": settings.role,
        "relay_only": settings.relay_only,
        "api_host": settings.api_host,
        "api_key_file": None if settings.api_key_file is None else str(settings.api_key_file),
        "backend": settings.backend,
        "gpu_layers": settings.gpu_layers,
        "max_memory": settings.max_memory,
        "model": settings.model,
        "stun": list(settings.stun),
    }


def _member(facts: NodeFacts) -> dict[str, Any]:
    return {
        "id": facts.id,
        "name": facts.name,
        "role": facts.role,
        "relay_only": facts.relay_only,
        "mesh_version": facts.mesh_version,
        "engine": facts.engine,
        "backend": facts.backend,
        "devices": [msgspec.to_builtins(device) for device in facts.devices],
        "computes_on": facts.computes_on,
        "models": {model.fingerprint: model.name for model in facts.models},
    }


async def _test(node: Node, peer: NodeId, name: str, turns: asyncio.Semaphore) -> dict[str, Any]:
    told: dict[str, Any] = {"id": peer, "name": name}
    try:
        async with turns:
            found = await node.links.examine(peer)
    except MeshError as error:
        return {**told, "error": error.message}
    return {
        **told,
        "error": None,
        "path": found.path,
        "rtt_ms": round(found.rtt_ms, 2),
        "burst_ms": round(found.burst_ms, 2),
        "burst_bytes": found.burst_bytes,
        "clock_ahead_s": None if found.clock_ahead_s is None else round(found.clock_ahead_s, 3),
        "clock_within_s": round(found.clock_within_s, 3),
    }
