"""What peers said of epochs other than ours: what they follow, what they would have us follow, what they serve."""

from __future__ import annotations

from mesh.membership.view import View
from mesh.wire.facts import Epoch, Layout, NodeId
from mesh.wire.messages import Accepted, EngineDown, Propose, Rejected, Serving, WorkerReady

MAX_LEAP = 2**16
"""By how much a number may exceed all that are known. Every layout takes the next one, so no honest leap comes near;
without a bound one message could use up all numbers there are, for ever."""


def is_plausible(message: Propose | Accepted | Rejected | Serving | WorkerReady | EngineDown, known: Epoch) -> bool:
    """Can a mesh that was at ``known`` when we last heard of it have come to the number in ``message``?"""
    named = message.newest if isinstance(message, Rejected) else message.epoch
    return named.number <= known.number + MAX_LEAP


class Claims:
    """The latest word of each peer; bounded by the number of members."""

    def __init__(self) -> None:
        self.follows: dict[NodeId, Propose] = {}
        """Older than ours: the sender has not come along yet."""
        self.held: dict[NodeId, tuple[Propose, float]] = {}
        """Newer than ours, but not the coordinator's while ours is well: let it decide first. With time of arrival."""
        self.servings: dict[NodeId, Serving] = {}
        self.ready: dict[NodeId, Epoch] = {}

    def hold(self, sender: NodeId, propose: Propose, now: float) -> bool:
        """Keep a newer proposal for later; False when it is known already."""
        known = self.held.get(sender)
        if known is not None and known[0].epoch == propose.epoch:
            return False
        self.held[sender] = (propose, now if known is None else known[1])
        return True

    def settle(self, epoch: Epoch) -> None:
        """``epoch`` is followed now: what came before it is settled."""
        self.follows.clear()
        self.held = {s: (p, at) for s, (p, at) in self.held.items() if p.epoch > epoch}

    def prune(self, view: View) -> None:
        """Forget whoever is out."""
        for known in (self.follows, self.held, self.servings, self.ready):
            for node in [node for node in known if node not in view]:
                del known[node]

    def is_served(self, propose: Propose) -> bool:
        """Whether ``propose``'s host told us that it serves it."""
        if propose.layout is None:
            return False
        serving = self.servings.get(propose.layout.host)
        return serving is not None and serving.epoch == propose.epoch

    def running(self, view: View, broken: Layout | None) -> Propose | None:
        """The best layout that peers follow and that could go on: one that serves before one that does not.

        ``broken`` cannot, by whatever number some peer still knows it.
        """
        told = [*self.follows.values(), *(p for p, _ in self.held.values())]
        able = [p for p in told if p.layout is not None and all(share.id in view for share in p.layout.ring)]
        if broken is not None:
            able = [p for p in able if p.layout is not None and p.layout.shape() != broken.shape()]
        return max(able, key=lambda p: (self.is_served(p), p.epoch), default=None)

    def oldest_held(self) -> float | None:
        return min((at for _, at in self.held.values()), default=None)

    def newest_held(self) -> tuple[NodeId, Propose] | None:
        if not self.held:
            return None
        sender = max(self.held, key=lambda s: self.held[s][0].epoch)
        return sender, self.held[sender][0]
