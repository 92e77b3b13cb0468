"""A mesh in one thread: the real cores on a virtual clock, a seeded network, seeded misfortune, and invariants.

``run_seed(n)`` is a pure function of ``n``: a failing seed replays exactly. The invariants are those of
docs/invariants.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mesh.election import events as el
from mesh.election.core import Election
from mesh.wire.facts import NO_EPOCH, Epoch, NodeId
from tests.sim.fakes import LAYERS, facts_of, plan
from tests.sim.network import Clock, Network, Weather
from tests.sim.node import Engine, Node

CONVERGE_WITHIN = 12.0
"""Simulated seconds after healing until everyone must agree; what it really takes is reported."""


class InvariantError(AssertionError):
    """An invariant does not hold. The message names it, the seed and the moment."""


@dataclass
class Outcome:
    seed: int
    nodes: int
    steps: int
    simulated_s: float
    converged_after_s: float
    epochs: int
    detected_s: list[float]
    """Seconds from each crash to each other node's verdict."""
    evicted_alive: int
    """Verdicts on nodes that ran, were awake lately, and could be reached by the judge."""


class World:
    """Everything there is; ``started``, ``adopted``, ``carried``, ``serves`` and so on are told by the nodes."""

    def __init__(
        self, seed: int, make_election: Callable[..., Election] = Election, story: list[str] | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.make_election = make_election
        self.clock = Clock()
        self.nodes: dict[NodeId, Node] = {}
        self.network = Network(self.clock, self.rng, self._weather(), self.nodes)
        self.engine_failure = 0.0
        self.is_healed = False
        self.layouts: dict[Epoch, tuple[Any, ...]] = {}
        self.epoch_of: dict[NodeId, Epoch] = {}
        """What each node last adopted, crashes included."""
        self.lineage: dict[NodeId, set[Epoch]] = {}
        self.routes: dict[NodeId, el.Served | None] = {}
        self.crashed_at: dict[NodeId, float] = {}
        self.trouble_until: dict[NodeId, float] = {}
        self.detected: list[float] = []
        self.evicted_alive = 0
        self.story = story

    def _weather(self) -> Weather:
        delay = self.rng.choice([0.0005, 0.005, 0.02, 0.15])
        return Weather(
            delay=delay,
            jitter=self.rng.choice([0.001, 0.02, 0.2]),
            loss=self.rng.choice([0.0, 0.01, 0.05]),
            rough=self.rng.choice([0.0, 0.0, 0.0, 0.1]),
            idle=self.rng.choice([2.0, 4.0, 8.0]),
        )

    def fail(self, what: str) -> None:
        raise InvariantError(f"seed {self.seed}, t={self.clock.now:.3f} s: {what}")

    def note(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.clock.now:9.3f}  {text}")

    # -- told by the nodes, checked at once ----------------------------------------------------------------------------

    def started(self, node: Node) -> None:
        self.note(f"{node.id[0]} starts")
        self.routes[node.id] = None
        self.lineage[node.id] = set()
        self.crashed_at.pop(node.id, None)
        self._trouble([node.id], 0.0)  # verdicts on its last run may still come

    def adopted(self, node: Node, effect: el.Adopt) -> None:
        shape = None if effect.layout is None else effect.layout.shape()
        ring = "" if effect.layout is None else "".join(m.id[0] for m in effect.layout.ring)
        number = f"({effect.epoch.number},{effect.epoch.coordinator[0]})"
        lifts = "" if effect.lifts == NO_EPOCH else f" lifts {effect.lifts.number}"
        self.note(f"{node.id[0]} adopts {number} {ring or '-'}{lifts}: {effect.reason}")
        known = self.layouts.setdefault(effect.epoch, (shape,))
        if known != (shape,):
            self.fail(f"epoch {effect.epoch} has two layouts: {known[0]} and {shape}")
        before = self.epoch_of.get(node.id, NO_EPOCH)
        fresh = not self.lineage[node.id]
        if effect.epoch.number < before.number or (effect.epoch <= before and not fresh):
            self.fail(f"{node.id[0]} went from epoch {before} back to {effect.epoch}")
        if effect.epoch.number > node.remembered:
            self.fail(f"{node.id[0]} follows epoch {effect.epoch.number} but would forget it")
        if effect.lifts == NO_EPOCH:
            self.lineage[node.id] = set()
        self.lineage[node.id].add(effect.epoch)
        self.epoch_of[node.id] = effect.epoch

    def carried(self, worker: Node, host: Engine) -> None:
        """A worker let a host's tunnel in."""
        if host.epoch not in self.lineage[worker.id]:
            follows, guest = self.epoch_of[worker.id], host.layout.host[0]
            self.fail(f"{worker.id[0]} follows {follows} but carries for {guest} in {host.epoch}")
        engine = worker.engine
        if engine is not None and engine.carries not in (None, host) and engine.carries.is_alive:
            self.fail(f"{worker.id[0]} serves two hosts' tunnels at once")

    def serves(self, node: Node, engine: Engine) -> None:
        """A token has come through ``engine``'s ring."""
        ranges = sorted(m.layers for m in engine.layout.ring if m.layers is not None)
        covered = [layer for first, last in ranges for layer in range(first, last + 1)]
        if covered != list(range(LAYERS)):
            self.fail(f"epoch {engine.epoch} serves layers {covered}")
        for share in engine.layout.ring:
            if not self.nodes[share.id].is_running:
                self.fail(f"epoch {engine.epoch} serves with {share.id[0]}, which is dead")
        for share in engine.layout.workers:
            carries = self.nodes[share.id].engine
            if carries is None or not carries.epochs & engine.epochs:
                self.fail(f"epoch {engine.epoch} serves, but {share.id[0]} runs something else")

    def routed(self, node: Node, effect: el.Served | el.Unserved) -> None:
        self.note(
            f"{node.id[0]} {effect}" if isinstance(effect, el.Unserved) else f"{node.id[0]} routes to {effect.host[0]}"
        )
        before = self.routes[node.id]
        if isinstance(effect, el.Unserved):
            if before is None:
                self.fail(f"{node.id[0]} was told twice that nothing serves")
            self.routes[node.id] = None
            return
        if effect.epoch != node.election.epoch:
            self.fail(f"{node.id[0]} follows {node.election.epoch} and routes to {effect.epoch}")
        self.routes[node.id] = effect

    def lost(self, judge: Node, node: NodeId, reason: str) -> None:
        self.note(f"{judge.id[0]} loses {node[0]}: {reason}")
        if reason not in ("crashed", "unreachable"):
            return
        crashed = self.crashed_at.get(node)
        now = self.clock.now
        if crashed is not None:
            if now > self.trouble_until.get(judge.id, 0.0) and crashed > self.trouble_until.get(node, 0.0):
                self.detected.append(now - crashed)
        elif max(self.trouble_until.get(n, 0.0) for n in (judge.id, node)) < now and self.nodes[node].is_awake:
            self.evicted_alive += 1

    def engine_fails(self, node: Node) -> bool:
        return self.rng.random() < self.engine_failure

    # -- misfortune ----------------------------------------------------------------------------------------------------

    def populate(self) -> None:
        rng = self.rng
        n = rng.randint(2, 9)
        clients = rng.randint(0, min(2, n - 2)) if n > 2 else 0
        order = list(range(n))
        rng.shuffle(order)
        for place, index in enumerate(order):
            role = "client" if place < clients else "worker"
            node = Node(self, facts_of(index, role=role, layers=rng.choice([2, 4, 6, 6, 8, 12])))
            self.nodes[node.id] = node
        for node in self.nodes.values():
            self.clock.at(rng.choice([0.0, 0.0, 1.0, 3.0]) * rng.random(), node.start)

    def chaos(self, seconds: float) -> None:
        rng = self.rng
        self.engine_failure = rng.choice([0.0, 0.0, 0.05, 0.3])
        end = self.clock.now + seconds
        pace = rng.choice([0.5, 1.5, 4.0])
        at = self.clock.now
        while (at := at + rng.expovariate(1 / pace)) < end:
            self.clock.at(at, self._strike)
        self.clock.run(end)

    def _strike(self) -> None:
        rng = self.rng
        node = self.nodes[rng.choice(list(self.nodes))]
        for_s = rng.choice([0.3, 1.0, 3.0, 6.0]) * (0.5 + rng.random())
        match rng.randint(0, 11):
            case 0 | 1:
                self._crash(node, for_s)
            case 2:
                self.note(f"{node.id[0]} sleeps {for_s:.2f} s")
                self._trouble([node.id], for_s)
                node.stall(for_s)
            case 3:
                self._cut([(node.id, rng.choice(list(self.nodes)))], for_s)
            case 4:
                other = rng.choice(list(self.nodes))
                self._cut([(node.id, other), (other, node.id)], for_s)
            case 5:
                self._cut([p for o in self.nodes for p in ((node.id, o), (o, node.id))], for_s)
            case 6:
                side = {n for n in self.nodes if rng.random() < 0.5}
                self._cut([(a, b) for a in self.nodes for b in self.nodes if (a in side) != (b in side)], for_s)
            case 7 if node.is_running and node.engine is not None:
                self.note(f"the engine of {node.id[0]} dies")
                node.fail_engine(node.engine, "killed")
            case 8 if node.is_awake:
                self.note(f"{node.id[0]} leaves")
                node.leave()
                self.later(0.5 + for_s, self._restart, node)
            case 10 | 11:
                self._slow(node.id, rng.choice(list(self.nodes)), for_s)
            case 9 if node.is_awake:
                self.note(f"{node.id[0]} drains")
                node.drain()
                self.later(1.0, node.leave)
                self.later(1.5 + for_s, self._restart, node)

    def _crash(self, node: Node, for_s: float) -> None:
        if node.is_running:
            self.note(f"{node.id[0]} crashes")
            if node.is_awake:
                self.crashed_at[node.id] = self.clock.now
            node.crash()
            self.later(for_s, self._restart, node)

    def _restart(self, node: Node) -> None:
        if not node.is_running:
            node.start()

    def _trouble(self, nodes: list[NodeId], for_s: float) -> None:
        """Until then (and some time of recovery) verdicts are not held against the detector."""
        for node in nodes:
            self.trouble_until[node] = max(self.trouble_until.get(node, 0.0), self.clock.now + for_s + 5.0)

    def _cut(self, paths: list[tuple[NodeId, NodeId]], for_s: float) -> None:
        self.note("cut " + " ".join(f"{a[0]}>{b[0]}" for a, b in paths if a != b))
        self._trouble([n for pair in paths for n in pair], for_s)
        for a, b in paths:
            if a != b:
                self.network.set_path(a, b, False)
                self.clock.after(for_s, self.network.set_path, a, b, True)

    def _slow(self, a: NodeId, b: NodeId, for_s: float) -> None:
        extra = self.rng.choice([0.3, 0.6, 1.0])
        self.note(f"{extra} s more from {a[0]} to {b[0]}")
        self._trouble([a, b], for_s)
        self.network.slow[(a, b)] = extra
        self.clock.after(for_s, self.network.slow.pop, (a, b), None)

    def later(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        """More misfortune to come, unless all is healed before."""
        self.clock.after(delay, lambda: None if self.is_healed else do(*args))

    def heal(self) -> None:
        self.note("all is healed")
        self.is_healed = True
        self.engine_failure = 0.0
        self.network.slow.clear()
        for a, b in sorted(self.network.closed):
            self.network.set_path(a, b, True)
        for node in self.nodes.values():
            if node.is_running and not node.is_awake:
                node.stalled_until = self.clock.now
                node._resume(node.boots)
            if not node.is_running or node.facts.draining or node.has_left:
                node.crash()
                node.start()

    # -- peace ---------------------------------------------------------------------------------------------------------

    def disagreement(self) -> str:
        """Why the mesh is not one yet; empty when everyone follows one epoch and it serves, or nothing can."""
        statuses = {n.id[0]: n.election.status() for n in self.nodes.values()}
        if any(not n.is_awake for n in self.nodes.values()):
            return "somebody is not up"
        epochs = {s.epoch for s in statuses.values()}
        if len(epochs) != 1:
            return "epochs " + ", ".join(f"{k}:{s.epoch.number}{s.epoch.coordinator[:1]}" for k, s in statuses.items())
        states = {s.state for s in statuses.values()}
        if states == {"waiting"}:
            possible, _ = plan(tuple(n.facts for n in self.nodes.values()), None, {}, frozenset())
            failed = next(iter(statuses.values())).reason
            return "" if possible is None or failed.startswith("FAILED") else f"all wait ({failed}), but could serve"
        if states != {"serving"}:
            return "states " + ", ".join(f"{k}:{s.state} ({s.reason})" for k, s in statuses.items())
        hosts = {route.host if route else None for route in self.routes.values()}
        return "" if len(hosts) == 1 else f"routes to {hosts}"

    def settle(self) -> float:
        """Run until everyone agrees; seconds it took."""
        start = self.clock.now
        while (why := self.disagreement()) and self.clock.now < start + CONVERGE_WITHIN:
            self.clock.run(self.clock.now + 0.1)
        if why:
            self.fail(f"no agreement {CONVERGE_WITHIN:.0f} s after healing: {why}")
        return self.clock.now - start


def run_seed(seed: int, make_election: Callable[..., Election] = Election, story: list[str] | None = None) -> Outcome:
    """One life of one mesh.

    Args:
        story: what happened is appended to it, line by line.

    Raises:
        InvariantError: an invariant did not hold.
    """
    world = World(seed, make_election, story)
    world.populate()
    world.clock.run(4.0)
    world.chaos(world.rng.choice([6.0, 12.0, 20.0]))
    world.heal()
    took = world.settle()
    return Outcome(
        seed=seed,
        nodes=len(world.nodes),
        steps=world.clock.steps,
        simulated_s=world.clock.now,
        converged_after_s=took,
        epochs=len(world.layouts),
        detected_s=world.detected,
        evicted_alive=world.evicted_alive,
    )
