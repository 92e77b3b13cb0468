"""What a plan says for itself: why this one, why not that machine, how much is missing and where."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.config import format_size
from mesh.plan.costs import Costs
from mesh.plan.eligible import Seat, seats_of
from mesh.plan.pace import Rtts, rtt
from mesh.plan.ring import MAX_RING
from mesh.wire.facts import ModelCost, NodeFacts


def why(seats: Sequence[Seat], costs: Costs, split: str, *, alone_ms: float | None = None) -> str:
    """Why this layout.

    Args:
        alone_ms: what the best machine alone would take for a token; None: none holds the model.
    """
    host = seats[0].node.name
    if len(seats) == 1:
        alone = "; --split always finds no second machine that could carry a layer" if split == "always" else ""
        return f"{host} alone holds {costs.model.name}{alone}"
    names = ", ".join(s.node.name for s in seats[1:])
    if split == "always":
        return f"{host} hosts and shares with {names}, as --split always asks"
    if alone_ms is not None:
        return f"{host} shares with {names}: one machine alone would take {alone_ms:.0f} ms/token"
    alone_bytes = costs.fixed(host=True) + costs.needs[-1]
    return (
        f"no machine alone has the {format_size(alone_bytes)} that {costs.model.name} needs: {host} shares with {names}"
    )


def left_out(
    seats: Sequence[Seat], model: ModelCost, rtt_ms: Rtts, node: NodeFacts, ms: float, with_it: float | None
) -> str:
    """Why ``node`` is not in a ring that takes ``ms``; ``with_it``: what the ring would take with it."""
    nearest = min(rtt(rtt_ms, node.id, s.id) for s in seats)
    if node.battery:
        return f"runs on battery: it carries layers only where others cannot; {model.name} fits without it"
    if with_it is not None and with_it > ms:
        return (
            f"would slow this mesh: {with_it:.0f} ms/token with it, {ms:.0f} without; {model.name} fits without it, "
            f"and it is {nearest:.0f} ms away"
        )
    return f"is not needed: {model.name} fits without it, and it is {nearest:.0f} ms from the ring"


def shortage(able: Sequence[NodeFacts], costs: Costs, split: str) -> str:
    """How much is missing, and where."""
    seats = sorted(
        (max(options, key=lambda s: s.usable) for node in able if (options := seats_of(node, costs.model))),
        key=lambda s: (-s.usable, s.id),
    )
    most = f", {MAX_RING} machines at most" if len(seats) > MAX_RING else ""
    seats = seats[:MAX_RING]
    if not seats:
        return f"no machine has a device for {costs.model.name}"
    layers = format_size(costs.needs[-1])
    alone = costs.fixed(host=True, device=seats[0].device.kind) + costs.needs[-1]
    where = ", ".join(f"{s.node.name} {s.device.name} {format_size(s.usable)}" for s in seats[:8])
    smaller = "use a smaller --ctx-size or a smaller quantisation"
    if split == "never" or len(seats) == 1:
        missing = format_size(alone - seats[0].usable)
        other = "allow --split auto" if split == "never" else "add a machine"
        return (
            f"{costs.model.name} needs {format_size(alone)} on one machine, and {missing} of that is missing on "
            f"{seats[0].node.name} ({where} usable): free some memory, {smaller}, or {other}"
        )
    missing_bytes = _missing(seats, costs)
    if missing_bytes > 0:
        return (
            f"{costs.model.name} fits nowhere: its layers with their cache need {layers}, and "
            f"{format_size(missing_bytes)} is missing over all ({where} usable, less buffers on each{most}): "
            f"free some memory, {smaller}, or add a machine"
        )
    largest = max(costs.each)
    return (
        f"{costs.model.name} fits nowhere in whole layers of up to {format_size(largest)} ({where} usable{most}): "
        f"free some memory, {smaller}, or add a machine"
    )


def _missing(seats: Sequence[Seat], costs: Costs) -> int:
    """The least that is missing over all choices of a host; negative when bytes alone would suffice."""
    shortages = []
    for host in seats:
        room = host.usable - costs.fixed(host=True, device=host.device.kind)
        others = [s.usable - costs.fixed(host=False) for s in seats if s is not host]
        # A host without room for the ends lacks those bytes whatever the others have.
        shortages.append(max(costs.needs[-1] - max(room, 0) - sum(o for o in others if o > 0), 0) + max(-room, 0))
    return min(shortages)
