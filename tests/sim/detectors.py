"""Detectors alone: meshes of the real membership core over delayed, lossy links, fast enough for thousands of hours."""

from __future__ import annotations

import random
from collections import Counter
from heapq import heappop, heappush

from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.events import Broadcast, Event, LinkUp, MemberLost, Received, Send, Tick
from mesh.wire.codec import encode
from mesh.wire.facts import NodeFacts, NodeId
from mesh.wire.messages import Control
from tests.sim.fakes import facts_of, node_id

SENT_AGAIN_AFTER_S = 0.2
"""What a lost packet costs: a probe timeout of the transport, doubled each time. The messages behind it wait."""


class Detectors:
    """``n`` cores that know each other. ``asleep`` ones keep what arrives for later, dead ones drop it.

    Args:
        delay: one way, seconds; ``jitter``: uniform, added to it.
        loss: share of packets that must be sent again.
        counts: keep count of messages and bytes.
    """

    def __init__(
        self, n: int, seed: int, delay: float, jitter: float = 0.0, loss: float = 0.0, *, counts: bool = False
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.delay, self.jitter, self.loss = delay, jitter, loss
        self.facts: dict[NodeId, NodeFacts] = {node_id(i): facts_of(i) for i in range(n)}
        self.nodes = {node: Membership(facts, 1 << BOOT_SHIFT) for node, facts in self.facts.items()}
        self.links: dict[NodeId, list[NodeId]] = {node: [] for node in self.nodes}
        self.dead: set[NodeId] = set()
        self.asleep: dict[NodeId, list[tuple[NodeId, Event]]] = {}
        self.lost: list[tuple[float, NodeId, NodeId]] = []
        """When, who said so, of whom."""
        self.sent: Counter[str] | None = Counter() if counts else None
        self.bytes = 0
        self._sizes: dict[int, int] = {}
        self._heap: list[tuple[float, int, NodeId, Event, float]] = []
        self._n = 0
        self._armed: dict[NodeId, float | None] = dict.fromkeys(self.nodes)
        self._due_at: dict[tuple[NodeId, NodeId], float] = {}

    def connect(self, within: float = 1.0) -> None:
        """Every pair links up at some moment of the next ``within`` seconds."""
        for a in self.nodes:
            for b in self.nodes:
                if a != b:
                    self.link(a, b, self.now + within * self.rng.random())

    def link(self, a: NodeId, b: NodeId, at: float) -> None:
        self.links[a].append(b)
        self._push(at, a, LinkUp(b, self.facts[b]))

    def run(self, until: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, node, event, due = heappop(heap)
            if due and (self._armed[node] != due or node in self.asleep):
                if node in self.asleep:
                    self.asleep[node].append((node, event))
                continue
            self._feed(node, event)
        self.now = until

    def sleep(self, node: NodeId, seconds: float) -> None:
        """From now on, and then everything that was kept, in order."""
        self.asleep[node] = []
        self.run(self.now + seconds)
        for who, event in self.asleep.pop(node):
            self._feed(who, event)

    def _push(self, at: float, node: NodeId, event: Event, due: float = 0.0) -> None:
        self._n += 1
        heappush(self._heap, (at, self._n, node, event, due))

    def _feed(self, node: NodeId, event: Event) -> None:
        if node in self.dead:
            return
        if node in self.asleep:
            self.asleep[node].append((node, event))
            return
        core = self.nodes[node]
        for effect in core.handle(event, self.now):
            if isinstance(effect, Send):
                self._carry(node, effect.peer, effect.message)
            elif isinstance(effect, Broadcast):
                for peer in self.links[node]:
                    self._carry(node, peer, effect.message)
            elif isinstance(effect, MemberLost):
                self.lost.append((self.now, node, effect.node))
        due = core.next_timer()
        if due is not None and due != self._armed[node]:
            self._armed[node] = due
            self._push(due if due > self.now else self.now, node, TICK, due)

    def _carry(self, sender: NodeId, receiver: NodeId, message: Control) -> None:
        random = self.rng.random
        at = self.now + self.delay + random() * self.jitter
        if random() < self.loss:
            wait = SENT_AGAIN_AFTER_S
            at += wait
            while random() < self.loss:
                wait *= 2
                at += wait
        if self.sent is not None:
            self.sent[type(message).__name__] += 1
            self.bytes += self._size(message)
        way = (sender, receiver)
        last = self._due_at.get(way, 0.0)
        if at < last:
            at = last  # in order: behind what was sent before
        self._due_at[way] = at
        self._push(at, receiver, Received(sender, message))

    def _size(self, message: Control) -> int:
        size = self._sizes.get(id(message))
        if size is None:
            size = len(encode(message))
            if len(self._sizes) < 100_000 and type(message).__name__ == "Facts":
                self._sizes[id(message)] = size
        return size


TICK = Tick()


def false_verdicts(seed: int, hours: float, n: int, delay: float, jitter: float, loss: float) -> tuple[float, int]:
    """Node-hours simulated, and how many of ``n`` healthy nodes were called dead meanwhile."""
    mesh = Detectors(n, seed, delay, jitter, loss)
    mesh.connect()
    mesh.run(hours * 3600)
    return hours * n, len(mesh.lost)


def verdicts(n: int, seed: int, delay: float, jitter: float = 0.0, loss: float = 0.0) -> list[float]:
    """Seconds from a crash at a random moment until each other node's verdict; all must come to the same."""
    mesh = Detectors(n, seed, delay, jitter, loss)
    mesh.connect()
    mesh.run(3.0 + mesh.rng.random())
    victim, at = mesh.rng.choice(sorted(mesh.nodes)), mesh.now
    mesh.dead.add(victim)
    mesh.run(at + 5.0)
    assert all(who == victim for _, _, who in mesh.lost), "a healthy node was called dead"
    return [when - at for when, _, _ in mesh.lost]
