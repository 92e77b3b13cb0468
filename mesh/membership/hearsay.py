"""What others asked of us and told us: probes done on their behalf, and whom they cannot hear."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.wire.facts import NodeId

MAX_ERRANDS = 64
"""Probes done for others at one time; more are dropped, the asker has other helpers."""


class Errands:
    """Probes we run for others: who waits for word from whom."""

    def __init__(self) -> None:
        self._open: dict[tuple[NodeId, NodeId], tuple[int, float]] = {}

    def take(self, target: NodeId, asker: NodeId, seq: int, until: float, now: float) -> bool:
        """Note an errand; False when there are too many."""
        for key in [key for key, (_, end) in self._open.items() if end < now]:
            del self._open[key]
        if len(self._open) >= MAX_ERRANDS:
            return False
        self._open[(target, asker)] = (seq, until)
        return True

    def done(self, target: NodeId, now: float) -> list[tuple[NodeId, int]]:
        """``target`` was heard: who is to be told, with their sequence numbers."""
        if not self._open:
            return []
        keys = [key for key in self._open if key[0] == target]
        found = [(key[1], self._open.pop(key)) for key in keys]
        return [(asker, seq) for asker, (seq, until) in found if now <= until]

    def drop(self) -> None:
        self._open.clear()


class Cuts:
    """Pairs of members that cannot hear each other, by what each end reports."""

    def __init__(self) -> None:
        self._by_reporter: dict[NodeId, set[NodeId]] = {}

    def note(self, reporter: NodeId, node: NodeId, cut: bool) -> None:
        if cut:
            self._by_reporter.setdefault(reporter, set()).add(node)
        else:
            self._by_reporter.get(reporter, set()).discard(node)

    def would_change(self, reporter: NodeId, node: NodeId, cut: bool) -> bool:
        return cut != (node in self._by_reporter.get(reporter, ()))

    def start_over(self, reporter: NodeId) -> None:
        """``reporter`` is about to tell all it knows."""
        self._by_reporter.pop(reporter, None)

    def forget(self, node: NodeId) -> None:
        """``node`` is out: what it said, and what was said of it, is void."""
        self.start_over(node)
        for nodes in self._by_reporter.values():
            nodes.discard(node)

    def pairs(self, members: Iterable[NodeId]) -> set[tuple[NodeId, NodeId]]:
        """Both ends members; unordered."""
        known = set(members)
        return {(r, n) for r, nodes in self._by_reporter.items() if r in known for n in nodes if n in known}
