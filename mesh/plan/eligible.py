"""Who may carry layers of a model, on which device, and why the others may not. Every refusal names what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.config import format_size
from mesh.plan.costs import Costs, usable_bytes
from mesh.plan.pace import Pace, pace
from mesh.wire.facts import Device, Layout, ModelCost, NodeFacts, NodeId


@dataclass(frozen=True, slots=True)
class Seat:
    """A node with the one device it would use. ``usable`` in bytes."""

    node: NodeFacts
    device: Device
    usable: int
    pace: Pace
    alone: Pace
    """Where it serves alone."""

    @property
    def id(self) -> NodeId:
        return self.node.id

    @property
    def most_layers(self) -> int | None:
        """What its owner lets it take as a worker, which has one device; a host has its processor for the others."""
        return None if self.device.kind == "cpu" else self.node.gpu_layers


def candidates(
    members: Sequence[NodeFacts], model: ModelCost, current: Layout | None
) -> tuple[list[NodeFacts], dict[NodeId, str]]:
    """Nodes that could serve the model, lowest id first, and the reasons of those that cannot."""
    excluded: dict[NodeId, str] = {}
    able: list[NodeFacts] = []
    for node in sorted(members, key=lambda m: m.id):
        if node.role == "client":
            excluded[node.id] = "is a lite client: it uses the mesh and carries nothing"
        elif node.relay_only:
            excluded[node.id] = "only relays (--relay-only): it carries other members' traffic, and no layers"
        elif node.draining:
            excluded[node.id] = "is about to leave"
        elif not node.engine:
            excluded[node.id] = f'has no engine yet; on "{node.name}":  mesh engine build'
        elif all(m.fingerprint != model.fingerprint for m in node.models):
            excluded[node.id] = f"has no copy of {model.name} on its disk; copy the file there, then:  mesh up --model"
        else:
            able.append(node)
    pin = _mesh_pin(able, current)
    for node in able:
        if node.engine != pin:
            excluded[node.id] = (
                f"runs engine {node.engine[:8]}, this mesh runs {pin[:8]}: they cannot share a ring; "
                f'on "{node.name}":  git pull && bin/mesh engine build'
            )
    return [node for node in able if node.engine == pin], excluded


def _mesh_pin(able: Sequence[NodeFacts], current: Layout | None) -> str:
    """The engine this mesh runs: the running host's, or else what most have; of equals, that of the lowest id."""
    if current is not None:
        for node in able:
            if node.id == current.host:
                return node.engine
    counts = Counter(node.engine for node in able)
    return counts.most_common(1)[0][0] if counts else ""


def seats_of(node: NodeFacts, model: ModelCost) -> list[Seat]:
    """The devices that the node's engine can use, fastest first."""
    seats = [
        Seat(node, device, usable_bytes(node, device), pace(device, model), pace(device, model, solo=True))
        for device in node.devices
        if device.kind in ("cpu", node.backend)
    ]
    return sorted(seats, key=lambda s: (-s.pace.bytes_per_second, -s.usable, s.device.name))


def too_small(node: NodeFacts, costs: Costs) -> str | None:
    """Why a node adds nothing, or None: it cannot hold even the model's smallest layer on any device."""
    seats = seats_of(node, costs.model)
    if not seats:
        return f"has no device that its engine ({node.backend}) can use"
    need = costs.fixed(host=False) + min(costs.each)
    largest = max(seats, key=lambda s: s.usable)
    if largest.usable >= need:
        return None
    bound = "may use" if largest.usable == node.budget_bytes else "has"
    free = "" if bound == "may use" else " free"
    return (
        f"{bound} {format_size(largest.usable)}{free} on {largest.device.name}, and one layer of {costs.model.name} "
        f"with its buffers needs {format_size(need)}"
    )
