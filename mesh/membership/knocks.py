"""Tickets that members announced, until they show them. Pure."""

from __future__ import annotations

from collections import OrderedDict

from mesh.wire.facts import NodeId

VALID_S = 5.0
MAX_EACH = 64
"""Outstanding for one member; what it announces beyond that is not expected."""


class Knocks:
    """Digests of tickets, by whom they will be shown. Only digests are kept: what is here opens nothing."""

    def __init__(self) -> None:
        self._expected: dict[NodeId, OrderedDict[bytes, float]] = {}
        self._owners: dict[bytes, NodeId] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def expect(self, peer: NodeId, digest: bytes, now: float) -> bool:
        """``peer`` will show the ticket of ``digest`` soon. False: it announced too many, or this one already."""
        self._expire(peer, now)
        mine = self._expected.setdefault(peer, OrderedDict())
        if digest in self._owners or len(mine) >= MAX_EACH:
            return False
        mine[digest] = now + VALID_S
        self._owners[digest] = peer
        return True

    def claim(self, digest: bytes, now: float) -> NodeId | None:
        """Who announced this ticket, which is worth nothing from now on; None: nobody, or too long ago."""
        peer = self._owners.pop(digest, None)
        if peer is None:
            return None
        until = self._expected[peer].pop(digest)
        return peer if now < until else None

    def forget(self, peer: NodeId) -> None:
        """``peer`` is not connected any more: none of its tickets is good."""
        for digest in self._expected.pop(peer, ()):
            del self._owners[digest]

    def _expire(self, peer: NodeId, now: float) -> None:
        mine = self._expected.get(peer)
        while mine:
            digest, until = next(iter(mine.items()))
            if now < until:
                return
            del mine[digest], self._owners[digest]
