"""How fast, and how surely, a mesh of detectors notices: the figures of docs/invariants.md, in virtual time."""

from __future__ import annotations

import random

import pytest

from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.events import Broadcast, LinkUp, MemberLost, Received, Send, Tick
from tests.sim.fakes import facts_of, node_id
from tests.sim.network import Clock


class Mesh:
    """Detectors over perfect, delayed links; ``asleep`` ones keep what arrives for later, dead ones drop it."""

    def __init__(self, n: int, seed: int, delay: float, jitter: float = 0.0, loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.delay, self.jitter, self.loss = delay, jitter, loss
        self.nodes = {node_id(i): Membership(facts_of(i), 1 << BOOT_SHIFT) for i in range(n)}
        self.dead: set[str] = set()
        self.asleep: dict[str, list[tuple[str, object]]] = {}
        self.lost: list[tuple[float, str, str]] = []
        self.arrivals: dict[tuple[str, str], float] = {}
        for a in self.nodes:
            for i, b in enumerate(self.nodes):
                if a != b:
                    self.clock.at(self.rng.random(), self._feed, a, LinkUp(b, facts_of(i)))

    def _feed(self, node: str, event: object) -> None:
        if node in self.dead:
            return
        if node in self.asleep:
            self.asleep[node].append((node, event))
            return
        core = self.nodes[node]
        for effect in core.handle(event, self.clock.now):  # type: ignore[arg-type]
            match effect:
                case Send(peer, message):
                    self._carry(node, peer, message)
                case Broadcast(message):
                    for peer in self.nodes:
                        if peer != node:
                            self._carry(node, peer, message)
                case MemberLost(who, _):
                    self.lost.append((self.clock.now, node, who))
        due = core.next_timer()
        if due is not None:
            self.clock.at(due, self._ring, node, due)

    def _ring(self, node: str, due: float) -> None:
        if node in self.asleep:
            self.asleep[node].append((node, Tick()))
        elif self.nodes[node].next_timer() == due:
            self._feed(node, Tick())

    def _carry(self, sender: str, receiver: str, message: object) -> None:
        at = self.clock.now + self.delay + self.rng.random() * self.jitter
        wait = 0.2
        while self.rng.random() < self.loss:
            at, wait = at + wait, wait * 2
        at = self.arrivals[(sender, receiver)] = max(at, self.arrivals.get((sender, receiver), 0.0))
        self.clock.at(at, self._feed, receiver, Received(sender, message))  # type: ignore[arg-type]

    def sleep(self, node: str, seconds: float) -> None:
        self.asleep[node] = []
        self.clock.after(seconds, self._wake, node)

    def _wake(self, node: str) -> None:
        for who, event in self.asleep.pop(node):
            self._feed(who, event)


@pytest.mark.parametrize(("one_way_ms", "p50", "p99"), [(0.1, 1.5, 3.0), (10, 1.5, 3.0), (150, 2.5, 3.0)])
def test_a_crash_is_noticed_within_the_promised_time(one_way_ms: float, p50: float, p99: float) -> None:
    took = []
    for seed in range(40):
        mesh = Mesh(5, seed, one_way_ms / 1000, jitter=one_way_ms / 5000)
        mesh.clock.run(3.0 + mesh.rng.random())
        victim = mesh.rng.choice(sorted(mesh.nodes))
        at = mesh.clock.now
        mesh.dead.add(victim)
        mesh.clock.run(at + 5.0)
        verdicts = [t - at for t, _, who in mesh.lost if who == victim]
        assert len(verdicts) == 4
        assert all(who == victim for _, _, who in mesh.lost)
        took += verdicts
    took.sort()
    assert took[len(took) // 2] <= p50
    assert took[int(len(took) * 0.99)] <= p99


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("one_way_ms", [0.1, 10, 150])
def test_a_stall_of_one_second_evicts_nobody(n: int, one_way_ms: float) -> None:
    for seed in range(15):
        mesh = Mesh(n, seed, one_way_ms / 1000, jitter=one_way_ms / 5000)
        mesh.clock.run(3.0 + mesh.rng.random())
        mesh.sleep(mesh.rng.choice(sorted(mesh.nodes)), 1.0)
        mesh.clock.run(mesh.clock.now + 6.0)
        assert mesh.lost == []


@pytest.mark.parametrize("seconds", [3.0, 10.0])
def test_a_long_stall_evicts_the_sleeper_alone_and_for_its_own_time_only(seconds: float) -> None:
    for seed in range(5):
        mesh = Mesh(5, seed, 0.001)
        mesh.clock.run(3.0)
        sleeper = mesh.rng.choice(sorted(mesh.nodes))
        mesh.sleep(sleeper, seconds)
        mesh.clock.run(mesh.clock.now + seconds + 3.0)
        assert {who for _, _, who in mesh.lost} == {sleeper}
        assert all(len(core.view().members) == 5 for core in mesh.nodes.values())


def test_loss_and_jitter_evict_nobody() -> None:
    mesh = Mesh(5, 1, 0.01, jitter=0.2, loss=0.05)
    mesh.clock.run(120.0)
    assert mesh.lost == []
